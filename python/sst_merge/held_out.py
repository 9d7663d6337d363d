"""What merges do to held-out sequences, measured on the model itself: KL of benign text, log p of refusals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sst_kernels.collect import CoreBasis, CoreGradients

from .adapters import LowRank
from .base import input_device
from .distributed import of_first
from .packing import Batch, batches
from .problem import Problem
from .tasks import Task

_POSITIONS_AT_ONCE = 512  # bounds the float32 copies of the logits
_BEYOND = 10.0  # times the predicted KL
_SMALL = 0.1  # nats: a KL that needs no warning


@dataclass(frozen=True)
class Merged:
    """A merged model, as it is written.

    Attributes:
        updates: Module name -> ΔW.
        biases: Module name -> LoRA bias, (d_out,).
    """

    updates: Mapping[str, LowRank]
    biases: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class HeldOut:
    """One merged model on held-out sequences; nats per sequence.

    Attributes:
        kl: Mean of KL(p_ft ‖ p_merged), summed over the loss-bearing positions of a benign sequence.
        kl_error: Its standard error; None for one sequence.
        refusal: Mean of log p_merged(refusal).
        refusal_change: Mean of log p_merged(refusal) − log p_ft(refusal).
        refusal_error: Standard error of the change.
        tasks: A row for every task that has a name: "kind", "task", "weight", and what its kind measures.
    """

    kl: float
    kl_error: float | None
    refusal: float
    refusal_change: float
    refusal_error: float | None
    tasks: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class _Mean:
    """Σ ω x / Σ ω over sequences, and its standard error; None for one sequence.

    The error is √(N/(N−1) Σ ω²(x−m)²) / Σ ω, that of a ratio (Cochran 1977); for equal weights the usual one.
    """

    value: float
    error: float | None

    @classmethod
    def of(cls, values: Tensor, weights: Tensor) -> _Mean:
        """The mean of values (S,) with weights (S,), float64."""
        total, n = weights.sum(), len(values)
        mean = (weights * values).sum() / total
        if n == 1:
            return cls(float(mean), None)
        squares = (weights * (values - mean)).square().sum()
        return cls(float(mean), float((n / (n - 1) * squares).sqrt() / total))

    @classmethod
    def over(cls, parts: Sequence[tuple[float, _Mean]]) -> _Mean:
        """Σ_t w_t m_t of the means m_t of different tasks, given with their weights."""
        errors = [None if part.error is None else weight * part.error for weight, part in parts]
        error = None if None in errors else math.hypot(*errors)
        return cls(sum(weight * part.value for weight, part in parts), error)


def measure(problem: Problem, merged: Sequence[Merged]) -> list[HeldOut]:
    """Measure merged models against the utility model, on the held-out share of the calibration data.

    Args:
        problem: Model, utility adapter and data.
        merged: The models.

    Returns:
        One result for each: weighted means of every task, summed over the tasks with their weights.

    Cost: 1 + len(merged) forward passes over the held-out sequences.
    """
    tasks = [(kind, task) for kind in ("benign", "harm") for task in problem.tasks[kind]]
    means = [_measure_task(problem, merged, kind, task) for kind, task in tasks]
    return of_first([_held_out(tasks, [of_model[i] for of_model in means]) for i in range(len(merged))])


def _held_out(tasks: Sequence[tuple[str, Task]], means: Sequence[Mapping[str, _Mean]]) -> HeldOut:
    """One model's result, from its means on every task: Σ_t w_t m_t, and a row a task."""
    kl, refusal, change = (
        _Mean.over([(task.weight, m[name]) for (_, task), m in zip(tasks, means, strict=True) if name in m])
        for name in ("kl", "refusal", "change")
    )
    rows = tuple(
        {"kind": kind, "task": task.name, "weight": task.weight, **_as_row(m)}
        for (kind, task), m in zip(tasks, means, strict=True)
        if task.name
    )
    return HeldOut(kl.value, kl.error, refusal.value, change.value, change.error, rows)


