r"""Fisher matrices of refusals (gain) and of the model's own behaviour (cost), in core coordinates.

F_harm = E[g gᵀ], g = ∇ log p(y_refusal | x): labels given, the empirical Fisher.
F_benign = E[g gᵀ], g = ∇ log p(ŷ | x), ŷ sampled from the model itself: the true Fisher, the metric of the KL
divergence. A sequence's gradient is the sum over its loss-bearing tokens, and both means are per sequence, so that the
quotient of the two is a number with a meaning. *Where*: at θ_ft (local), or averaged over points θ_ft + tτ on the way
to the full patch τ (path), labels sampled from the model at that point.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from sst_kernels.collect import CoreBasis, CoreGradients, TokenGradients
from sst_kernels.labels import counter_uniform, sample_labels

from . import distributed
from .base import input_device
from .data import TokenSequence
from .memory import partition
from .mixture import Statistics, mix_parts, part_name
from .packing import Batch, batches, count_batches
from .part_files import pieces
from .shared_collection import collect_together, settle
from .store import FisherFolder, Progress
from .sums import FisherSums
from .tasks import Task

Save = Callable[[FisherSums, list[int]], None]
"""(sums, numbers of the batches in them)."""


@dataclass(frozen=True)
class CollectionSettings:
    """How Fishers are collected.

    Attributes:
        points: t of the points θ_ft + tτ; (0.0,) is `local`.
        point_weights: Their weights, summing to 1.
        representations: Of the Fishers of harmful and of benign data; see `sums.FisherSums`.
        batch_size: Sequences a forward pass.
        samples: Labels ŷ sampled per position for the true Fisher.
        seed: Of the sampled labels.
        row_length: Tokens of a row that several sequences are packed in; None gives each its own row.
        groups: How many groups of modules are collected one after another, their sums left in the folder; 0 for all at
            once, and kept.
    """

    points: tuple[float, ...] = (0.25, 0.5)
    point_weights: tuple[float, ...] = (0.5, 0.5)
    representations: tuple[str, str] = ("exact", "exact")
    batch_size: int = 8
    samples: int = 1
    seed: int = 0
    row_length: int | None = None
    groups: int = 0


@dataclass(frozen=True)
class Part:
    """One of the sums that a collection consists of.

    Attributes:
        name: A field of `Statistics`, and the task's name, if it has one: see `mixture.part_name`.
        sequences: Tokenised calibration examples.
        sampled: Labels sampled from the model (true Fisher) instead of given (empirical Fisher).
        points: t -> weight.
        representation: As in `FisherSums`.
    """

    name: str
    sequences: Sequence[TokenSequence]
    sampled: bool
    points: Mapping[float, float]
    representation: str

    def empty(self, samples: int) -> FisherSums:
        """Sums without a row, room made for those to come."""
        draws = samples if self.sampled else 1
        return FisherSums(self.representation, draws * len(self.points) * len(self.sequences))


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
        The sum, a float32 scalar, and the logits (R, T, V).
    """
    if logits is None:
        logits = model(**batch.model_inputs, use_cache=False).logits
    row, position = batch.is_target[:, 1:].nonzero(as_tuple=True)  # logits at `position` predict the token after it
    scores = logits[row, position].float()
    if seed is None:
        labels = batch.input_ids[row, position + 1]
    else:
        at = row, position + 1
        uniform = counter_uniform(seed, batch.sequence_index[at], batch.position_ids[at], sample)
        labels = sample_labels(scores.detach(), uniform)
    return -F.cross_entropy(scores, labels, reduction="sum"), logits


