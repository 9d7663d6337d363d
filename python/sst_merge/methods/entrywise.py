"""Methods that look at entries: TIES, DARE, DELLA and masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..adapters import LowRank
from ..baselines import (
    agreeing_mean,
    dare,
    della,
    diagonal_sst_mask,
    ratio_mask,
    sst_m_ratio,
    sst_v_ratio,
    task_arithmetic,
    ties,
)
from ..directions import shared_damping
from ..method_settings import DareParameters, DataFreeParameters, DellaParameters, DiagonalSstParameters, TiesParameters
from ..problem import Problem
from .plan import Plan, add_filtered, unfiltered


def plan_ties(problem: Problem, parameters: TiesParameters) -> Plan:
    """TIES on the true ΔW; α is the scale λ."""

    def update(name: str, alpha: float) -> Tensor:
        return ties([u.dense() for u in problem.updates(name)], parameters.density, alpha)

    return Plan(update, False, lambda u, s, scale: ties([u, s], parameters.density, scale))


def plan_dare(problem: Problem, parameters: DareParameters) -> Plan:
    """DARE of both true ΔW, then task arithmetic. The masks depend on seed and module, not on α."""

    def update(name: str, alpha: float) -> Tensor:
        generator = _generator(problem, parameters.seed, name)
        utility, safety = (dare(u.dense(), parameters.drop, generator) for u in problem.updates(name))
        return task_arithmetic(utility, safety, alpha)

    return Plan(update, False, task_arithmetic)


def _generator(problem: Problem, seed: int, name: str) -> torch.Generator:
    """Of a module's masks: they depend on seed and module alone."""
    return torch.Generator().manual_seed(seed * len(problem.names) + problem.names.index(name))


def plan_della(problem: Problem, parameters: DellaParameters) -> Plan:
    """DELLA on the true ΔW; α is the scale λ. Nothing is dropped of LoRA biases."""

    def update(name: str, alpha: float) -> Tensor:
        updates = [u.dense() for u in problem.updates(name)]
        generator = _generator(problem, parameters.seed, name)
        return della(updates, parameters.drop, parameters.window, alpha, generator)

    return Plan(update, False, lambda u, s, scale: scale * agreeing_mean([u, s]))


def plan_diagonal_sst(problem: Problem, parameters: DiagonalSstParameters) -> Plan:
    """Δ_u + α m⊙τ, m from the diagonal Fishers of ΔW or of the core; or Δ_u + α(m_B⊙B_s)(m_A⊙A_s), of the factors."""
    curvature = problem.curvature(parameters)
    statistics, patch = curvature.statistics, curvature.patch
    epsilon = shared_damping(statistics.benign, list(patch), parameters.epsilon)
    share = parameters.share if parameters.mask == "hard" else None

    def diagonals(name: str) -> tuple[Tensor, Tensor]:
        return statistics.harm.diagonal_of(name), statistics.benign.diagonal_of(name)

    if parameters.coordinates == "factor":
        factors = {name: _masked_factors(problem.updates(name)[1], diagonals(name), epsilon, share) for name in patch}
        return Plan(_add_factors(problem, factors), False, task_arithmetic, curvature=curvature)
    kept = {
        name: diagonal_sst_mask(*diagonals(name), epsilon, share).reshape(tau.shape) * tau
        for name, tau in patch.items()
    }
    in_core = parameters.coordinates == "core"
    return Plan(add_filtered(curvature, kept), in_core, unfiltered(parameters), curvature=curvature)


def _masked_factors(update: LowRank, diagonals: tuple[Tensor, Tensor], epsilon: float, share: float | None) -> LowRank:
    """(m_B⊙B)(m_A⊙A), a mask for each factor from its part of the diagonals (harm, benign)."""
    factors = update.up, update.down
    harm, benign = (diagonal.split([f.numel() for f in factors]) for diagonal in diagonals)
    masks = (diagonal_sst_mask(h, b, epsilon, share) for h, b in zip(harm, benign, strict=True))
    return LowRank(*(f * mask.reshape(f.shape).to(f) for f, mask in zip(factors, masks, strict=True)))


def _add_factors(problem: Problem, kept: Mapping[str, LowRank]) -> Callable[[str, float], LowRank]:
    """(name, α) -> Δ_u + α·kept, side by side."""

    def update(name: str, alpha: float) -> LowRank:
        utility, patch = problem.updates(name)[0], kept.get(name)
        if patch is None:
            return utility
        return LowRank(torch.cat([utility.up, alpha * patch.up], 1), torch.cat([utility.down, patch.down]))

    return update


def plan_sst_v(problem: Problem, parameters: DataFreeParameters) -> Plan:
    """Δ_u + α m⊙τ, m from r = (Δ_s−Δ_u)²/(Δ_u² + ε)."""
    squares = sum(float(problem.updates(name)[0].singular_values().square().sum()) for name in problem.names)
    epsilon = _relative(parameters.epsilon, squares, problem)
    return _masked(problem, parameters, lambda name, u, s: sst_v_ratio(u, s, epsilon))


def plan_sst_m(problem: Problem, parameters: DataFreeParameters) -> Plan:
    """Δ_u + α m⊙τ, m from r = |θ_s|/(|θ_u| + ε); the base's weights are read once for ε and once a strength."""
    magnitudes = sum(
        float((base_weight(problem, name) + problem.updates(name)[0].dense()).abs().sum(dtype=torch.float64))
        for name in problem.names
    )
    epsilon = _relative(parameters.epsilon, magnitudes, problem)
    return _masked(problem, parameters, lambda name, u, s: sst_m_ratio(base_weight(problem, name), u, s, epsilon))


def _relative(epsilon: float, total: float, problem: Problem) -> float:
    """ε times the mean of a denominator over the entries of all modules, of which the sum is given."""
    if not total:
        raise ValueError(
            "epsilon: the utility adapter changes nothing, so there is no unit for it; give another adapter"
        )
    return epsilon * total / sum(math.prod(problem.updates(name)[0].shape) for name in problem.names)


def _masked(problem: Problem, parameters: DataFreeParameters, ratio: Callable[[str, Tensor, Tensor], Tensor]) -> Plan:
    """Δ_u + α m⊙τ on the true ΔW, m from ratio(name, Δ_u, Δ_s), made anew for every strength: no mask is stored."""
    formula = unfiltered(parameters)
    share = parameters.share if parameters.mask == "hard" else None

    def update(name: str, alpha: float) -> Tensor:
        utility, safety = (u.dense() for u in problem.updates(name))
        return formula(utility, safety, alpha * ratio_mask(ratio(name, utility, safety), share))

    return Plan(update, False, formula)


def base_weight(problem: Problem, name: str) -> Tensor:
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
