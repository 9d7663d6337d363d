"""Operators made of operators: c A, A + γI, A₁ + … + A_T."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from numbers import Real

import torch
from torch import Tensor

from .checks import as_scale
from .operators import Operator, as_operator, check_alike
from .scaling import even_exponent, joint_exponent, power_norm, scale_by_power


class _OfOne(Operator):
    """What operators of one operator and one number share."""

    operator: Operator

    n = property(lambda self: self.operator.n)
    dtype = property(lambda self: self.operator.dtype)
    device = property(lambda self: self.operator.device)
    has_diagonal = property(lambda self: self.operator.has_diagonal)

    def identity(self) -> Operator:
        """Identity, as the operator's own."""
        return self.operator.identity()

    def apply_cost(self, columns: int = 1) -> int:
        """The operator's, and 2n a column."""
        return self.operator.apply_cost(columns) + 2 * self.n * columns


@dataclass(frozen=True, eq=False)
class Scaled(_OfOne):
    """c A.

    Attributes:
        operator: A; a tensor means Dense.
        scale: c, a number or real tensor (...,), of any sign.
    """

    operator: Operator | Tensor
    scale: Tensor | float

    def __post_init__(self) -> None:
        """Make A an operator and c a real tensor."""
        object.__setattr__(self, "operator", as_operator(self.operator, "Scaled: operator"))
        object.__setattr__(self, "scale", _scale("Scaled", "scale", self.scale, self.operator))

    @property
    def batch_shape(self) -> torch.Size:
        """Leading dimensions of A and c, broadcast."""
        return torch.broadcast_shapes(self.operator.batch_shape, self.scale.shape)

    def __matmul__(self, x: Tensor) -> Tensor:
        """Product c (A x)."""
        return self.scale[..., None, None] * (self.operator @ x)

    def diagonal(self) -> Tensor:
        """Diagonal c a_ii."""
        return self.scale[..., None] * self.operator.diagonal()

    def to_dense(self) -> Tensor:
        """Matrix c A."""
        return self.scale[..., None, None] * self.operator.to_dense()

    def norm(self) -> Tensor:
        """|c| times that of A."""
        return self.scale.abs() * self.operator.norm()

    def normalized(self) -> tuple[Scaled, Tensor]:
        """A normalized, c scaled to at most 1; exponents added."""
        operator, exponent = self.operator.normalized()
        own = even_exponent(self.scale.abs())
        return Scaled(operator, scale_by_power(self.scale, -own)), exponent + own


@dataclass(frozen=True, eq=False)
class Damped(_OfOne):
    """A + γI.

    Attributes:
        operator: A; a tensor means Dense.
        damping: γ, a number >= 0 or real tensor (...,). A tensor's sign is not checked here: `solve`
            reports a sum that is not positive definite in the status of its pencil.

    Example:
        >>> Damped(torch.ones(2, 2), 0.5).to_dense()
        tensor([[1.5000, 1.0000],
                [1.0000, 1.5000]])
    """

    operator: Operator | Tensor
    damping: Tensor | float

    def __post_init__(self) -> None:
        """Make A an operator and γ a real tensor."""
        object.__setattr__(self, "operator", as_operator(self.operator, "Damped: operator"))
        if isinstance(self.damping, Real) and not self.damping >= 0:
            raise ValueError(f"Damped: damping must be >= 0, got {self.damping}; Sum and Scaled shift by any number")
        object.__setattr__(self, "damping", _scale("Damped", "damping", self.damping, self.operator))

    @property
    def batch_shape(self) -> torch.Size:
        """Leading dimensions of A and γ, broadcast."""
        return torch.broadcast_shapes(self.operator.batch_shape, self.damping.shape)

    def __matmul__(self, x: Tensor) -> Tensor:
        """Product A x + γx."""
        return self.operator @ x + self.damping[..., None, None] * x

    def diagonal(self) -> Tensor:
        """Diagonal a_ii + γ."""
        return self.operator.diagonal() + self.damping[..., None]

    def to_dense(self) -> Tensor:
        """Matrix A + γI."""
        eye = torch.eye(self.n, dtype=self.dtype, device=self.device)
        return self.operator.to_dense() + self.damping[..., None, None] * eye

    def norm(self) -> Tensor:
        """‖A + γI‖₂ from below; see `power_norm`."""
        return power_norm(self)

    def normalized(self) -> tuple[Damped, Tensor]:
        """A and γ scaled by one power; see `Operator.normalized`."""
        operator, exponent = self.operator.normalized()
        own = even_exponent(self.damping.abs())
        joint = joint_exponent((exponent, own), (operator.norm() == 0, self.damping == 0))
        return Damped(_shifted(operator, exponent - joint), scale_by_power(self.damping, -joint)), joint


