"""Merges entry by entry, θ = θ_u + α m⊙τ, streamed: no tensor is whole in memory, but for one that is small."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..settings import Config
from .fishers import KINDS, DiagonalFishers, checked
from .masks import Mask
from .models import BASE, SAFETY, UTILITY, Models
from .ratios import RATIOS, Ratio
from .tensors import Slab, read_ahead, slabs

_KEPT = 1 << 26
"""Ratios of a tensor up to this size are kept (256 MB), so that everything is read once; of others they are computed
again at every reading."""


@dataclass(frozen=True)
class Change:
    """What a merge does to a run of a tensor's entries: θ = θ_u + α φ.

    Attributes:
        slab: Which entries.
        utility: θ_u, (m,).
        patch: τ, (m,).
        filtered: φ, (m,).
        kept: Σ m, what is kept of the entries; m for all of them.
    """

    slab: Slab
    utility: Tensor
    patch: Tensor
    filtered: Tensor
    kept: float


class Elementwise:
    """Diagonal SST, SST-V, SST-M; task arithmetic and interpolation, which keep everything.

    Args:
        models: What is merged.
        config: Method and parameters are used.
        fishers: For diagonal SST.

    Attributes:
        names: What is merged.
        not_covered: What is merged without curvature, or not at all; nothing.
        rows: Name -> what the report says of a tensor besides what every method can; nothing.
        warnings: None.
        epsilon: ε in the units of what it is added to; None for a method without ratio.
        threshold: The least ratio that a hard global mask keeps, once `changes` has run.

    Raises:
        ValueError: What ε is relative to is zero.
    """

    def __init__(self, models: Models, config: Config, fishers: DiagonalFishers | None) -> None:
        self.models, self.fishers, self.parameters = models, fishers, config.parameters
        self.ratio: Ratio | None = RATIOS.get(config.merge_method)
        interpolates = config.merge_method == "interpolation" or getattr(self.parameters, "patch", "") == "interpolate"
        self.origin = UTILITY if interpolates else BASE
        self.names, self.not_covered, self.rows, self.warnings = models.names, [], {}, []
        self.epsilon = self.threshold = None
        self._differ = False
        if self.ratio is not None:
            self.epsilon = self.parameters.epsilon * self._mean_of_unit()
            if not self.epsilon > 0:
                raise ValueError(_NO_UNIT[config.merge_method])

    def changes(self) -> Iterator[Change]:
        """Every entry that is merged, once, tensor by tensor.

        Yields:
            Slabs in the order of `names`.

        Raises:
            ValueError: A Fisher or a ratio is no number, with the tensor's name; or the two models are the same.
        """
        names = self.models.names
        is_global = getattr(self.parameters, "scope", "module") == "global"
        for group in [names] if is_global else [[name] for name in names]:
            yield from self._group(group)
        if not self._differ:
            raise ValueError("models: utility and safety hold the same weights; name two models")

    def _group(self, names: Sequence[str]) -> Iterator[Change]:
        """The tensors whose entries are ranked together."""
        items = list(slabs(names, self.models.of[UTILITY].places))
        mask, kept = None, None
        reads = {UTILITY, SAFETY, self.origin}
        if self.ratio is not None:
            total = sum(slab.stop - slab.start for slab in items)
            if total <= _KEPT:
                kept = list(self._ratios(items))
            share = self.parameters.share if self.parameters.mask == "hard" else None
            mask = Mask(lambda: self._ratios(items) if kept is None else iter(kept), total, share)
            self.threshold = mask.threshold
            reads |= set() if kept is not None else set(self.ratio.reads)
        for i, (slab, x) in enumerate(self._read(items, reads)):
            self._differ = self._differ or not torch.equal(x[UTILITY], x[SAFETY])
            patch = x[SAFETY] - x[self.origin]
            if mask is None:
                yield Change(slab, x[UTILITY], patch, patch, float(len(patch)))
                continue
            r = self.ratio.formula(x, self.epsilon).float() if kept is None else kept[i][1]
            m = mask.of(r)
            yield Change(slab, x[UTILITY], patch, patch * m, float(m.sum()))

    def _ratios(self, items: Sequence[Slab]) -> Iterator[tuple[str, Tensor]]:
        """(name, r) of every slab, r in float32; weights that are no numbers are named with their model."""
        for slab, x in self._read(items, self.ratio.reads):
            r = self.ratio.formula(x, self.epsilon).float()
            if not math.isfinite(float(r.sum())):
                self.models.check_finite(slab)
            yield slab.name, r

    def _mean_of_unit(self) -> float:
        """The mean of what ε is relative to: from the Fisher's metadata, or by reading it."""
        places = self.models.of[UTILITY].places
        count = sum(places[name].numel for name in self.models.names)
        if self.ratio.unit_reads == ("benign",) and "benign" in self.fishers.sums:
            return self.fishers.sums["benign"] / count
        total = 0.0
        for slab, x in self._read(list(slabs(self.models.names, places)), self.ratio.unit_reads):
            unit = float(self.ratio.unit(x).double().sum())
            if not math.isfinite(unit):
                self.models.check_finite(slab)
            total += unit
        return total / count

    def _read(self, items: Sequence[Slab], reads: Iterable[str]) -> Iterator[tuple[Slab, Mapping[str, Any]]]:
        """Every slab with what is asked for: θ's in the dtype of the merge, Fishers in float32 and checked."""
        kinds = [kind for kind in KINDS if kind in reads]
        owners = self.models.needed(set(reads) - set(kinds))

        def read(slab: Slab) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            theta = {owner: self.models.files[owner].read(slab) for owner in owners}
            return theta, {kind: self.fishers.stored(kind, slab) for kind in kinds}

        for slab, (theta, fisher) in read_ahead(items, read):
            diagonals = {kind: checked(kind, slab.name, values) for kind, values in fisher.items()}
            yield slab, {**self.models.weighted(theta), **diagonals}


_NO_UNIT = {
    "diagonal_sst": "F_benign is zero: no gradient of the benign data reached the model; collect it again",
    "sst_v": "epsilon: the utility model equals the base, so there is no unit for it; give another model",
    "sst_m": "epsilon: the utility model's weights are all zero, so there is no unit for it; give another model",
}
