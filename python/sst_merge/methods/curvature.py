"""Methods that weigh by Fishers, or by what the layers see."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from ..adapters import LowRank
from ..baselines import (
    fisher_averaging,
    gradient_matching,
    interpolation,
    regmean,
    shrunk_gram,
    single_fisher,
    task_arithmetic,
    top_eigenvectors,
)
from ..directions import shared_damping
from ..grams import InputGrams
from ..method_settings import (
    FisherAveragingParameters,
    GradientMatchingParameters,
    RegMeanParameters,
    SingleFisherParameters,
)
from ..problem import Problem
from ..sums import FisherSums
from .plan import Plan, from_output_basis, in_output_basis


def plan_single_fisher(problem: Problem, parameters: SingleFisherParameters) -> Plan:
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


def plan_fisher_averaging(problem: Problem, parameters: FisherAveragingParameters) -> Plan:
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


def plan_gradient_matching(problem: Problem, parameters: GradientMatchingParameters) -> Plan:
    """Gradient matching by the collected F_benign and F_harm; task arithmetic of LoRA biases and where τ is zero."""
    in_core = parameters.coordinates == "core"
    curvature = problem.curvature(parameters)
    statistics = curvature.statistics
    prior = shared_damping(statistics.benign, list(curvature.patch), parameters.epsilon)
    if not prior:
        raise ValueError("F_benign is zero: the benign data bear no gradient; check calibration.benign")

    def update(name: str, alpha: float) -> Tensor:
        utility, safety = problem.cores(name) if in_core else (u.dense() for u in problem.updates(name))
        if name not in curvature.patch:
            return task_arithmetic(utility, safety, alpha)
        fishers = tuple(
            sums.diagonal_of(name).to(utility).reshape(utility.shape) for sums in (statistics.benign, statistics.harm)
        )
        return gradient_matching(utility, safety, fishers, prior, alpha)

    return Plan(update, in_core, task_arithmetic, curvature=curvature)


def plan_regmean(problem: Problem, parameters: RegMeanParameters) -> Plan:
    """RegMean by the inputs of both models; embeddings, whose inputs are indices, and LoRA biases are interpolated."""
    grams = InputGrams(problem)

    def update(name: str, alpha: float) -> LowRank:
        utility, safety = in_output_basis(problem, name)
        found = grams.of(name)
        if found is None:
            return from_output_basis(problem, name, interpolation(utility, safety, alpha))
        shrunk = tuple(shrunk_gram(gram.to(utility), parameters.reduction, parameters.epsilon) for gram in found)
        return from_output_basis(problem, name, regmean(utility, safety, shrunk, alpha))

    return Plan(update, False, interpolation)
