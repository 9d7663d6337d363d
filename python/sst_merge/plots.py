"""Pictures of a merge report's directions, held-out measurements and tuning, drawn from the numbers of report.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes

from .picture import BLUE, GREY, INK, ORANGE, Picture, numbers, picture

FLOOR = 1e-6  # λ below this share of the largest is drawn at it
GRID = 100  # a scatter's points that fall in one cell of GRID × GRID are drawn once
KL, REFUSAL = "KL from the utility model (nats)", "change of log p(refusal) (nats)"


def of_directions(report: Mapping[str, Any]) -> list[Picture]:
    """Spectra, gain against cost, found against held-out λ, damping shares; those whose numbers are there."""
    directions = report.get("directions", {}).values()
    pictures: list[tuple[str, str, str, Callable[[Axes, list[dict[str, np.ndarray]]], None], tuple[str, ...]]] = [
        (
            "spectrum",
            "Spectra",
            "Gain per cost λ of every module's directions, from the first module (dark) to the last (light).",
            _spectrum,
            ("value",),
        ),
        (
            "gain_cost",
            "Gain against cost",
            "Share of the patch's gain against share of its cost, directions taken by falling λ.",
            _gain_cost,
            ("value", "cost", "factor"),
        ),
        (
            "ray_held",
            "Found against held out",
            "λ against the same direction's quotient on held-out sequences; equal on the line. Coinciding points are "
            "drawn once.",
            _ray_held,
            ("value", "ray_held", "factor"),
        ),
        (
            "damping_share",
            "Damping share",
            "Share of a direction's cost that is damping: near 1, benign data say nothing.",
            _damping_share,
            ("damping_share", "factor"),
        ),
    ]
    drawn = []
    for name, title, caption, draw, keys in pictures:
        spectra = list(filter(None, (_finite(spectrum, keys) for spectrum in directions)))
        if spectra:
            drawn.append(picture(name, title, caption, lambda axes, d=draw, s=spectra: d(axes, s)))
    return drawn


def _finite(spectrum: Mapping[str, Sequence[float]], keys: Sequence[str]) -> dict[str, np.ndarray]:
    """The columns of a module's directions, those left out that lack a finite number; {} if none is left."""
    if not spectrum.keys() >= set(keys):
        return {}
    columns = np.array([spectrum[key] for key in keys], dtype=float)
    columns = columns[:, np.isfinite(columns).all(0)]
    return dict(zip(keys, columns, strict=True)) if columns.size else {}


def _pooled(spectra: Sequence[Mapping[str, np.ndarray]], *keys: str) -> list[np.ndarray]:
    """Columns over all directions of all modules."""
    return [np.concatenate([spectrum[key] for spectrum in spectra]) for key in keys]


def _floor(values: np.ndarray) -> float:
    """The least λ that is drawn, > 0."""
    return FLOOR * (values.max(initial=0) or 1)


def _spectrum(axes: Axes, spectra: list[dict[str, np.ndarray]]) -> None:
    """λ_i over i, a line a module."""
    floor = _floor(*_pooled(spectra, "value"))
    for i, spectrum in enumerate(spectra):
        value = spectrum["value"].clip(floor)
        drawn = np.unique(np.geomspace(1, len(value), 100).round().astype(int))  # evenly on the logarithmic axis
        axes.plot(drawn, value[drawn - 1], lw=0.8, c=colormaps["viridis"](0.35 + 0.35 * i / len(spectra)))
    axes.set(xscale="log", yscale="log", xlabel="direction i", ylabel="λ")


def _gain_cost(axes: Axes, spectra: list[dict[str, np.ndarray]]) -> None:
    """Cumulative gain over cumulative cost, and where the filter stands."""
    value, cost, factor = _pooled(spectra, "value", "cost", "factor")
    order = np.argsort(-value, kind="stable")
    gain = value * cost
    whole = np.array([cost.sum(), gain.sum()])
    if not (whole > 0).all():  # an empty patch has no shares
        whole[:] = np.nan
    curve = np.cumsum([cost[order], gain[order]], axis=1) / whole[:, None]
    kept = np.array([(factor**2 * cost).sum(), (factor**2 * gain).sum()]) / whole
    axes.plot(*np.column_stack([[0, 0], curve]), c=BLUE, label="by falling λ")
    axes.plot(*kept, "o", c=ORANGE, label="this merge")
    axes.plot([0, 1], [0, 1], ":", c=GREY, label="scaling the whole patch's square")
    axes.set(xlabel="cost / cost of the whole patch", ylabel="gain / gain of the whole patch")


