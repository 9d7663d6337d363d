"""The Kronecker factors of one layer: what they are of, and the sums."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .ops import khatri_rao_rows, kron_accumulate_, syrk_accumulate_


@dataclass(frozen=True)
class LayerSpec:
    """What a layer's factors are of.

    Attributes:
        kind: "linear", "embedding" or "conv2d".
        d_in: Length of the rows x; r_in where there is a basis.
        d_out: Length of the rows δ; r_out where there is a basis.
        basis: Fingerprint of the `CoreBasis` on which the rows are projected; "" for full width.
    """

    kind: str
    d_in: int
    d_out: int
    basis: str = ""

    @property
    def diagonal_input(self) -> bool:
        """Whether x is one-hot, so that S_A is diagonal."""
        return self.kind == "embedding" and not self.basis

    def nbytes(self, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of both sums."""
        d, e = self.d_in, self.d_out
        return (8 * d if self.diagonal_input else d * (d + 1) // 2 * dtype.itemsize) + e * (e + 1) // 2 * dtype.itemsize


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which rows of this dtype are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class Rows:
    """What one call of a layer adds.

    Attributes:
        x: (T, d_in), or (T,) the index of the one in one-hot rows.
        delta: (T, d_out), of x's dtype unless that is an index.
        weight: (T,) of the sums' dtype, or None for ones. Rows of weight 0 may hold NaN.
    """

    x: Tensor
    delta: Tensor
    weight: Tensor | None = None

    def finite(self) -> Rows:
        """The same rows, or all of weight 0 if any δ that counts is not finite; decided on the device."""
        ok = self.delta.sum(-1, dtype=sum_dtype(self.delta.dtype)).isfinite()
        if self.weight is None:
            return replace(self, weight=ok.all().expand(len(ok)).to(sum_dtype(self.delta.dtype)))
        return replace(self, weight=self.weight * (ok | (self.weight == 0)).all())

    def reduced(self, cu_seqlens: Tensor) -> Rows:
        """(x̄_s, δ̄_s) = (Σ_t w_t x_t / Σ_t w_t, Σ_t w_t δ_t) of each sequence s; those without weight get weight 0.

        Args:
            cu_seqlens: (S+1,), int: sequence s holds the rows cu_seqlens[s] to cu_seqlens[s+1].

        Returns:
            Rows of the sums' dtype, with weight 1 for each sequence that has weight.
        """
        ones = self.delta.new_ones(len(self.delta), 1)
        mass = khatri_rao_rows(ones, ones, cu_seqlens, self.weight)
        x_sum = khatri_rao_rows(self.x, ones, cu_seqlens, self.weight)
        delta_sum = khatri_rao_rows(self.delta, ones, cu_seqlens, self.weight)
        present = mass != 0
        return Rows(x_sum / mass.where(present, 1.0), delta_sum, present.squeeze(1).to(delta_sum.dtype))


@dataclass
class LayerFactors:
    """The sums of one layer.

    Attributes:
        input_factor: S_A, (d_in (d_in + 1) / 2,): the lower triangle, row by row; its diagonal (d_in,) in float64 for
            one-hot rows; None where another layer holds it (`Factors.shared`).
        grad_factor: S_G, (d_out (d_out + 1) / 2,), float32, or float64 for a float64 model.
        counts: (2,) float64, Σ w over what is in S_A and in S_G; the first is 0 where another layer holds S_A.
    """

    input_factor: Tensor | None
    grad_factor: Tensor
    counts: Tensor

    @classmethod
    def zeros(
        cls, spec: LayerSpec, dtype: torch.dtype, device: torch.device | str, shared: bool = False
    ) -> LayerFactors:
        """Empty sums; without an input factor if `shared`."""
        packed = spec.d_in * (spec.d_in + 1) // 2
        input_factor = None
        if not shared and spec.diagonal_input:
            input_factor = torch.zeros(spec.d_in, dtype=torch.float64, device=device)
        elif not shared:
            input_factor = torch.zeros(packed, dtype=dtype, device=device)
        grad_factor = torch.zeros(spec.d_out * (spec.d_out + 1) // 2, dtype=dtype, device=device)
        return cls(input_factor, grad_factor, torch.zeros(2, dtype=torch.float64, device=device))

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name, without the one that another layer holds."""
        return {f.name: t for f in fields(self) if (t := getattr(self, f.name)) is not None}

    def accumulate_(self, rows: Rows, alpha: float = 1.0, beta: float = 1.0, precision: str = "ieee") -> None:
        """S_A ← β S_A + Σ w x xᵀ, S_G ← β S_G + α Σ w δ δᵀ, n ← β n + Σ w.

        Args:
            rows: x, δ and w. x is not read where another layer holds S_A.
            alpha: Undoes the scale of δ: 1/scale².
            beta: Factor of the sums so far.
            precision: See `kron_accumulate_`.
        """
        if self.input_factor is not None and rows.x.dim() == 2:
            return kron_accumulate_(
                self.input_factor,
                self.grad_factor,
                self.counts,
                rows.x,
                rows.delta,
                rows.weight,
                alpha,
                beta,
                precision=precision,
            )
        weight = (
            rows.delta.new_ones(len(rows.delta), dtype=torch.float64) if rows.weight is None else rows.weight.double()
        )
        syrk_accumulate_(self.grad_factor, rows.delta, rows.weight, alpha, beta, precision=precision)
        total = weight.sum()
        self.counts.mul_(beta)[1].add_(total)
        if self.input_factor is not None:
            self.counts[0].add_(total)
            self.input_factor.mul_(beta).index_add_(0, rows.x, weight)
        return None

    def to_(self, device: torch.device | str) -> None:
        """Moves the sums."""
        for name, tensor in self.tensors().items():
            setattr(self, name, tensor.to(device))

    def add_(self, other: LayerFactors, beta: float = 1.0) -> None:
        """Self ← β self + other, sum by sum; `other` may live on another device."""
        theirs = other.tensors()
        for name, mine in self.tensors().items():
            mine.mul_(beta).add_(theirs[name].to(mine.device))
