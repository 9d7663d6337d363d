"""`solve`: the k largest eigenpairs of a pencil, by the method that its structure allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .dense import dense, fused, fused_can, fused_is_slow
from .gram import gram
from .operators import Diagonal, Kronecker, Operator
from .pencil import Pencil
from .preconditioners import has_inverse
from .result import Counts, EigenResult, Spectrum, Status
from .simplify import simplified
from .structured import EKFAC, Gram

_ACCEPTED = 10  # times tol: a stagnated pair is still called converged up to here


def solve(
    pencil: Pencil,
    k: int,
    *,
    method: str = "auto",
    tol: float | None = None,
    seed: int = 0,
) -> EigenResult:
    """The k largest λ of A v = λ B v, descending, with VᴴBV = I, for each pencil of a batch.

    Never raises for a pencil: one that is indefinite, singular or not finite comes back as NaN
    with a status, and harms no other pencil of its batch.

    | method      | pencil                                        | how                          |
    |-------------|-----------------------------------------------|------------------------------|
    | "diagonal"  | both Diagonal                                 | a_i / b_i                    |
    | "kronecker" | both Kronecker, their factors of equal orders | products of λ of the factors |
    |             | both EKFAC, of one eigenbasis (same tensors)  | ratios of their eigenvalues  |
    | "gram"      | A = JᴴJ/N, N < n, B of those `inverse` takes  | eigh of J B⁻¹ Jᴴ / N         |
    | "fused"     | real, no gradient wanted; A and B are formed  | all pairs, by `fused_eigh`   |
    | "dense"     | any; A and B are formed                       | Cholesky, then eigh          |
    | "auto"      | any                                           | the first of these that fits |

    "auto" passes over "fused" where "dense" is faster: for single pencils beyond 64 × 64 on the CPU.
    On CUDA, "fused" takes what `fused_eigh_limit` says.

    Gradients flow to the entries of A and B (to the lower triangle, where matrices are read) by
    way of `torch.linalg.eigh`: they hold for distinct eigenvalues and are NaN or infinite for
    equal ones, and by "gram" for equal ones of J B⁻¹ Jᴴ anywhere.

    Args:
        pencil: A and B, float32, float64, complex64 or complex128, on any device.
        k: number of pairs, 1 <= k <= n.
        method: one of the table above.
        tol: largest backward error that counts as converged; 4√n·eps by default.
        seed: of the start vectors of iterative methods; the direct methods here draw none.

    Returns:
        Values, vectors, certificates and a status for each pencil. Cost: dense 14n³ flops; gram
        about 2N²n and 9N³; Kronecker its two small pencils and 4(n₁ + n₂)nk; diagonal n log n; each
        and nk entries.

    Raises:
        TypeError: if `pencil` is no Pencil or k no integer.
        ValueError: if k or tol is out of range, or the method unknown or unfit for the pencil.
    """
    structure, name = _choose(pencil, k, method)
    if tol is None:
        tol = pencil.tolerance
    elif not 0 < tol < math.inf:
        raise ValueError(f"solve: tol must be positive and finite, got {tol}; None for the default")
    found = _METHODS[name](structure, k)
    values, vectors = found.values[..., :k], found.vectors
    errors = pencil.backward_errors(values, vectors) if found.errors is None else found.errors
    orthogonality = pencil.b_orthogonality(vectors)
    status, blank = _judge(found, errors, orthogonality, tol)
    return EigenResult(
        values=values.masked_fill(blank[..., None], torch.nan),
        vectors=vectors.masked_fill(blank[..., None, None], torch.nan),
        backward_errors=errors.masked_fill(blank[..., None], torch.nan),
        b_orthogonality=orthogonality.masked_fill(blank, torch.nan),
        status=status,
        method=name,
        counts=Counts(k, k, 0, 0),
    )


def diagonal(pencil: Pencil, k: int) -> Spectrum:
    """λ_i = a_i / b_i, v_i = e_i / √b_i.

    Args:
        pencil: both operators Diagonal.
        k: number of pairs.

    Returns:
        All eigenvalues and k vectors; n log n and nk entries written.
    """
    shape = (*pencil.batch_shape, pencil.n)
    a, b = (x.diagonal().real.expand(shape) for x in (pencil.A, pencil.B))
    values, chosen, scale, status = _ratios(a, b, k)
    vectors = torch.zeros(*shape, k, dtype=pencil.dtype, device=pencil.device)
    vectors = vectors.scatter(-2, chosen[..., None, :], scale.to(pencil.dtype)[..., None, :])
    return Spectrum(values, vectors, _of_one_rounding(values, k), status)


def _ratios(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sorted a_i / b_i (..., n), the indices of the first k, their 1/√b_i, and status bits."""
    values, order = (a / b).sort(dim=-1, descending=True, stable=True)
    chosen = order[..., :k]
    infinite = ~(torch.isfinite(a) & torch.isfinite(b)).all(-1)
    indefinite = (b <= 0).any(-1)
    status = infinite * int(Status.NON_FINITE) | indefinite * int(Status.NOT_POSITIVE_DEFINITE)
    return values, chosen, b.gather(-1, chosen).rsqrt(), status | Status.VERIFIED


