"""Merge methods through one door: each takes a problem and gives, for every module and strength α, an update."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .adapters import LowRank, factor
from .baselines import (
    dare,
    diagonal_sst_mask,
    fisher_averaging,
    interpolation,
    ratio_mask,
    single_fisher,
    sst_m_ratio,
    sst_v_ratio,
    subspace_boosting,
    task_arithmetic,
    ties,
    top_eigenvectors,
    tsv,
)
from .coordinates import from_core
from .directions import Directions, find_directions, shared_damping
from .problem import Curvature, Problem
from .select import filtered_cores, kept_coefficients
from .settings import (
    AlphaParameters,
    DareParameters,
    DataFreeParameters,
    DiagonalSstParameters,
    FisherAveragingParameters,
    FisherParameters,
    SingleFisherParameters,
    SstParameters,
    SubspaceBoostingParameters,
    TiesParameters,
    TsvParameters,
)
from .steps import Walk, walk
from .sums import FisherSums

Formula = Callable[[Tensor, Tensor, float | Tensor], Tensor]
"""(utility's, safety's, α) -> merged, of tensors of one shape; those that act entry by entry take an α for each."""


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
        walk: α -> the steps of a merge that has several; then directions, kept, curvature and γ are the first one's.
    """

    update: Callable[[str, float], Tensor]
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


def _sst_v(problem: Problem, parameters: DataFreeParameters) -> Plan:
    """Δ_u + α m⊙τ, m from r = (Δ_s−Δ_u)²/(Δ_u² + ε)."""
    squares = sum(float(problem.updates(name)[0].singular_values().square().sum()) for name in problem.names)
    epsilon = _relative(parameters.epsilon, squares, problem)
    return _masked(problem, parameters, lambda name, u, s: sst_v_ratio(u, s, epsilon))


def _sst_m(problem: Problem, parameters: DataFreeParameters) -> Plan:
    """Δ_u + α m⊙τ, m from r = |θ_s|/(|θ_u| + ε); the base's weights are read once for ε and once a strength."""
    magnitudes = sum(
        float((_base_weight(problem, name) + problem.updates(name)[0].dense()).abs().sum(dtype=torch.float64))
        for name in problem.names
    )
    epsilon = _relative(parameters.epsilon, magnitudes, problem)
    return _masked(problem, parameters, lambda name, u, s: sst_m_ratio(_base_weight(problem, name), u, s, epsilon))


def _relative(epsilon: float, total: float, problem: Problem) -> float:
    """ε times the mean of a denominator over the entries of all modules, of which the sum is given."""
    if not total:
        raise ValueError(
            "epsilon: the utility adapter changes nothing, so there is no unit for it; give another adapter"
        )
    return epsilon * total / sum(math.prod(problem.updates(name)[0].shape) for name in problem.names)


def _masked(problem: Problem, parameters: DataFreeParameters, ratio: Callable[[str, Tensor, Tensor], Tensor]) -> Plan:
    """Δ_u + α m⊙τ on the true ΔW, m from ratio(name, Δ_u, Δ_s), made anew for every strength: no mask is stored."""
    formula = _unfiltered(parameters)
    share = parameters.share if parameters.mask == "hard" else None

    def update(name: str, alpha: float) -> Tensor:
        utility, safety = (u.dense() for u in problem.updates(name))
        return formula(utility, safety, alpha * ratio_mask(ratio(name, utility, safety), share))

    return Plan(update, False, formula)


def _base_weight(problem: Problem, name: str) -> Tensor:
    """θ_0 of a module as (d_out, d_in), float32, on the merge's device; a convolution's kernel unfolded."""
    module = problem.model.get_submodule(name)
    weight = getattr(module, "weight", None)
    if weight is None or weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"sst_m needs the base's weights, and those of {name} are quantised ({type(module).__name__}); give "
            "base_model in its original precision, or use sst_v, which needs none"
        )
    transposed = isinstance(module, (nn.Embedding, Conv1D))
    weight = weight.detach().to(problem.config.device, torch.float32).flatten(1)
    return weight.mT if transposed else weight


