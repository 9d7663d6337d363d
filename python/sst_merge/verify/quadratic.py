"""Where the quadratic model holds: what it predicts of a patch against what the merged model does to held-out text.

Two statements are theorems about the limit α → 0 and must hold; the rest is measured and reported.

    E KL(p_ft ‖ p_{ft+αφ}) / ½α² → φᵀ F_benign(θ_ft) φ          E Δ log p(refusal) / α → ḡᵀφ

F_benign's quadratic form is had twice: as the variance over the whole vocabulary of d log p_t/dα, by differences of
forward passes; and as (gᵀφ)² with labels drawn from the model, by backward passes through the hooks that collect
Fishers, which also give gᵀφ of the refusals. All modules are moved at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sst_kernels.collect import CoreGradients, TokenGradients

from ..base import input_device
from ..coordinates import from_core
from ..directions import Directions
from ..fisher import log_likelihood
from ..held_out import HeldOut, Merged, measure
from ..packing import Batch, batches
from ..picture import numbers
from ..problem import Curvature, Problem
from .checks import Check

Cores = Mapping[str, Tensor]
"""Module name -> (r_out, r_in), float64."""

SAMPLES = 8  # labels drawn at every position
BAND = (0.5, 2.0)
"""Measured over predicted KL for which the model is said to hold."""
_FINE = 1001  # points at which the ratio is looked at
_ERRORS = 6  # standard errors, of known variance: Chebyshev's bound is 3%, a normal tail's 2e-9
_STEP = 2.0**-7  # of derivatives by differences; twice it shows their error
_ROUNDING = 8 * torch.finfo(torch.float32).eps  # of log p at a position; of independent signs at several


@dataclass(frozen=True)
class Slopes:
    """Derivatives along αφ at θ_ft, an entry or row for every held-out sequence of one kind; float64.

    Attributes:
        slope: gᵀφ, (N, samples); given labels have one sample.
        second: φᵀFφ of the sequence, E(gᵀφ)² over labels, by differences, (N,).
        coarse: The same with twice the step.
        variance: Of (gᵀφ)² over drawn labels, (N,).
        weights: u = w_t ω / Σω over task t, (N,): Σ u x is the mean of `held_out.measure`.
        positions: Numbers of loss-bearing positions, (N,).
    """

    slope: Tensor
    second: Tensor
    coarse: Tensor
    variance: Tensor
    weights: Tensor
    positions: Tensor

    def mean(self, x: Tensor) -> float:
        """Σ u x over sequences, for x (N,) or (N, samples); over samples the plain mean."""
        return float(self.weights @ (x if x.ndim == 1 else x.mean(1)))

    @property
    def error(self) -> float:
        """Standard error of the mean of (gᵀφ)² over drawn labels."""
        return self.mean(self.weights * self.variance / self.slope.shape[1]) ** 0.5

    @property
    def rounding(self) -> float:
        """Of a mean of sums of log p over positions."""
        return _ROUNDING * self.mean(self.positions.sqrt())


def slopes(problem: Problem, origin: Cores, phi: Cores, kind: str, seed: int) -> Slopes:
    """gᵀφ of every held-out sequence at θ_ft, and what it is over all labels.

    Args:
        problem: Model and data.
        origin: Cores of θ_ft.
        phi: The direction φ.
        kind: "harm", labels given; or "benign", labels drawn from the model.
        seed: Of drawn labels.

    Returns:
        The derivatives.

    Cost: on the held-out sequences of a kind, six forward and 1 or `SAMPLES` backward passes.
    """
    drawn = seed if kind == "benign" else None
    bases = {name: problem.bases[name] for name in origin}
    found = []
    with CoreGradients(problem.model, bases, watched=phi.keys()) as gradients:
        for batch, weight in _weighted_batches(problem, kind):
            gradients.layout(batch.cu_seqlens, batch.attention_mask.flatten())
            positions = batch.is_target[:, 1:].sum(1).double().cpu()
            second, fourth, squares = _moments(problem, gradients, batch, origin, phi, _STEP)
            coarse, *_ = _moments(problem, gradients, batch, origin, phi, 2 * _STEP)
            gradients.set_cores(origin)
            slope = _backward(problem, gradients, batch, phi, drawn)
            # (Σd)², d independent: E(Σd)⁴ = Σ m₄ + 3(Σ m₂)² − 3Σ m₂²
            variance = (fourth + 2 * second.square() - 3 * squares).clamp(min=0)
            found.append((slope, second, coarse, variance, weight, positions))
    return Slopes(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _weighted_batches(problem: Problem, kind: str) -> Iterator[tuple[Batch, Tensor]]:
    """Held-out sequences of all tasks of a kind, and what each counts: w_t ω / Σω over its task."""
    for task in problem.tasks[kind]:
        total = sum(sequence.weight for sequence in task.held)
        for batch in batches(task.held, problem.config.calibration.batch_size, input_device(problem.model)):
            yield batch, task.weight * batch.weight / total


def _backward(problem: Problem, gradients: CoreGradients, batch: Batch, phi: Cores, seed: int | None) -> Tensor:
    """gᵀφ of a batch's sequences, (S, samples)."""
    columns, logits = [], None
    samples = 1 if seed is None else SAMPLES
    for sample in range(samples):
        total = torch.zeros(len(batch.index), dtype=torch.float64)

        def consume(name: str, tokens: TokenGradients, total: Tensor = total) -> None:
            total += (tokens.rows().double() @ phi[name].to(tokens.device).flatten()).cpu()

        gradients.consume = consume
        value, logits = log_likelihood(problem.model, batch, seed, sample, logits)
        value.backward(retain_graph=sample + 1 < samples)
        columns.append(total)
    return torch.stack(columns, 1)


