"""Hermitian linear operators of order n, batched over leading dimensions.

Conventions: an operator stands for matrices of shape (..., n, n); `A @ X` takes X (..., n, m) to
(..., n, m), batch dimensions broadcast. vec is row-major (torch `flatten`), hence
(P ⊗ Q) vec(C) = vec(P C Qᵀ). Every dtype is float32, float64, complex64 or complex128.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_entries, check_matrix, check_parts, promoted
from .products import symm_thin
from .scaling import even_exponent, peak, power_norm, scale_by_power, start_block

_PROBES = 4  # columns that `Operator.asymmetry` multiplies
_LARGE = 256  # order from which products with Dense read the matrix as it is stored
_POWER_STEPS = 4  # of Dense.norm: each costs one product, and the estimate only grows


class Operator(ABC):
    """Hermitian linear map on n-vectors; subclasses say how it is stored."""

    @property
    @abstractmethod
    def n(self) -> int:
        """Order of the operator."""

    @property
    @abstractmethod
    def batch_shape(self) -> torch.Size:
        """Leading dimensions."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of the entries."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the entries."""

    @abstractmethod
    def __matmul__(self, x: Tensor) -> Tensor:
        """A x for x (..., n, m)."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Diagonal entries a_ii (..., n), in the operator's dtype."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """Full matrix (..., n, n); costs n² entries of memory."""

    @abstractmethod
    def norm(self) -> Tensor:
        """Estimate (...,) of ‖A‖₂ that never exceeds it (beyond rounding)."""

    @abstractmethod
    def identity(self) -> Operator:
        """Identity of the same order, batch, dtype, device and structure."""

    @abstractmethod
    def normalized(self) -> tuple[Operator, Tensor]:
        """Ã and even exponents e (...,), int32, with A = 2ᵉ Ã, e = 0 where A is not finite.

        The parts that Ã is made of (entries, factors, rows; the products of a callable) are at most
        about 1 in magnitude, so that its norms and products stay in range.
        Exact, but for entries 2⁻¹²⁶ (double: 2⁻¹⁰²²) times smaller than the largest one.
        """

    @abstractmethod
    def apply_cost(self, columns: int = 1) -> int:
        """Flops of A @ X for X (n, columns) and one matrix of the batch: two for each multiply–add."""

    @property
    def shape(self) -> torch.Size:
        """Shape (..., n, n) of the matrix it stands for."""
        return torch.Size((*self.batch_shape, self.n, self.n))

    @property
    def mH(self) -> Operator:
        """Adjoint Aᴴ, which is A itself."""
        return self

    @property
    def mT(self) -> Operator:
        """Transpose Aᵀ, which is A itself for real dtypes.

        Raises:
            TypeError: if A is complex, where Aᵀ is not A.
        """
        if self.dtype.is_complex:
            raise TypeError(f"mT: the transpose of a complex {type(self).__name__} is not the operator itself; use .mH")
        return self

    @property
    def has_diagonal(self) -> bool:
        """Whether `diagonal` costs less than n products."""
        return True

    def trace(self) -> Tensor:
        """Σ_i a_ii, shape (...,)."""
        return self.diagonal().sum(-1)

    def parts(self) -> Iterator[Operator]:
        """This operator, and those it is made of, theirs included."""
        yield self
        for value in vars(self).values():
            for part in value if isinstance(value, list | tuple) else [value]:
                if isinstance(part, Operator):
                    yield from part.parts()

    def asymmetry(self) -> Tensor:
        """Max |XᴴAX − (XᴴAX)ᴴ| / max |X|ᴴ|AX| (...,) for four random columns X: rounding if A is Hermitian."""
        x = start_block(self, _PROBES)
        y = self @ x
        product = x.mH @ y
        return _share((product - product.mH).abs(), x.abs().mH @ y.abs())


