"""Merge methods to compare with: short pure functions of one module's true ΔW, or of its core.

A core C, ΔW = Q_out C Q_inᵀ with orthonormal Q_out and Q_in, stands for ΔW exactly wherever a method is linear, or made
of singular values and vectors. Methods that look at entries say in which coordinates. Only `sst_m_ratio` sees base
weights.
"""

from .curvature import fisher_averaging, gradient_matching, regmean, shrunk_gram, single_fisher, top_eigenvectors
from .entrywise import (
    agreeing_mean,
    dare,
    della,
    diagonal_sst_mask,
    interpolation,
    keep_largest,
    magprune_drop,
    ratio_mask,
    sst_m_ratio,
    sst_v_ratio,
    task_arithmetic,
    ties,
)
from .safety import aligned_part, is_unsafe, safe_lora, safe_merge
from .spectral import isotropic, knots, subspace_boosting, tsv

__all__ = [
    "agreeing_mean",
    "aligned_part",
    "dare",
    "della",
    "diagonal_sst_mask",
    "fisher_averaging",
    "gradient_matching",
    "interpolation",
    "is_unsafe",
    "isotropic",
    "keep_largest",
    "knots",
    "magprune_drop",
    "ratio_mask",
    "regmean",
    "safe_lora",
    "safe_merge",
    "shrunk_gram",
    "single_fisher",
    "sst_m_ratio",
    "sst_v_ratio",
    "subspace_boosting",
    "task_arithmetic",
    "ties",
    "top_eigenvectors",
    "tsv",
]