def _of_one_rounding(values: Tensor, k: int) -> Tensor:
    """Uncertainty of a λ_k that is a ratio of stored numbers."""
    return 4 * torch.finfo(values.dtype).eps * values[..., k - 1].detach().abs()


def kronecker(pencil: Pencil, k: int) -> Spectrum:
    """λ = α_i β_j, v = u_i ⊗ w_j from A₁u = αB₁u and A₂w = βB₂w (vec row-major).

    Args:
        pencil: A = A₁ ⊗ A₂ and B = B₁ ⊗ B₂, factors of equal orders n₁ and n₂, B₁ and B₂ positive
            definite (if both are negative definite, flip both signs); or both EKFAC in one basis.
        k: number of pairs.

    Returns:
        All eigenvalues and k vectors; two small pencils, n log n, and nk entries written.
    """
    a, b = pencil.A, pencil.B
    if isinstance(a, EKFAC):
        return _shared_basis(pencil, k)
    left = solve(Pencil(a.left, b.left), a.left.n)
    right = solve(Pencil(a.right, b.right), a.right.n)
    products = (left.values[..., :, None] * right.values[..., None, :]).flatten(-2)
    values, order = products.sort(dim=-1, descending=True, stable=True)
    vectors = _kronecker_columns(left.vectors, right.vectors, order[..., :k])
    eps = torch.finfo(values.dtype).eps
    uncertainty = (a.left.n + a.right.n) * eps * values.detach().abs().amax(-1)
    faults = (left.status | right.status) & _FAULTS
    verified = left.status & right.status & Status.VERIFIED
    return Spectrum(values, vectors, uncertainty, faults | verified)


def _shared_basis(pencil: Pencil, k: int) -> Spectrum:
    """λ = a_ij / b_ij, v = u_i ⊗ w_j / √b_ij for EKFAC operators in the same U and W."""
    shape = (*pencil.batch_shape, pencil.n)
    a, b = (x.entries.real.flatten(-2).expand(shape) for x in (pencil.A, pencil.B))
    values, chosen, scale, status = _ratios(a, b, k)
    columns = _kronecker_columns(pencil.A.left_vectors, pencil.A.right_vectors, chosen)
    return Spectrum(values, columns * scale[..., None, :], _of_one_rounding(values, k), status)