@dataclass(frozen=True, eq=False)
class Dense(Operator):
    """A stored matrix (..., n, n), of which only the lower triangle is read, as LAPACK does.

    Attributes:
        matrix: (..., n, n), any strides; the strict upper triangle and, for complex dtypes, the
            imaginary part of the diagonal are ignored.
    """

    matrix: Tensor

    def __post_init__(self) -> None:
        """Check shape and dtype."""
        check_matrix("Dense", "matrix", self.matrix)

    n = property(lambda self: self.matrix.shape[-1])
    batch_shape = property(lambda self: self.matrix.shape[:-2])
    dtype = property(lambda self: self.matrix.dtype)
    device = property(lambda self: self.matrix.device)

    @property
    def is_large(self) -> bool:
        """Whether a copy of the matrix costs more than to read its lower triangle alone, by `symm_thin` on the CPU."""
        even = self.matrix.dim() <= 3 or self.matrix.is_contiguous()
        real = self.device.type == "cpu" and not self.dtype.is_complex
        return self.n >= _LARGE and real and even and self.matrix.stride(-1) == 1

    def __matmul__(self, x: Tensor) -> Tensor:
        """A x; 2n²m flops."""
        if self.is_large and x.dim() > 1 and self.batch_shape in (x.shape[:-2], ()):
            return symm_thin(self.matrix, x if x.dim() <= 3 else x.contiguous())
        return self.to_dense() @ x

    def diagonal(self) -> Tensor:
        """Diagonal entries (..., n)."""
        return self.matrix.diagonal(dim1=-2, dim2=-1).real.to(self.dtype)

    def to_dense(self) -> Tensor:
        """Hermitian matrix with the lower triangle of `matrix`; a copy."""
        lower = self.matrix.tril(-1)
        full = lower + lower.mH
        full.diagonal(dim1=-2, dim2=-1).copy_(self.diagonal())
        return full

    def norm(self) -> Tensor:
        """‖A‖₂ from below, by power steps, of small matrices from the longest column; at most 40n² flops."""
        if self.is_large:
            return power_norm(self)
        full = self.to_dense()
        longest = torch.linalg.vector_norm(full, dim=-2).argmax(-1)
        x = full.take_along_dim(longest[..., None, None], -1)
        norm = torch.linalg.vector_norm(x, dim=-2, keepdim=True)
        for _ in range(_POWER_STEPS):
            x = full @ (x / norm.clamp_min(torch.finfo(self.dtype).tiny))
            norm = torch.linalg.vector_norm(x, dim=-2, keepdim=True)
        return norm[..., 0, 0]

    def identity(self) -> Diagonal:
        """Identity, as a Diagonal."""
        return Diagonal(torch.ones_like(self.diagonal()))

    def normalized(self) -> tuple[Dense, Tensor]:
        """Matrix scaled to entries of at most 1, and exponents; see `Operator.normalized`."""
        full = self.to_dense()
        exponent = even_exponent(peak(full, (-2, -1)))
        return Mirrored(scale_by_power(full, -exponent[..., None, None])), exponent

    def apply_cost(self, columns: int = 1) -> int:
        """2n² a column."""
        return 2 * self.n**2 * columns

    def asymmetry(self) -> Tensor:
        """Max |M − Mᴴ| / max |M| of the matrix as it is stored, (...,)."""
        return _share((self.matrix - self.matrix.mH).abs(), self.matrix.abs())


@dataclass(frozen=True, eq=False)
class Mirrored(Dense):
    """A Dense whose upper triangle already mirrors the lower one, and is read."""

    def __matmul__(self, x: Tensor) -> Tensor:
        """A x; 2n²m flops."""
        return self.matrix @ x

    def to_dense(self) -> Tensor:
        """The matrix itself."""
        return self.matrix


@dataclass(frozen=True, eq=False)
class Diagonal(Operator):
    """diag(d).

    Attributes:
        entries: d (..., n); imaginary parts are ignored.
    """

    entries: Tensor

    def __post_init__(self) -> None:
        """Check shape and dtype."""
        check_entries("Diagonal", "entries", self.entries)
        if self.entries.dim() < 1:
            raise ValueError("Diagonal: entries must be (..., n), got a scalar; use entries[None]")

    n = property(lambda self: self.entries.shape[-1])
    batch_shape = property(lambda self: self.entries.shape[:-1])
    dtype = property(lambda self: self.entries.dtype)
    device = property(lambda self: self.entries.device)

    def __matmul__(self, x: Tensor) -> Tensor:
        """D x; nm flops."""
        return self.entries.real[..., None] * x

    def diagonal(self) -> Tensor:
        """Diagonal entries (..., n)."""
        return self.entries.real.to(self.dtype)

    def to_dense(self) -> Tensor:
        """Matrix with d on its diagonal."""
        return torch.diag_embed(self.diagonal())

    def norm(self) -> Tensor:
        """‖D‖₂ = max |d_i|, exactly."""
        return peak(self.entries.real, (-1,))

    def identity(self) -> Diagonal:
        """diag(1, …, 1)."""
        return Diagonal(torch.ones_like(self.entries))

    def normalized(self) -> tuple[Diagonal, Tensor]:
        """Diagonal scaled to entries of at most 1, and exponents; see `Operator.normalized`."""
        exponent = even_exponent(peak(self.entries.real, (-1,)))
        return Diagonal(scale_by_power(self.diagonal(), -exponent[..., None])), exponent

    def apply_cost(self, columns: int = 1) -> int:
        """One multiplication an entry."""
        return self.n * columns


