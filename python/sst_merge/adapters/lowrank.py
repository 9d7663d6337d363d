"""The change of one module's linear map, kept as two thin factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RANK_TOLERANCE = 1e-6
"""Singular values of float32 factors below this share of the largest are rounding."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """ΔW = up · down, the adapter's scale folded in: y += up (down x).

    Attributes:
        up: (d_out, r).
        down: (r, d_in), in the dtype of `up`. For an embedding x is one-hot, d_in the vocabulary.

    Raises:
        ValueError: The factors do not chain.

    Example:
        >>> update = LowRank(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0, 0.0]]))
        >>> update.shape, update.rank, update.singular_values()  # √5 · 5
        ((2, 3), 1, tensor([11.1803], dtype=torch.float64))
    """

    up: Tensor
    down: Tensor

    def __post_init__(self) -> None:
        """Check that the factors chain."""
        if self.up.ndim != 2 or self.down.ndim != 2 or self.up.shape[1] != self.down.shape[0]:
            raise ValueError(
                "LowRank: up must be (d_out, r) and down (r, d_in), "
                f"got {tuple(self.up.shape)} and {tuple(self.down.shape)}"
            )

    @property
    def rank(self) -> int:
        """Number of columns of `up`: an upper bound of the rank of ΔW."""
        return self.up.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of ΔW."""
        return self.up.shape[0], self.down.shape[1]

    def dense(self) -> Tensor:
        """ΔW, (d_out, d_in)."""
        return self.up @ self.down

    def scaled(self, c: float) -> LowRank:
        """Return c ΔW."""
        return LowRank(self.up * c, self.down)

    def singular_values(self) -> Tensor:
        """σ(ΔW) = σ(R_up R_downᵀ) with up = Q_up R_up and downᵀ = Q_down R_down.

        Returns:
            float64, descending, min(r, d_out, d_in) of them; the others are zero.

        Cost: O((d_out + d_in) r²) flops; no d_out × d_in matrix.
        """
        r_up = torch.linalg.qr(self.up.double(), mode="r").R
        r_down = torch.linalg.qr(self.down.double().mT, mode="r").R
        return torch.linalg.svdvals(r_up @ r_down.mT)


def factor(delta: Tensor, rank: int | None = None) -> tuple[LowRank, float]:
    """Factors of a dense change by its truncated SVD: U√Σ · √ΣVᵀ, the best of its rank.

    Args:
        delta: (d_out, d_in), floating point.
        rank: Largest rank of the factors; None keeps the numerical rank, that is the singular
            values above max(d_out, d_in) · eps of the largest.

    Returns:
        The factors, in delta's dtype (rank 0 for a zero delta), and the relative error
        ‖ΔW − up·down‖_F / ‖ΔW‖_F of leaving out the other singular values.

    Raises:
        ValueError: delta is not a finite matrix, or rank is below 1.

    Cost: one SVD in float64, O(d_out · d_in · min(d_out, d_in)) flops.
    Source: Eckart and Young, 1936.
    """
    if delta.ndim != 2 or not torch.isfinite(delta).all():
        raise ValueError(f"factor: delta must be a finite matrix, got {tuple(delta.shape)}")
    if rank is not None and rank < 1:
        raise ValueError(f"factor: rank must be at least 1, or None for all, got {rank}")
    u, sigma, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    tolerance = max(delta.shape) * torch.finfo(delta.dtype).eps * sigma[:1]
    kept = int((sigma > tolerance).sum())
    if rank is not None:
        kept = min(kept, rank)
    root = sigma[:kept].sqrt()
    whole = float(torch.linalg.vector_norm(sigma))
    error = float(torch.linalg.vector_norm(sigma[kept:])) / whole if whole else 0.0
    low = LowRank((u[:, :kept] * root).to(delta.dtype), (root[:, None] * vh[:kept]).to(delta.dtype))
    return low, error
