"""The differentiable op R_i = (λ_iB − A)⁻¹ off the span of the k leading eigenvectors of a pencil.

z = R_i g solves the bordered, Hermitian system [λ_iB − A, BV; VᴴB, 0] [z; y] = [g; 0], with
y = Vᴴg for exact pairs. Hence, with M = BV, dz = R(dg + dA z − d(λB) z − dM y) − V dMᴴz, and in
reverse with p = R z̄, q = Vᴴz̄: ḡ = p, Ā = sym(p zᴴ), M̄ = −(p yᴴ + z qᴴ),
B̄ = sym(M̄Vᴴ − λ p zᴴ), V̄ = B M̄, λ̄ = −Re pᴴBz.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dense import generalized_eigh
from .eigh_grad import hermitian_part, separation
from .operators import Dense
from .registration import define, warn
from .result import Status

_RANKS = (2, 2, 1, 2, 0, 2)  # of a matrix, values, vectors and a status, behind the batch dimensions


def to_lower(x: Tensor) -> Tensor:
    """Cotangent of the lower triangle of a Hermitian matrix from that of the whole: 2 tril(X) − diag X."""
    return x.tril() + x.tril(-1)


def _kernel(a: Tensor, b: Tensor, values: Tensor, vectors: Tensor, status: Tensor, rhs: Tensor) -> Tensor:
    """Columns R_i g_i; 0 for pencils whose status says NON_FINITE.

    Equal eigenvalues on both sides of k have no resolvent; their part is left out, with a warning.
    Where conjugate gradients fail, the whole spectrum is computed.

    Returns:
        Z (..., n, k).
    """
    (n, k), batch = rhs.shape[-2:], _batch(a, b, values, vectors, status, rhs)
    if ((status & Status.CLUSTER_AT_K) != 0).any():
        warn(
            "eigh_topk: k cuts a cluster of equal eigenvalues, so that the vectors are an arbitrary choice and "
            "derivatives across the cut, which do not exist, are taken as 0; take k up to the next gap"
        )
    if not (rhs != 0).any():
        return rhs.new_zeros(*batch, n, k)
    cores = ((n, n), (n, n), (k,), (n, k), (), (n, k))
    tensors = (*(Dense(x).to_dense() for x in (a, b)), values, vectors, status, rhs)
    flat = (x.expand(batch + core).reshape((math.prod(batch), *core)) for x, core in zip(tensors, cores, strict=True))
    return _solve(*flat).reshape(*batch, n, k)


def _solve(a: Tensor, b: Tensor, values: Tensor, vectors: Tensor, status: Tensor, rhs: Tensor) -> Tensor:
    """The kernel for N pencils."""
    z, todo = torch.zeros_like(rhs), ((status & Status.NON_FINITE) == 0) & (rhs != 0).flatten(1).any(-1)

    def taken(which: Tensor) -> list[Tensor]:
        return [x if len(which) == len(x) else x[which] for x in (a, b, values, vectors, rhs)]

    if _iterating_pays(*rhs.shape[1:]):
        some = (todo & ((status & Status.CLUSTER_AT_K) == 0)).nonzero()[:, 0]
        if len(some):
            z[some], solved = _iterate(*taken(some))
            todo[some] = ~solved
    some = todo.nonzero()[:, 0]
    if len(some):
        z[some] = _by_spectrum(*taken(some))
    return z


def _batch(*tensors: Tensor) -> torch.Size:
    """Batch dimensions of the op's arguments, broadcast."""
    return torch.broadcast_shapes(*(x.shape[: x.dim() - rank] for x, rank in zip(tensors, _RANKS, strict=True)))


def _iterating_pays(n: int, k: int) -> bool:
    """Whether conjugate gradients cost less than the whole spectrum."""
    return n > 256 and 4 * k <= n


def _off_span(vectors: Tensor, image: Tensor, x: Tensor) -> Tensor:
    """X − V (BV)ᴴX."""
    return x - vectors @ (image.mH @ x)


def _by_spectrum(a: Tensor, b: Tensor, values: Tensor, vectors: Tensor, rhs: Tensor) -> Tensor:
    """Z = Q Σ_j u_j (u_jᴴ Qᴴg_i)/(λ_i − μ_j) over μ_j unequal to λ_i, Q = I − VVᴴB; 14n³ flops."""
    image = b @ vectors
    mu, u, fault = generalized_eigh(a, b)
    gap = values[:, None, :] - mu[:, :, None]
    part = u.mH @ _off_span(image, vectors, rhs)
    z = u @ torch.where(gap.abs() <= separation(mu)[..., None], 0, part / gap)
    return torch.where((fault == 0)[:, None, None], _off_span(vectors, image, z), 0)


