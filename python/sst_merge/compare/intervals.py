r"""Means over replicates with confidence intervals, and paired comparisons.

The standard error of a mean over R replicates has se² = s²/R + v. s² is their variance; v the bootstrap variance of the
mean over prompts (Efron 1979), added where all replicates are measured on the same prompts, whose choice s² cannot
show, and taken alone where there is one replicate. The interval is mean ± t_ν se with Satterthwaite's (1946) degrees of
freedom, ν = se⁴/((s²/R)²/(R−1)): Student's own interval where v = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean, and what is known of it.

    Attributes:
        mean: Over replicates.
        low: Lower end of the confidence interval; None where nothing varied, so that nothing is known of its error.
        high: Upper end.
        p: Of the hypothesis that the mean is zero, two-sided.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


def estimate(values: Sequence[float], confidence: float, prompts: np.ndarray | None = None) -> Estimate:
    """Mean over replicates with its interval.

    Args:
        values: (R,), one a replicate.
        confidence: Such as 0.95.
        prompts: (B,), the mean over replicates in every resample of their common prompts; None leaves v out.

    Returns:
        The estimate.
    """
    x = np.asarray(values, float)
    mean, count = float(x.mean()), len(x)
    between = float(x.var(ddof=1)) / count if count > 1 else 0.0
    within = 0.0 if prompts is None else float(np.var(prompts, ddof=1))
    error = (between + within) ** 0.5
    if error <= 1e-12 * (1 + abs(mean)):
        return Estimate(mean)
    freedom = (between + within) ** 2 / (between**2 / (count - 1)) if between > 0 else np.inf
    half = float(stats.t.ppf((1 + confidence) / 2, freedom)) * error
    return Estimate(mean, mean - half, mean + half, 2 * float(stats.t.sf(abs(mean) / error, freedom)))


def holm(p: Sequence[float]) -> list[float]:
    """P-values adjusted for how many there are (Holm 1979): max over the smaller ones of (m − rank)·p, at most 1.

    Args:
        p: In any order.

    Returns:
        In the same order. Rejecting those below a level keeps the chance of any false rejection below it.
    """
    order = np.argsort(p, kind="stable")
    steps = np.asarray(p, float)[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(steps).clip(max=1.0)
    return adjusted.tolist()
