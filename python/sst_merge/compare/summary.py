"""From measured rows to what is compared: areas, scores at a chosen strength, and paired differences."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .axes import Axes, values_of
from .frontier import area
from .intervals import Estimate, estimate, holm

Row = Mapping[str, Any]
RESAMPLES = 1000
SAFETY_WANTED = 0.9


@dataclass(frozen=True)
class Curve:
    """One variant on one replicate.

    Attributes:
        alphas: (J,), strengths.
        safety: (J + 1,), of the utility model first, then at every strength.
        utility: As `safety`.
        area: Under the frontier.
        resampled: (B,), the area in every resample of the prompts.
        chosen: Which strength scores best on the validation half of the prompts.
        score: Its score on the test half.
        best: Which strength scores best on the test half itself.
        best_score: Its score there.
        tuned: Which strength was tuned, if it was; its test score is `tuned_score`.
        tuned_score: None if nothing was tuned.
        rows: As they were measured.
        tested: Name -> value of every evaluator on the test half at the chosen strength.
    """

    alphas: np.ndarray
    safety: np.ndarray
    utility: np.ndarray
    area: float
    resampled: np.ndarray
    chosen: int
    score: float
    best: int
    best_score: float
    tuned: int | None
    tuned_score: float | None
    rows: Sequence[Row]
    tested: Mapping[str, float]


@dataclass(frozen=True)
class Standing:
    """One variant over all replicates.

    Attributes:
        label: Of the variant.
        curves: One a replicate.
        area: Mean area.
        difference: Mean of its area minus the best one's, paired by replicate; None of the best itself.
        p: Of the difference, adjusted for all variants (Holm); None where nothing varied.
    """

    label: str
    curves: Sequence[Curve]
    area: Estimate
    difference: Estimate | None
    p: float | None

    @property
    def method(self) -> str:
        """Its merge method."""
        return self.curves[0].rows[0]["merge_method"]

    def mean(self, value: Callable[[Curve], float | None]) -> float | None:
        """Mean over the replicates that have the value; None if none has."""
        known = [x for x in map(value, self.curves) if x is not None]
        return float(np.mean(known)) if known else None


@dataclass(frozen=True)
class Summary:
    """The comparison in numbers.

    Attributes:
        standings: Best area first.
        references: Name -> the row of a model alone on every replicate.
        replicates: Their names.
        axes: Safety and utility.
        confidence: Of the intervals.
        halved: Whether every part of the axes has prompts, so that strengths are chosen on other prompts than tested.
    """

    standings: Sequence[Standing]
    references: Mapping[str, Sequence[Row]]
    replicates: Sequence[str]
    axes: Axes
    confidence: float
    halved: bool


def summarise(
    rows: Mapping[str, Sequence[Sequence[Row]]],
    references: Mapping[str, Sequence[Row]],
    seeds: Mapping[str, int],
    judged: tuple[Axes, float, bool],
) -> Summary:
    """Areas with intervals, scores, and differences to the best.

    Args:
        rows: Label -> for every replicate the rows of all strengths.
        references: Name -> for every replicate the row of a model alone; "utility alone" is every frontier's left end.
        seeds: Replicate -> seed, which halves the prompts.
        judged: Axes, confidence, and whether the replicates share their prompts.

    Returns:
        The summary.

    Raises:
        ValueError: An axis names what was not measured, or a value that its scale does not take.
    """
    axes, confidence, shared = judged
    left = references["utility alone"]
    _check_measured(axes, left[0])
    curves = {}
    for label, groups in rows.items():
        curves[label] = [
            _curve(group, origin, axes, seed, 0 if shared else index)
            for index, (group, origin, seed) in enumerate(zip(groups, left, seeds.values(), strict=True))
        ]
    pooled = shared or len(seeds) == 1
    ranked = sorted(curves, key=lambda label: -np.mean([c.area for c in curves[label]]))
    areas = {label: _estimate(curves[label], None, confidence, pooled) for label in ranked}
    differences = {label: _estimate(curves[label], curves[ranked[0]], confidence, pooled) for label in ranked[1:]}
    known = [label for label, difference in differences.items() if difference.p is not None]
    adjusted = dict(zip(known, holm([differences[label].p for label in known]), strict=True)) if known else {}
    standings = [
        Standing(label, curves[label], areas[label], differences.get(label), adjusted.get(label)) for label in ranked
    ]
    halved = all(left[0]["outcomes"][name].totals is not None for name in axes.parts)
    return Summary(standings, references, list(seeds), axes, confidence, halved)


def _check_measured(axes: Axes, row: Row) -> None:
    """Every part of the axes is there."""
    for name in axes.parts:
        if name not in row["outcomes"]:
            raise ValueError(f"axes: no evaluator measured {name!r}; measured were {', '.join(row['outcomes'])}")


def _estimate(curves: Sequence[Curve], others: Sequence[Curve] | None, confidence: float, pooled: bool) -> Estimate:
    """Mean area, or mean difference of areas paired by replicate and by resample."""
    values = np.array([c.area for c in curves])
    resampled = np.array([c.resampled for c in curves])
    if others is not None:
        values = values - np.array([c.area for c in others])
        resampled = resampled - np.array([c.resampled for c in others])
    return estimate(values, confidence, resampled.mean(0) if pooled else None)


def _curve(rows: Sequence[Row], origin: Row, axes: Axes, seed: int, stream: int) -> Curve:
    """One variant on one replicate."""
    outcomes = [origin["outcomes"], *(row["outcomes"] for row in rows)]
    safety, utility = (np.array(side) for side in zip(*(axes.point(values_of(o)) for o in outcomes), strict=True))
    resampled = [axes.point(values_of(o, lambda n, p: _multinomial(n, p, stream))) for o in outcomes]
    columns = [np.stack([np.broadcast_to(point[i], RESAMPLES) for point in resampled], 1) for i in (0, 1)]
    validated, tested = (
        [float(axes.score(values_of(o, lambda n, p, h=half: _half(n, p, seed, h)))) for o in outcomes[1:]]
        for half in (0, 1)
    )
    chosen, best = int(np.argmax(validated)), int(np.argmax(tested))
    alphas = np.array([row["alpha"] for row in rows])
    tuned = rows[0].get("tuned")
    at = None if tuned is None else int(np.argmin(np.abs(alphas - tuned["alpha"])))
    values = values_of(outcomes[1 + chosen], lambda n, p: _half(n, p, seed, 1))
    return Curve(
        alphas,
        safety,
        utility,
        float(area(safety, utility)),
        area(*columns),
        chosen,
        tested[chosen],
        best,
        tested[best],
        at,
        None if at is None else tested[at],
        rows,
        {name: float(value) for name, value in values.items()},
    )


def _multinomial(name: str, prompts: int, stream: int) -> np.ndarray:
    """How often each prompt is drawn in each resample, (P, B): the same for all variants, so that they are paired."""
    random = np.random.default_rng([stream, zlib.crc32(name.encode())])
    return random.multinomial(prompts, np.full(prompts, 1 / prompts), RESAMPLES).T.astype(float)


def _half(name: str, prompts: int, seed: int, half: int) -> np.ndarray:
    """1 for the prompts of a half, drawn by seed; of one prompt alone, both halves have it."""
    if prompts == 1:
        return np.ones(1)
    drawn = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(prompts)
    weights = np.zeros(prompts)
    weights[drawn[: prompts // 2] if half == 0 else drawn[prompts // 2 :]] = 1.0
    return weights


def utility_where_safe(curve: Curve) -> float | None:
    """The most utility among strengths whose safety is at least `SAFETY_WANTED`, on all prompts; None without one."""
    safe = curve.safety >= SAFETY_WANTED
    return float(curve.utility[safe].max()) if safe.any() else None
