"""A merged model at one strength: in memory, and on disk for those who ask for a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import LowRank, write_files
from ..checkpoint import Checkpoint, as_stored
from ..held_out import Merged, updated
from ..methods import Plan
from ..problem import Problem


@dataclass(frozen=True)
class Subject:
    """What evaluators measure.

    Attributes:
        problem: Adapters and base.
        plan: The solved merge.
        alpha: Strength.
        model: θ_0 + ΔW in eval mode, while `merged_model` is entered.
    """

    problem: Problem
    plan: Plan
    alpha: float
    model: nn.Module

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that `calibration.tokenizer` names."""
        return self.problem.tokenizer

    def write(self, folder: Path, *, merge_into_base: bool = False) -> None:
        """The merged adapter, exact, or the base with the merge added.

        Args:
            folder: Existing.
            merge_into_base: Write the full checkpoint.
        """
        problem, biases = self.problem, self.plan.merged_biases(self.problem, self.alpha)
        if merge_into_base:
            Checkpoint(problem).write(folder, lambda name: self.plan.dense(problem, name, self.alpha), biases)
            return
        write_files(
            folder,
            {name: self.plan.low_rank(problem, name, self.alpha)[0] for name in problem.names},
            sources=(problem.utility, problem.safety),
            biases=biases,
            saved=problem.saved,
        )


@contextmanager
def merged_model(problem: Problem, plan: Plan, alpha: float) -> Iterator[Subject]:
    """The base model with a merge put in place; restored bit for bit at exit.

    ΔW is added to weights of float32 or wider that no other parameter is tied to; where adding would round (bfloat16,
    quantised) or reach further, hooks compute it beside the weight, as an adapter does.

    Args:
        problem: Holds the model.
        plan: The solved merge.
        alpha: Strength.

    Yields:
        The merged model.
    """
    names = [name for name in problem.names if _takes_addition(problem.model, name)]
    hooked = {name: exact_update(problem, plan, name, alpha) for name in problem.names if name not in names}
    kept = {name: problem.model.get_submodule(name).weight.detach().clone() for name in names}
    try:
        for name in names:
            _add(problem.model.get_submodule(name), plan.dense(problem, name, alpha))
        with updated(problem, Merged(hooked, plan.merged_biases(problem, alpha))):
            yield Subject(problem, plan, alpha, problem.model)
    finally:
        with torch.no_grad():
            for name, weight in kept.items():
                problem.model.get_submodule(name).weight.copy_(weight)


def exact_update(problem: Problem, plan: Plan, name: str, alpha: float) -> LowRank:
    """ΔW as factors without a decomposition: (Q_out C) Q_inᵀ, or ΔW · I where the method is no low-rank one.

    Args:
        problem: The problem.
        plan: The solved merge.
        name: Module name.
        alpha: Strength.

    Returns:
        The update, float32.
    """
    matrix = plan.update(name, alpha)
    if isinstance(matrix, LowRank):
        return LowRank(matrix.up.float(), matrix.down.float())
    matrix = matrix.float()
    if plan.in_core:
        basis = problem.bases[name]
        return LowRank(basis.q_out.float() @ matrix, basis.q_in.mT.float())
    return LowRank(matrix, torch.eye(matrix.shape[1], device=matrix.device))


def _takes_addition(model: nn.Module, name: str) -> bool:
    """Whether ΔW may be added to the module's own weight."""
    weight = getattr(model.get_submodule(name), "weight", None)
    if weight is None or weight.device.type == "meta" or weight.dtype not in (torch.float32, torch.float64):
        return False
    return sum(parameter is weight for _, parameter in model.named_parameters(remove_duplicate=False)) == 1


@torch.no_grad()
def _add(module: nn.Module, delta: Tensor) -> None:
    """W ← W + ΔW."""
    module.weight += as_stored(module, delta).reshape(module.weight.shape).to(module.weight)
