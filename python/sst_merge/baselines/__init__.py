"""Merge methods to compare with: short pure functions of one module's true ΔW, or of its core.

A core C, ΔW = Q_out C Q_inᵀ with orthonormal Q_out and Q_in, stands for ΔW exactly wherever a method is linear, or made
of singular values and vectors. Methods that look at entries say in which coordinates. Only `sst_m_ratio` sees base
weights.
"""

from .curvature import fisher_averaging, single_fisher, top_eigenvectors
from .entrywise import (
    dare,
    diagonal_sst_mask,
    interpolation,
    keep_largest,
    ratio_mask,
    sst_m_ratio,
    sst_v_ratio,
    task_arithmetic,
    ties,
)
from .spectral import subspace_boosting, tsv

__all__ = [
    "dare",
    "diagonal_sst_mask",
    "fisher_averaging",
    "interpolation",
    "keep_largest",
    "ratio_mask",
    "single_fisher",
    "sst_m_ratio",
    "sst_v_ratio",
    "subspace_boosting",
    "task_arithmetic",
    "ties",
    "top_eigenvectors",
    "tsv",
]
