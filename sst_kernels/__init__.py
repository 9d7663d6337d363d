"""Batched curvature kernels and generalized eigensolvers for torch."""

from __future__ import annotations

import torch  # noqa: F401  (first: it loads libtorch, which the compiled module needs)

from ._C import build_info
from .accumulate import AccumulatorOptions, FactorAccumulator
from .eigh import eigh
from .factors import Factors
from .operators import Dense, Diagonal, Kronecker
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
from .result import EigenResult, Status
from .solve import solve

__all__ = [
    "AccumulatorOptions",
    "Dense",
    "Diagonal",
    "EigenResult",
    "FactorAccumulator",
    "Factors",
    "Kronecker",
    "Pencil",
    "Status",
    "build_info",
    "eigh",
    "fused_eigh",
    "fused_eigh_limit",
    "grouped_syrk_accumulate_",
    "khatri_rao_rows",
    "khatri_rao_syrk_accumulate_",
    "kron_accumulate_",
    "pack_lower",
    "solve",
    "symmetrize_",
    "syrk_accumulate_",
    "unpack_lower",
]