def _kronecker_columns(u: Tensor, w: Tensor, order: Tensor) -> Tensor:
    """Columns u_i ⊗ w_j of U ⊗ W for the indices (i, j) = divmod(order, n₂); (..., n, k)."""
    u, w = (
        x.expand(*order.shape[:-1], -1, -1).take_along_dim(index[..., None, :], -1)
        for x, index in ((u, order // w.shape[-1]), (w, order % w.shape[-1]))
    )
    return (u[..., :, None, :] * w[..., None, :, :]).flatten(-3, -2)


_METHODS: dict[str, Callable[[Pencil, int], Spectrum]] = {
    "diagonal": diagonal,
    "kronecker": kronecker,
    "gram": gram,
    "fused": fused,
    "dense": dense,
}
_FAULTS = Status.NOT_POSITIVE_DEFINITE | Status.NON_FINITE | Status.MAX_ITERATIONS


def _fits(pencil: Pencil, method: str) -> bool:
    """Whether `method` can solve a pencil of this structure."""
    a, b = pencil.A, pencil.B
    if method == "diagonal":
        return isinstance(a, Diagonal) and isinstance(b, Diagonal)
    if method == "kronecker":
        if isinstance(a, EKFAC) and isinstance(b, EKFAC):
            return a.left_vectors is b.left_vectors and a.right_vectors is b.right_vectors
        both = isinstance(a, Kronecker) and isinstance(b, Kronecker)
        return both and a.left.n == b.left.n
    if method == "gram":
        few = isinstance(a, Gram) and a.rows.shape[-2] < a.n
        return few and bool((a.count > 0).all()) and has_inverse(b)
    if method == "fused":
        held = [*_held(a), *_held(b)]
        like = torch.empty(0, dtype=pencil.dtype, device=pencil.device)
        return not any(map(callable, held)) and fused_can(pencil.n, [like, *(x for x in held if isinstance(x, Tensor))])
    return True


def _held(operator: Operator) -> Iterator[Any]:
    """What an operator and its parts are made of."""
    for field in fields(operator):
        value = getattr(operator, field.name)
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, Operator):
                yield from _held(part)
            else:
                yield part


def _choose(pencil: Pencil, k: int, method: str) -> tuple[Pencil, str]:
    """The simplified pencil and the name of the method that will run, after checking the arguments."""
    if not isinstance(pencil, Pencil):
        raise TypeError(f"solve: pencil must be a Pencil, got {type(pencil).__name__}; write Pencil(A, B)")
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"solve: k must be an int, got {type(k).__name__}")
    if not 1 <= k <= pencil.n:
        raise ValueError(f"solve: k must be in 1..n with n = {pencil.n}, got k = {k}")
    structure = Pencil(simplified(pencil.A), simplified(pencil.B))
    if method == "auto":
        slow = {"fused"} if fused_is_slow(pencil.n, pencil.batch_shape.numel(), pencil.device) else set()
        return structure, next(name for name in _METHODS if name not in slow and _fits(structure, name))
    if method not in _METHODS:
        raise ValueError(f"solve: method must be one of {['auto', *_METHODS]}, got {method!r}")
    if not _fits(structure, method):
        kinds = f"{type(pencil.A).__name__} and {type(pencil.B).__name__}"
        raise ValueError(
            f"solve: method {method!r} does not fit A and B, which are {kinds}; "
            "use method='auto', or see the table in solve's documentation"
        )
    return structure, method


@torch.no_grad()
def _judge(found: Spectrum, errors: Tensor, orthogonality: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """Status (...,), and which pencils have no result to show."""
    k = errors.shape[-1]
    status = found.status & (_FAULTS | Status.VERIFIED)
    broken = (status & (Status.NOT_POSITIVE_DEFINITE | Status.NON_FINITE)) != 0
    finite = torch.isfinite(found.vectors).flatten(-2).all(-1)
    finite &= torch.isfinite(found.values[..., :k]).all(-1)
    status |= (~finite & ((status & _FAULTS) == 0)) * int(Status.NON_FINITE)
    blank = broken | ~finite
    worst = errors.amax(-1)
    converged = ~blank & (worst <= _ACCEPTED * tol)
    cluster = torch.zeros_like(blank)
    if k < found.values.shape[-1]:
        gap = found.values[..., k - 1] - found.values[..., k]
        cluster = ~blank & (gap <= found.uncertainty)
    # k·max|VᴴBV − I| < 1 makes the pairs independent (Gershgorin), so that none is counted twice
    sound = converged & ~cluster & (k * orthogonality < 1)
    status = torch.where(sound, status, status & ~Status.VERIFIED)
    status |= converged * int(Status.CONVERGED) | cluster * int(Status.CLUSTER_AT_K)
    return status | ~(blank | (worst <= tol)) * int(Status.STAGNATED), blank
