"""Methods made of singular values and vectors, on cores: they have those of ΔW."""

from __future__ import annotations

from ..baselines import subspace_boosting, tsv
from ..problem import Problem
from ..settings import SubspaceBoostingParameters, TsvParameters
from .plan import Plan


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