@torch.no_grad()
def _moments(
    problem: Problem, gradients: CoreGradients, batch: Batch, origin: Cores, phi: Cores, step: float
) -> tuple[Tensor, ...]:
    """Σ_t m₂, Σ_t m₄ and Σ_t m₂², m the moments over the vocabulary of d log p_t/dα at one position; each (S,)."""
    row, position = batch.is_target[:, 1:].nonzero(as_tuple=True)
    ends = []
    for t in (-step, 0.0, step):
        gradients.set_cores({**origin, **{name: origin[name] + t * core for name, core in phi.items()}})
        logits = problem.model(**batch.model_inputs, use_cache=False).logits[row, position]
        ends.append(logits.float().log_softmax(-1))
    p, d = ends[1].exp(), (ends[2] - ends[0]) / (2 * step)
    second, fourth = (torch.where(p > 0, p * d**power, 0.0).sum(-1).double() for power in (2, 4))
    zeros = second.new_zeros(len(batch.index))
    return tuple(zeros.index_add(0, row, x).cpu() for x in (second, fourth, second.square()))


def moved(problem: Problem, origin: Cores, phi: Cores, alpha: float) -> Merged:
    """The model θ_ft + αφ; LoRA biases stay the utility adapter's."""
    cores = {**origin, **{name: origin[name] + alpha * core for name, core in phi.items()}}
    updates = {name: from_core(problem.bases[name], core)[0] for name, core in cores.items()}
    return Merged(updates, problem.utility.biases)


def stored_quadratic(curvature: Curvature, directions: Mapping[str, Directions], phi: Cores) -> float:
    """φᵀF_benign φ by the stored held-out Fisher, undamped: a module at a time, or (gram) across them."""
    held, total = curvature.statistics.benign_held, 0.0
    for d in directions.values():
        total += float(held.quadratic(d.names, torch.cat([phi[name].flatten() for name in d.names])[:, None])[0])
    return total


def sweep(
    problem: Problem,
    curvature: Curvature,
    directions: Mapping[str, Directions],
    phi: Cores,
    alphas: Sequence[float],
    seed: int,
) -> tuple[list[dict[str, Any]], list[Check], list[str]]:
    """Predicted beside measured over α, and the checks of both limits.

    Args:
        problem: Model and data.
        curvature: The run's statistics.
        directions: Of its pencils, for the modules that each covers.
        phi: The kept patch.
        alphas: Strengths α > 0, ascending, two or more.
        seed: Of drawn labels.

    Returns:
        A row for every α, nats per sequence; the checks; and notes on what could not be checked.

    Cost: 2 + len(alphas) forward passes over the held-out sequences, and those of `slopes`.
    """
    origin = curvature.origin
    models = [moved(problem, origin, phi, alpha) for alpha in (0.0, *alphas)]
    zero, *measured = measure(problem, models)
    benign, harm = (slopes(problem, origin, phi, kind, seed) for kind in ("benign", "harm"))
    stored = stored_quadratic(curvature, directions, phi)
    slope = sum(float(curvature.statistics.gradient(name) @ core.flatten()) for name, core in phi.items())
    rows = [
        {
            "alpha": alpha,
            "measured_kl": m.kl,
            "measured_kl_se": m.kl_error,
            "predicted_kl": 0.5 * alpha**2 * stored,
            "predicted_kl_at_ft": 0.5 * alpha**2 * benign.mean(benign.second),
            "measured_refusal": m.refusal_change,
            "measured_refusal_se": m.refusal_error,
            "predicted_refusal": alpha * slope,
            "predicted_refusal_held": alpha * harm.mean(harm.slope),
        }
        for alpha, m in zip(alphas, measured, strict=True)
    ]
    if problem.replaced:
        return rows, [], ["the safety adapter replaces whole parameters: as α → 0 the merge is not the utility model"]
    checks = [*_limit_of_kl(rows, zero, benign), *_limit_of_refusal(rows, zero, harm)]
    notes = (
        [] if len(checks) == 2 else ["a limit α → 0 was not judged: at every α that was swept, rounding is too large"]
    )
    return rows, checks, notes


