"""Directions of equal predicted cost, tried on the model itself: does the order by gain per cost hold for losses?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from ..directions import Directions
from ..held_out import HeldOut, measure
from ..problem import Curvature, Problem
from ..select import filtered_cores
from .quadratic import moved, stored_quadratic
from .solved import normal

RANDOM = 4
"""Directions of each random kind."""


def order(
    problem: Problem,
    curvature: Curvature,
    directions: Mapping[str, Directions],
    kept: Mapping[str, Tensor],
    alpha: float,
    rng: torch.Generator,
) -> dict[str, Any]:
    """Predicted and measured effect of several steps φ that cost as much as α times what the run keeps.

    The steps: what the run keeps, the whole patch, what the run drops; the kept directions with random coefficients;
    random filters of the patch; and random directions, isotropic in the metric B. Each has the sign that raises
    log p(refusal) to first order. The gain φᵀAφ is a second moment, so its measured counterpart is E(Δ log p)².

    Args:
        problem: Model and data.
        curvature: The run's statistics.
        directions: Of its pencils.
        kept: Coefficients that the run keeps, not all zero.
        alpha: α.
        rng: Of random steps.

    Returns:
        α, the cost φᵀBφ of every step, a row for every step, and Spearman's rank correlations of Ray(φ) with the
        measured gain and with the measured change.

    Cost: 1 + 3 + 3 · `RANDOM` forward passes over the held-out sequences.
    """
    cost = alpha**2 * sum(float(s.square().sum()) for s in kept.values())
    steps = []
    for name, s in _steps(directions, kept, rng):
        spent = sum(float(x.square().sum()) for x in s.values())
        slope = sum(float(x @ directions[label].gradient) for label, x in s.items())
        if spent > 0:
            factor = (cost / spent) ** 0.5 * (1 if slope >= 0 else -1)
            steps.append((name, {label: factor * x for label, x in s.items()}))
    cores = [filtered_cores(directions, s, curvature.patch) for _, s in steps]
    measured = measure(problem, [moved(problem, curvature.origin, phi, 1.0) for phi in cores])
    rows = [
        {
            "step": name,
            "ray": sum(float((directions[label].values * x.square()).sum()) for label, x in s.items()) / cost,
            "measured_gain": _second_moment(problem, m),
            "predicted_kl": stored_quadratic(curvature, directions, phi) / 2,
            "measured_kl": m.kl,
            "measured_kl_se": m.kl_error,
            "predicted_refusal": sum(float(x @ directions[label].gradient) for label, x in s.items()),
            "measured_refusal": m.refusal_change,
            "measured_refusal_se": m.refusal_error,
        }
        for (name, s), phi, m in zip(steps, cores, measured, strict=True)
    ]
    return {
        "alpha": alpha,
        "cost": cost,
        "rows": rows,
        "correlation_gain": _correlation(rows, "measured_gain"),
        "correlation_change": _correlation(rows, "measured_refusal"),
    }


def _second_moment(problem: Problem, measured: HeldOut) -> float:
    """Σ_t w_t E(Δ log p)² over harmful tasks: of each its mean and, N_eff times its standard error, its spread."""
    of_harm = [row for row in measured.tasks if row["kind"] == "harm"]  # those that have names
    rows = {row["task"]: (row["measured_refusal"], row["measured_refusal_se"]) for row in of_harm}
    total = 0.0
    for task in problem.tasks["harm"]:
        mean, error = rows.get(task.name, (measured.refusal_change, measured.refusal_error))
        weights = [sequence.weight for sequence in task.held]
        effective = sum(weights) ** 2 / sum(w**2 for w in weights)
        total += task.weight * (mean**2 + effective * (error or 0) ** 2)
    return total


def _correlation(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Spearman's rank correlation of Ray(φ) with a column; None where it has none."""
    found = float(spearmanr([row["ray"] for row in rows], [row[key] for row in rows]).statistic)
    return found if math.isfinite(found) else None


def _steps(
    directions: Mapping[str, Directions], kept: Mapping[str, Tensor], rng: torch.Generator
) -> list[tuple[str, dict[str, Tensor]]]:
    """Names and coefficients, not yet scaled."""
    whole = {label: d.coefficients for label, d in directions.items()}
    steps = [("kept", dict(kept)), ("whole patch", whole)]
    steps.append(("dropped", {label: whole[label] - kept[label] for label in whole}))

    def random(like: Tensor) -> Tensor:
        return normal(rng, len(like)).to(like)

    for i in range(1, RANDOM + 1):
        steps += [
            (f"kept directions, random {i}", {label: random(s) * (s != 0) for label, s in kept.items()}),
            (f"random filter {i}", {label: random(c).abs().clamp(max=1) * c for label, c in whole.items()}),
            (f"random direction {i}", {label: random(c) for label, c in whole.items()}),
        ]
    return steps
