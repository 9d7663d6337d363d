"""`eigh_topk`: the k largest eigenpairs of dense pencils, as a differentiable op.

The derivatives need only the k pairs that were found: within their span V they are explicit, and
off it they come from the resolvent R_i g = z with (λ_iB − A)z = (I − BVVᴴ)g, VᴴBz = 0, which is
positive definite there (`resolvent`). With E, D and W = VᴴV̄ of `eigh_grad`, and
Y = V(diag λ̄ + E ∘ W) + [R_i v̄_i]: Ā = sym(Y Vᴴ), B̄ = −sym((YΛ + ½ V(D ∘ W))Vᴴ).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_matrix, promoted
from .choose import check_count
from .eigh_grad import hermitian_part, inverse_gaps
from .operators import Dense
from .pencil import Pencil
from .registration import define
from .resolvent import resolvent, to_lower
from .result import Status
from .solve import solve


def eigh_topk(
    a: Tensor, b: Tensor, k: int, *, tol: float | None = None, method: str = "auto", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest λ of A v = λ B v, descending, with VᴴBV = I; torch.ops.sst_kernels.eigh_topk.

    `solve` for matrices as an op: derivatives of first and second order, forward and reverse, and
    torch.vmap, torch.func and torch.compile work. Derivatives flow to the lower triangles. At equal
    eigenvalues they are as in `eigh`; a k that cuts a cluster of them gives finite derivatives and a
    RuntimeWarning. A pencil without a result has derivative zero.

    Args:
        a: (..., n, n) Hermitian, of which the lower triangle is read. float32, float64, complex64,
            complex128; integers are promoted to float64.
        b: (..., n, n) Hermitian positive definite, likewise; batch dimensions broadcast.
        k: number of pairs, 1 <= k <= n.
        tol: as in `solve`.
        method: as in `solve`.
        seed: as in `solve`.

    Returns:
        Values (..., k), vectors (..., n, k), and `Status` bits (...,), int64. Cost: `solve`; a
        gradient of vectors 7n³/3 flops and 2n²k + 4nk² an iteration of conjugate gradients, or one
        more dense solve where that is cheaper (`resolvent`); one of values alone 4n²k.

    What does not fit raises TypeError or ValueError, as in `solve`.

    Example:
        >>> a = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64)).requires_grad_()
        >>> w, v, status = eigh_topk(a, torch.diag(torch.tensor([4.0, 0.25], dtype=torch.float64)), 1)
        >>> w.sum().backward()
        >>> w.tolist(), a.grad.tolist(), int(status) == Status.CONVERGED | Status.VERIFIED
        ([4.0], [[0.0, 0.0], [0.0, 4.0]], True)
    """
    a, b = (promoted(x) if isinstance(x, Tensor) else x for x in (a, b))
    check_matrix("eigh_topk", "a", a)
    check_matrix("eigh_topk", "b", b)
    check_count(k, a.shape[-1])
    return _op(a, b, int(k), tol=tol, method=method, seed=seed)


def _kernel(
    a: Tensor, b: Tensor, k: int, *, tol: float | None = None, method: str = "auto", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    found = solve(Pencil(a, b), k, tol=tol, method=method, seed=seed)
    return found.values, found.vectors, found.status


def _fake(
    a: Tensor, b: Tensor, k: int, *, tol: float | None = None, method: str = "auto", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    pencil = Pencil(a, b)  # also what refuses one tensor on meta, which brings its call here
    check_count(k, pencil.n)
    batch, n = pencil.batch_shape, pencil.n
    vectors = a.new_empty(*batch, n, k, dtype=pencil.dtype)
    return vectors.real.new_empty(*batch, k), vectors, a.new_empty(batch, dtype=torch.int64)


def _clean(outputs: tuple) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """λ, V and status, with λ = 0, V = 0 and NON_FINITE for pencils without a result, and which those are."""
    values, vectors, status = outputs
    bad = ~torch.isfinite(values).all(-1)
    status = torch.where(bad, status | int(Status.NON_FINITE), status)
    return values.masked_fill(bad[..., None], 0), vectors.masked_fill(bad[..., None, None], 0), status, bad


def _backward(inputs: tuple, outputs: tuple, grads: tuple) -> tuple[Tensor, Tensor]:
    a, b = inputs[:2]
    values, v, status, bad = _clean(outputs)
    values_bar, v_bar = (
        torch.zeros_like(x) if g is None else g.masked_fill(bad[(..., *(None,) * (g.dim() - bad.dim()))], 0)
        for x, g in zip((values, v), grads[:2], strict=True)
    )
    overlaps, diagonal = v.mH @ v_bar, torch.diag_embed(values_bar)
    e = inverse_gaps(values, overlaps + diagonal, torch.is_grad_enabled())
    y = v @ (e * overlaps + diagonal) + resolvent(a, b, values, v, status, v_bar)
    norms = 0.5 * v @ overlaps.masked_fill(e != 0, 0)
    a_bar = to_lower(hermitian_part(y @ v.mH))
    b_bar = to_lower(-hermitian_part((y * values[..., None, :] + norms) @ v.mH))
    return a_bar.sum_to_size(a.shape), b_bar.sum_to_size(b.shape)


def _jvp(inputs: tuple, outputs: tuple, tangents: tuple) -> tuple[Tensor, Tensor, None]:
    """dλ_i = v_iᴴm_i, dV = V(E ∘ VᴴM − ½ D ∘ VᴴdBV) + [R_i m_i] with M = dA V − dB VΛ."""
    a, b = inputs[:2]
    values, v, status, bad = _clean(outputs)
    da_v, db_v = (
        torch.zeros_like(v) if x is None else (Dense(x) @ v).masked_fill(bad[..., None, None], 0) for x in tangents[:2]
    )
    m = da_v - db_v * values[..., None, :]
    overlaps = v.mH @ m
    e = inverse_gaps(values, torch.zeros_like(overlaps), False)
    dv = v @ (e * overlaps - 0.5 * (v.mH @ db_v).masked_fill(e != 0, 0)) + resolvent(a, b, values, v, status, m)
    return overlaps.diagonal(dim1=-2, dim2=-1).real, dv, None


_op = define(
    'eigh_topk(Tensor a, Tensor b, int k, *, float? tol=None, str method="auto", int seed=0)'
    " -> (Tensor values, Tensor vectors, Tensor status)",
    kernel=_kernel,
    fake=_fake,
    backward=_backward,
    jvp=_jvp,
    ranks=(2, 2),
)
