"""B⁻¹ where the structure of B gives it, and positive definite approximations of B⁻¹ elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .combined import Damped, Sum
from .dense import generalized_eigh
from .operators import Dense, Diagonal, Kronecker, Operator
from .result import Status, faults
from .simplify import simplified
from .structured import EKFAC, LowRankPlusDiagonal

_ALTERNATIONS = 10  # of the nearest Kronecker product: T × T matrices only


class Inverse(NamedTuple):
    """B⁻¹, and which matrices of the batch have none that is positive definite.

    Attributes:
        operator: B⁻¹; in place of a faulty matrix, an arbitrary positive definite one.
        fault: bits of `Status` (...,), int64: NOT_POSITIVE_DEFINITE, NON_FINITE or 0.
    """

    operator: Operator
    fault: Tensor


def inverse(operator: Operator) -> Operator | None:
    """B⁻¹ as an operator, exact to rounding, if the structure of B has one.

    | B                                                    | B⁻¹                               |
    |------------------------------------------------------|-----------------------------------|
    | Diagonal                                             | Diagonal                          |
    | Dense                                                | Dense, n³ flops                   |
    | Kronecker of these                                   | Kronecker                         |
    | Damped Kronecker                                     | EKFAC, two small eigenproblems    |
    | EKFAC                                                | EKFAC                             |
    | LowRankPlusDiagonal, Damped Gram, their sums, d > 0  | LowRankPlusDiagonal (Woodbury)    |
    | the same with r >= n                                 | Dense                             |
    | Scaled, Damped and one-term Sum of these             | as above, after `simplified`      |

    Args:
        operator: B, positive definite; in place of the inverse of one that is not stands an
            arbitrary positive definite matrix (`factored_inverse` tells which).

    Returns:
        B⁻¹, or None. Without gradients.
    """
    found = factored_inverse(operator)
    return None if found is None else found.operator


@torch.no_grad()
def factored_inverse(operator: Operator) -> Inverse | None:
    """B⁻¹ and the faults of each B; see `inverse`.

    Args:
        operator: B.

    Returns:
        The inverse and its faults, or None if the structure has none.
    """
    b = simplified(operator)
    if not has_inverse(b):
        return None
    if isinstance(b, Diagonal):
        entries, fault = _positive(b.entries.real, 1)
        return Inverse(Diagonal(entries.reciprocal().to(b.dtype)), fault)
    if isinstance(b, Kronecker):
        left, right = factored_inverse(b.left), factored_inverse(b.right)
        return Inverse(Kronecker(left.operator, right.operator), left.fault | right.fault)
    fault = 0
    if isinstance(b, Damped):
        b, fault = diagonalized(b.operator, b.damping)
    if isinstance(b, EKFAC):
        return _ekfac_inverse(b, fault)
    if isinstance(b, LowRankPlusDiagonal) and b.factor.shape[-1] < b.n:
        return _woodbury(b)
    return _dense_inverse(b.to_dense())


def has_inverse(operator: Operator) -> bool:
    """Whether `inverse` has one; costs nothing but, for low rank plus diagonal, a look at d.

    Args:
        operator: B.

    Returns:
        Whether it has.
    """
    b = simplified(operator)
    if isinstance(b, Kronecker):
        return has_inverse(b.left) and has_inverse(b.right)
    if isinstance(b, Damped):
        return isinstance(b.operator, Kronecker)
    if isinstance(b, LowRankPlusDiagonal) and b.factor.shape[-1] < b.n:
        # U C Uᴴ lifts at most r of the d_i <= 0 (Weyl): with more, B is not positive definite
        lost = (b.entries.real <= 0).sum(-1)
        return not bool(((lost > 0) & (lost <= b.factor.shape[-1])).any())
    return isinstance(b, Dense | Diagonal | EKFAC | LowRankPlusDiagonal)


@torch.no_grad()
def preconditioner(operator: Operator) -> Operator | None:
    """A positive definite approximation of B⁻¹: the exact one if `inverse` has it.

    Else, for sums of Kronecker products, EKFAC, diagonal and damping: the eigenbasis U ⊗ W of the
    nearest Kronecker product (Van Loan & Pitsianis 1993), with B's own diagonal in that basis, or
    in the basis of the entries where that is closer. Both have tr(M⁻¹B) = n, so the one of the
    smaller determinant has the smaller divergence tr(M⁻¹B) − n + log det M − log det B. For others
    the diagonal.

    Args:
        operator: B, positive definite.

    Returns:
        M⁻¹, or None where nothing is known but products. Without gradients.
    """
    b = simplified(operator)
    exact = inverse(b)
    if exact is not None:
        return exact
    shape = _kronecker_shape(b)
    if shape is not None:
        return _in_kronecker_basis(b, shape)
    if b.has_diagonal:
        return Diagonal(_raised(b.diagonal().real, 1).reciprocal().to(b.dtype))
    return None


def hermitian_eigh(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues, ascending, and vectors of Hermitian matrices, in double precision inside.

    Args:
        matrix: (..., n, n), both triangles filled, any dtype of `DTYPES`.

    Returns:
        Values (..., n), vectors (..., n, n), in the precision of `matrix`, and fault bits (...,),
        int64; the pairs of a faulty matrix are zeros and the identity.
    """
    batch, n = matrix.shape[:-2], matrix.shape[-1]
    double = torch.promote_types(matrix.dtype, torch.float64)
    hermitian = matrix.to(double).reshape(batch.numel(), n, n)
    values, vectors, fault = generalized_eigh(0.5 * hermitian + 0.5 * hermitian.mH, None)
    bad = (fault != 0)[:, None]
    vectors = torch.where(bad[..., None], torch.eye(n, dtype=double, device=matrix.device), vectors)
    values = values.masked_fill(bad, 0.0).to(matrix.dtype.to_real())
    return values.reshape(*batch, n), vectors.to(matrix.dtype).reshape(*batch, n, n), fault.reshape(batch)


