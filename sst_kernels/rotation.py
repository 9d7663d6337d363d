"""B = B₁ ⊗ B₂ + γI in its own eigenbasis U ⊗ W: exact damping, and a diagonal B."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .combined import Damped, Sum
from .operators import Diagonal, Kronecker, Operator, kronecker_product
from .pencil import Pencil
from .preconditioners import diagonalized
from .simplify import simplified
from .structured import EKFAC, Gram

Back = Callable[[Tensor], Tensor]


def rotate_to_diagonal(pencil: Pencil) -> tuple[Pencil, Back] | None:
    """((U ⊗ W)ᴴ A (U ⊗ W), D) for B = (U ⊗ W) D (U ⊗ W)ᴴ: the same λ, with a diagonal B.

    Args:
        pencil: B a Kronecker product, damped or not, or EKFAC; A a Kronecker product or EKFAC with
            factors of the same orders, a Gram operator, or a damped sum of these.

    Returns:
        The pencil in the eigenbasis, A of its own structure and B Diagonal, and the function that
        takes vectors (..., n, m) back, x ↦ (U ⊗ W)x. None if the structures do not fit. D is NaN for
        a B that is not finite. Cost: 14(n₁³ + n₂³) flops, and two products with each factor of A.
    """
    a, b = simplified(pencil.A), simplified(pencil.B)
    inner = b.operator if isinstance(b, Damped) else b
    if isinstance(inner, Kronecker):
        orders = (inner.left.n, inner.right.n)
    elif isinstance(inner, EKFAC):
        orders = tuple(inner.entries.shape[-2:])
    else:
        return None
    if not _rotates(a, orders):
        return None
    if isinstance(inner, Kronecker):
        basis, fault = diagonalized(inner, b.damping if isinstance(b, Damped) else 0.0)
        entries = basis.entries.masked_fill((fault != 0)[..., None, None], torch.nan)
    else:
        basis, entries = inner, inner.entries
    u, w = basis.left_vectors, basis.right_vectors

    def back(x: Tensor) -> Tensor:
        return kronecker_product(u, w, x)

    return Pencil(_rotated(a, u, w), Diagonal(entries.flatten(-2))), back


def _rotates(a: Operator, orders: tuple[int, int]) -> bool:
    """Whether A keeps its structure under U ⊗ W."""
    if isinstance(a, Kronecker):
        return (a.left.n, a.right.n) == orders
    if isinstance(a, EKFAC):
        return tuple(a.entries.shape[-2:]) == orders
    if isinstance(a, Damped):
        return _rotates(a.operator, orders)
    return isinstance(a, Gram) or (isinstance(a, Sum) and all(_rotates(term, orders) for term in a.terms))


def _rotated(a: Operator, u: Tensor, w: Tensor) -> Operator:
    """(U ⊗ W)ᴴ A (U ⊗ W)."""
    if isinstance(a, Kronecker):
        return Kronecker(u.mH @ (a.left @ u), w.mH @ (a.right @ w))
    if isinstance(a, EKFAC):
        return EKFAC(u.mH @ a.left_vectors, w.mH @ a.right_vectors, a.entries)
    if isinstance(a, Gram):
        return Gram(kronecker_product(u.mH, w.mH, a.rows.mH).mH, a.count)
    if isinstance(a, Damped):
        return Damped(_rotated(a.operator, u, w), a.damping)
    return Sum([_rotated(term, u, w) for term in a.terms])
