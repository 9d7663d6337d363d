"""`solve`: the k largest eigenpairs of a pencil, by the method that its structure allows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .choose import choose, fits
from .davidson import DavidsonOptions, davidson
from .dense import VERIFY_UP_TO, counted, dense, fused, fused_is_slow, subset
from .gram import gram
from .lapack import lapack
from .operators import Dense
from .pencil import Pencil
from .result import Counts, EigenResult, Spectrum, Status, faults
from .rotation import rotate_to_diagonal
from .structured import EKFAC

_ACCEPTED = 10  # times tol: a stagnated pair is still called converged up to here


def solve(
    pencil: Pencil,
    k: int,
    *,
    method: str = "auto",
    tol: float | None = None,
    seed: int = 0,
    options: DavidsonOptions | None = None,
    verify: bool | None = None,
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
    | "fused"     | real, no callable, no gradient; A, B formed   | all pairs, by `fused_eigh`   |
    | "subset"    | the same, on the CPU                          | k pairs of a tridiagonal T   |
    | "lapack"    | no gradient wanted, on the CPU; both formed   | xSYGVX, xSYGVD, by scipy     |
    | "dense"     | any; A and B are formed                       | Cholesky, then eigh          |
    | "davidson"  | real, no gradient wanted                      | block Jacobi–Davidson        |
    | "auto"      | any                                           | the fastest of these         |

    "fused" takes orders up to what `fused_eigh_limit` says. Pencils for which "subset" cannot say that its pairs are
    good and none is missed (faults, clusters at k, entries beyond 1e±50), and those that "lapack" does not solve to
    `tol`, are solved by "fused" or "dense".
    "davidson" iterates: its pairs hold to `tol`, and one may be missed unless the status says VERIFIED. Before it,
    a B that is a Kronecker product, damped or not, beside an A of such terms, is made diagonal (ten times the
    memory of its factors).

    Gradients flow to the entries of A and B (to the lower triangle, where matrices are read) by
    way of `torch.linalg.eigh`: they hold for distinct eigenvalues and are NaN or infinite for
    equal ones, and by "gram" for equal ones of J B⁻¹ Jᴴ anywhere.

    Args:
        pencil: A and B, float32, float64, complex64 or complex128, on any device.
        k: number of pairs, 1 <= k <= n.
        method: one of the table above.
        tol: largest backward error that counts as converged; 4√n·eps by default.
        seed: of the start vectors of "davidson"; the direct methods draw none.
        options: of "davidson"; see `DavidsonOptions`.
        verify: whether to count the eigenvalues above λ_k by the inertia of A − tB, which forms A and B and
            takes n³/3 flops. None: where A and B are dense and n <= 512, after "davidson", "dense" and "fused";
            the closed forms, "gram" and "subset" find out on their own.

    Returns:
        Values, vectors, certificates and a status for each pencil. Cost: dense 14n³ flops; subset 3n³ + 8n²k;
        lapack 4n³ to 9n³; gram about 2N²n and 9N³; Kronecker its two small pencils and 4(n₁ + n₂)nk;
        diagonal n log n; each and nk entries.

    Raises:
        TypeError: if `pencil` is no Pencil, `options` no DavidsonOptions, or k no integer.
        ValueError: if k or tol is out of range, the method unknown or unfit for the pencil, or its device meta.

    Example:
        >>> from sst_kernels import Kronecker
        >>> a, b = (torch.diag(torch.tensor(d, dtype=torch.float64)) for d in ([3.0, 1.0], [1.0, 2.0]))
        >>> result = solve(Pencil(Kronecker(a, a), Kronecker(b, b)), k=1)
        >>> result.values.tolist(), result.method, int(result.status) == Status.CONVERGED | Status.VERIFIED
        ([9.0], 'kronecker', True)
        >>> solve(Pencil(a, -b), k=1).explain()
        ['pencil: NOT_POSITIVE_DEFINITE: B is not positive definite; add damping, B + γI']
    """
    structure, name = choose(pencil, k, method)
    k = int(k)
    if not isinstance(options, DavidsonOptions | None):
        raise TypeError(f"solve: options must be a DavidsonOptions, got {type(options).__name__}")
    if tol is None:
        tol = pencil.tolerance
    elif not 0 < tol < math.inf:
        raise ValueError(f"solve: tol must be positive and finite, got {tol}; None for the default")
    if name == "subset":
        result = subset(structure, k, min(tol, pencil.tolerance))
        return result if result.status.all() else _with_others(result, result.status == 0, structure, k, tol, verify)
    if name == "davidson":
        found = _iterate(structure, k, tol, seed, options or DavidsonOptions())
    else:
        found = _METHODS[name](structure, k)
    values, vectors = found.values[..., :k], found.vectors
    errors, orthogonality = found.errors, found.orthogonality
    if errors is None and orthogonality is None:
        errors, orthogonality = pencil.certificates(values, vectors)
    elif orthogonality is None:
        orthogonality = pencil.b_orthogonality(vectors)
    count = verify if verify is not None else name == "davidson" and _is_small_and_dense(structure)
    if count and not (found.status & Status.VERIFIED).all():
        found = found._replace(status=found.status | counted(structure, found.values, k))
    status, blank = _judge(found, errors, orthogonality, tol)
    result = EigenResult(
        values=values.masked_fill(blank[..., None], torch.nan),
        vectors=vectors.masked_fill(blank[..., None, None], torch.nan),
        backward_errors=errors.masked_fill(blank[..., None], torch.nan),
        b_orthogonality=orthogonality.masked_fill(blank, torch.nan),
        status=status,
        method=name,
        counts=found.counts or Counts(k, k, 0, 0),
        history=found.history,
    )
    if name == "lapack":
        return _with_others(result, ~(result.backward_errors.amax(-1) <= tol), structure, k, tol, verify)
    return result