def diagonalized(operator: Kronecker, damping: Tensor | float) -> tuple[EKFAC, Tensor]:
    """P ⊗ Q + γI = (U ⊗ W)(α βᵀ + γ)(U ⊗ W)ᴴ from P = UαUᴴ and Q = WβWᴴ.

    Args:
        operator: P ⊗ Q; the factors are formed.
        damping: γ (...,).

    Returns:
        The EKFAC, and fault bits (...,) of the eigenproblems. 14(n₁³ + n₂³) flops.
    """
    alpha, u, left_fault = hermitian_eigh(operator.left.to_dense())
    beta, w, right_fault = hermitian_eigh(operator.right.to_dense())
    entries = alpha[..., :, None] * beta[..., None, :] + _as_grid(damping, alpha)
    return EKFAC(u, w, entries.to(operator.dtype)), left_fault | right_fault


def _positive(entries: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """Entries, 1 in the place of those of a pencil that has one not above zero, and fault bits."""
    entries = entries.detach()
    infinite = ~torch.isfinite(entries).flatten(-dims).all(-1)
    indefinite = ~infinite & (entries <= 0).flatten(-dims).any(-1)
    fault = faults(infinite, indefinite)
    return torch.where((fault != 0)[(..., *[None] * dims)], 1.0, entries), fault


def _ekfac_inverse(b: EKFAC, fault: Tensor | int) -> Inverse:
    """(U ⊗ W) diag(1/D) (U ⊗ W)ᴴ; `fault` is what is known already."""
    entries, own = _positive(b.entries.real, 2)
    bases = []
    for x in (b.left_vectors, b.right_vectors):
        infinite = ~torch.isfinite(x).flatten(-2).all(-1)
        own = own | infinite * int(Status.NON_FINITE)
        bases.append(torch.where(infinite[..., None, None], torch.eye(x.shape[-1], dtype=x.dtype, device=x.device), x))
    return Inverse(EKFAC(*bases, entries.reciprocal().to(b.dtype)), own | fault)


def _dense_inverse(matrix: Tensor) -> Inverse:
    """B⁻¹ from a Cholesky factor, in double precision inside."""
    double = matrix.to(torch.promote_types(matrix.dtype, torch.float64))
    infinite = ~torch.isfinite(double).flatten(-2).all(-1)
    eye = torch.eye(matrix.shape[-1], dtype=double.dtype, device=matrix.device)
    factor, info = torch.linalg.cholesky_ex(torch.where(infinite[..., None, None], eye, double))
    factor = torch.where((info > 0)[..., None, None], eye, factor)
    fault = faults(infinite, info > 0)
    return Inverse(Dense(torch.cholesky_inverse(factor).to(matrix.dtype)), fault)


def _woodbury(b: LowRankPlusDiagonal) -> Inverse:
    """(D + U C Uᴴ)⁻¹ = D^(-½) (I − Q Y diag(μ/(1+μ)) Yᴴ Qᴴ) D^(-½).

    With QR = D^(-½)U and YμYᴴ = R C Rᴴ nothing is subtracted; B is positive definite if μ > −1.

    Returns:
        The inverse and faults; 4nr² flops and an eigenproblem of order r.
    """
    d, fault = _positive(b.entries.real, 1)
    root = d.rsqrt()[..., None]
    core = torch.eye(b.factor.shape[-1], dtype=b.dtype, device=b.device) if b.core is None else b.core
    infinite = ~(torch.isfinite(b.factor).flatten(-2).all(-1) & torch.isfinite(core).flatten(-2).all(-1))
    factor = torch.where(infinite[..., None, None], 0.0, b.factor)
    q, r = torch.linalg.qr(root * factor)
    mu, y, unfinished = hermitian_eigh(r @ core @ r.mH)
    fault = fault | infinite * int(Status.NON_FINITE) | unfinished
    indefinite = (fault == 0) & (mu <= -1).any(-1)
    fault = fault | indefinite * int(Status.NOT_POSITIVE_DEFINITE)
    mu = torch.where((fault != 0)[..., None], 0.0, mu)
    inner = torch.diag_embed(-mu / (1 + mu)).to(b.dtype)
    return Inverse(LowRankPlusDiagonal(root * (q @ y), d.reciprocal().to(b.dtype), inner), fault)


def _raised(entries: Tensor, dims: int) -> Tensor:
    """Entries raised to eps times the largest, and to 1 where none is positive or one not finite."""
    entries = entries.detach()
    largest = entries.flatten(-dims).amax(-1)[(..., *[None] * dims)]
    usable = torch.isfinite(largest) & (largest > 0)
    return torch.where(usable, entries.clamp_min(torch.finfo(entries.dtype).eps * largest), 1.0)


def _as_grid(damping: Tensor | float, like: Tensor) -> Tensor:
    """γ (..., 1, 1) on the device of `like`."""
    return torch.as_tensor(damping, device=like.device)[..., None, None]


def _terms(b: Operator) -> tuple[Sequence[Operator], Tensor | float]:
    """Terms and damping of a simplified operator."""
    if isinstance(b, Damped):
        return _terms(b.operator)[0], b.damping
    return (b.terms if isinstance(b, Sum) else (b,)), 0.0


def _kronecker_shape(b: Operator) -> tuple[int, int] | None:
    """(n₁, n₂) of a sum of Kronecker products, EKFAC and diagonals, if all have one."""
    shapes = set()
    for term in _terms(b)[0]:
        if isinstance(term, Kronecker):
            shapes.add((term.left.n, term.right.n))
        elif isinstance(term, EKFAC):
            shapes.add(tuple(term.entries.shape[-2:]))
        elif not isinstance(term, Diagonal):
            return None
    return shapes.pop() if len(shapes) == 1 else None


def _in_kronecker_basis(b: Operator, shape: tuple[int, int]) -> EKFAC:
    """M⁻¹ of `preconditioner`: B's diagonal in the better of two Kronecker bases."""
    p, q = _nearest_kronecker(_terms(simplified(b.normalized()[0]))[0])
    (_, u, _), (_, w, _) = hermitian_eigh(p), hermitian_eigh(q)
    terms, damping = _terms(b)
    rotated = sum(_diagonal_in(term, u, w, shape) for term in terms) + _as_grid(damping, u)
    rotated, plain = _raised(rotated, 2), _raised(b.diagonal().real.unflatten(-1, shape), 2)
    better = (rotated.log().sum((-2, -1)) <= plain.log().sum((-2, -1)))[..., None, None]
    u, w = (torch.where(better, x, torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)) for x in (u, w))
    return EKFAC(u, w, torch.where(better, rotated, plain).reciprocal().to(b.dtype))


