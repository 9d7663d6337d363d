"""The pencil (A, B) of A v = λ B v, and the certificates of its eigenpairs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import as_scale
from .operators import Dense, Operator, as_operator, check_alike
from .scaling import scale_by_power

_ORDINARY = 2.0**30  # norms up to this, and down to its inverse, leave squares and products in range


class Measured(NamedTuple):
    """An operator that stays in range, the exponents of what it stands for (see `normalized`), and its norms."""

    operator: Operator
    exponent: Tensor
    norm: Tensor


@dataclass(frozen=True, eq=False)
class Pencil:
    """A v = λ B v with A Hermitian and B Hermitian positive definite, batched.

    Neither is checked: stored matrices are used through their lower triangles (`check_hermitian` looks at the
    upper ones), and a B that is not positive definite is reported by `solve` in the status of its pencil.

    Attributes:
        A: operator of shape (..., n, n); a tensor means Dense.
        B: operator of shape (..., n, n), batch dimensions broadcast with those of A; a tensor
            means Dense, None the identity.
    """

    A: Operator | Tensor
    B: Operator | Tensor | None = None

    def __post_init__(self) -> None:
        """Check that A and B have one order, dtype and device, and batches that broadcast."""
        object.__setattr__(self, "A", as_operator(self.A, "Pencil: A"))
        b = self.A.identity() if self.B is None else as_operator(self.B, "Pencil: B")
        object.__setattr__(self, "B", b)
        check_alike("Pencil", ("A", self.A), ("B", self.B), same_order=True)

    n = property(lambda self: self.A.n)
    dtype = property(lambda self: self.A.dtype)
    device = property(lambda self: self.A.device)

    @property
    def batch_shape(self) -> torch.Size:
        """Leading dimensions of A and B, broadcast."""
        a, b = self.A.batch_shape, self.B.batch_shape
        return a if a == b else torch.broadcast_shapes(a, b)

    @property
    def tolerance(self) -> float:
        """Backward error 4√n·eps, above which a pair is not called converged by default."""
        return 4 * math.sqrt(self.n) * torch.finfo(self.dtype).eps

    def dense(self) -> tuple[Tensor, Tensor]:
        """Matrices A and B, each (..., n, n) in the batch shape of the pencil."""
        shape = (*self.batch_shape, self.n, self.n)
        return self.A.to_dense().expand(shape), self.B.to_dense().expand(shape)

    @torch.no_grad()
    def check_hermitian(self) -> None:
        """Refuse operators with a part that is not Hermitian to rounding, which `solve` does not look for.

        Stored matrices are compared with their adjoints, n² operations; callables and the rest are
        judged by products with four random columns. NaN is left to `solve`.

        Raises:
            ValueError: if max |M − Mᴴ| exceeds 10n·eps of max |M|.
        """
        limit = 10 * self.n * torch.finfo(self.dtype).eps
        for name, operator in (("A", self.A), ("B", self.B)):
            for part in operator.parts():
                asymmetry = part.asymmetry()
                bad = (asymmetry > limit).nonzero().tolist()
                if bad:
                    where = f" {tuple(bad[0])}" if bad[0] else ""
                    raise ValueError(
                        f"Pencil: {name} must be Hermitian, got max |M - Mᴴ| = {asymmetry[tuple(bad[0])]:.1e} max |M| "
                        f"in its {type(part).__name__}{where}, with {limit:.1e} for rounding; take 0.5 * (M + M.mH), "
                        "or nothing if the lower triangle of a stored matrix is what you mean"
                    )

    @torch.no_grad()
    def backward_errors(self, values: Tensor, vectors: Tensor) -> Tensor:
        """η = ‖Av − λBv‖ / ((‖A‖ + |λ|‖B‖) ‖v‖) for each pair (λ, v).

        η is the least relative change of A and B that makes (λ, v) exact, and does not depend on
        how A, B and v are scaled (Higham & Higham 1998). The norms are estimated from
        below, so η is never flattered.

        Args:
            values: λ (..., k), real.
            vectors: v as columns, (..., n, k).

        Returns:
            η (..., k), real; NaN where λ or v is not finite. One product with A and one with B.
        """
        unit, _ = _unit_columns(vectors)
        a, b = self.measured()
        return _backward_errors(values, unit, a, b, b.operator @ unit)

    @torch.no_grad()
    def b_orthogonality(self, vectors: Tensor) -> Tensor:
        """Largest |VᴴBV − I| for V (..., n, k); shape (...,). One product with B and 2nk² flops."""
        unit, length = _unit_columns(vectors)
        b = _measured(self.B)
        return _b_orthogonality(unit, length, b, b.operator @ unit)

    @torch.no_grad()
    def certificates(
        self, values: Tensor, vectors: Tensor, measured: tuple[Measured, Measured] | None = None
    ) -> tuple[Tensor, Tensor]:
        """`backward_errors` and `b_orthogonality`, with one product with A and one with B.

        Args:
            values: λ (..., k), real.
            vectors: v as columns, (..., n, k).
            measured: what `measured` returns, where it is known.

        Returns:
            Backward errors (..., k) and B-orthogonality (...,).
        """
        unit, length = _unit_columns(vectors)
        a, b = measured or self.measured()
        product = b.operator @ unit
        orthogonality = _b_orthogonality(unit, length, b, product)
        return _backward_errors(values, unit, a, b, product), orthogonality

    @torch.no_grad()
    def measured(self) -> tuple[Measured, Measured]:
        """A and B as the certificates multiply with them, and their norms."""
        return _measured(self.A), _measured(self.B)

    @torch.no_grad()
    def count_above(self, t: Tensor | float) -> Tensor:
        """Number of eigenvalues above t, by Sylvester's law of inertia on A − tB = LDLᴴ.

        Args:
            t: a number or real tensor (...,) that broadcasts with the batch shape of the pencil. Within
                rounding of an eigenvalue the count may go either way.

        Returns:
            Counts, int64 (...,). Forms A − tB; n³/3 flops (complex: of order 2n).

        Example:
            >>> Pencil(torch.diag(torch.tensor([3.0, 2.0, 1.0]))).count_above(1.5)
            tensor(2)
        """
        a, b = self.dense()
        t = as_scale("Pencil.count_above", "t", t, self.dtype, self.device, self.batch_shape)
        shifted = a - t[..., None, None] * b
        copies = 1
        if shifted.is_complex():  # [[X, −Y], [Y, X]] has every eigenvalue of X + iY twice
            x, y, copies = shifted.real, shifted.imag, 2
            shifted = torch.cat([torch.cat([x, -y], -1), torch.cat([y, x], -1)], -2)
        factor, pivots, _ = torch.linalg.ldl_factor_ex(shifted)
        # A 2×2 pivot (marked by pivots < 0 in both its rows) has one eigenvalue of either sign
        # (Bunch & Kaufman 1977).
        single = (pivots > 0) & (factor.diagonal(dim1=-2, dim2=-1) > 0)
        return (single.sum(-1) + (pivots < 0).sum(-1) // 2) // copies


def _measured(op: Operator) -> Measured:
    """The operator itself where it is a large matrix of ordinary size, which saves a copy, else normalized."""
    if isinstance(op, Dense) and op.is_large:
        norm = op.norm()
        if bool(((norm < _ORDINARY) & (norm > 1 / _ORDINARY)).all()):
            return Measured(op, torch.zeros(op.batch_shape, dtype=torch.int32, device=op.device), norm)
    op, exponent = op.normalized()
    return Measured(op, exponent, op.norm())


def _unit_columns(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of length 1, and the lengths that they had (..., k)."""
    largest = torch.linalg.vector_norm(vectors, torch.inf, dim=-2, keepdim=True)
    unit = vectors / largest
    length = torch.linalg.vector_norm(unit, dim=-2, keepdim=True)
    unit /= length
    return unit, (largest * length)[..., 0, :]


def _backward_errors(values: Tensor, unit: Tensor, a: Measured, b: Measured, product: Tensor) -> Tensor:
    """Backward errors of unit vectors, their product with B̃ given, which is overwritten."""
    # A = 2ᵅÃ, B = 2ᵝB̃: λ̃ = 2^(β−α) λ
    values = scale_by_power(values, (b.exponent - a.exponent)[..., None])
    size = a.norm[..., None] + values.abs() * b.norm[..., None]
    size = size.clamp_min(torch.finfo(size.dtype).tiny)[..., None, :]
    # in place: for small pencils, memory costs more than arithmetic
    subtrahend = product.mul_(values[..., None, :] / size)
    return torch.linalg.vector_norm((a.operator @ unit).div_(size).sub_(subtrahend), dim=-2)


def _b_orthogonality(unit: Tensor, length: Tensor, b: Measured, product: Tensor) -> Tensor:
    """Max |VᴴBV − I| of V = unit · diag(length), B̃ · unit given."""
    scale = scale_by_power(length, (b.exponent // 2)[..., None])
    gram = (unit.mH @ product).mul_(scale[..., :, None]).mul_(scale[..., None, :])
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return torch.linalg.vector_norm(gram, torch.inf, dim=(-2, -1))
