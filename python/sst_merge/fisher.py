r"""Fisher matrices of refusals (gain) and of the model's own behaviour (cost), in core coordinates.

F_harm = E[g gᵀ], g = ∇ log p(y_refusal | x): labels given, the empirical Fisher.
F_benign = E[g gᵀ], g = ∇ log p(ŷ | x), ŷ sampled from the model itself: the true Fisher, the metric of the KL
divergence. A sequence's gradient is the sum over its loss-bearing tokens, and both means are per sequence, so that the
quotient of the two is a number with a meaning. *Where*: at θ_ft (local), or averaged over points θ_ft + tτ on the way
to the full patch τ (path), labels sampled from the model at that point.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from sst_kernels import syrk_accumulate_
from sst_kernels.collect import CoreBasis, CoreGradients
from sst_kernels.labels import counter_uniform, sample_labels

from .base import input_device
from .data import Batch, TokenSequence, batches


@dataclass
class FisherSums:
    """Σ w g gᵀ and Σ w g over sequences, per module, with their count: sums, so that parts add up.

    Attributes:
        diagonal: Keep only Σ w g² (n,) instead of Σ w g gᵀ (n, n).
        second: Module name -> (n, n), only its lower triangle is meaningful; or (n,).
        first: Module name -> (n,), Σ w g.
        count: Σ w over sequences.
    """

    diagonal: bool
    second: dict[str, Tensor] = field(default_factory=dict)
    first: dict[str, Tensor] = field(default_factory=dict)
    count: float = 0.0

    def add(self, name: str, rows: Tensor, weight: float) -> None:
        """Σ ← Σ + w Σ_s g_s g_sᵀ for the rows g_s of one module, in place.

        Args:
            name: Module name.
            rows: (S, n), float32 or float64.
            weight: w.
        """
        n = rows.shape[1]
        if name not in self.second:
            self.second[name] = rows.new_zeros(n if self.diagonal else (n, n))
            self.first[name] = rows.new_zeros(n)
        if self.diagonal:
            self.second[name].add_(rows.square().sum(0), alpha=weight)
        else:
            syrk_accumulate_(self.second[name], rows, alpha=weight)
        self.first[name].add_(rows.sum(0), alpha=weight)

    def fisher(self, name: str) -> Tensor:
        """F = Σ w g gᵀ / Σ w, symmetric (n, n), or its diagonal (n,); float64."""
        second = self.second[name].double() / self.count
        return second if self.diagonal else second.tril() + second.tril(-1).mT

    def diagonal_of(self, name: str) -> Tensor:
        """Diag F, (n,), float64."""
        second = self.second[name]
        return (second if self.diagonal else second.diagonal()).double() / self.count

    def mean_gradient(self, name: str) -> Tensor:
        """ḡ = Σ w g / Σ w, (n,), float64."""
        return self.first[name].double() / self.count


@dataclass(frozen=True)
class CollectionSettings:
    """How Fishers are collected.

    Attributes:
        points: t of the points θ_ft + tτ; (0.0,) is `local`.
        point_weights: Their weights, summing to 1.
        diagonal: Keep diagonals only.
        batch_size: Sequences a forward pass.
        samples: Labels ŷ sampled per position for the true Fisher.
        seed: Of the sampled labels.
    """

    points: tuple[float, ...] = (0.25, 0.5)
    point_weights: tuple[float, ...] = (0.5, 0.5)
    diagonal: bool = False
    batch_size: int = 8
    samples: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Statistics:
    """Fishers of both kinds, from sequences that find directions and from held-out ones that judge them.

    Attributes:
        harm: Empirical Fisher of refusals.
        benign: True Fisher of the model's own behaviour.
        harm_held: As `harm`, held-out sequences.
        benign_held: As `benign`, held-out sequences.
        gradient: Mean gradient of log p(refusal) at θ_ft, module name -> (n,), float64: it carries the sign.
    """

    harm: FisherSums
    benign: FisherSums
    harm_held: FisherSums
    benign_held: FisherSums
    gradient: dict[str, Tensor]


def log_likelihood(
    model: nn.Module, batch: Batch, seed: int | None, sample: int = 0, logits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Σ log p(y_t | y_<t, x) over the loss-bearing tokens of a batch.

    Args:
        model: A causal language model of transformers.
        batch: The tokens.
        seed: None takes the batch's own tokens as labels y_t; otherwise y_t is sampled from the model with this seed,
            given the batch's own prefix.
        sample: Which of several samples.
        logits: Of a forward pass of the same batch, to save another one.

    Returns:
        The sum, a float32 scalar, and the logits (S, T, V).
    """
    if logits is None:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    row, position = batch.is_target[:, 1:].nonzero(as_tuple=True)  # logits at `position` predict the token after it
    scores = logits[row, position].float()
    if seed is None:
        labels = batch.input_ids[row, position + 1]
    else:
        labels = sample_labels(scores.detach(), counter_uniform(seed, batch.index[row], position + 1, sample))
    return -F.cross_entropy(scores, labels, reduction="sum"), logits


