"""Operators with more structure than entries: EK-FAC, Gram, low rank plus diagonal, a Python callable.

Conventions as in `operators`: Hermitian, (..., n, n), vec row-major. Nothing here forms n × n, but
for `to_dense`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from .checks import DTYPES, as_scale, check_entries, check_matrix, check_parts
from .operators import Diagonal, Operator, kronecker_product
from .scaling import even_exponent, joint_exponent, peak, power_norm, scale_by_power, start_block

_CHUNK = 256  # columns of the identity that a callable is given at a time


@dataclass(frozen=True, eq=False)
class EKFAC(Operator):
    """(U ⊗ W) diag(vec D) (U ⊗ W)ᴴ, vec row-major: eigenvalues D in a Kronecker eigenbasis.

    George et al. 2018. U and W must be unitary, which is not checked.

    Attributes:
        left_vectors: U (..., n₁, n₁).
        right_vectors: W (..., n₂, n₂).
        entries: D (..., n₁, n₂); imaginary parts are ignored.
    """

    left_vectors: Tensor
    right_vectors: Tensor
    entries: Tensor

    def __post_init__(self) -> None:
        """Check shapes, dtypes and devices."""
        u, w, d = self.left_vectors, self.right_vectors, self.entries
        check_matrix("EKFAC", "left_vectors", u)
        check_matrix("EKFAC", "right_vectors", w)
        check_entries("EKFAC", "entries", d)
        expected = (u.shape[-1], w.shape[-1])
        if d.shape[-2:] != expected:
            raise ValueError(
                f"EKFAC: entries must be (..., n1, n2) = (..., {expected[0]}, {expected[1]}) to match "
                f"left_vectors and right_vectors, got {tuple(d.shape)}"
            )
        check_parts("EKFAC", ("left_vectors", u, 2), ("right_vectors", w, 2), ("entries", d, 2))

    n = property(lambda self: self.entries.shape[-2] * self.entries.shape[-1])
    dtype = property(lambda self: self.entries.dtype)
    device = property(lambda self: self.entries.device)

    @property
    def batch_shape(self) -> torch.Size:
        """Leading dimensions of U, W and D, broadcast."""
        parts = (self.left_vectors, self.right_vectors, self.entries)
        return torch.broadcast_shapes(*(x.shape[:-2] for x in parts))

    def __matmul__(self, x: Tensor) -> Tensor:
        """U (D ∘ (Uᴴ C W̄)) Wᵀ for each column vec(C) of x; 4(n₁ + n₂)nm flops."""
        u, w = self.left_vectors, self.right_vectors
        y = self.entries.real.flatten(-2)[..., None] * kronecker_product(u.mH, w.mH, x)
        return kronecker_product(u, w, y)

    def diagonal(self) -> Tensor:
        """Σ_ab |u_ia|² |w_jb|² d_ab at row-major (i, j)."""
        u, w = (x.abs().square() for x in (self.left_vectors, self.right_vectors))
        return (u @ self.entries.real @ w.mT).flatten(-2).to(self.dtype)

    def to_dense(self) -> Tensor:
        """Matrix (..., n, n), by n products."""
        return self @ torch.eye(self.n, dtype=self.dtype, device=self.device)

    def norm(self) -> Tensor:
        """‖A‖₂ = max |d_ij|, exactly."""
        return peak(self.entries.real, (-2, -1)).expand(self.batch_shape)

    def identity(self) -> EKFAC:
        """Identity in the same eigenbasis, D = 1."""
        return EKFAC(self.left_vectors, self.right_vectors, torch.ones_like(self.entries))

    def normalized(self) -> tuple[EKFAC, Tensor]:
        """D scaled to at most 1, and exponents; see `Operator.normalized`."""
        exponent = even_exponent(peak(self.entries.real, (-2, -1)))
        entries = scale_by_power(self.entries, -exponent[..., None, None])
        return EKFAC(self.left_vectors, self.right_vectors, entries), exponent.expand(self.batch_shape)

    def apply_cost(self, columns: int = 1) -> int:
        """4(n₁ + n₂)n a column, and n for D."""
        return self.n * columns * (4 * sum(self.entries.shape[-2:]) + 1)


@dataclass(frozen=True, eq=False)
class Gram(Operator):
    """JᴴJ / N: second moment of N rows.

    Attributes:
        rows: J (..., rows, n).
        count: N, a positive number or (...,) real tensor; the number of rows by default. Batches
            of unequal row counts are padded with zero rows and say their counts here.

    Example:
        >>> Gram(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).to_dense()
        tensor([[ 5.,  7.],
                [ 7., 10.]])
    """

    rows: Tensor
    count: Tensor | float | None = None

    def __post_init__(self) -> None:
        """Check shapes; make `count` a real tensor."""
        check_entries("Gram", "rows", self.rows)
        if self.rows.dim() < 2:
            raise ValueError(f"Gram: rows must be (..., N, n), got {tuple(self.rows.shape)}")
        count = max(self.rows.shape[-2], 1) if self.count is None else self.count
        if isinstance(count, Real) and not count > 0:
            raise ValueError(f"Gram: count must be positive, got {count}; None means the number of rows")
        object.__setattr__(
            self, "count", as_scale("Gram", "count", count, self.dtype, self.device, self.rows.shape[:-2])
        )

    n = property(lambda self: self.rows.shape[-1])
    dtype = property(lambda self: self.rows.dtype)
    device = property(lambda self: self.rows.device)

    @property
    def batch_shape(self) -> torch.Size:
        """Leading dimensions of J and N, broadcast."""
        return torch.broadcast_shapes(self.rows.shape[:-2], self.count.shape)

    def __matmul__(self, x: Tensor) -> Tensor:
        """Jᴴ(Jx) / N; 4Nnm flops."""
        return self.rows.mH @ ((self.rows @ x) / self.count[..., None, None])

    def diagonal(self) -> Tensor:
        """Σ_s |j_si|² / N."""
        return (self.rows.abs().square().sum(-2) / self.count[..., None]).to(self.dtype)

    def to_dense(self) -> Tensor:
        """Matrix (..., n, n); 2Nn² flops."""
        return self.rows.mH @ (self.rows / self.count[..., None, None])

    def norm(self) -> Tensor:
        """‖A‖₂ from below; see `power_norm`."""
        return power_norm(self)

    def identity(self) -> Diagonal:
        """Identity, as a Diagonal."""
        return Diagonal(torch.ones_like(self.diagonal()))

    def normalized(self) -> tuple[Gram, Tensor]:
        """J scaled to at most 1, and twice its exponents; see `Operator.normalized`."""
        exponent = even_exponent(peak(self.rows, (-2, -1)))
        rows = scale_by_power(self.rows, -exponent[..., None, None])
        return Gram(rows, self.count), (2 * exponent).expand(self.batch_shape)

    def apply_cost(self, columns: int = 1) -> int:
        """4Nn a column."""
        return 4 * self.rows.shape[-2] * self.n * columns


@dataclass(frozen=True, eq=False)
class LowRankPlusDiagonal(Operator):
    """diag(d) + U C Uᴴ.

    Attributes:
        factor: U (..., n, r).
        entries: d (..., n); imaginary parts are ignored.
        core: C (..., r, r) Hermitian, both triangles filled; None means the identity.
    """

    factor: Tensor
    entries: Tensor
    core: Tensor | None = None

    def __post_init__(self) -> None:
        """Check shapes, dtypes and devices."""
        name, (u, d, c) = "LowRankPlusDiagonal", (self.factor, self.entries, self.core)
        check_entries(name, "factor", u)
        check_entries(name, "entries", d)
        if u.dim() < 2 or d.dim() < 1 or u.shape[-2] != d.shape[-1]:
            raise ValueError(
                f"{name}: factor must be (..., n, r) and entries (..., n), got {tuple(u.shape)} and {tuple(d.shape)}"
            )
        parts = [("factor", u, 2), ("entries", d, 1)]
        if c is not None:
            check_matrix(name, "core", c)
            if c.shape[-1] != u.shape[-1]:
                raise ValueError(
                    f"{name}: core must be (..., r, r) with r = {u.shape[-1]} to match factor, got {tuple(c.shape)}"
                )
            parts.append(("core", c, 2))
        check_parts(name, *parts)

    n = property(lambda self: self.entries.shape[-1])
    dtype = property(lambda self: self.entries.dtype)
    device = property(lambda self: self.entries.device)

    @property
    def batch_shape(self) -> torch.Size:
        """Leading dimensions of U, d and C, broadcast."""
        core = () if self.core is None else self.core.shape[:-2]
        return torch.broadcast_shapes(self.factor.shape[:-2], self.entries.shape[:-1], core)

    def __matmul__(self, x: Tensor) -> Tensor:
        """D x + U C (Uᴴ x); (4r + 1)nm flops and the core's."""
        return self.entries.real[..., None] * x + self.factor @ self._inner(self.factor.mH @ x)

    def diagonal(self) -> Tensor:
        """d_i + u_i C u_iᴴ, u_i the rows of U."""
        low_rank = (self.factor * self._inner(self.factor.mH).mT).sum(-1)
        return (self.entries.real + low_rank.real).to(self.dtype)

    def to_dense(self) -> Tensor:
        """Matrix (..., n, n); 2n²r flops."""
        return torch.diag_embed(self.entries.real.to(self.dtype)) + self.factor @ self._inner(self.factor.mH)

    def norm(self) -> Tensor:
        """‖A‖₂ from below; see `power_norm`."""
        return power_norm(self)

    def identity(self) -> Diagonal:
        """Identity, as a Diagonal."""
        return Diagonal(torch.ones_like(self.diagonal()))

    def normalized(self) -> tuple[LowRankPlusDiagonal, Tensor]:
        """U, C and d scaled to at most 1 (the larger of D and U C Uᴴ decides), and exponents."""
        factor_exponent = even_exponent(peak(self.factor, (-2, -1)))
        core = self.core
        if core is None:
            core = torch.eye(self.factor.shape[-1], dtype=self.dtype, device=self.device)
        core_peak, entry_peak = peak(core, (-2, -1)), peak(self.entries.real, (-1,))
        low_rank = 2 * factor_exponent + even_exponent(core_peak)
        absent = (core_peak == 0) | (peak(self.factor, (-2, -1)) == 0)
        exponent = joint_exponent((low_rank, even_exponent(entry_peak)), (absent, entry_peak == 0))
        return LowRankPlusDiagonal(
            scale_by_power(self.factor, -factor_exponent[..., None, None]),
            scale_by_power(self.entries, -exponent[..., None]),
            scale_by_power(core, (2 * factor_exponent - exponent)[..., None, None]),
        ), exponent

    def apply_cost(self, columns: int = 1) -> int:
        """(4r + 1)n a column, and 2r² for a core."""
        r = self.factor.shape[-1]
        return columns * ((4 * r + 1) * self.n + (0 if self.core is None else 2 * r * r))

    def _inner(self, x: Tensor) -> Tensor:
        """C x."""
        return x if self.core is None else self.core @ x


