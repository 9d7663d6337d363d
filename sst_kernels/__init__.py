"""Batched curvature kernels and generalized eigensolvers for torch."""

from __future__ import annotations

import torch  # noqa: F401  (first: it loads libtorch, which the compiled module needs)

from ._C import build_info
from .eigh import eigh
from .operators import Dense, Diagonal, Kronecker
from .ops import khatri_rao_rows, syrk_accumulate_
from .pencil import Pencil
from .result import EigenResult, Status
from .solve import solve

__all__ = [
    "Dense",
    "Diagonal",
    "EigenResult",
    "Kronecker",
    "Pencil",
    "Status",
    "build_info",
    "eigh",
    "khatri_rao_rows",
    "solve",
    "syrk_accumulate_",
]
