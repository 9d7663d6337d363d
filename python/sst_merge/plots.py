"""Pictures of a merge report, drawn from the numbers of report.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FLOOR = 1e-6  # λ below this share of the largest is drawn at it


def draw(folder: Path, report: dict[str, Any]) -> list[tuple[str, str]]:
    """Draw every picture.

    Args:
        folder: Where the PNG files go.
        report: With the key "directions".

    Returns:
        (file name, caption) of each.
    """
    pictures: list[tuple[str, str, Callable[[Axes, dict[str, Any]], None]]] = [
        (
            "spectrum.png",
            "Spectrum of every module: gain per cost λ, from the first module (dark) to the last.",
            _spectrum,
        ),
        (
            "gain_cost.png",
            "Share of the patch's gain against share of its cost, directions taken by falling λ.",
            _gain_cost,
        ),
        (
            "kept_energy.png",
            "Squared norm of the kept patch over the whole one's (may exceed 1: no Euclidean projection).",
            _kept_energy,
        ),
        (
            "ray_held.png",
            "λ against the same direction's quotient on held-out sequences; equal on the line.",
            _ray_held,
        ),
        (
            "damping_share.png",
            "Share of a direction's cost that is damping: near 1, benign data say nothing.",
            _damping,
        ),
    ]
    for file, _, plot in pictures:
        height = 0.16 * len(report["directions"]) if plot is _kept_energy else 0
        figure = Figure(figsize=(7, max(4, height)), layout="constrained")
        plot(figure.add_subplot(), report)
        figure.savefig(folder / file, dpi=120)
    return [(file, caption) for file, caption, _ in pictures]


def _columns(report: dict[str, Any], key: str) -> np.ndarray:
    """One column of all directions of all modules."""
    return np.concatenate([np.array(d[key]) for d in report["directions"].values()])


def _spectrum(axes: Axes, report: dict[str, Any]) -> None:
    """λ_i over i, a line a module."""
    spectra = [np.array(d["value"]) for d in report["directions"].values()]
    floor = FLOOR * max(s.max() for s in spectra)
    for i, spectrum in enumerate(spectra):
        axes.plot(
            np.arange(1, len(spectrum) + 1),
            spectrum.clip(floor),
            lw=0.8,
            c=colormaps["viridis"](i / len(spectra)),
        )
    axes.set(xscale="log", yscale="log", xlabel="direction i", ylabel="λ")


def _gain_cost(axes: Axes, report: dict[str, Any]) -> None:
    """Cumulative gain over cumulative cost, and where the filter stands."""
    order = np.argsort(-_columns(report, "value"), kind="stable")
    value, cost, factor = (_columns(report, key)[order] for key in ("value", "cost", "factor"))
    gain = value * cost
    axes.plot(np.cumsum(cost) / cost.sum(), np.cumsum(gain) / gain.sum(), label="by falling λ")
    kept = factor**2
    axes.plot((kept * cost).sum() / cost.sum(), (kept * gain).sum() / gain.sum(), "o", label="this merge")
    axes.plot([0, 1], [0, 1], ":", c="grey", label="scaling the whole patch's square")
    axes.set(xlabel="cost / cost of the whole patch", ylabel="gain / gain of the whole patch")
    axes.legend()


def _kept_energy(axes: Axes, report: dict[str, Any]) -> None:
    """Bars, a module each."""
    rows = [m for m in report["modules"] if "kept_energy" in m]
    axes.barh([m["module"] for m in rows], [m["kept_energy"] for m in rows], height=0.8)
    axes.tick_params(axis="y", labelsize=6)
    axes.set(xlabel="kept energy", xlim=(0, None), ylim=(len(rows) - 0.5, -0.5))


def _ray_held(axes: Axes, report: dict[str, Any]) -> None:
    """Scatter of λ and Ray_held; kept directions stand out."""
    value, held, kept = (_columns(report, key) for key in ("value", "ray_held", "factor"))
    floor = FLOOR * value.max()
    for mask, style in (
        (kept < 0.5, {"c": "lightgrey", "label": "left out"}),
        (kept >= 0.5, {"label": "kept"}),
    ):
        axes.scatter(value[mask].clip(floor), held[mask].clip(floor), s=3, **style)
    ends = [floor, value.max()]
    axes.plot(ends, ends, ":", c="black")
    axes.set(xscale="log", yscale="log", xlabel="λ", ylabel="Ray_held")
    axes.legend()


def _damping(axes: Axes, report: dict[str, Any]) -> None:
    """Histogram of the damping share, of all and of kept directions."""
    share, kept = _columns(report, "damping_share"), _columns(report, "factor")
    bins = np.linspace(0, 1, 41)
    axes.hist(share, bins, label="all", color="lightgrey")
    axes.hist(share, bins, weights=kept, label="kept")
    axes.set(xlabel="damping share γvᵀv / vᵀBv", ylabel="directions", yscale="log")
    axes.legend()
