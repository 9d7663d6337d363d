"""The differentiable op behind `eigh`: pencils with their whole spectrum known.

With E_ji = 1/(λ_i − λ_j), 0 where λ_i = λ_j to working accuracy, D = 1 where E = 0 and 0 elsewhere,
and type 1 of the problem (for types 2 and 3 see the code):

- dλ_i = v_iᴴ(dA − λ_i dB)v_i, dV = V(E ∘ VᴴM − ½ D ∘ VᴴdBV) with M = dA V − dB VΛ;
- with Y = V(diag λ̄ + E ∘ W), W = VᴴV̄: Ā = sym(Y Vᴴ), B̄ = −sym((YΛ + ½ V(D ∘ W)) Vᴴ).

Two vectors of one eigenspace are not told apart by this. First derivatives hold there for symmetric
functions of the eigenvalues and for projectors V Vᴴ on whole eigenspaces; a function V f(Λ) Vᴴ would need
f′(λ) within the eigenspace, which no cotangent of (λ, V) carries. A warning says so. Giles (2008), "An extended
collection of matrix derivative results", sec. 3.1, has type 1 with B = I and distinct λ.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .dense import generalized_eigh
from .registration import define, warn
from .result import REMEDIES


class LinAlgError(np.linalg.LinAlgError, torch.linalg.LinAlgError, ValueError):
    """Raised for a single pencil without a solution; caught as numpy's error and as torch's."""


def hermitian_part(x: Tensor) -> Tensor:
    """½(X + Xᴴ)."""
    return 0.5 * (x + x.mH)


def separation(values: Tensor) -> Tensor:
    """10 √n eps max|λ| (..., 1): eigenvalues no further apart are equal to working accuracy."""
    rounding = 10 * math.sqrt(values.shape[-1]) * torch.finfo(values.dtype).eps
    return rounding * values.detach().abs().amax(-1, keepdim=True)


def _inverse_gaps_kernel(values: Tensor, coupling: Tensor, again: bool) -> Tensor:
    gap = values[..., None, :] - values[..., :, None]
    equal = gap.abs() <= separation(values)[..., None]
    allowed = torch.finfo(values.dtype).eps ** 0.5 * coupling.abs().amax((-2, -1), keepdim=True)
    if (equal & ((coupling - coupling.mH).abs() > allowed)).any():
        warn(
            "eigh: the loss depends on the choice of vectors within an eigenspace (equal eigenvalues, or the "
            "phase of a complex vector), where their derivative does not exist and is taken as 0; use projectors "
            "V Vᴴ on whole eigenspaces, or perturb the pencil"
        )
    else:
        others = equal & ~torch.eye(values.shape[-1], dtype=torch.bool, device=values.device)
        own = coupling.diagonal(dim1=-2, dim2=-1).real
        joined = ((coupling + coupling.mH).abs() > allowed) | ((own[..., None] - own[..., None, :]).abs() > allowed)
        touched = (coupling != 0).any(-2)
        if (others & (joined | (again & (touched[..., None] | touched[..., None, :])))).any():
            warn(
                "eigh: eigenvalues are equal to working accuracy. First derivatives hold for functions of the "
                "eigenvalues and of projectors V Vᴴ on whole eigenspaces; for functions that join the two, such as "
                "V f(w) Vᴴ, and for second derivatives, the part within an eigenspace is missing: perturb the "
                "pencil where that matters"
            )
    shape = torch.broadcast_shapes(gap.shape, coupling.shape)
    return (1 / gap.masked_fill(equal, torch.inf)).expand(shape)


def _inverse_gaps_fake(values: Tensor, coupling: Tensor, again: bool) -> Tensor:
    return values.new_empty(torch.broadcast_shapes((*values.shape, values.shape[-1]), coupling.shape))


def _inverse_gaps_backward(inputs: tuple, outputs: tuple, grads: tuple) -> tuple[Tensor | None]:
    """λ̄_i = −Σ_j (Ē_ji E_ji² − Ē_ij E_ij²)."""
    (e,), (e_bar,) = outputs, grads
    if e_bar is None:
        return (None,)
    rate = e_bar * e * e
    return (rate.sum(-1) - rate.sum(-2),)


def _inverse_gaps_jvp(inputs: tuple, outputs: tuple, tangents: tuple) -> Tensor:
    """dE_ji = −E_ji² (dλ_i − dλ_j)."""
    (e,), dvalues = outputs, tangents[0]
    if dvalues is None:
        return torch.zeros_like(e)
    return -e * e * (dvalues[..., None, :] - dvalues[..., :, None])


# E (..., n, n) of values λ (..., n). Warns if the coupling W (+ diag λ̄) shows that dropped pairs matter, or may
# matter when the derivative is taken `again`.
inverse_gaps = define(
    "_inverse_gaps(Tensor values, Tensor coupling, bool again) -> Tensor",
    kernel=_inverse_gaps_kernel,
    fake=_inverse_gaps_fake,
    backward=_inverse_gaps_backward,
    jvp=_inverse_gaps_jvp,
    ranks=(1, 2),
)


def _eigh_kernel(
    a: Tensor, b: Tensor | None, problem: int, first: int, last: int, values_only: bool, report: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n = a.shape[-1]
    batch = a.shape[:-2] if b is None else torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    flat = [x if x is None else x.expand(*batch, n, n).reshape(math.prod(batch), n, n) for x in (a, b)]
    values, vectors, fault = generalized_eigh(
        *flat, problem=problem, columns=slice(first, last), values_only=values_only
    )
    fault = fault.reshape(batch)
    if report:
        _report(fault, [x for x in (a, b) if x is not None])
    vectors = a.new_empty(len(values), n, 0) if vectors is None else vectors
    return values.reshape(*batch, n), vectors.reshape(*batch, n, vectors.shape[-1]), fault


def _eigh_fake(
    a: Tensor, b: Tensor | None, problem: int, first: int, last: int, values_only: bool, report: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n = a.shape[-1]
    batch = a.shape[:-2] if b is None else torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    values = a.new_empty(*batch, n, dtype=a.real.dtype)
    vectors = a.new_empty(*batch, n, 0 if values_only else last - first)
    return values, vectors, a.new_empty(batch, dtype=torch.int64)


def _report(fault: Tensor, matrices: list[Tensor]) -> None:
    """Raise for a single faulty pencil, warn once for those of a batch.

    Raises:
        LinAlgError: if `fault`, (...,), has no dimension and is not zero.
    """
    if not fault.any():
        return
    if fault.dim() == 0:
        finite = all(bool(torch.isfinite(x).all()) for x in matrices)
        raise LinAlgError(f"eigh: {_reason(int(fault))}" if finite else "eigh: a and b must not contain infs or NaNs")
    failed = [f"{tuple(i)} ({_reason(int(fault[tuple(i)]))})" for i in fault.nonzero().tolist()]
    warn(f"eigh: no result for pencils {', '.join(failed)}")


def _reason(code: int) -> str:
    """Remedies for the bits of a status."""
    return "; ".join(text for bit, text in REMEDIES.items() if code & bit)


class _Pairs:
    """A solved batch, with faulty pencils replaced: λ = 0, V = 0, A = 0, B = I.

    Attributes:
        values: λ (..., n).
        u: all vectors (..., n, n).
        bad: which pencils are faulty, (...,).
    """

    def __init__(self, inputs: tuple, outputs: tuple) -> None:
        self.a, self.b, self.problem, self.first, self.last = inputs[:5]
        values, u, fault = outputs
        n = values.shape[-1]
        if u.shape[-1] < n:
            everything = pairs(self.a, self.b, self.problem, 0, n, False, False)[1]
            kept = [everything[..., : self.first], u, everything[..., self.last :]]
            u = torch.cat(kept, -1) if u.shape[-1] else everything
        self.bad = fault != 0
        self.values, self.u = self.clean(values), self.clean(u)

    def clean(self, x: Tensor, instead: Tensor | float = 0) -> Tensor:
        """Copy of x with `instead` for faulty pencils."""
        bad = self.bad
        return torch.where(bad[(..., *(None,) * (x.dim() - bad.dim()))], instead, x)

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """A and B, each in the batch shape of the values."""
        shape = (*self.bad.shape, *self.a.shape[-2:])
        eye = torch.eye(shape[-1], dtype=self.a.dtype, device=self.a.device)
        return self.clean(self.a.expand(shape)), self.clean(self.b.expand(shape), eye)

    def padded(self, v: Tensor | None) -> Tensor | None:
        """Cotangent of the wanted vectors as one of all vectors; None if it is zero."""
        if v is None or not v.shape[-1]:
            return None
        return torch.nn.functional.pad(self.clean(v), (self.first, self.values.shape[-1] - self.last))


def _eigh_backward(inputs: tuple, outputs: tuple, grads: tuple) -> tuple[Tensor | None, ...]:
    found = _Pairs(inputs, outputs)
    values, u, again = found.values, found.u, torch.is_grad_enabled()
    values_bar, u_bar = grads[0], found.padded(grads[1])
    values_bar = torch.zeros_like(values) if values_bar is None else found.clean(values_bar)
    y, norms = u * values_bar[..., None, :], None
    coupling = torch.diag_embed(values_bar)
    if u_bar is not None:
        overlaps = u.mH @ u_bar
        e = inverse_gaps(values, coupling + overlaps, again)
        y, norms = y + u @ (e * overlaps), 0.5 * overlaps.masked_fill(e != 0, 0)
    elif again:
        inverse_gaps(values, coupling.to(u.dtype), again)
    a_bar, b_bar = _matrix_cotangents(found, y, norms, u_bar)
    return a_bar.sum_to_size(inputs[0].shape), None if b_bar is None else b_bar.sum_to_size(inputs[1].shape)


def _matrix_cotangents(
    found: _Pairs, y: Tensor, norms: Tensor | None, u_bar: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Ā and B̄ from Y = U(diag λ̄ + E ∘ W) and ½ D ∘ W, with W = UᴴŪ; None for W = 0."""

    def normalized(right: Tensor, basis: Tensor) -> Tensor:
        return hermitian_part((right if norms is None else right - basis @ norms) @ basis.mH)

    # Type 2 is the pencil (BAB, B). Type 3 has its vectors X = B⁻¹U, and Ū gives X̄ = BŪ.
    u = found.u
    if found.problem == 2:
        a, b = found.matrices
        by, bu = b @ y, b @ u
        return hermitian_part(by @ bu.mH), normalized(a @ by, u)
    a_bar = hermitian_part(y @ u.mH)
    if found.b is None:
        return a_bar, None
    if found.problem == 1:
        return a_bar, normalized(-y * found.values[..., None, :], u)
    a, b = found.matrices
    right = a @ y if u_bar is None else a @ y + u_bar
    return a_bar, normalized(right, torch.cholesky_solve(u, torch.linalg.cholesky_ex(b).L))


