"""A = JᴴJ/N with fewer rows than columns, and B with an exact inverse: an N × N eigenproblem, at any n.

B⁻¹A = B⁻¹JᴴJ/N has the nonzero eigenvalues of M = J B⁻¹ Jᴴ / N (Sylvester), and with M w = λw the
eigenvectors v = B⁻¹Jᴴw/√(Nλ) (push-through). λ = 0 belongs to the null space of J.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .operators import Operator
from .pencil import Pencil
from .preconditioners import factored_inverse, hermitian_eigh
from .result import Spectrum, Status
from .scaling import start_block
from .simplify import converted

_REFINEMENTS = 3  # of B⁻¹Jᴴ: each takes its error times cond(B)·eps, and makes one more derivative right
_HEAVY = 1e-4  # share of λ₁ from which on a λ shows in the residual of a null vector
_PASSES = 3  # of Cholesky QR, the first one shifted (Fukaya et al. 2020)


def gram(pencil: Pencil, k: int) -> Spectrum:
    """The k largest pairs of A v = λ B v for A = JᴴJ/N, exact, without forming n × n.

    Beyond the rank of J, λ = 0: random vectors, made B-orthogonal to the others, which puts them
    into the null space of J. A batch in single precision is solved again in double where a
    backward error or VᴴBV − I of it asks for that: an ill-conditioned B.

    Args:
        pencil: A a Gram operator with N < n and positive counts, B one that `inverse` can invert.
        k: number of pairs.

    Returns:
        At least k + 1 eigenvalues (k, if that is n) and k vectors. Cost: the inverse of B, four
        products with it and three with B for N columns, 2N²n flops, an eigenproblem of order N,
        10nk² flops; memory 3Nn + 3nk entries and those of B⁻¹.
    """
    found = _gram(pencil, k)
    double = torch.promote_types(pencil.dtype, torch.float64)
    if pencil.dtype == double:
        return found
    errors, orthogonality = pencil.certificates(found.values[..., :k], found.vectors)
    loose = orthogonality > 10 * pencil.n * torch.finfo(pencil.dtype).eps
    if not ((errors.amax(-1) > pencil.tolerance) | loose).any():  # faulty pencils are NaN
        return found._replace(errors=errors, orthogonality=orthogonality)
    redone = _gram(Pencil(converted(pencil.A, double), converted(pencil.B, double)), k)
    values, vectors, uncertainty = (new.to(old.dtype) for new, old in zip(redone[:3], found[:3], strict=True))
    return Spectrum(values, vectors, uncertainty, redone.status)


def _gram(pencil: Pencil, k: int) -> Spectrum:
    """The method itself, in the precision of the pencil; see `gram`."""
    a, b, rows = pencil.A, pencil.B, pencil.A.rows
    found = factored_inverse(b)
    infinite = ~torch.isfinite(rows).flatten(-2).all(-1)
    fault = found.fault | infinite * int(Status.NON_FINITE)
    solved = found.operator @ rows.mH
    for _ in range(_REFINEMENTS):
        solved = solved + found.operator @ (rows.mH - b @ solved)
    mu, w, unfinished = hermitian_eigh((rows @ solved) / a.count[..., None, None])
    mu, w = mu.flip(-1), w.flip(-1)
    basis = _b_orthonormal(b, _candidates(solved, mu, w, a.count, found.operator @ start_block(b, k)))
    half = rows @ basis
    values, y, unfinished_too = hermitian_eigh((half.mH @ half) / a.count[..., None, None])
    values, vectors = values.flip(-1), basis @ y.flip(-1)
    null = values <= _zero(mu)
    values = values.masked_fill(null, 0.0)
    vectors = vectors - null[..., None, :] * _range_part(solved, mu, w, a.count, rows @ vectors)
    fault = torch.where(fault != 0, fault, unfinished | unfinished_too)
    return _spectrum(pencil, values, vectors, mu, fault)


def _candidates(solved: Tensor, mu: Tensor, w: Tensor, count: Tensor, fill: Tensor) -> Tensor:
    """B⁻¹Jᴴw/√(Nλ) for the leading λ that are not zero to rounding, then columns of `fill`.

    Args:
        solved: B⁻¹Jᴴ (..., n, N).
        mu: λ (..., N), descending.
        w: eigenvectors (..., N, N).
        count: N of JᴴJ/N.
        fill: (..., n, k).

    Returns:
        (..., n, k).
    """
    k, rank = fill.shape[-1], min(fill.shape[-1], mu.shape[-1])
    leading = mu[..., :rank]
    good = leading > _zero(mu)
    scale = torch.where(good, count[..., None] * leading, 1.0).rsqrt()
    pushed = solved @ (w[..., :rank] * scale[..., None, :])
    filled = torch.where(good[..., None, :], pushed, fill[..., :rank])
    return torch.cat([filled, fill[..., rank:].expand(*filled.shape[:-1], k - rank)], -1)


def _zero(mu: Tensor) -> Tensor:
    """Largest λ that is zero to rounding, (..., 1)."""
    return mu.shape[-1] * torch.finfo(mu.dtype).eps * mu.detach().abs().amax(-1, keepdim=True)


def _range_part(solved: Tensor, mu: Tensor, w: Tensor, count: Tensor, image: Tensor) -> Tensor:
    """Σ v_i (v_iᴴBu) over the heavy λ_i, found as B⁻¹Jᴴw_i (w_iᴴJu)/(Nλ_i) from Ju.

    What is left of v_i in u is rounding in B's norm, but λ_i‖Bv_i‖ times that in A u; Ju shows it
    with all its digits. For light λ_i it is Ju whose rounding would be magnified.

    Returns:
        (..., n, k), to be subtracted from u.
    """
    inverse = torch.where(mu > _HEAVY * mu[..., :1], mu, torch.inf).reciprocal() / count[..., None]
    return solved @ (w @ (inverse[..., None] * (w.mH @ image)))


def _b_orthonormal(b: Operator, z: Tensor) -> Tensor:
    """Basis V of the span of z, VᴴBV = I, each column from those of z up to it: Cholesky QR.

    The Gram matrices are scaled to a unit diagonal and factored in double precision. Columns that
    depend on one another beyond rounding are left as they come; the certificates show it.

    Returns:
        V (..., n, k); 3 products with B, 9nk² flops.
    """
    k, eps = z.shape[-1], torch.finfo(z.dtype).eps
    double = torch.promote_types(z.dtype, torch.float64)
    eye = torch.eye(k, dtype=double, device=z.device)
    for step in range(_PASSES):
        gram = (z.mH @ (b @ z)).to(double)
        scale = gram.diagonal(dim1=-2, dim2=-1).real.rsqrt()
        gram = scale[..., :, None] * gram * scale[..., None, :]
        gram = 0.5 * gram + 0.5 * gram.mH
        if step == 0:
            gram = gram + 10 * k * eps * eye
        factor = torch.linalg.cholesky_ex(gram).L
        z = z @ (scale[..., None] * torch.linalg.solve_triangular(factor.mH, eye, upper=True)).to(z.dtype)
    return z


def _spectrum(pencil: Pencil, values: Tensor, vectors: Tensor, mu: Tensor, fault: Tensor) -> Spectrum:
    """What is known: the k pairs, the λ beyond them, and whether any λ is missing among these."""
    n, k, batch = pencil.n, values.shape[-1], pencil.batch_shape
    verified = torch.full_like(fault, int(Status.VERIFIED))
    uncertainty = (mu.shape[-1] + math.sqrt(n)) * torch.finfo(mu.dtype).eps * mu.detach().abs().amax(-1)
    if k < n:
        rest = mu[..., k:] if k < mu.shape[-1] else torch.zeros_like(values[..., :1])
        values = torch.cat([values, rest], -1)
        middle = 0.5 * (values[..., k - 1] + values[..., k])
        verified = verified * ((mu > middle[..., None]).sum(-1) == k)
    return Spectrum(
        values.expand(*batch, -1),
        vectors.expand(*batch, n, k),
        uncertainty.expand(batch),
        (fault | verified).expand(batch),
    )
