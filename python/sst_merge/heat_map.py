"""Heat maps of a merge report, layer × kind of module, drawn from the numbers of report.json."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes

from .picture import WIDTH, Picture, picture


def _ratio(key: str, over: str) -> Callable[[Mapping[str, Any]], float | None]:
    """row[key] / row[over], None where that is no number."""

    def of(row: Mapping[str, Any]) -> float | None:
        return row[key] / row[over] if row.get(key) is not None and row.get(over) else None

    return of


HEAT_MAPS: tuple[tuple[str, str, str, Callable[[Mapping[str, Any]], float | None]], ...] = (
    (
        "kept_energy",
        "Kept energy",
        "Squared norm of the kept patch over the whole one's (may exceed 1: no Euclidean projection).",
        lambda row: row.get("kept_energy"),
    ),
    ("kept_share", "Kept share", "Share of the directions that is kept, Σ f / n.", _ratio("kept", "n")),
    (
        "held_ratio",
        "Held-out over found λ",
        "Ray_held / λ, both averaged by kept cost: near 0, the kept directions are noise.",
        _ratio("ray_held", "ray"),
    ),
    (
        "kept_damping",
        "Damping share of what is kept",
        "Share of the kept directions' cost that is damping: near 1, benign data say nothing.",
        lambda row: row.get("damping_share"),
    ),
)


def of_modules(report: Mapping[str, Any]) -> list[Picture]:
    """Heat maps layer × kind of module, of every quantity that a module has."""
    pictures = []
    for name, title, caption, quantity in HEAT_MAPS:
        cells = {row["module"]: quantity(row) for row in report["modules"]}
        cells = {module: x for module, x in cells.items() if x is not None and np.isfinite(x)}
        if cells:
            grid = _grid(cells)
            layers, kinds, _ = grid
            size = max(WIDTH, 0.7 + 0.36 * len(kinds)), 0.3 + 0.2 * len(layers) + 0.075 * max(map(len, kinds))
            pictures.append(picture(name, title, caption, lambda axes, g=grid: _heat_map(axes, *g), size))
    return pictures


def layer_and_kind(module: str) -> tuple[int | None, str]:
    """The first number among a module's name's parts, and the name with * in its place."""
    match = re.search(r"(?<![^.])\d+(?![^.])", module)
    if match is None:
        return None, module
    return int(match[0]), f"{module[: match.start()]}*{module[match.end() :]}"


def _grid(cells: Mapping[str, float]) -> tuple[list[str], list[str], np.ndarray]:
    """Labels of rows and columns, and values (rows, columns), NaN where there is no module."""
    places = {module: layer_and_kind(module) for module in cells}
    layers = sorted({layer for layer, _ in places.values()}, key=lambda x: (x is None, x or 0))
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    values = np.full((len(layers), len(kinds)), np.nan)
    for module, (layer, kind) in places.items():
        values[layers.index(layer), kinds.index(kind)] = cells[module]
    stems = {kind.partition("*")[0] for kind in kinds if "*" in kind}
    if len(stems) == 1:  # the usual case: "model.layers.*." says nothing
        kinds = [kind.removeprefix(f"{next(iter(stems))}*").lstrip(".") or "*" for kind in kinds]
    return ["–" if layer is None else str(layer) for layer in layers], [_printable(kind) for kind in kinds], values


def _printable(text: str) -> str:
    """Text without signs that SVG forbids."""
    return "".join(sign if sign.isprintable() else "�" for sign in text)


def _heat_map(axes: Axes, layers: list[str], kinds: list[str], values: np.ndarray) -> None:
    """Cells from 0 to the largest value, each with its number."""
    top = max(float(np.nanmax(values)), np.finfo(float).tiny)
    axes.pcolormesh(values, cmap="viridis", vmin=0, vmax=top)
    for (i, j), x in np.ndenumerate(values):
        if not np.isnan(x):
            color = ink_on(colormaps["viridis"](x / top))
            axes.text(j + 0.5, i + 0.5, f"{x:.2g}", ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(np.arange(len(kinds)) + 0.5, kinds, rotation=90)
    axes.set_yticks(np.arange(len(layers)) + 0.5, layers)
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.set(ylabel="layer")


def luminance(color: Sequence[float]) -> float:
    """Relative luminance of an sRGB colour in [0, 1]³ (WCAG 2.2)."""
    r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in color[:3])
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def ink_on(color: Sequence[float]) -> str:
    """Black or white, whichever contrasts more: (L₁ + 0.05) / (L₂ + 0.05) ≥ 4.5 on any colour."""
    return "#000000" if (luminance(color) + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"
