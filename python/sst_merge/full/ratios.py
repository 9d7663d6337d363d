"""Ratios r by which the entries of the safety patch are ranked or weighted: the merge is θ_u + α m⊙τ.

r is f_harm/(f_benign + ε) (diagonal SST), (θ_s−θ_u)²/((θ_u−θ_0)² + ε) (SST-V) or |θ_s|/(|θ_u| + ε) (SST-M); see
`baselines` for their source. ε is given in units of the mean over all merged entries of what it is added to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..baselines import sst_m_ratio, sst_v_ratio

Values = Mapping[str, Tensor]
"""What was read of a slab: "base", "utility", "safety", "harm", "benign" -> (m,)."""


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