def _ray_held(axes: Axes, spectra: list[dict[str, np.ndarray]]) -> None:
    """Scatter of λ and Ray_held; kept directions stand out."""
    value, held, kept = _pooled(spectra, "value", "ray_held", "factor")
    floor = _floor(value)
    for mask, color, label in ((kept < 0.5, GREY, "left out"), (kept >= 0.5, BLUE, "kept")):
        points = np.log10(np.column_stack([value[mask], held[mask]]).clip(floor))
        axes.plot(*_distinct(points), "o", ms=2, mew=0, c=color, label=label)
    ends = [floor, value.max(initial=floor)]
    axes.plot(ends, ends, ":", c=INK)
    axes.set(xscale="log", yscale="log", xlabel="λ", ylabel="Ray_held")


def _distinct(logarithms: np.ndarray) -> np.ndarray:
    """10^x of points (N, 2), one of those in the same cell of a GRID × GRID; (2, N')."""
    if not len(logarithms):
        return logarithms.T
    least, step = logarithms.min(0), np.maximum(np.ptp(logarithms, axis=0), 1e-9) / GRID
    return 10 ** (np.unique(np.round((logarithms - least) / step), axis=0) * step + least).T


def _damping_share(axes: Axes, spectra: list[dict[str, np.ndarray]]) -> None:
    """Histogram of the damping share, of all and of kept directions."""
    share, kept = _pooled(spectra, "damping_share", "factor")
    bins = np.linspace(0, 1, 41)
    axes.hist(share, bins, label="all", color=GREY)
    axes.hist(share, bins, weights=kept, label="kept", color=BLUE)
    axes.set(xlabel="damping share γvᵀv / vᵀBv", ylabel="directions", yscale="log")


def of_held_out(report: Mapping[str, Any]) -> list[Picture]:
    """The frontier of the strengths, and predicted against measured changes; those with two strengths or more."""
    rows = sorted(report.get("held_out", ()), key=lambda row: row["alpha"])
    pictures = []
    if np.isfinite(numbers(rows, "measured_kl") * numbers(rows, "measured_refusal")).sum() > 1:
        caption = (
            "Refusals gained against damage done, measured on held-out sequences, in nats per sequence; a point a "
            "strength α, bars ± one standard error where known."
        )
        pictures.append(picture("frontier", "Frontier", caption, lambda axes: _frontier(axes, rows)))
    for kind, label, model in (("kl", KL, "by the quadratic model"), ("refusal", REFUSAL, "to first order")):
        if np.isfinite(numbers(rows, f"measured_{kind}")).sum() > 1:
            caption = (
                f"Predicted {model} and measured on held-out sequences, in nats per sequence; bars ± one standard "
                "error where known."
            )
            title = f"Predicted against measured {kind.replace('kl', 'KL')}"
            pictures.append(
                picture(f"held_out_{kind}", title, caption, lambda axes, k=kind, x=label: _predicted(axes, rows, k, x))
            )
    return pictures


def _legend_above(axes: Axes) -> None:
    """The legend over the axes, where it covers nothing that is drawn."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)


def _errors(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """Standard errors, 0 where none is known."""
    return np.nan_to_num(numbers(rows, f"{key}_se"))


def _frontier(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Measured refusal gain over measured KL, each point with its α."""
    kl, refusal = numbers(rows, "measured_kl"), numbers(rows, "measured_refusal")
    axes.errorbar(
        kl, refusal, _errors(rows, "measured_refusal"), _errors(rows, "measured_kl"), fmt="o-", c=BLUE, lw=1, ms=4
    )
    beside = {"xytext": (5, -5), "textcoords": "offset points", "va": "top", "fontsize": 7}  # between the bars
    for row, x, y in zip(rows, kl, refusal, strict=True):
        if np.isfinite(x * y):
            axes.annotate(f"α {row['alpha']:g}", (x, y), **beside)
    axes.axhline(0, ls=":", lw=0.8, c=GREY)
    axes.set(xlabel=KL, ylabel=REFUSAL)


