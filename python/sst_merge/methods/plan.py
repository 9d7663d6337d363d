"""A solved merge: for every module and strength α, an update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..adapters import LowRank, factor
from ..baselines import interpolation, task_arithmetic
from ..coordinates import core_basis, from_core, to_core
from ..directions import Directions
from ..method_settings import DataFreeParameters
from ..problem import Curvature, Problem
from ..settings import AlphaParameters, FisherParameters
from ..steps import Walk

Formula = Callable[[Tensor, Tensor, float | Tensor], Tensor]
"""(utility's, safety's, α) -> merged, of tensors of one shape; those that act entry by entry take an α for each."""


@dataclass(frozen=True)
class Plan:
    """A solved merge, at every strength.

    Attributes:
        update: (module name, α) -> ΔW: its core in `problem.bases`, the dense matrix, or factors.
        in_core: Whether the matrices that `update` gives are cores.
        biases: (b_u, b_s, α) -> merged LoRA bias of a module.
        directions: Solutions of the pencils, by module or for all at once (SST only).
        kept: α -> coefficients of Filter(τ) in the directions, by the same keys (SST only).
        curvature: The statistics used, if any.
        gamma: Shared damping γ (SST only).
        walk: α -> the steps of a merge that has several; then directions, kept, curvature and γ are the first one's.
    """

    update: Callable[[str, float], Tensor | LowRank]
    in_core: bool
    biases: Formula
    directions: Mapping[str, Directions] = field(default_factory=dict)
    kept: Callable[[float], Mapping[str, Tensor]] | None = None
    curvature: Curvature | None = None
    gamma: float | None = None
    walk: Callable[[float], Walk] | None = None

    def merged_biases(self, problem: Problem, alpha: float) -> dict[str, Tensor]:
        """LoRA biases, merged by the method's formula without curvature; one that an adapter lacks is zero there."""
        utility, safety = problem.utility.biases, problem.safety.biases
        merged = {}
        for name in {**utility, **safety}:
            given = [biases.get(name) for biases in (utility, safety)]
            zero = torch.zeros_like(next(b for b in given if b is not None))
            merged[name] = self.biases(*(zero if b is None else b for b in given), alpha)
        return merged

    def dense(self, problem: Problem, name: str, alpha: float) -> Tensor:
        """ΔW of a module, (d_out, d_in), float32."""
        matrix = self.update(name, alpha)
        if isinstance(matrix, LowRank):
            return matrix.dense().float()
        if not self.in_core:
            return matrix.float()
        matrix, basis = matrix.float(), problem.bases[name]
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
        if isinstance(matrix, LowRank):
            if not matrix.rank:
                return matrix, 0.0
            basis = core_basis([matrix])
            return from_core(basis, to_core(basis, matrix), rank)
        return from_core(problem.bases[name], matrix, rank) if self.in_core else factor(matrix, rank)


def in_output_basis(problem: Problem, name: str) -> tuple[Tensor, Tensor]:
    """Q_outᵀΔW of both updates, (r_out, d_in), float64: whole rows, where a method needs the inputs as they are."""
    q_in = problem.bases[name].q_in.double()
    return tuple(core @ q_in.mT for core in problem.cores(name))


def from_output_basis(problem: Problem, name: str, rows: Tensor) -> LowRank:
    """ΔW = Q_out·rows, float32."""
    return LowRank(problem.bases[name].q_out.float(), rows.float())


def in_core_of(formula: Formula) -> Callable[[Problem, AlphaParameters], Plan]:
    """A method that is linear in the two updates, done exactly on their cores."""

    def build(problem: Problem, parameters: AlphaParameters) -> Plan:
        return Plan(lambda name, alpha: formula(*problem.cores(name), alpha), True, formula)

    return build


def add_filtered(curvature: Curvature, kept: Mapping[str, Tensor]) -> Callable[[str, float], Tensor]:
    """(name, α) -> Δ_u + α·Filter(τ), the filtered patch given; Δ_u where there is no patch."""

    def update(name: str, alpha: float) -> Tensor:
        return curvature.origin[name] + alpha * kept[name] if name in kept else curvature.origin[name]

    return update


def unfiltered(parameters: FisherParameters | DataFreeParameters) -> Formula:
    """The merge of what no filter covers: as if the whole patch were kept."""
    return task_arithmetic if parameters.patch == "additive" else interpolation
