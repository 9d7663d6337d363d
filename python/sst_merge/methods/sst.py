"""SST: the patch, filtered by the pencils of F_harm and F_benign."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, lru_cache

from torch import Tensor

from ..directions import Directions, find_directions
from ..problem import Curvature, Problem
from ..select import filtered_cores, kept_coefficients
from ..settings import SstParameters
from ..steps import Walk, walk
from .plan import Plan, unfiltered


def plan_sst(problem: Problem, parameters: SstParameters) -> Plan:
    """Δ_u + α·Filter(τ), Filter from the pencils (F_harm, F_benign + γI)."""
    curvature = problem.curvature(parameters)
    directions, gamma = find_directions(curvature.statistics, curvature.patch, parameters)
    plan = sst_plan(curvature, directions, gamma, parameters)
    if parameters.steps == 1:
        return plan

    @cache
    def steps(alpha: float) -> Walk:
        return walk(problem, parameters, alpha, (curvature, directions))

    for alpha in parameters.alpha if isinstance(parameters.alpha, tuple) else (parameters.alpha,):
        steps(alpha)

    def update(name: str, alpha: float) -> Tensor:
        return steps(alpha).cores[name] if name in curvature.patch else curvature.origin[name]

    return replace(plan, update=update, walk=steps)


def sst_plan(
    curvature: Curvature, directions: Mapping[str, Directions], gamma: float, parameters: SstParameters
) -> Plan:
    """The plan of SST from pencils that are solved.

    Args:
        curvature: The statistics, with the patch.
        directions: Of its pencils.
        gamma: Their damping γ.
        parameters: The selection is used.

    Returns:
        The plan.
    """

    def kept(alpha: float) -> dict[str, Tensor]:
        return kept_coefficients(directions, parameters, alpha)

    @lru_cache(maxsize=1)
    def cores(alpha: float) -> dict[str, Tensor]:
        return filtered_cores(directions, kept(alpha), curvature.patch)

    def update(name: str, alpha: float) -> Tensor:
        origin = curvature.origin[name]
        return origin + alpha * cores(alpha)[name] if name in curvature.patch else origin

    return Plan(update, True, unfiltered(parameters), directions, kept, curvature, gamma)