class FunctionOperator(Operator):
    """A Python callable X ↦ A X, on X (..., n, m) in the batch shape of A and X together.

    That A is Hermitian is the caller's promise. An exception in the callable arrives as it is.

    Attributes:
        function: the callable; it must not change its argument.

    Example:
        >>> double = FunctionOperator(lambda x: 2 * x, (3, 3), dtype=torch.float32)
        >>> double @ torch.ones(3, 1)
        tensor([[2.],
                [2.],
                [2.]])
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        diagonal: Tensor | None = None,
    ) -> None:
        """Say what the callable stands for.

        Args:
            function: X ↦ A X.
            shape: (..., n, n).
            dtype: of the arguments and results.
            device: of the arguments and results.
            diagonal: a_ii (..., n) where it is known; preconditioners are made from it.

        Raises:
            TypeError: if `function` is not callable, or the dtype not supported.
            ValueError: if the shape is not square, or that of `diagonal` does not match.
        """
        if not callable(function):
            raise TypeError(f"FunctionOperator: function must be callable, got {type(function).__name__}")
        if dtype not in DTYPES:
            raise TypeError(f"FunctionOperator: dtype must be float32, float64, complex64 or complex128, got {dtype}")
        if not isinstance(shape, Sequence) or len(shape) < 2 or shape[-1] != shape[-2] or min(shape) < 0:
            raise ValueError(f"FunctionOperator: shape must be (..., n, n), got {shape}")
        self.function, self._shape, self._dtype = function, torch.Size(shape), dtype
        self._device = torch.empty(0, device=device).device
        self._diagonal = diagonal
        if diagonal is not None:
            check_entries("FunctionOperator", "diagonal", diagonal)
            self._check("diagonal", diagonal, self._shape[:-1])

    n = property(lambda self: self._shape[-1])
    batch_shape = property(lambda self: self._shape[:-2])
    dtype = property(lambda self: self._dtype)
    device = property(lambda self: self._device)
    has_diagonal = property(lambda self: self._diagonal is not None)

    def __matmul__(self, x: Tensor) -> Tensor:
        """function(x), with its shape, dtype and device checked."""
        x = x.expand(*torch.broadcast_shapes(self.batch_shape, x.shape[:-2]), *x.shape[-2:])
        y = self.function(x)
        if not isinstance(y, Tensor):
            raise TypeError(f"FunctionOperator: function must return a torch.Tensor, got {type(y).__name__}")
        self._check("what function returns", y, x.shape)
        return y

    def diagonal(self) -> Tensor:
        """The given one; without it, from n products in chunks of columns."""
        if self._diagonal is not None:
            return self._diagonal
        parts = [y.diagonal(-first, -2, -1) for first, y in self._columns()]
        return torch.cat(parts, -1) if parts else torch.zeros(self._shape[:-1], dtype=self.dtype, device=self.device)

    def to_dense(self) -> Tensor:
        """Products with the columns of the identity, in chunks."""
        parts = [y for _, y in self._columns()]
        return torch.cat(parts, -1) if parts else torch.zeros(self._shape, dtype=self.dtype, device=self.device)

    def norm(self) -> Tensor:
        """‖A‖₂ from below; see `power_norm`."""
        return power_norm(self)

    def identity(self) -> Diagonal:
        """Identity, as a Diagonal."""
        return Diagonal(torch.ones(self._shape[:-1], dtype=self.dtype, device=self.device))

    def normalized(self) -> tuple[FunctionOperator, Tensor]:
        """The callable with its results scaled by those of one block; see `Operator.normalized`."""
        y = self @ start_block(self, 1)
        limit = 126 if self.dtype.to_real() == torch.float32 else 1022
        exponent = even_exponent(peak(y, (-2, -1))).clamp(-limit, limit)

        def scaled(x: Tensor) -> Tensor:
            return scale_by_power(self @ x, -exponent[..., None, None])

        diagonal = None if self._diagonal is None else scale_by_power(self._diagonal, -exponent[..., None])
        return FunctionOperator(scaled, self._shape, self.dtype, self.device, diagonal), exponent

    def apply_cost(self, columns: int = 1) -> int:
        """2n² a column, as if A were stored: what a callable costs is not known."""
        return 2 * self.n**2 * columns

    def _columns(self) -> list[tuple[int, Tensor]]:
        """A's columns from each first one, (first, (..., n, chunk))."""
        eye = torch.eye(self.n, min(self.n, _CHUNK), dtype=self.dtype, device=self.device)
        starts = range(0, self.n, _CHUNK)
        return [(i, self @ eye.roll(i, -2)[:, : self.n - i]) for i in starts]

    def _check(self, name: str, x: Tensor, shape: torch.Size) -> None:
        """Refuse a tensor that is not what the operator's shape, dtype and device ask for."""
        for what, expected, got in (
            ("shape", tuple(shape), tuple(x.shape)),
            ("dtype", self.dtype, x.dtype),
            ("device", self.device, x.device),
        ):
            if expected != got:
                raise ValueError(f"FunctionOperator: {name} must have {what} {expected}, got {got}")
