"""Batched dense generalized eigenproblem by Cholesky, congruence and `torch.linalg.eigh`, or `fused_eigh`.

The steps of LAPACK's xSYGVD / xHEGVD (Anderson et al. 1999, sec. 2.3.5), on batches and on any
device. With B = LLᴴ the three problem types reduce to the standard C y = λ y:

| type | problem    | C         | v     |
|------|------------|-----------|-------|
| 1    | A v = λ B v | L⁻¹ A L⁻ᴴ | L⁻ᴴ y |
| 2    | A B v = λ v | Lᴴ A L    | L⁻ᴴ y |
| 3    | B A v = λ v | Lᴴ A L    | L y   |

A failing matrix is replaced by the identity before it can reach LAPACK, so it harms no other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operators import Dense, Mirrored
from .ops import fused_eigh, fused_eigh_limit
from .pencil import Pencil
from .result import Counts, EigenResult, Spectrum, Status, faults

# What the info of fused_eigh means.
_OF_INFO = torch.tensor([0, Status.NOT_POSITIVE_DEFINITE, Status.NON_FINITE, Status.MAX_ITERATIONS])
VERIFY_UP_TO = 512  # order up to which the inertia check is worth its n³/3 flops unasked


def dense(pencil: Pencil, k: int) -> Spectrum:
    """The k largest pairs of A v = λ B v, by the whole spectrum, in torch's operations.

    Args:
        pencil: any pencil; A and B are formed.
        k: number of pairs.

    Returns:
        All eigenvalues and k vectors; about 14n³ flops and nine n² matrices a pencil.
    """
    return _largest(pencil, k, fused=False)


def fused(pencil: Pencil, k: int) -> Spectrum:
    """The k largest pairs of A v = λ B v, by the whole spectrum, in one call of `fused_eigh`.

    Args:
        pencil: any pencil of a real dtype and an order that `fused_eigh` takes; A and B are formed.
        k: number of pairs.

    Returns:
        All eigenvalues and k vectors; about 10n³ flops and four n² matrices a pencil.
    """
    return _largest(pencil, k, fused=True)


def subset(pencil: Pencil, k: int, tol: float) -> EigenResult:
    """The k largest pairs of A v = λ B v by tridiagonalisation, bisection and inverse iteration, on the CPU.

    Args:
        pencil: of a real dtype; A and B are formed.
        k: number of pairs.
        tol: largest backward error that is accepted.

    Returns:
        The result: a pencil's status is CONVERGED and VERIFIED, or 0 where that cannot be said and another method
        is needed. One thread a pencil; 3n³ + 8n²k flops and five n² float64 matrices each.
    """
    a, b = (x.matrix if isinstance(x, Dense) else x.to_dense() for x in (pencil.A, pencil.B))
    if a.shape != b.shape:
        a, b = torch.broadcast_tensors(a, b)
    values, vectors, errors, orthogonality, status = torch.ops.sst_kernels._leading_eigh.default(a, b, k, tol)
    return EigenResult(values[..., :k], vectors, errors, orthogonality, status, "subset", Counts(k, k, 0, 0))


@torch.library.register_fake("sst_kernels::_leading_eigh")
def _(A: Tensor, B: Tensor, k: int, tol: float) -> tuple[Tensor, ...]:
    batch, n = A.shape[:-2], A.shape[-1]
    shapes = (min(k + 1, n),), (n, k), (k,), ()
    return *(A.new_empty((*batch, *shape)) for shape in shapes), A.new_empty(batch, dtype=torch.int64)


def _largest(pencil: Pencil, k: int, *, fused: bool) -> Spectrum:
    """The k largest pairs of the whole spectrum, refined, and counted where that is cheap."""
    n, batch = pencil.n, pencil.batch_shape
    a, b = (x.reshape(-1, n, n) for x in pencil.dense())
    whole = Pencil(Mirrored(a), Mirrored(b))
    values, vectors, status = generalized_eigh(a, b, fused=fused)
    values, vectors, errors, orthogonality = _refine(whole, values.flip(-1), vectors.flip(-1), k)
    if k == n or n <= VERIFY_UP_TO:
        status = status | counted(whole, values, k)
    uncertainty = n * torch.finfo(values.dtype).eps * values.detach().abs().amax(-1)
    parts = values, vectors, uncertainty, status, errors, orthogonality
    return Spectrum(*(x.reshape(batch + x.shape[1:]) for x in parts))


@torch.no_grad()
def counted(pencil: Pencil, values: Tensor, k: int) -> Tensor:
    """VERIFIED where exactly k eigenvalues lie above the middle between λ_k and the next that is known, (...,)."""
    if k == pencil.n:  # n independent eigenvectors leave no room for another
        return torch.full(pencil.batch_shape, int(Status.VERIFIED), device=pencil.device)
    middle = 0.5 * (values[..., k - 1] + values[..., k]).nan_to_num()
    return (pencil.count_above(middle) == k) * int(Status.VERIFIED)


@torch.no_grad()
def _correction(pencil: Pencil, values: Tensor, vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Changes of the first k pairs that one refinement step asks for, zero where it does not help.

    The error of pair j has the components (vᵢᴴ r_j) / (λ_j − λ_i) along the other eigenvectors, to
    first order (Ogita & Aishima 2018, there for B = I); then λ_j = v_jᴴAv_j / v_jᴴBv_j.
    Components above √eps, where first order does not hold, are left. A pencil stays as it was
    if its backward errors do not fall, or if VᴴBV − I grows to four times that of all n vectors.

    Returns:
        Changes of the values (N, k) and of the vectors (N, n, k); two products with A and with B,
        and 4n²k flops, beside the certificates.
    """
    x, old = vectors[..., :k], values[..., :k]
    residual = pencil.A @ x - (pencil.B @ x) * old[..., None, :]
    parts = (vectors.mH @ residual) / (old[..., None, :] - values[..., :, None])
    small = parts.abs() <= torch.finfo(old.dtype).eps ** 0.5
    change = vectors @ torch.where(small, parts, 0)
    y = x + change
    quotient = (y.conj() * (pencil.A @ y)).sum(-2).real / (y.conj() * (pencil.B @ y)).sum(-2).real
    before = pencil.backward_errors(old, x)
    after, orthogonality = pencil.certificates(quotient, y)
    allowed = 4 * pencil.b_orthogonality(vectors).clamp_min(pencil.n * torch.finfo(old.dtype).eps)
    better = (after.amax(-1) < before.amax(-1)) & (orthogonality <= allowed)
    better = better[..., None]
    return torch.where(better, quotient - old, 0), torch.where(better[..., None], change, 0)