def _extrapolated(alphas: Sequence[float], quotients: Sequence[float], i: int) -> tuple[float, float]:
    """The limit at α = 0 of a smooth quotient through its i-th and next value; twice what it changes up to i + 2."""
    step = (quotients[i + 1] - quotients[i]) * alphas[i] / (alphas[i + 1] - alphas[i])
    changes = [abs(after - before) for before, after in pairwise(quotients[i : i + 3])]
    return quotients[i] - step, 2 * max(changes)


def _limit_of_kl(rows: Sequence[Mapping[str, float]], zero: HeldOut, benign: Slopes) -> list[Check]:
    """KL/½α² → φᵀFφ, at the least α where KL is well above its rounding; and φᵀFφ by drawn labels."""
    quadratic = benign.mean(benign.second)
    if not quadratic > 0:
        return []
    drawn = Check(
        "limit",
        "θ_ft",
        "E(gᵀφ)² = φᵀF_benign(θ_ft)φ, labels drawn",
        -abs(benign.mean(benign.slope.square()) - quadratic) / quadratic,
        (_ERRORS * benign.error + abs(benign.mean(benign.coarse) - quadratic)) / quadratic,
        f"{_ERRORS} standard errors of drawn labels, from their fourth moment, and what twice the step changes",
        limit=0.9,
    )
    floor, rounding = abs(zero.kl), benign.rounding
    noise = [floor + 2 * (floor * abs(row["measured_kl"])) ** 0.5 + rounding for row in rows]
    clear = [i for i, row in enumerate(rows[:-1]) if not noise[i] > 0.05 * row["measured_kl"]]
    if not clear:
        return [drawn]
    alphas, i = [row["alpha"] for row in rows], clear[0]
    limit, bias = _extrapolated(alphas, [2 * row["measured_kl"] / row["alpha"] ** 2 for row in rows], i)
    tolerance = bias + abs(benign.mean(benign.coarse) - quadratic) + 2 * noise[i] / alphas[i] ** 2
    kl = Check(
        "limit",
        f"α = {alphas[i]:g}",
        "E KL / ½α² → φᵀF_benign(θ_ft)φ as α → 0",
        -abs(limit - quadratic) / quadratic,
        tolerance / quadratic,
        "twice the change of the quotient, what twice the step of the derivative changes, and rounding of KL",
        limit=0.9,
    )
    return [drawn, kl]


def _limit_of_refusal(rows: Sequence[Mapping[str, float]], zero: HeldOut, harm: Slopes) -> list[Check]:
    """Δ log p/α → ḡᵀφ, at the least α where the change is well above its rounding."""
    noise = 4 * abs(zero.refusal_change) + harm.rounding + _ROUNDING * abs(zero.refusal)
    unit = harm.mean(harm.slope.abs())
    alphas = [row["alpha"] for row in rows]
    clear = [i for i, alpha in enumerate(alphas[:-1]) if not noise > 0.05 * alpha * unit]
    if not clear:
        return []
    i = clear[0]
    limit, bias = _extrapolated(alphas, [row["measured_refusal"] / row["alpha"] for row in rows], i)
    tolerance = bias + noise / alphas[i] + 1e-3 * unit
    return [
        Check(
            "limit",
            f"α = {alphas[i]:g}",
            "E Δ log p(refusal) / α → ḡᵀφ as α → 0",
            -abs(limit - harm.mean(harm.slope)) / unit,
            tolerance / unit,
            "twice the change of the quotient, rounding of log p, and 10⁻³ for a float32 backward pass",
            limit=0.9,
        )
    ]


def holds(rows: Sequence[Mapping[str, float]], predicted: str) -> tuple[float, float] | None:
    """The longest range of α in which measured over predicted KL is in `BAND`, the ratio interpolated in logarithms.

    Args:
        rows: From `sweep`.
        predicted: Key of the prediction.

    Returns:
        (least, largest) α; an end of the sweep where it does not end before; None where the model holds nowhere.
    """
    alpha, measured, model = (numbers(rows, key) for key in ("alpha", "measured_kl", predicted))
    known = (measured > 0) & (model > 0)
    if not known.any():
        return None
    at = np.linspace(*np.log(alpha[known][[0, -1]]), _FINE)
    ratio = np.interp(at, np.log(alpha[known]), np.log(measured[known] / model[known]))
    inside = (ratio >= np.log(BAND[0])) & (ratio <= np.log(BAND[1]))
    edges = np.flatnonzero(np.diff(np.r_[False, inside, False])).reshape(-1, 2)
    if not len(edges):
        return None
    start, stop = edges[np.argmax(edges[:, 1] - edges[:, 0])]
    return float(np.exp(at[start])), float(np.exp(at[stop - 1]))
