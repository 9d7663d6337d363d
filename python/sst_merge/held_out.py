"""What merges do to held-out sequences, measured on the model itself: KL of benign text, log p of refusals."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sst_kernels.collect import CoreBasis, CoreGradients

from .adapters import LowRank
from .base import input_device
from .packing import Batch, batches
from .problem import Problem

_POSITIONS_AT_ONCE = 512  # bounds the float32 copies of the logits


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


def measure(problem: Problem, merged: Sequence[Mapping[str, LowRank]]) -> list[HeldOut]:
    """Measure merged models against the utility model, on the held-out share of the calibration data.

    Args:
        problem: Model, utility adapter and data.
        merged: Module name -> ΔW, for each merged model.

    Returns:
        One result for each.

    Cost: 1 + len(merged) forward passes over the held-out sequences.
    """
    kl: list[list[float]] = [[] for _ in merged]
    change: list[list[float]] = [[] for _ in merged]
    refusal: list[list[float]] = [[] for _ in merged]
    for kind in ("benign", "harm"):
        for batch in _held_out_batches(problem, kind):
            before = _log_probabilities(problem, problem.utility.updates, batch)
            for i, updates in enumerate(merged):
                after = _log_probabilities(problem, updates, batch)
                if kind == "benign":
                    kl[i] += _by_sequence(
                        batch, [(b.exp() * (b - a)).sum(-1) for b, a in zip(before, after, strict=True)]
                    )
                else:
                    labels = _labels(batch).split(_POSITIONS_AT_ONCE)
                    old, new = (_by_sequence(batch, map(_at, logp, labels)) for logp in (before, after))
                    refusal[i] += new
                    change[i] += [n - o for n, o in zip(new, old, strict=True)]
    return [
        HeldOut(statistics.mean(k), _error(k), statistics.mean(r), statistics.mean(c), _error(c))
        for k, r, c in zip(kl, refusal, change, strict=True)
    ]


def _held_out_batches(problem: Problem, kind: str) -> Iterator[Batch]:
    """Held-out sequences of one kind, in batches on the model's device."""
    sequences = problem.calibration[kind][1]
    found = list(batches(sequences, problem.config.calibration.batch_size, input_device(problem.model)))
    yield from tqdm(found, desc=f"measure, {kind}", unit="batch", leave=False)


@contextmanager
def updated(problem: Problem, updates: Mapping[str, LowRank]) -> Iterator[None]:
    """The model computes with ΔW, by hooks; its weights stay as they are.

    Args:
        problem: Holds the model.
        updates: Module name -> ΔW; up and down take the place of a core's bases.

    Yields:
        Nothing.
    """
    bases = {name: CoreBasis(u.up, u.down.mT) for name, u in updates.items() if u.rank}
    with CoreGradients(problem.model, bases, watched=()) as cores:
        cores.set_cores({name: torch.eye(updates[name].rank, device=b.q_out.device) for name, b in bases.items()})
        yield


def _log_probabilities(problem: Problem, updates: Mapping[str, LowRank], batch: Batch) -> list[Tensor]:
    """Log p of every token at the loss-bearing positions, in float32, some positions at a time."""
    row, position = batch.is_target[:, 1:].nonzero(as_tuple=True)
    with torch.no_grad(), updated(problem, updates):
        logits = problem.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits[
            row, position
        ]
    return [part.float().log_softmax(-1) for part in logits.split(_POSITIONS_AT_ONCE)]


def _labels(batch: Batch) -> Tensor:
    """The tokens at the loss-bearing positions."""
    row, position = batch.is_target[:, 1:].nonzero(as_tuple=True)
    return batch.input_ids[row, position + 1]


def _at(logp: Tensor, labels: Tensor) -> Tensor:
    """Log p of the labels."""
    return logp.gather(1, labels[:, None])[:, 0]


def _by_sequence(batch: Batch, values: Iterator[Tensor] | list[Tensor]) -> list[float]:
    """Sums over the loss-bearing positions of each sequence, in float64."""
    row = batch.is_target[:, 1:].nonzero(as_tuple=True)[0]
    flat = torch.cat(list(values)).double()
    return flat.new_zeros(len(batch.index)).index_add_(0, row, flat).tolist()


def _error(values: Sequence[float]) -> float | None:
    """Standard error of a mean; None for one value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


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
