"""Methods made of singular values and vectors, on cores: they have those of ΔW."""

from __future__ import annotations

from ..adapters import LowRank
from ..baselines import isotropic, knots, subspace_boosting, ties, tsv
from ..method_settings import IsotropicParameters, KnotsParameters, SubspaceBoostingParameters, TsvParameters
from ..problem import Problem
from .plan import Plan, from_output_basis, in_output_basis


def plan_tsv(problem: Problem, parameters: TsvParameters) -> Plan:
    """α·TSV-Merge, on cores: they have ΔW's singular values. LoRA biases: α times their mean, as in the source."""
    return Plan(
        lambda name, alpha: alpha * tsv(problem.cores(name), parameters.share),
        True,
        lambda u, s, alpha: alpha * (u + s) / 2,
    )


def plan_subspace_boosting(problem: Problem, parameters: SubspaceBoostingParameters) -> Plan:
    """α·Boost(Δ_u + Δ_s), on cores: they have ΔW's singular values. LoRA biases: α(b_u + b_s), as in the source."""
    return Plan(
        lambda name, alpha: alpha * subspace_boosting(sum(problem.cores(name)), parameters.beta),
        True,
        lambda u, s, alpha: alpha * (u + s),
    )


def plan_isotropic(problem: Problem, parameters: IsotropicParameters) -> Plan:
    """α·Iso, on cores: they have ΔW's singular values. LoRA biases: α times their mean, as in the source."""
    return Plan(
        lambda name, alpha: alpha * isotropic(problem.cores(name), parameters.common),
        True,
        lambda u, s, alpha: alpha * (u + s) / 2,
    )


def plan_knots(problem: Problem, parameters: KnotsParameters) -> Plan:
    """KnOTS-TIES on the true ΔW, rows in the basis of the module's outputs; α is the scale λ. LoRA biases: TIES."""

    def update(name: str, alpha: float) -> LowRank:
        return from_output_basis(problem, name, knots(in_output_basis(problem, name), parameters.density, alpha))

    return Plan(update, False, lambda u, s, scale: ties([u, s], parameters.density, scale))
