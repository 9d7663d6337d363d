"""Masks m of the safety patch, entry by entry, from ratios r: the merge is θ_u + α m⊙τ.

r is f_harm/(f_benign + ε) (diagonal SST), (θ_s−θ_u)²/((θ_u−θ_0)² + ε) (SST-V) or |θ_s|/(|θ_u| + ε) (SST-M); see
`baselines` for their source. ε is given in units of the mean over all merged entries of what it is added to. A hard
mask keeps the largest r, exactly and without sorting (`sst_kernels.TopSelect`); a soft one is r/max r.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sst_kernels import TopSelect

from ..baselines import sst_m_ratio, sst_v_ratio

Values = Mapping[str, Tensor]
"""What was read of a slab: "base", "utility", "safety", "harm", "benign" -> (m,)."""

Stream = Callable[[], Iterator[tuple[str, Tensor]]]
"""Gives (name, r) of all slabs, in the same order whenever it is called."""


@dataclass(frozen=True)
class Ratio:
    """How r is had.

    Attributes:
        reads: What it is computed from.
        unit_reads: What `unit` is computed from.
        unit: What ε is added to.
        formula: (values, ε) -> r.
    """

    reads: tuple[str, ...]
    unit_reads: tuple[str, ...]
    unit: Callable[[Values], Tensor]
    formula: Callable[[Values, float], Tensor]


RATIOS = {
    "diagonal_sst": Ratio(
        ("harm", "benign"), ("benign",), lambda x: x["benign"], lambda x, e: x["harm"] / (x["benign"] + e)
    ),
    "sst_v": Ratio(
        ("base", "utility", "safety"),
        ("base", "utility"),
        lambda x: (x["utility"] - x["base"]).square(),
        lambda x, e: sst_v_ratio(x["utility"] - x["base"], x["safety"] - x["base"], e),
    ),
    "sst_m": Ratio(
        ("utility", "safety"),
        ("utility",),
        lambda x: x["utility"].abs(),
        lambda x, e: sst_m_ratio(torch.zeros(()), x["utility"], x["safety"], e),
    ),
}
"""Method -> its ratio; a method without one keeps the whole patch."""


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
