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
    """

    kl: float
    kl_error: float | None
    refusal: float
    refusal_change: float
    refusal_error: float | None


def measure(problem: Problem, merged: Sequence[Merged]) -> list[HeldOut]:
    """Measure merged models against the utility model, on the held-out share of the calibration data.

    Args:
        problem: Model, utility adapter and data.
        merged: The models.

    Returns:
        One result for each.

    Cost: 1 + len(merged) forward passes over the held-out sequences.
    """
    kl, change, refusal = ([[] for _ in merged] for _ in range(3))
    for kind in ("benign", "harm"):
        for batch in _held_out_batches(problem, kind):
            row = batch.is_target[:, 1:].nonzero(as_tuple=True)[0]
            with _utility_alone(problem):
                before = _logits(problem, Merged(problem.utility.updates, problem.utility.biases), batch)
            for i, model in enumerate(merged):
                after = _logits(problem, model, batch)
                if kind == "benign":
                    kl[i].append(_by_sequence(batch, row, _divergence(before, after)))
                else:
                    old, new = (_by_sequence(batch, row, _likelihood(batch, logits)) for logits in (before, after))
                    refusal[i].append(new)
                    change[i].append(new - old)
    values = [[torch.cat(parts) for parts in (k, r, c)] for k, r, c in zip(kl, refusal, change, strict=True)]
    found = [HeldOut(float(k.mean()), _error(k), float(r.mean()), float(c.mean()), _error(c)) for k, r, c in values]
    return of_first(found)


def _held_out_batches(problem: Problem, kind: str) -> Iterator[Batch]:
    """Held-out sequences of one kind, a row each, in batches on the model's device."""
    sequences = problem.calibration[kind][1]
    found = list(batches(sequences, problem.config.calibration.batch_size, input_device(problem.model)))
    yield from tqdm(found, desc=f"measure, {kind}", unit="batch", leave=False)


@contextmanager
def _updated(problem: Problem, merged: Merged) -> Iterator[None]:
    """The model computes with ΔW and biases, by hooks; up and down take the place of a core's bases."""
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
    with _updated(problem, merged):
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


def _error(values: Tensor) -> float | None:
    """Standard error of a mean; None for one value."""
    return float(values.std()) / len(values) ** 0.5 if len(values) > 1 else None


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
