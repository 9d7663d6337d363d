"""Methods that judge each module of the utility update by the directions of the safety update, on cores."""

from __future__ import annotations

from torch import Tensor

from ..baselines import interpolation, safe_lora, safe_merge, task_arithmetic
from ..method_settings import SafeLoraParameters, SafeMergeParameters
from ..problem import Problem
from .plan import Plan


def plan_safe_lora(problem: Problem, parameters: SafeLoraParameters) -> Plan:
    """SafeLoRA, the projected update on θ_0 + αΔ_s. LoRA biases, which it does not know, are added: b_u + αb_s."""

    def update(name: str, alpha: float) -> Tensor:
        return safe_lora(*problem.cores(name), parameters.threshold, parameters.projector == "exact", alpha)

    return Plan(update, True, task_arithmetic)


def plan_safe_merge(problem: Problem, parameters: SafeMergeParameters) -> Plan:
    """SafeMERGE; LoRA biases are interpolated, whatever their module was found to be."""

    def update(name: str, alpha: float) -> Tensor:
        return safe_merge(*problem.cores(name), parameters.threshold, parameters.projector == "exact", alpha)

    return Plan(update, True, interpolation)