class Collector:
    """Fisher collection for one model and one set of core bases; a context manager that holds the hooks.

    Args:
        model: The base model θ_0, in eval mode; the update is added by the hooks.
        bases: Module name -> basis, on the model's device.
        origin: Module name -> core of θ_ft = θ_0 + Δ_utility.
        patch: Module name -> core of the full patch τ; Fishers are collected for these modules.
        settings: How to collect.
        pullback: (module name, rows of ∂/∂vec(C)) -> rows in the coordinates that are summed in; None leaves them.
    """

    def __init__(
        self,
        model: nn.Module,
        bases: Mapping[str, CoreBasis],
        origin: Mapping[str, Tensor],
        patch: Mapping[str, Tensor],
        settings: CollectionSettings,
        pullback: Callable[[str, Tensor], Tensor] | None = None,
    ) -> None:
        self.model, self.origin, self.patch, self.settings = model, origin, patch, settings
        self.pullback = pullback
        self.gradients = CoreGradients(model, bases, watched=patch.keys())

    def __enter__(self) -> Collector:
        self.gradients.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.gradients.__exit__(*exc)

    @contextmanager
    def watching(self, names: Collection[str]) -> Iterator[None]:
        """Within it, gradients of these modules alone are summed."""
        before, self.gradients.watched = self.gradients.watched, frozenset(names)
        try:
            yield
        finally:
            self.gradients.watched = before

    @property
    def sizes(self) -> dict[str, int]:
        """Module name -> n, the number of its coordinates."""
        return {name: tau.numel() for name, tau in self.patch.items()}

    @property
    def device(self) -> torch.device:
        """Where sums are kept: with the patch."""
        return next(iter(self.patch.values())).device

    def empty(self, part: Part) -> FisherSums:
        """The sums of a part before the first batch."""
        return part.empty(self.settings.samples)

    def batches(self, part: Part) -> list[tuple[float, Batch]]:
        """(t, batch) of every step of a part, on the model's device."""
        device = input_device(self.model)
        rows = list(batches(part.sequences, self.settings.batch_size, device, self.settings.row_length))
        return [(t, batch) for t in part.points for batch in rows]

    def collect(
        self,
        part: Part,
        saved: Progress | None = None,
        save: Save | None = None,
        bar: tqdm | None = None,
        numbers: Collection[int] | None = None,
    ) -> FisherSums:
        """Sums over the sequences of g gᵀ at θ_ft + tτ, one forward and one backward pass a batch and point.

        Args:
            part: What to sum.
            saved: Where an earlier run had come to; what it did is not done again.
            save: Called with the sums after every batch.
            bar: Told of every batch.
            numbers: Which of the batches to sum over; None for all, and then the sums are checked.

        Returns:
            The sums; the same bits, however often it was interrupted.

        Raises:
            ValueError: A module got no gradient, or one that is not finite; names it.
        """
        sums, done = (self.empty(part), []) if saved is None else (saved.sums, list(saved.batches))
        steps = self.batches(part)
        wanted = [k for k in (range(len(steps)) if numbers is None else numbers) if k not in set(done)]
        at = None
        for number in wanted:
            t, batch = steps[number]
            if t != at:
                self._move_to(at := t)
            self._one_batch(batch, sums, part.points[t], part.sampled)
            sums.add_count(part.points[t], batch.weight)
            done.append(number)
            if bar is not None:
                bar.update()
            if save is not None:
                save(sums, done)
        if numbers is None:
            self.check(sums)
        return sums

    def accompany(self, part: Part) -> None:
        """One step of a part whose gradients are dropped: other ranks need this one's share of the parameters."""
        t, batch = self.batches(part)[0]
        self._move_to(t)
        self._one_batch(batch, self.empty(part), part.points[t], part.sampled)

    def check(self, sums: FisherSums) -> None:
        """Raise unless every module was reached, by finite gradients.

        Args:
            sums: Of all batches.

        Raises:
            ValueError: One was not; names it.
        """
        for name in (name for name in self.patch if name in self.gradients.watched):
            if name not in sums.first:
                raise ValueError(
                    f"no gradient reached module {name!r}: the model does not use it; train the adapters without it"
                )
            if not torch.isfinite(sums.first[name]).all():
                raise ValueError(
                    f"the gradients of module {name!r} are not finite: the base has NaN weights or overflows in its "
                    "dtype; try --dtype float32 or bfloat16"
                )

    def _move_to(self, t: float) -> None:
        """Put the model at θ_ft + tτ."""
        moved = {name: self.origin[name] + t * tau for name, tau in self.patch.items()}
        self.gradients.set_cores({**self.origin, **moved})

    def _one_batch(self, batch: Batch, sums: FisherSums, weight: float, sampled: bool) -> None:
        """Forward, backward, and the gradients of every module into the sums."""
        s = self.settings
        samples = s.samples if sampled else 1
        self.gradients.layout(batch.cu_seqlens, batch.attention_mask.flatten())
        logits, alike = None, bool((batch.weight == 1).all())
        for sample in range(samples):
            seen: set[str] = set()

            def consume(name: str, gradients: TokenGradients, seen: set[str] = seen) -> None:
                if name in seen:
                    raise ValueError(f"module {name!r} is called more than once in a forward pass: not supported")
                seen.add(name)
                importance = None if alike else batch.weight
                if self.pullback is None:
                    sums.take(name, gradients, weight / samples, importance)
                else:
                    rows = self.pullback(name, gradients.rows())
                    sums.add(name, rows, weight / samples, None if alike else batch.weight.to(rows))

            self.gradients.consume = consume
            loss, logits = log_likelihood(self.model, batch, s.seed if sampled else None, sample, logits)
            loss.backward(retain_graph=sample + 1 < samples)