def _nearest_kronecker(terms: Sequence[Operator]) -> tuple[Tensor, Tensor]:
    """P and Q of which P ⊗ Q is nearest to Σ_t P_t ⊗ Q_t in Frobenius norm, up to a scale.

    P = Σ a_t P_t and Q = Σ b_t Q_t, found by alternating least squares; for positive semidefinite
    terms a and b stay positive (Perron), and so P and Q positive semidefinite.

    Returns:
        P (..., n₁, n₁) and Q (..., n₂, n₂).
    """
    pairs = [_factors(term) for term in terms if not isinstance(term, Diagonal)]
    batch = torch.broadcast_shapes(*(x.shape[:-2] for pair in pairs for x in pair))
    p, q = (torch.stack([x.expand(*batch, *x.shape[-2:]) for x in side], -3) for side in zip(*pairs, strict=True))
    grams = [(x.flatten(-2).conj() @ x.flatten(-2).mT).real for x in (p, q)]
    b = torch.ones_like(grams[0][..., :1])
    for _ in range(_ALTERNATIONS):
        a = grams[1] @ b
        a = a / torch.linalg.vector_norm(a, dim=-2, keepdim=True)
        b = grams[0] @ a
        b = b / torch.linalg.vector_norm(b, dim=-2, keepdim=True)
    return (a[..., None] * p).sum(-3), (b[..., None] * q).sum(-3)


def _factors(term: Kronecker | EKFAC) -> tuple[Tensor, Tensor]:
    """P and Q of a Kronecker product; for EKFAC those of its mean eigenvalues along either side."""
    if isinstance(term, Kronecker):
        return term.left.to_dense(), term.right.to_dense()
    u, w, d = term.left_vectors, term.right_vectors, term.entries
    return (u * d.mean(-1)[..., None, :]) @ u.mH, (w * d.mean(-2)[..., None, :]) @ w.mH


def _diagonal_in(term: Operator, u: Tensor, w: Tensor, shape: tuple[int, int]) -> Tensor:
    """Diagonal entries of (U ⊗ W)ᴴ A (U ⊗ W), (..., n₁, n₂), real."""
    if isinstance(term, Kronecker):
        left, right = ((x.conj() * (factor @ x)).sum(-2).real for x, factor in ((u, term.left), (w, term.right)))
        return left[..., :, None] * right[..., None, :]
    if isinstance(term, EKFAC):
        u, w, entries = term.left_vectors.mH @ u, term.right_vectors.mH @ w, term.entries.real
    else:
        entries = term.diagonal().real.unflatten(-1, shape)
    return u.abs().square().mT @ entries @ w.abs().square()