def _single_fisher(problem: Problem, parameters: SingleFisherParameters) -> Plan:
    """(I − QQᵀ)Δ_u + αQQᵀΔ_s in core coordinates; LoRA biases, which no Fisher covers, are added: b_u + αb_s."""
    curvature = problem.curvature(parameters)
    k, harm = parameters.k, curvature.statistics.harm
    q = {}
    for name, tau in curvature.patch.items():
        count = k if isinstance(k, int) else max(1, round(k * tau.numel()))
        q[name] = top_eigenvectors(harm.fisher(name), count)

    def update(name: str, alpha: float) -> Tensor:
        utility, safety = problem.cores(name)
        return single_fisher(utility, safety, q[name], alpha) if name in q else utility

    return Plan(update, True, task_arithmetic, curvature=curvature)


def _tsv(problem: Problem, parameters: TsvParameters) -> Plan:
    """α·TSV-Merge, on cores: they have ΔW's singular values. LoRA biases: α times their mean, as in the source."""
    return Plan(
        lambda name, alpha: alpha * tsv(problem.cores(name), parameters.share),
        True,
        lambda u, s, alpha: alpha * (u + s) / 2,
    )


def _subspace_boosting(problem: Problem, parameters: SubspaceBoostingParameters) -> Plan:
    """α·Boost(Δ_u + Δ_s), on cores: they have ΔW's singular values. LoRA biases: α(b_u + b_s), as in the source."""
    return Plan(
        lambda name, alpha: alpha * subspace_boosting(sum(problem.cores(name)), parameters.beta),
        True,
        lambda u, s, alpha: alpha * (u + s),
    )


def _fisher_averaging(problem: Problem, parameters: FisherAveragingParameters) -> Plan:
    """Average of Δ_u and Δ_s weighted by the collected F_benign and F_harm; LoRA biases are interpolated."""
    in_core = parameters.coordinates == "core"
    curvature = problem.curvature(parameters)
    statistics, names = curvature.statistics, list(curvature.patch)
    normalised = [_normalised(sums, names, parameters.epsilon) for sums in (statistics.benign, statistics.harm)]

    def update(name: str, alpha: float) -> Tensor:
        utility, safety = problem.cores(name) if in_core else (u.dense() for u in problem.updates(name))
        if name not in curvature.patch:
            return interpolation(utility, safety, alpha)
        fishers = tuple(fisher(name).to(utility).reshape(utility.shape) for fisher in normalised)
        return fisher_averaging(utility, safety, fishers, alpha)

    return Plan(update, in_core, interpolation, curvature=curvature)


def _normalised(sums: FisherSums, names: list[str], epsilon: float) -> Callable[[str], Tensor]:
    """Name -> max(diag F, ε·mean)/‖·‖₂, mean and norm over all modules; float64."""
    floor = shared_damping(sums, names, epsilon)
    if not floor:
        raise ValueError("a Fisher is zero: no gradient reached the adapters; check the calibration data")
    norm = math.sqrt(sum(float(sums.diagonal_of(name).clamp(min=floor).square().sum()) for name in names))
    return lambda name: sums.diagonal_of(name).clamp(min=floor) / norm


def _sst(problem: Problem, parameters: SstParameters) -> Plan:
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

    return Plan(update, True, _unfiltered(parameters), directions, kept, curvature, gamma)


def _add_filtered(curvature: Curvature, kept: Mapping[str, Tensor]) -> Callable[[str, float], Tensor]:
    """(name, α) -> Δ_u + α·Filter(τ), the filtered patch given; Δ_u where there is no patch."""

    def update(name: str, alpha: float) -> Tensor:
        return curvature.origin[name] + alpha * kept[name] if name in kept else curvature.origin[name]

    return update


def _unfiltered(parameters: FisherParameters | DataFreeParameters) -> Formula:
    """The merge of what no filter covers: as if the whole patch were kept."""
    return task_arithmetic if parameters.patch == "additive" else interpolation


METHODS: dict[str, Callable[[Problem, Any], Plan]] = {
    "sst": _sst,
    "task_arithmetic": _in_core(task_arithmetic),
    "interpolation": _in_core(interpolation),
    "ties": _ties,
    "dare": _dare,
    "diagonal_sst": _diagonal_sst,
    "sst_v": _sst_v,
    "sst_m": _sst_m,
    "single_fisher": _single_fisher,
    "tsv": _tsv,
    "subspace_boosting": _subspace_boosting,
    "fisher_averaging": _fisher_averaging,
}
"""Name in the configuration -> builder of a plan from a problem and the method's parameters."""