def collect_statistics(
    collector: Collector,
    harm: Sequence[Task],
    benign: Sequence[Task],
    folder: FisherFolder | None = None,
    title: str = "",
) -> Statistics:
    """Both Fishers, from found and held-out sequences of every task, and ḡ at θ_ft.

    Args:
        collector: Entered.
        harm: Tasks of prompts with refusals.
        benign: Tasks of what should not change.
        folder: Where the sums are kept, every few batches; a collection that is there in part is gone on with.
        title: Before what the progress bar says.

    Returns:
        The statistics.

    Cost: (1 + share held) · points forward and backward passes over each set, and with `path` one more over `harm`.
    """
    s = collector.settings
    parts = _parts(s, harm, benign)
    passes = max(1, s.groups)
    totals = [passes * len(p.points) * count_batches(p.sequences, s.batch_size, s.row_length) for p in parts.values()]
    done = [
        0 if folder is None else folder.batches_done(p.name, total)
        for p, total in zip(parts.values(), totals, strict=True)
    ]
    counts = (sum(numbers) // distributed.world() for numbers in (totals, done))
    sums = {}
    with tqdm(
        **dict(zip(("total", "initial"), counts, strict=True)),
        unit="batch",
        leave=False,
        disable=not distributed.first(),
    ) as bar:
        for key, part in parts.items():
            bar.set_description(title + part.name.replace("_", " "))
            sums[key] = _collect_part(collector, part, folder, bar)
    for task in harm if s.points == (0.0,) else ():
        sums["origin", task.name] = _local_origin(sums["harm", task.name], part_name("origin", task.name), folder)
    return mix_parts(sums, {"harm": {t.name: t.weight for t in harm}, "benign": {t.name: t.weight for t in benign}})


def _parts(s: CollectionSettings, harm: Sequence[Task], benign: Sequence[Task]) -> dict[tuple[str, str], Part]:
    """(Field of `Statistics`, task's name) -> what is to be summed, in the order of collection."""
    points = dict(zip(s.points, s.point_weights, strict=True))
    of_harm, of_benign = s.representations
    wanted = [
        ("harm", harm, "found", False, points, of_harm),
        ("benign", benign, "found", True, points, of_benign),
        ("harm_held", harm, "held", False, points, of_harm),
        ("benign_held", benign, "held", True, points, of_benign),
    ]
    if s.points != (0.0,):
        wanted.append(("origin", harm, "found", False, {0.0: 1.0}, "gradient"))
    return {
        (field, task.name): Part(part_name(field, task.name), getattr(task, side), *how)
        for field, tasks, side, *how in wanted
        for task in tasks
    }


def _local_origin(sums: FisherSums, part: str, folder: FisherFolder | None) -> FisherSums:
    """Σ g at θ_ft over harmful sequences, which their local sums have."""
    origin = FisherSums("gradient", first=dict(sums.first))
    origin.take_counts(sums.counts)
    if folder is not None and distributed.first():
        folder.save(part, origin)
    return origin


def _collect_part(collector: Collector, part: Part, folder: FisherFolder | None, bar: tqdm) -> FisherSums:
    """One part, whole or group by group."""
    count = 0 if folder is None else folder.groups(part.name, collector.settings.groups)
    if count == 0:
        return _collect_at_once(collector, part, folder, bar)
    for name, group in zip(pieces(part.name, count), partition(collector.sizes, count), strict=True):
        with collector.watching(group):
            _collect_at_once(collector, replace(part, name=name), folder, bar)
    distributed.meet()
    return folder.load(part.name).sums


def _collect_at_once(collector: Collector, part: Part, folder: FisherFolder | None, bar: tqdm) -> FisherSums:
    """The sums of the modules that are watched, from the folder as far as they are there."""
    if distributed.world() > 1:
        return collect_together(collector, part, folder, bar)
    if folder is None:
        return collector.collect(part, bar=bar)
    settle(folder, part.name, 1)
    saved = folder.load(part.name, part.empty(collector.settings.samples))
    if saved is not None and saved.complete:
        return saved.sums
    sums = collector.collect(part, saved, partial(folder.save_now_and_then, part.name), bar)
    folder.save(part.name, sums)
    return sums