def _as_row(means: Mapping[str, _Mean]) -> dict[str, float | None]:
    """What was measured on a task, in the columns of `compare`; None where its kind measures something else."""
    row = {}
    for name, column in (("kl", "measured_kl"), ("change", "measured_refusal")):
        mean = means.get(name)
        row[column], row[f"{column}_se"] = (mean.value, mean.error) if mean else (None, None)
    return row


def _measure_task(problem: Problem, merged: Sequence[Merged], kind: str, task: Task) -> list[dict[str, _Mean]]:
    """Per model, "kl" of a benign task, or "refusal" and "change" of a harmful one."""
    values: list[dict[str, list[Tensor]]] = [{} for _ in merged]
    weights = []
    for batch in _held_out_batches(problem, task):
        weights.append(batch.weight)
        row = batch.is_target[:, 1:].nonzero(as_tuple=True)[0]
        with _utility_alone(problem):
            before = _logits(problem, Merged(problem.utility.updates, problem.utility.biases), batch)
        for model, found in zip(merged, values, strict=True):
            after = _logits(problem, model, batch)
            if kind == "benign":
                new = {"kl": _by_sequence(batch, row, _divergence(before, after))}
            else:
                old, refusal = (_by_sequence(batch, row, _likelihood(batch, logits)) for logits in (before, after))
                new = {"refusal": refusal, "change": refusal - old}
            for name, parts in new.items():
                found.setdefault(name, []).append(parts)
    weight = torch.cat(weights)
    return [{name: _Mean.of(torch.cat(parts), weight) for name, parts in found.items()} for found in values]


def _held_out_batches(problem: Problem, task: Task) -> Iterator[Batch]:
    """Held-out sequences of one task, a row each, in batches on the model's device."""
    found = list(batches(task.held, problem.config.calibration.batch_size, input_device(problem.model)))
    yield from tqdm(found, desc=f"measure {task.name}".rstrip(), unit="batch", leave=False)


@contextmanager
def updated(problem: Problem, merged: Merged) -> Iterator[None]:
    """The model computes with ΔW and biases, by hooks; up and down take the place of a core's bases.

    Args:
        problem: Holds the model.
        merged: What is added to θ_0; a module that is not named computes as it is.

    Yields:
        Nothing.
    """
    bases = {name: CoreBasis(u.up, u.down.mT) for name, u in merged.updates.items() if u.rank}
    eyes = {name: torch.eye(merged.updates[name].rank, device=b.q_out.device) for name, b in bases.items()}
    with ExitStack() as stack:
        stack.enter_context(CoreGradients(problem.model, bases, watched=())).set_cores(eyes)
        for name in {*merged.biases, *problem.utility.biases}:
            parts = (biases.get(name, torch.zeros(())) for biases in (merged.biases, problem.utility.biases))
            new, present = (part.to(problem.config.device) for part in parts)
            hook = partial(_add_bias, new - present)
            stack.callback(problem.model.get_submodule(name).register_forward_hook(hook).remove)
        yield


def _add_bias(bias: Tensor, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Y + b; the channels of a convolution come before its positions."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        bias = bias.reshape(-1, *[1] * len(module.kernel_size))
    return output + bias.to(output)


@contextmanager
def _utility_alone(problem: Problem) -> Iterator[None]:
    """Whole parameters that the safety adapter replaced are those of the base again."""
    model, swapped = problem.model, []
    for name, value in problem.replaced.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        swapped.append((module, leaf, getattr(module, leaf)))
        setattr(module, leaf, value)
    try:
        yield
    finally:
        for module, leaf, value in swapped:
            setattr(module, leaf, value)


@torch.no_grad()
def _logits(problem: Problem, merged: Merged, batch: Batch) -> Tensor:
    """Logits (P, V) at the P positions before a loss-bearing token, in the model's dtype."""
    row, position = batch.is_target[:, 1:].nonzero(as_tuple=True)
    with updated(problem, merged):
        return problem.model(**batch.model_inputs, use_cache=False).logits[row, position]


def _divergence(before: Tensor, after: Tensor) -> Tensor:
    """KL(p ‖ q) at every position; a token that p never draws adds nothing."""
    parts = []
    for logits in zip(before.split(_POSITIONS_AT_ONCE), after.split(_POSITIONS_AT_ONCE), strict=True):
        p, q = (part.float().log_softmax(-1) for part in logits)
        parts.append(torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1))
    return torch.cat(parts)