def _iterate(a: Tensor, b: Tensor, values: Tensor, vectors: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    """Conjugate gradients on (λ_i − C) y = L⁻¹Qᴴg_i, C = L⁻¹AL⁻ᴴ, off W = LᴴV, all columns at once.

    Returns:
        Z = L⁻ᴴY, and which pencils reached the backward error eps in all columns before
        iterating became dearer than the whole spectrum.
    """
    factor, info = torch.linalg.cholesky_ex(b)
    w = factor.mH @ vectors
    n, k = rhs.shape[-2:]
    c = torch.linalg.solve_triangular(factor, a, upper=False)
    c = torch.linalg.solve_triangular(factor, c.mH, upper=False)
    rhs = torch.linalg.solve_triangular(factor, rhs, upper=False)
    residual = _off_span(w, w, _off_span(w, w, rhs))
    y, direction = torch.zeros_like(residual), residual
    square = _norm2(residual)
    eps = torch.finfo(values.dtype).eps
    size, start = 2 * values.abs().amax(-1, keepdim=True), _norm2(rhs).sqrt()
    active = square.sqrt() > 10 * eps * start  # else rhs is in the span
    sound = (info == 0)[:, None].expand_as(active).clone()
    for _ in range(max(50, 8 * n // k)):
        image = _off_span(w, w, values[:, None, :] * direction - c @ direction)
        curvature = (direction.conj() * image).sum(-2).real
        sound &= ~active | (curvature > 0)
        active &= sound
        if not active.any():
            break
        step = torch.where(active, square / curvature, 0)[:, None, :]
        y, residual = y + step * direction, residual - step * image
        before, square = square, torch.where(active, _norm2(residual), square)
        active = active & (square.sqrt() > eps * (size * _norm2(y).sqrt() + start))
        turn = torch.where(active, square / before, 0)[:, None, :]
        direction = torch.where(active[:, None, :], residual + turn * direction, 0)
    z = _off_span(vectors, b @ vectors, torch.linalg.solve_triangular(factor.mH, y, upper=True))
    solved = (sound & ~active).all(-1) & torch.isfinite(z).flatten(1).all(-1)
    return z, solved


def _norm2(x: Tensor) -> Tensor:
    """Squared norm of each column."""
    return (x.conj() * x).sum(-2).real


def _fake(a: Tensor, b: Tensor, values: Tensor, vectors: Tensor, status: Tensor, rhs: Tensor) -> Tensor:
    return rhs.new_empty(*_batch(a, b, values, vectors, status, rhs), *rhs.shape[-2:])


def _times(b: Tensor, x: Tensor, status: Tensor) -> Tensor:
    """B X, 0 for pencils without a result, whose B may hold NaN."""
    return (Dense(b) @ x).masked_fill(((status & Status.NON_FINITE) != 0)[..., None, None], 0)


def _backward(inputs: tuple, outputs: tuple, grads: tuple) -> tuple[Tensor | None, ...]:
    a, b, values, v, status, rhs = inputs
    (z,), (z_bar,) = outputs, grads
    if z_bar is None:
        return (None,) * 6
    p = resolvent(a, b, values, v, status, z_bar)
    image_bar = -(p @ (rhs.mH @ v) + z @ (z_bar.mH @ v))
    b_bar = hermitian_part(image_bar @ v.mH - (p * values[..., None, :]) @ z.mH)
    return (
        to_lower(hermitian_part(p @ z.mH)).sum_to_size(a.shape),
        to_lower(b_bar).sum_to_size(b.shape),
        -(p.conj() * _times(b, z, status)).sum(-2).real.sum_to_size(values.shape),
        _times(b, image_bar, status).sum_to_size(v.shape),
        None,
        p.sum_to_size(rhs.shape),
    )


def _jvp(inputs: tuple, outputs: tuple, tangents: tuple) -> Tensor:
    a, b, values, v, status, rhs = inputs
    (z,), (da, db, dvalues, dv, _, drhs) = outputs, tangents
    image = torch.zeros_like(z)
    change = torch.zeros_like(z) if drhs is None else drhs
    if da is not None:
        change = change + _times(da, z, status)
    if dvalues is not None:
        change = change - _times(b, z, status) * dvalues[..., None, :]
    if dv is not None:
        image = image + _times(b, dv, status)
    if db is not None:
        image = image + _times(db, v, status)
        change = change - _times(db, z, status) * values[..., None, :]
    change = change - image @ (v.mH @ rhs)
    return resolvent(a, b, values, v, status, change) - v @ (image.mH @ z)


# Z (..., n, k), column i = R_i g_i, of values λ (..., k), vectors V (..., n, k), status (...,), G (..., n, k).
resolvent = define(
    "_resolvent(Tensor a, Tensor b, Tensor values, Tensor vectors, Tensor status, Tensor rhs) -> Tensor",
    kernel=_kernel,
    fake=_fake,
    backward=_backward,
    jvp=_jvp,
    ranks=_RANKS,
)