def _refine(whole: Pencil, values: Tensor, vectors: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first k pairs, refined in those pencils where a backward error is above tolerance.

    Cholesky and congruence leave errors of eps·|λ|_max in every λ (Davies, Higham & Tisseur 2001),
    too much for the small ones where B is ill-conditioned.

    Returns:
        Values (N, n) and vectors (N, n, k), descending, and their certificates.
    """
    kept = vectors[..., :k]
    certificates = whole.certificates(values[:, :k], kept)
    poor = (certificates[0].amax(-1) > whole.tolerance).nonzero()[:, 0]
    if not len(poor):
        return values, kept, *certificates
    pencil = Pencil(*(Mirrored(x.matrix[poor]) for x in (whole.A, whole.B)))
    changes = _correction(pencil, values[poor], vectors[poor], k)
    first = values[:, :k].index_add(0, poor, changes[0])
    first, order = first.sort(-1, descending=True)
    kept = kept.index_add(0, poor, changes[1]).take_along_dim(order[:, None, :], -1)
    return torch.cat([first, values[:, k:]], -1), kept, *whole.certificates(first, kept)


def generalized_eigh(
    a: Tensor,
    b: Tensor | None,
    *,
    problem: int = 1,
    columns: slice = slice(None),
    values_only: bool = False,
    fused: bool | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """All eigenvalues, ascending, and the wanted eigenvectors of N Hermitian pencils.

    A single-precision pencil whose B has no Cholesky factor is solved in double precision before
    it is called indefinite: rounding alone can hide a positive definite B.

    Args:
        a: (N, n, n) Hermitian, both triangles filled.
        b: (N, n, n) Hermitian in the dtype of `a`, or None for the identity.
        problem: 1, 2 or 3, see the table above.
        columns: which eigenvectors, by ascending index.
        values_only: whether to leave the eigenvectors out.
        fused: whether `fused_eigh` solves the pencils (no other problem than 1, and no gradient),
            else torch's operations; None for the faster of those that can.

    Returns:
        Values (N, n), vectors (N, n, len(columns)) or None, and fault bits of `Status` (N,),
        int64. The values and vectors of a faulty pencil are NaN.
    """
    if fused is None:
        n, count = a.shape[-1], 1 if values_only else a.shape[0]
        fused = problem == 1 and b is not None and not fused_is_slow(n, count, a.device) and fused_can(n, [a, b])
    if fused:
        values, vectors, info = fused_eigh(a, b)
        vectors, fault = None if values_only else vectors[..., columns], _OF_INFO.to(info.device)[info.long()]
    else:
        c, factor, fault = _reduce(a, b, problem)
        values, y, unfinished = _standard_eigh(c, values_only)
        fault = fault | unfinished
        vectors = None if values_only else _back_substitute(factor, y[..., columns], problem)
        values, vectors, fault = _blank_faults(values, vectors, fault)
    hidden = (fault & Status.NOT_POSITIVE_DEFINITE).nonzero()[:, 0]
    if len(hidden) and values.dtype == torch.float32:
        double = torch.promote_types(a.dtype, torch.float64)
        redone = generalized_eigh(
            a[hidden].to(double),
            b[hidden].to(double),
            problem=problem,
            columns=columns,
            values_only=values_only,
            fused=None if fused else False,
        )
        values, vectors, fault = (
            old if old is None else old.index_copy(0, hidden, new.to(old.dtype))
            for old, new in zip((values, vectors, fault), redone, strict=True)
        )
        values, vectors, fault = _blank_faults(values, vectors, fault)
    return values, vectors, fault


def fused_can(n: int, tensors: list[Tensor]) -> bool:
    """Whether `fused_eigh` takes order n in the dtype and on the device of these, none needing a gradient."""
    like = tensors[0]
    if like.is_complex() or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return False
    return like.device.type in ("cpu", "cuda") and n <= fused_eigh_limit(like)


def fused_is_slow(n: int, count: int, device: torch.device) -> bool:
    """Whether torch's operations are as fast as `fused_eigh`: for a single larger pencil on the CPU."""
    return device.type == "cpu" and n > 64 and count == 1


def subset_can(n: int, tensors: list[Tensor]) -> bool:
    """Whether `subset` takes pencils made of these."""
    return tensors[0].device.type == "cpu" and fused_can(n, tensors)


def _reduce(a: Tensor, b: Tensor | None, problem: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Standard problem C of each pencil, its factor and its faults.

    A faulty pencil gets C = I, through `torch.where`, which also keeps its gradient at zero.

    Returns:
        C (N, n, n), the Cholesky factor L of B (None if b is), and fault bits (N,).
    """
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    infinite = ~_all_finite(a)
    indefinite = torch.zeros_like(infinite)
    c, factor = torch.where(infinite[:, None, None], eye, a), None
    if b is not None:
        bad = ~_all_finite(b)
        factor, info = torch.linalg.cholesky_ex(torch.where(bad[:, None, None], eye, b))
        infinite, indefinite = infinite | bad, info > 0
        factor = torch.where(indefinite[:, None, None], eye, factor)
        if problem == 1:
            half = torch.linalg.solve_triangular(factor, c, upper=False)
            c = torch.linalg.solve_triangular(factor, half.mH, upper=False)
        else:
            c = factor.mH @ c @ factor
        c = 0.5 * c + 0.5 * c.mH
        infinite = infinite | ~_all_finite(c)
    fault = faults(infinite, indefinite)
    return torch.where((fault != 0)[:, None, None], eye, c), factor, fault


def _all_finite(x: Tensor) -> Tensor:
    """Whether all entries of x[i] are finite, (N,)."""
    return torch.isfinite(x).flatten(1).all(-1)


def _standard_eigh(c: Tensor, values_only: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Eigenpairs of each C, ascending, and MAX_ITERATIONS where LAPACK gives up.

    torch reports a matrix that did not converge by an exception for the whole batch, so the rare
    batch that holds one is solved matrix by matrix.

    Returns:
        Values (N, n), vectors (N, n, n) or None, and fault bits (N,).
    """
    fault = torch.zeros(len(c), dtype=torch.int64, device=c.device)
    try:
        if values_only:
            return torch.linalg.eigvalsh(c), None, fault
        return *torch.linalg.eigh(c), fault
    except torch.linalg.LinAlgError:
        if len(c) > 1:
            values, vectors, faults = zip(*(_standard_eigh(one, values_only) for one in c.split(1)), strict=True)
            return torch.cat(values), None if values_only else torch.cat(vectors), torch.cat(faults)
        nan = torch.full_like(c, torch.nan)
        return nan[..., 0].real, None if values_only else nan, fault + Status.MAX_ITERATIONS


def _back_substitute(factor: Tensor | None, y: Tensor, problem: int) -> Tensor:
    """Eigenvectors v of the pencil from y of C; see the table above."""
    if factor is None:
        return y
    if problem == 3:
        return factor @ y
    return torch.linalg.solve_triangular(factor.mH, y, upper=True)


def _blank_faults(values: Tensor, vectors: Tensor | None, fault: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Mark results that overflow, and set what faulty pencils hold to NaN."""
    finite = _all_finite(values)
    if vectors is not None:
        finite = finite & _all_finite(vectors)
    fault = fault | (~finite & (fault == 0)) * int(Status.NON_FINITE)
    bad = fault != 0
    values = torch.where(bad[:, None], torch.nan, values)
    if vectors is not None:
        vectors = torch.where(bad[:, None, None], torch.nan, vectors)
    return values, vectors, fault