def _likelihood(batch: Batch, logits: Tensor) -> Tensor:
    """Log p of the given token at every position."""
    row, position = batch.is_target[:, 1:].nonzero(as_tuple=True)
    labels = batch.input_ids[row, position + 1]
    parts = zip(logits.split(_POSITIONS_AT_ONCE), labels.split(_POSITIONS_AT_ONCE), strict=True)
    return torch.cat([part.float().log_softmax(-1).gather(1, label[:, None])[:, 0] for part, label in parts])


def _by_sequence(batch: Batch, row: Tensor, values: Tensor) -> Tensor:
    """Sums over the loss-bearing positions of each sequence, in float64, on the CPU."""
    return values.new_zeros(len(batch.index), dtype=torch.float64).index_add_(0, row, values.double()).cpu()


def compare(strengths: Sequence[Mapping[str, Any]], measured: Sequence[HeldOut]) -> list[dict[str, Any]]:
    """Predicted beside measured, a row for every strength; nats per sequence.

    Args:
        strengths: Rows of the report: alpha and, where there are Fishers, the predictions of the quadratic model.
        measured: On the held-out sequences, in the same order.

    Returns:
        The rows.
    """
    return [
        {
            "alpha": row["alpha"],
            "predicted_kl": row.get("predicted_kl"),
            "measured_kl": m.kl,
            "measured_kl_se": m.kl_error,
            "predicted_refusal": row.get("predicted_refusal"),
            "measured_refusal": m.refusal_change,
            "measured_refusal_se": m.refusal_error,
        }
        for row, m in zip(strengths, measured, strict=True)
    ]


def compare_tasks(strengths: Sequence[Mapping[str, Any]], measured: Sequence[HeldOut]) -> list[dict[str, Any]]:
    """What was measured on each task that has a name, a row for every strength and task; nats per sequence.

    Args:
        strengths: Rows of the report: alpha.
        measured: On the held-out sequences, in the same order.

    Returns:
        The rows.
    """
    return [{"alpha": row["alpha"], **task} for row, m in zip(strengths, measured, strict=True) for task in m.tasks]


def warnings_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the measurements warn of.

    Args:
        rows: From `compare`.

    Returns:
        A sentence for every strength at which the merge is not finite, refuses less than the utility model by more
        than two standard errors, or diverges from it by more than `_BEYOND` times the prediction.
    """
    found = []
    for row in rows:
        where, kl, change = f"at alpha {row['alpha']:g}", row["measured_kl"], row["measured_refusal"]
        if not (math.isfinite(kl) and math.isfinite(change)):
            found.append(f"{where} the merged model gives values that are not finite; lower alpha, or change dtype")
        elif change + 2 * (row["measured_refusal_se"] or 0) < 0:
            found.append(
                f"{where} the merge refuses less than the utility model does: log p(refusal) changes by {change:.3g} "
                "nats a held-out sequence. Are the roles, or the files harm and benign, swapped? Else lower alpha, or "
                "select otherwise"
            )
        predicted = row["predicted_kl"]
        if predicted is not None and kl > _BEYOND * predicted and kl > _SMALL:
            found.append(
                f"{where} the merge diverges from the utility model by {kl:.3g} nats a held-out sequence, the "
                f"quadratic model predicted {predicted:.3g}: the step is too large for it, or benign data never "
                "visited its directions (damping share near 1)"
            )
    return found