class Collector:
    """Fisher collection for one model and one set of core bases; a context manager that holds the hooks.

    Args:
        model: The base model θ_0, in eval mode; the update is added by the hooks.
        bases: Module name -> basis, on the model's device.
        origin: Module name -> core of θ_ft = θ_0 + Δ_utility.
        patch: Module name -> core of the full patch τ; Fishers are collected for these modules.
        settings: How to collect.
    """

    def __init__(
        self,
        model: nn.Module,
        bases: Mapping[str, CoreBasis],
        origin: Mapping[str, Tensor],
        patch: Mapping[str, Tensor],
        settings: CollectionSettings,
    ) -> None:
        self.model, self.origin, self.patch, self.settings = model, origin, patch, settings
        self.gradients = CoreGradients(model, bases, watched=patch.keys())

    def __enter__(self) -> Collector:
        self.gradients.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.gradients.__exit__(*exc)

    def collect(
        self,
        sequences: Sequence[TokenSequence],
        *,
        sampled: bool,
        points: Mapping[float, float],
        title: str,
    ) -> FisherSums:
        """Sums over the sequences of g gᵀ at θ_ft + tτ, one forward and one backward pass a batch and point.

        Args:
            sequences: Tokenised calibration examples.
            sampled: Labels sampled from the model (true Fisher) instead of given (empirical Fisher).
            points: t -> weight.
            title: Of the progress bar.

        Returns:
            The sums.

        Raises:
            ValueError: A module got no gradient, or one that is not finite; names it.
        """
        s = self.settings
        sums = FisherSums(s.diagonal)
        bar = tqdm(total=len(points) * len(sequences), desc=title, unit="seq", leave=False)
        with bar:
            for t, weight in points.items():
                self._move_to(t)
                for batch in batches(sequences, s.batch_size, input_device(self.model)):
                    self._one_batch(batch, sums, weight, sampled)
                    bar.update(len(batch.index))
                sums.count += weight * len(sequences)
        _check_complete(sums, self.patch)
        return sums

    def _move_to(self, t: float) -> None:
        """Put the model at θ_ft + tτ."""
        moved = {name: self.origin[name] + t * tau for name, tau in self.patch.items()}
        self.gradients.set_cores({**self.origin, **moved})

    def _one_batch(self, batch: Batch, sums: FisherSums, weight: float, sampled: bool) -> None:
        """Forward, backward, and the rows of every module into the sums."""
        s = self.settings
        samples = s.samples if sampled else 1
        size, length = batch.input_ids.shape
        offsets = torch.arange(0, (size + 1) * length, length, device=batch.input_ids.device)
        self.gradients.layout(offsets, batch.attention_mask.flatten())
        logits = None
        for sample in range(samples):
            seen: set[str] = set()

            def consume(name: str, rows: Tensor, seen: set[str] = seen) -> None:
                if name in seen:
                    raise ValueError(f"module {name!r} is called more than once in a forward pass: not supported")
                seen.add(name)
                sums.add(name, rows, weight / samples)

            self.gradients.consume = consume
            loss, logits = log_likelihood(self.model, batch, s.seed if sampled else None, sample, logits)
            loss.backward(retain_graph=sample + 1 < samples)


def _check_complete(sums: FisherSums, names: Iterable[str]) -> None:
    """Every module was reached, by finite gradients."""
    for name in names:
        if name not in sums.second:
            raise ValueError(
                f"no gradient reached module {name!r}: the model does not use it; train the adapters without it"
            )
        if not torch.isfinite(sums.diagonal_of(name)).all():
            raise ValueError(
                f"the gradients of module {name!r} are not finite: the base has NaN weights or overflows in its dtype; "
                "try --dtype float32 or bfloat16"
            )


def collect_statistics(
    collector: Collector,
    harm: tuple[Sequence[TokenSequence], Sequence[TokenSequence]],
    benign: tuple[Sequence[TokenSequence], Sequence[TokenSequence]],
) -> Statistics:
    """Both Fishers, from found and held-out sequences, and ḡ at θ_ft.

    Args:
        collector: Entered.
        harm: (found, held) sequences of prompts with refusals.
        benign: (found, held) sequences of what should not change.

    Returns:
        The statistics.

    Cost: (1 + share held) · points forward and backward passes over each set, and with `path` one more over `harm`.
    """
    s = collector.settings
    points = dict(zip(s.points, s.point_weights, strict=True))
    found, held = (
        {
            "harm": collector.collect(harm[i], sampled=False, points=points, title=f"harm, {part}"),
            "benign": collector.collect(benign[i], sampled=True, points=points, title=f"benign, {part}"),
        }
        for i, part in enumerate(("found", "held out"))
    )
    at_origin = found["harm"]
    if s.points != (0.0,):
        at_origin = collector.collect(harm[0], sampled=False, points={0.0: 1.0}, title="harm, gradient")
    gradient = {name: at_origin.mean_gradient(name) for name in at_origin.first}
    return Statistics(found["harm"], found["benign"], held["harm"], held["benign"], gradient)
