"""Merge methods through one door: each takes a problem and gives, for every module and strength α, an update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..baselines import interpolation, task_arithmetic
from ..problem import Problem
from .curvature import plan_fisher_averaging, plan_gradient_matching, plan_regmean, plan_single_fisher
from .entrywise import plan_dare, plan_della, plan_diagonal_sst, plan_sst_m, plan_sst_v, plan_ties
from .plan import Plan, in_core_of
from .safety import plan_safe_lora, plan_safe_merge
from .spectral import plan_isotropic, plan_knots, plan_subspace_boosting, plan_tsv
from .sst import plan_sst, sst_plan

__all__ = ["METHODS", "Plan", "sst_plan"]

METHODS: dict[str, Callable[[Problem, Any], Plan]] = {
    "sst": plan_sst,
    "task_arithmetic": in_core_of(task_arithmetic),
    "interpolation": in_core_of(interpolation),
    "ties": plan_ties,
    "dare": plan_dare,
    "della": plan_della,
    "diagonal_sst": plan_diagonal_sst,
    "sst_v": plan_sst_v,
    "sst_m": plan_sst_m,
    "single_fisher": plan_single_fisher,
    "tsv": plan_tsv,
    "isotropic": plan_isotropic,
    "knots": plan_knots,
    "subspace_boosting": plan_subspace_boosting,
    "fisher_averaging": plan_fisher_averaging,
    "gradient_matching": plan_gradient_matching,
    "regmean": plan_regmean,
    "safe_lora": plan_safe_lora,
    "safe_merge": plan_safe_merge,
}
"""Name in the configuration -> builder of a plan from a problem and the method's parameters."""
