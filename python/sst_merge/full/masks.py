"""Masks m of a patch, entry by entry, from ratios r ≥ 0 of many tensors ranked together.

A hard mask keeps the largest r, exactly and without sorting (`sst_kernels.TopSelect`); a soft one is r/max r.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sst_kernels import TopSelect

Stream = Callable[[], Iterator[tuple[str, Tensor]]]
"""Gives (name, r) of all slabs, in the same order whenever it is called."""


class Mask:
    """The mask of all entries of a stream, given slab by slab in the stream's order.

    Args:
        stream: Of the ratios r ≥ 0, float32.
        total: Number of entries.
        share: Share of entries a hard mask keeps, ties to the first in the stream; None for the soft mask r/max r.

    Attributes:
        threshold: The least r that is kept; None with a soft mask.

    Raises:
        ValueError: A ratio is NaN; names the tensor.

    Cost: the stream is read twice (hard) or once (soft) before the first mask.
    """

    def __init__(self, stream: Stream, total: int, share: float | None) -> None:
        self.threshold = self._largest = self._top = None
        if share is None:
            self._largest = max((float(r.max()) for _, r in stream()), default=0.0)
            return
        self._top = TopSelect(total, max(1, round(share * total)))
        while not self._top.done:
            for name, r in stream():
                self._top.observe(r, name)
            self._top.next_pass()
        self.threshold = self._top.threshold

    def of(self, r: Tensor) -> Tensor:
        """M of the next slab: bool, or float32 in [0, 1]."""
        if self._top is not None:
            return self._top.mask(r)
        return r / max(self._largest, torch.finfo(r.dtype).tiny)
