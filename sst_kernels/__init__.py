"""Batched curvature kernels and generalized eigensolvers for torch."""

from __future__ import annotations

import torch  # noqa: F401  (first: it loads libtorch, which the compiled module needs)

from ._C import build_info
from .accumulate import AccumulatorOptions, FactorAccumulator
from .combined import Damped, Scaled, Sum
from .davidson import DavidsonOptions
from .distributed import solve_distributed
from .eigh import eigh
from .eigh_topk import eigh_topk
from .factors import Factors
from .operators import Dense, Diagonal, Kronecker, Operator
from .ops import (
    fused_eigh,
    fused_eigh_limit,
    grouped_syrk_accumulate_,
    khatri_rao_rows,
    khatri_rao_syrk_accumulate_,
    kron_accumulate_,
    pack_lower,
    symmetrize_,
    syrk_accumulate_,
    unpack_lower,
)
from .pencil import Pencil
from .products import symm_thin, symm_thin_pair
from .result import EigenResult, Status
from .solve import solve
from .structured import EKFAC, FunctionOperator, Gram, LowRankPlusDiagonal
from .top_select import TopSelect, digit_histogram_, threshold_mask_, top_mask

__all__ = [
    "EKFAC",
    "AccumulatorOptions",
    "Damped",
    "DavidsonOptions",
    "Dense",
    "Diagonal",
    "EigenResult",
    "FactorAccumulator",
    "Factors",
    "FunctionOperator",
    "Gram",
    "Kronecker",
    "LowRankPlusDiagonal",
    "Operator",
    "Pencil",
    "Scaled",
    "Status",
    "Sum",
    "TopSelect",
    "build_info",
    "digit_histogram_",
    "eigh",
    "eigh_topk",
    "fused_eigh",
    "fused_eigh_limit",
    "grouped_syrk_accumulate_",
    "khatri_rao_rows",
    "khatri_rao_syrk_accumulate_",
    "kron_accumulate_",
    "pack_lower",
    "solve",
    "solve_distributed",
    "symm_thin",
    "symm_thin_pair",
    "symmetrize_",
    "syrk_accumulate_",
    "threshold_mask_",
    "top_mask",
    "unpack_lower",
]
