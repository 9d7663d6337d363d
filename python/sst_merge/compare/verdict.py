"""The comparison in sentences, as it falls: no method has a place in them but by its numbers."""

from __future__ import annotations

from ..method_settings import AVERAGES
from .intervals import Estimate
from .summary import SAFETY_WANTED, Standing, Summary

LEAST_P = 1e-4


def verdict(summary: Summary) -> list[str]:
    """Who has the largest area, who comes next, and from whom the best is not separated.

    Separated: the paired difference of areas has p < 1 − confidence after Holm's adjustment for all variants.

    Args:
        summary: Of the comparison.

    Returns:
        Sentences.
    """
    best, *others = summary.standings
    level = 1 - summary.confidence
    said = [f"Best: {best.label}, area under the frontier {interval(best.area)}."]
    if not others:
        return said
    second = others[0]
    said.append(f"Second: {second.label}, difference {interval(second.difference)}, {_separation(second, level)}.")
    tied = [s.label for s in others if not is_separated(s, level)]
    if not tied:
        said.append(f"{best.label} is separated from all {len(others)} others.")
    elif len(tied) == len(others):
        said.append(f"{best.label} is not separated from any of the {len(others)} others.")
    else:
        said.append(f"Not separated from the best: {len(tied)} of {len(others)} others: {'; '.join(tied)}.")
    return said + _own(summary, level)


def _own(summary: Summary, level: float) -> list[str]:
    """Where the best variant of merge_method sst stands, if that is neither first nor second."""
    places = [place for place, s in enumerate(summary.standings, start=1) if s.method == "sst"]
    if not places or places[0] <= 2:
        return []
    s = summary.standings[places[0] - 1]
    return [
        f"The best variant of sst, {s.label}, is number {places[0]}: difference {interval(s.difference)}, "
        f"{_separation(s, level)}."
    ]


def is_separated(standing: Standing, level: float) -> bool:
    """Whether a variant's area differs from the best one's by more than chance, all comparisons counted."""
    return standing.p is not None and standing.p < level


def _separation(standing: Standing, level: float) -> str:
    """In words."""
    if standing.p is None:
        return "equal" if standing.difference.mean == 0 else "with no variation measured, so nothing is known of chance"
    return f"{'separated' if is_separated(standing, level) else 'not separated'} (adjusted p {p_value(standing.p)})"


def interval(value: Estimate, digits: int = 3) -> str:
    """A mean with its interval: 0.870 [0.840, 0.900]."""
    mean = f"{value.mean:.{digits}f}"
    return mean if value.low is None else f"{mean} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def p_value(p: float) -> str:
    """Two digits, but none that neither replicates nor resamples can support."""
    return f"{p:.2g}" if p >= LEAST_P else f"< {LEAST_P:g}"


def short_sweeps(summary: Summary) -> list[str]:
    """Variants whose sweep may have ended too early: nowhere safe, and safest at its end.

    Args:
        summary: Of the comparison.

    Returns:
        A sentence, or none.
    """
    ended = [
        s.label
        for s in summary.standings
        if s.method not in AVERAGES
        and any(c.safety.max() < SAFETY_WANTED and c.safety[-1] == c.safety.max() for c in s.curves)
    ]
    if not ended:
        return []
    return [
        f"The sweep may end too early for {'; '.join(ended)}: on some replicate no strength reaches safety "
        f"{SAFETY_WANTED:g}, and none is safer than the largest. Add larger ones to alphas."
    ]