def _predicted(axes: Axes, rows: Sequence[Mapping[str, Any]], kind: str, label: str) -> None:
    """Predicted and measured over α."""
    alpha, measured = numbers(rows, "alpha"), f"measured_{kind}"
    axes.plot(alpha, numbers(rows, f"predicted_{kind}"), "s--", c=ORANGE, lw=1, ms=4, label="predicted")
    axes.errorbar(
        alpha, numbers(rows, measured), _errors(rows, measured), fmt="o-", c=BLUE, lw=1, ms=4, label="measured"
    )
    axes.set(xlabel="strength α", ylabel=label)
    _legend_above(axes)


OUTCOMES = frozenset({"alpha", "objective", "kl", "refusal_loss"})
"""Columns of a tuning candidate that are not settings of the filter; nor are standard errors, `…_se`."""


def of_tuning(report: Mapping[str, Any]) -> list[Picture]:
    """The objective over α, a line a setting, and the frontier of all candidates."""
    tuning = report.get("tuning", {})
    rows = tuning.get("candidates", ())
    chosen = [all(row.get(k, v) == v for k, v in tuning["chosen"].items()) for row in rows]
    pictures = []
    if np.isfinite(numbers(rows, "objective")).any():
        caption = "The objective over the strength α on the held-out share, a line a setting; the star is chosen."
        pictures.append(picture("tuning", "Tuning", caption, lambda axes: _tuning(axes, rows, chosen)))
    if np.isfinite(numbers(rows, "kl") * numbers(rows, "refusal_loss")).any():
        caption = "All candidates: loss on refusals against KL; no candidate is better in both than those on the line."
        pictures.append(
            picture("candidates", "Candidates", caption, lambda axes: _candidates(axes, rows, np.array(chosen)))
        )
    return pictures


def _tuning(axes: Axes, rows: Sequence[Mapping[str, Any]], chosen: Sequence[bool]) -> None:
    """Objective over α, logarithmic where it spans more than 3 : 1; the chosen setting's line stands out, named."""
    curves: dict[tuple[tuple[str, Any], ...], list[int]] = {}
    for i in np.argsort(numbers(rows, "alpha"), kind="stable"):
        setting = tuple((k, v) for k, v in rows[i].items() if k not in OUTCOMES and not k.endswith("_se"))
        curves.setdefault(setting, []).append(i)
    alpha, objective = numbers(rows, "alpha"), numbers(rows, "objective")
    for setting, curve in sorted(curves.items(), key=lambda item: any(chosen[i] for i in item[1])):
        style = {"c": GREY, "lw": 0.7}
        if any(chosen[i] for i in curve):
            style = {"c": BLUE, "lw": 1.5, "label": "\n".join(f"{k} {v}" for k, v in setting)}
        axes.plot(alpha[curve], objective[curve], ".-", ms=3, **style)
    axes.plot(alpha[chosen], objective[chosen], "*", c=ORANGE, ms=9, label="chosen")
    axes.set(xlabel="strength α", ylabel="objective")
    if 0 < 3 * np.nanmin(objective) < np.nanmax(objective):
        axes.set_yscale("log")
    _legend_above(axes)


def _candidates(axes: Axes, rows: Sequence[Mapping[str, Any]], chosen: np.ndarray) -> None:
    """Loss on refusals over KL, and the line of those that no other beats in both."""
    kl, loss = numbers(rows, "kl"), numbers(rows, "refusal_loss")
    axes.plot(kl, loss, "o", ms=3, mew=0, c=GREY, label="candidates")
    order = np.lexsort((loss, kl))
    order = order[np.isfinite(kl * loss)[order]]
    best = np.minimum.accumulate(np.r_[np.inf, loss[order]])
    order = order[loss[order] < best[:-1]]
    axes.plot(kl[order], loss[order], "o-", ms=3, lw=1, c=BLUE, label="not beaten in both")
    axes.plot(kl[chosen], loss[chosen], "*", c=ORANGE, ms=9, label="chosen")
    axes.set(xlabel=KL, ylabel="loss on refusals")
    _legend_above(axes)