@dataclass(frozen=True, eq=False)
class Sum(Operator):
    """A₁ + … + A_T.

    Attributes:
        terms: at least one operator; a tensor means Dense. Of one order, dtype and device.
    """

    terms: Sequence[Operator | Tensor]

    def __post_init__(self) -> None:
        """Check that the terms go together."""
        if not isinstance(self.terms, Sequence) or not len(self.terms):
            raise ValueError("Sum: terms must be a sequence of at least one operator, Sum([A, B])")
        terms = tuple(as_operator(term, f"Sum: terms[{i}]") for i, term in enumerate(self.terms))
        object.__setattr__(self, "terms", terms)
        for i, term in enumerate(terms[1:], 1):
            check_alike("Sum", ("terms[0]", terms[0]), (f"terms[{i}]", term), same_order=True)

    n = property(lambda self: self.terms[0].n)
    dtype = property(lambda self: self.terms[0].dtype)
    device = property(lambda self: self.terms[0].device)
    has_diagonal = property(lambda self: all(term.has_diagonal for term in self.terms))

    @property
    def batch_shape(self) -> torch.Size:
        """Leading dimensions of all terms, broadcast."""
        return torch.broadcast_shapes(*(term.batch_shape for term in self.terms))

    def __matmul__(self, x: Tensor) -> Tensor:
        """Sum of the products."""
        return _total(term @ x for term in self.terms)

    def diagonal(self) -> Tensor:
        """Sum of the diagonals."""
        return _total(term.diagonal() for term in self.terms)

    def to_dense(self) -> Tensor:
        """Sum of the matrices."""
        return _total(term.to_dense() for term in self.terms)

    def norm(self) -> Tensor:
        """‖A‖₂ from below; see `power_norm`."""
        return power_norm(self)

    def identity(self) -> Operator:
        """Identity, as that of the first term."""
        return self.terms[0].identity()

    def normalized(self) -> tuple[Sum, Tensor]:
        """All terms scaled by one power; see `Operator.normalized`."""
        terms, exponents = zip(*(term.normalized() for term in self.terms), strict=True)
        joint = joint_exponent(exponents, [term.norm() == 0 for term in terms])
        scaled = [_shifted(term, exponent - joint) for term, exponent in zip(terms, exponents, strict=True)]
        return Sum(scaled), joint

    def apply_cost(self, columns: int = 1) -> int:
        """Those of the terms, and an addition an entry for each."""
        return sum(term.apply_cost(columns) + self.n * columns for term in self.terms)


def _scale(owner: str, name: str, value: Tensor | float, operator: Operator) -> Tensor:
    """A number or tensor (...,) as a real tensor that goes with the operator."""
    return as_scale(owner, name, value, operator.dtype, operator.device, operator.batch_shape)


def _shifted(operator: Operator, exponent: Tensor) -> Scaled:
    """2ᵉ A for e <= 0."""
    return Scaled(operator, exponent.to(operator.dtype.to_real()).exp2())


def _total(parts: Iterable[Tensor]) -> Tensor:
    """Sum of tensors that broadcast, in their order."""
    return reduce(torch.add, parts)