@dataclass(frozen=True, eq=False)
class Kronecker(Operator):
    """P ⊗ Q with (P ⊗ Q) vec(C) = vec(P C Qᵀ), vec row-major.

    Attributes:
        left: P, Hermitian of order n₁; a tensor means Dense.
        right: Q, Hermitian of order n₂; a tensor means Dense. The operator's order is n₁n₂.

    Example:
        >>> p, q = torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.diag(torch.tensor([1.0, 10.0]))
        >>> (Kronecker(p, q) @ torch.tensor([[1.0], [1.0], [0.0], [0.0]])).mT  # C = [[1, 1], [0, 0]]
        tensor([[ 1., 10.,  2., 20.]])
    """

    left: Operator | Tensor
    right: Operator | Tensor

    def __post_init__(self) -> None:
        """Check that both factors have one dtype, one device and batches that broadcast."""
        object.__setattr__(self, "left", as_operator(self.left, "Kronecker: left"))
        object.__setattr__(self, "right", as_operator(self.right, "Kronecker: right"))
        check_alike("Kronecker", ("left", self.left), ("right", self.right), same_order=False)

    n = property(lambda self: self.left.n * self.right.n)
    dtype = property(lambda self: self.left.dtype)
    device = property(lambda self: self.left.device)

    @property
    def batch_shape(self) -> torch.Size:
        """Leading dimensions of both factors, broadcast."""
        return torch.broadcast_shapes(self.left.batch_shape, self.right.batch_shape)

    def __matmul__(self, x: Tensor) -> Tensor:
        """vec(P C Qᵀ) for each column vec(C) of x; 2(n₁ + n₂)n₁n₂m flops for dense factors."""
        return kronecker_product(self.left, self.right, x)

    def diagonal(self) -> Tensor:
        """p_ii q_jj at row-major (i, j)."""
        return (self.left.diagonal()[..., None] * self.right.diagonal()[..., None, :]).flatten(-2)

    def to_dense(self) -> Tensor:
        """p_ij q_kl at rows (i, k), columns (j, l)."""
        p = self.left.to_dense()[..., :, None, :, None]
        q = self.right.to_dense()[..., None, :, None, :]
        return (p * q).flatten(-2).flatten(-3, -2)

    def norm(self) -> Tensor:
        """‖P‖₂ ‖Q‖₂, each estimated from below."""
        return self.left.norm() * self.right.norm()

    def identity(self) -> Kronecker:
        """I ⊗ I."""
        return Kronecker(self.left.identity(), self.right.identity())

    def normalized(self) -> tuple[Kronecker, Tensor]:
        """Both factors scaled; exponents added; see `Operator.normalized`."""
        left, left_exponent = self.left.normalized()
        right, right_exponent = self.right.normalized()
        return Kronecker(left, right), left_exponent + right_exponent

    def apply_cost(self, columns: int = 1) -> int:
        """P on n₂ columns and Q on n₁, for each column."""
        return self.left.apply_cost(self.right.n * columns) + self.right.apply_cost(self.left.n * columns)

    @property
    def has_diagonal(self) -> bool:
        """Whether both factors have one."""
        return self.left.has_diagonal and self.right.has_diagonal


def kronecker_product(left: Operator | Tensor, right: Operator | Tensor, x: Tensor) -> Tensor:
    """(P ⊗ Q) x for square P and Q: vec(P C Qᵀ) for each column vec(C), vec row-major.

    Args:
        left: P, order n₁.
        right: Q, order n₂.
        x: (..., n₁n₂, m).

    Returns:
        (..., n₁n₂, m); 2(n₁ + n₂)n₁n₂m flops for dense factors.
    """
    n1, n2, m = left.shape[-1], right.shape[-1], x.shape[-1]
    y = left @ x.reshape(*x.shape[:-2], n1, n2 * m)
    y = y.unflatten(-1, (n2, m)).transpose(-3, -2).flatten(-2)
    z = right @ y
    return z.unflatten(-1, (n1, m)).transpose(-3, -2).flatten(-3, -2)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Largest entry of `part` by that of `whole`, (...,); 0 where `whole` is zero or empty."""
    part, whole = (peak(x, (-2, -1)) for x in (part, whole))
    return torch.where(whole == 0, 0.0, part / whole)


def as_operator(value: Operator | Tensor, name: str) -> Operator:
    """`value` itself if it is an operator, Dense(value) if it is a tensor, integers promoted to float64.

    Returns:
        An operator.

    Raises:
        TypeError: if it is neither; `name` says whose argument it was.
    """
    if isinstance(value, Operator):
        return value
    if isinstance(value, Tensor):
        return Dense(promoted(value))
    raise TypeError(
        f"{name} must be a torch.Tensor or an Operator, got {type(value).__name__}; convert with torch.as_tensor"
    )


def check_alike(owner: str, first: tuple[str, Operator], second: tuple[str, Operator], *, same_order: bool) -> None:
    """Check that two named operators share dtype and device, and that their batches broadcast.

    Args:
        owner: whose arguments they are, for the message.
        first: name and operator.
        second: name and operator.
        same_order: whether their orders n must agree too.

    Raises:
        TypeError: if the dtypes differ.
        ValueError: if the orders or devices differ, or the batch shapes do not broadcast.
    """
    (name1, op1), (name2, op2) = first, second
    if same_order and op1.n != op2.n:
        raise ValueError(
            f"{owner}: {name2} must be of the order of {name1}, got {name1} {tuple(op1.shape)} "
            f"and {name2} {tuple(op2.shape)}"
        )
    check_parts(owner, (name1, op1, 2), (name2, op2, 2))
