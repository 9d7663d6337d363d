"""Merge methods through one door: each takes a problem and gives, for every module and strength α, an update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .adapters import LowRank, factor
from .baselines import dare, diagonal_sst_mask, interpolation, task_arithmetic, ties
from .coordinates import from_core
from .directions import Directions, find_directions, shared_damping
from .problem import Curvature, Problem
from .select import filtered_cores, kept_coefficients
from .settings import (
    AlphaParameters,
    DareParameters,
    DiagonalSstParameters,
    FisherParameters,
    SstParameters,
    TiesParameters,
)

Formula = Callable[[Tensor, Tensor, float], Tensor]
"""(utility's, safety's, α) -> merged, of tensors of one shape."""


@dataclass(frozen=True)
class Plan:
    """A solved merge, at every strength.

    Attributes:
        update: (module name, α) -> ΔW, with ΔW's matrix given either as a core in `problem.bases` or dense.
        in_core: Whether `update` gives cores.
        biases: (b_u, b_s, α) -> merged LoRA bias of a module.
        directions: Solutions of the pencils, by module or for all at once (SST only).
        kept: α -> coefficients of Filter(τ) in the directions, by the same keys (SST only).
        curvature: The statistics used, if any.
        gamma: Shared damping γ (SST only).
    """

    update: Callable[[str, float], Tensor]
    in_core: bool
    biases: Formula
    directions: Mapping[str, Directions] = field(default_factory=dict)
    kept: Callable[[float], Mapping[str, Tensor]] | None = None
    curvature: Curvature | None = None
    gamma: float | None = None

    def dense(self, problem: Problem, name: str, alpha: float) -> Tensor:
        """ΔW of a module, (d_out, d_in), float32."""
        matrix = self.update(name, alpha).float()
        if not self.in_core:
            return matrix
        basis = problem.bases[name]
        return basis.q_out.float() @ matrix @ basis.q_in.mT.float()

    def low_rank(self, problem: Problem, name: str, alpha: float, rank: int | None = None) -> tuple[LowRank, float]:
        """The update of a module as factors.

        Args:
            problem: The problem that was solved.
            name: Module name.
            alpha: α.
            rank: Rank to truncate to; None is exact.

        Returns:
            The update, and the relative Frobenius error of the truncation.
        """
        matrix = self.update(name, alpha)
        return from_core(problem.bases[name], matrix, rank) if self.in_core else factor(matrix, rank)


def _in_core(formula: Formula) -> Callable[[Problem, AlphaParameters], Plan]:
    """A method that is linear in the two updates, done exactly on their cores."""

    def build(problem: Problem, parameters: AlphaParameters) -> Plan:
        return Plan(lambda name, alpha: formula(*problem.cores(name), alpha), True, formula)

    return build


def _ties(problem: Problem, parameters: TiesParameters) -> Plan:
    """TIES on the true ΔW; α is the scale λ."""

    def update(name: str, alpha: float) -> Tensor:
        return ties([u.dense() for u in problem.updates(name)], parameters.density, alpha)

    return Plan(update, False, lambda u, s, scale: ties([u, s], parameters.density, scale))


def _dare(problem: Problem, parameters: DareParameters) -> Plan:
    """DARE of both true ΔW, then task arithmetic. The masks depend on seed and module, not on α."""

    def update(name: str, alpha: float) -> Tensor:
        generator = torch.Generator().manual_seed(parameters.seed * len(problem.names) + problem.names.index(name))
        utility, safety = (dare(u.dense(), parameters.drop, generator) for u in problem.updates(name))
        return task_arithmetic(utility, safety, alpha)

    return Plan(update, False, task_arithmetic)


def _diagonal_sst(problem: Problem, parameters: DiagonalSstParameters) -> Plan:
    """Δ_u + α m⊙τ, m from the diagonal Fishers of ΔW or of the core."""
    curvature = problem.curvature(parameters)
    in_core = parameters.coordinates == "core"
    statistics, names = curvature.statistics, list(curvature.patch)
    epsilon = shared_damping(statistics.benign, names, parameters.epsilon)
    share = parameters.share if parameters.mask == "hard" else None
    kept = {}
    for name, tau in curvature.patch.items():
        diagonals = statistics.harm.diagonal_of(name), statistics.benign.diagonal_of(name)
        kept[name] = diagonal_sst_mask(*diagonals, epsilon, share).reshape(tau.shape) * tau
    return Plan(_add_filtered(curvature, kept), in_core, _unfiltered(parameters), curvature=curvature)


def _sst(problem: Problem, parameters: SstParameters) -> Plan:
    """Δ_u + α·Filter(τ), Filter from the pencils (F_harm, F_benign + γI)."""
    curvature = problem.curvature(parameters)
    return sst_plan(curvature, *find_directions(curvature.statistics, curvature.patch, parameters), parameters)


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

    return Plan(update, True, _unfiltered(parameters), directions, kept, curvature, gamma)


def _add_filtered(curvature: Curvature, kept: Mapping[str, Tensor]) -> Callable[[str, float], Tensor]:
    """(name, α) -> Δ_u + α·Filter(τ), the filtered patch given; Δ_u where there is no patch."""

    def update(name: str, alpha: float) -> Tensor:
        return curvature.origin[name] + alpha * kept[name] if name in kept else curvature.origin[name]

    return update


def _unfiltered(parameters: FisherParameters) -> Formula:
    """The merge of what no Fisher covers: as if the whole patch were kept."""
    return task_arithmetic if parameters.patch == "additive" else interpolation


METHODS: dict[str, Callable[[Problem, Any], Plan]] = {
    "sst": _sst,
    "task_arithmetic": _in_core(task_arithmetic),
    "interpolation": _in_core(interpolation),
    "ties": _ties,
    "dare": _dare,
    "diagonal_sst": _diagonal_sst,
}
"""Name in the configuration -> builder of a plan from a problem and the method's parameters."""