def _eigh_jvp(inputs: tuple, outputs: tuple, tangents: tuple) -> tuple[Tensor, Tensor, None]:
    found = _Pairs(inputs, outputs)
    values, u = found.values, found.u
    da, db = (None if x is None else found.clean(x.expand(*found.bad.shape, *x.shape[-2:])) for x in tangents[:2])
    da = torch.zeros_like(u) if da is None else da
    if db is None:
        left = found.matrices[1] @ u if found.problem == 2 else u
        change, extra = left.mH @ da @ left, None
        norms = torch.zeros_like(change)
    elif found.problem == 1:
        norms, extra = u.mH @ db @ u, None
        change = u.mH @ da @ u - norms * values[..., None, :]
    else:
        a, b = found.matrices
        x = u if found.problem == 2 else torch.cholesky_solve(u, torch.linalg.cholesky_ex(b).L)
        bx = b @ u if found.problem == 2 else u
        norms, extra = x.mH @ db @ x, None if found.problem == 2 else db @ x
        change = bx.mH @ (da @ bx + a @ (db @ x))
    e = inverse_gaps(values, torch.zeros_like(change), False)
    du = u @ (e * change - 0.5 * norms.masked_fill(e != 0, 0))
    if extra is not None:
        du = du + extra
    wanted = slice(found.first, found.first + outputs[1].shape[-1])
    return change.diagonal(dim1=-2, dim2=-1).real, du[..., wanted], None


# (values (..., n), vectors (..., n, last - first), fault bits (...,)) of Hermitian pencils, with both
# triangles filled: `generalized_eigh` with derivatives. The vectors are empty if `values_only`.
# `report` raises or warns about faults. Derivatives of fewer than all vectors solve once more.
pairs = define(
    "_eigh(Tensor a, Tensor? b, int problem, int first, int last, bool values_only, bool report)"
    " -> (Tensor, Tensor, Tensor)",
    kernel=_eigh_kernel,
    fake=_eigh_fake,
    backward=_eigh_backward,
    jvp=_eigh_jvp,
    ranks=(2, 2),
)