def _with_others(
    result: EigenResult, poor: Tensor, pencil: Pencil, k: int, tol: float, verify: bool | None
) -> EigenResult:
    """The result, its poor pencils solved by way of the whole spectrum, which refines, and names faults."""
    count = int(poor.sum())
    if count == 0:
        return result
    slow = fused_is_slow(pencil.n, count, pencil.device)
    whole = "fused" if not slow and fits(pencil, "fused") else "dense"
    if count == poor.numel():
        return solve(pencil, k, method=whole, tol=tol, verify=verify)
    rest = solve(Pencil(*(x[poor] for x in pencil.dense())), k, method=whole, tol=tol, verify=verify)
    for name in ("values", "vectors", "backward_errors", "b_orthogonality", "status"):
        getattr(result, name)[poor] = getattr(rest, name)
    return result


def _iterate(pencil: Pencil, k: int, tol: float, seed: int, options: DavidsonOptions) -> Spectrum:
    """`davidson`, in the Kronecker eigenbasis of B where it has one."""
    rotated = None if options.start is not None or options.preconditioner is not None else rotate_to_diagonal(pencil)
    if rotated is None:
        return davidson(pencil, k, tol, seed, options)
    in_basis, back = rotated
    found = davidson(in_basis, k, tol, seed, options)
    return found._replace(vectors=back(found.vectors), errors=None, orthogonality=None)


def _is_small_and_dense(pencil: Pencil) -> bool:
    return isinstance(pencil.A, Dense) and isinstance(pencil.B, Dense) and pencil.n <= VERIFY_UP_TO


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
    status = faults(infinite, indefinite)
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
    "lapack": lapack,
    "dense": dense,
}
_FAULTS = Status.NOT_POSITIVE_DEFINITE | Status.NON_FINITE | Status.MAX_ITERATIONS


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
    above = ~(blank | (worst <= tol)) & ((status & Status.MAX_ITERATIONS) == 0)
    return status | above * int(Status.STAGNATED), blank
