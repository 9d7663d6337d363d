"""Figures of a comparison: frontiers of every replicate and their mean, and areas with their intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from scipy import stats

from ..picture import GREY, INK, Picture, picture
from .frontier import staircase
from .summary import Standing, Summary

COLOURS = ("#3b82c4", "#d9730d", "#2f9e62", "#a855c7", "#c2393b", "#8a6d3b")
"""Of the best variants, in the order of their areas; all others are grey."""

SIZE = (6.4, 3.6)
GRID = np.linspace(0, 1, 201)


def of_comparison(summary: Summary) -> list[Picture]:
    """Areas; the mean frontier, where there are several replicates; a frontier for each replicate."""
    count, share = len(summary.replicates), f"{summary.confidence:.0%}"
    pictures = [
        picture(
            "area",
            "Area under the frontier",
            f"Mean over {count} replicate{'s' * (count > 1)} and {share} confidence interval, best first.",
            lambda axes: _areas(axes, summary.standings),
            (6.4, 0.9 + 0.19 * len(summary.standings)),
        )
    ]
    if count > 1:
        caption = (
            f"Mean over {count} replicates of the most utility at each safety asked for; bands are pointwise {share} "
            "confidence intervals over replicates. All but the largest areas are grey."
        )
        pictures.append(picture("frontier", "Mean frontier", caption, lambda axes: _mean_frontier(axes, summary), SIZE))
    for i, name in enumerate(summary.replicates):
        caption = "A point a strength; the line is the frontier, the star the utility model. Grey: all other variants."
        drawn = lambda axes, i=i: _frontier(axes, summary, i)  # noqa: E731
        pictures.append(picture(f"frontier-{name}", f"Frontier, {name}", caption, drawn, SIZE))
    return pictures


def _styles(standings: Sequence[Standing]) -> list[dict]:
    """Line styles, best first."""
    coloured = [{"c": c, "lw": 1.4, "zorder": 3, "label": s.label} for c, s in zip(COLOURS, standings, strict=False)]
    return coloured + [{"c": GREY, "lw": 0.5, "zorder": 1}] * (len(standings) - len(coloured))


def _frontier(axes: Axes, summary: Summary, replicate: int) -> None:
    """Points and staircases of one replicate."""
    for standing, style in zip(summary.standings, _styles(summary.standings), strict=True):
        curve = standing.curves[replicate]
        axes.plot(GRID, staircase(curve.safety, curve.utility, GRID), **style)
        axes.plot(curve.safety[1:], curve.utility[1:], "o", ms=2, c=style["c"], zorder=style["zorder"])
    axes.plot(curve.safety[0], curve.utility[0], "*", c=INK, ms=8)
    _finish(axes)


def _mean_frontier(axes: Axes, summary: Summary) -> None:
    """Mean staircases, the coloured ones with bands."""
    count = len(summary.replicates)
    for standing, style in zip(summary.standings, _styles(summary.standings), strict=True):
        heights = np.array([staircase(c.safety, c.utility, GRID) for c in standing.curves])
        mean = heights.mean(0)
        axes.plot(GRID, mean, **style)
        if "label" in style:
            half = stats.t.ppf((1 + summary.confidence) / 2, count - 1) * heights.std(0, ddof=1) / count**0.5
            band = (mean - half).clip(0), (mean + half).clip(max=1)
            axes.fill_between(GRID, *band, color=style["c"], alpha=0.12, lw=0, zorder=2)
    _finish(axes)


def _finish(axes: Axes) -> None:
    """Labels and a legend beside."""
    axes.set(xlabel="safety", ylabel="utility", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def _areas(axes: Axes, standings: Sequence[Standing]) -> None:
    """A bar of the interval and a point for each variant."""
    for place, standing in enumerate(reversed(standings)):
        value = standing.area
        if value.low is not None:
            axes.plot([value.low, value.high], [place, place], c=GREY, lw=2, solid_capstyle="butt")
        each = [curve.area for curve in standing.curves]
        axes.plot(each, [place] * len(each), "|", c=INK, ms=4, mew=0.6)
        axes.plot(value.mean, place, "o", c=COLOURS[0], ms=4)
    axes.set_yticks(range(len(standings)), [s.label for s in reversed(standings)])
    axes.set(xlabel="area under the frontier", ylim=(-0.7, len(standings) - 0.3))
