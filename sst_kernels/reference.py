"""The slow, readable meaning of each compiled op, in float64 on the CPU: the specification.

The kernels are tested against these functions. Nothing here is fast, and nothing else uses it.
"""

from __future__ import annotations

import itertools
import struct

import torch
from torch import Tensor


def khatri_rao_rows(a: Tensor, b: Tensor, cu_seqlens: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum of outer products over each sequence: out[s] = vec(Σ_{t∈s} w_t b_t a_tᵀ), vec row-major.

    Args:
        a: (T, r_a), any dtype and device.
        b: (T, r_b).
        cu_seqlens: (S + 1,) integers; clamped into [0, T], decreasing pairs are empty sequences.
        weight: (T,) or None for ones; a token of weight 0 is left out, whatever it holds.

    Returns:
        (S, r_b · r_a) float64 on the CPU.
    """
    tokens = a.shape[0]
    a, b = a.double().cpu(), b.double().cpu()
    weights = torch.ones(tokens).double() if weight is None else weight.double().cpu()
    boundaries = [min(max(i, 0), tokens) for i in cu_seqlens.tolist()]
    rows = torch.zeros(len(boundaries) - 1, b.shape[1], a.shape[1], dtype=torch.float64)
    for s in range(len(boundaries) - 1):
        for t in range(boundaries[s], boundaries[s + 1]):
            if weights[t] != 0:
                rows[s] += weights[t] * torch.outer(b[t], a[t])
    return rows.flatten(1)


def syrk_accumulate_(
    S: Tensor,
    X: Tensor,
    weight: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Tensor:
    """Lower triangle of β S + α Xᵀ diag(w) X, returned beside S's own upper triangle.

    Args:
        S: (…, d, d), or packed (…, d (d + 1) / 2), any dtype and device; not changed.
        X: (…, T, d).
        weight: (…, T) or None for ones; a row of weight 0 is left out, whatever it holds.
        alpha: Factor of the new part.
        beta: Factor of the old part; 0 leaves S's lower triangle unread.

    Returns:
        S's shape, float64 on the CPU: what S should hold afterwards.
    """
    if S.dim() == X.dim() - 1:
        return pack_lower(syrk_accumulate_(unpack_lower(S), X, weight, alpha, beta))
    out, x = S.double().cpu().clone(), X.double().cpu()
    weights = torch.ones(X.shape[:-1]) if weight is None else weight
    for member in itertools.product(*map(range, X.shape[:-2])):
        total = torch.zeros_like(out[member])
        for row, w in zip(x[member], weights[member].double().tolist(), strict=True):
            if w != 0:
                total += w * torch.outer(row, row)
        lower = alpha * total if beta == 0 else beta * out[member] + alpha * total
        out[member] = torch.where(torch.ones_like(total).tril().bool(), lower, out[member])
    return out


def kron_accumulate_(
    factors: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    delta: Tensor,
    mask: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """β A + Σ_t w_t x_t x_tᵀ, β G + α Σ_t w_t δ_t δ_tᵀ, β counts + Σ_t w_t.

    Args:
        factors: A (d_in, d_in), G (d_out, d_out), either of them packed, and counts (2,); not changed.
        x: (…, d_in); leading dimensions are tokens.
        delta: (…, d_out).
        mask: Those leading dimensions, bool or weights, or None for ones.
        alpha: Factor of the new part of G.
        beta: Factor of the old parts.

    Returns:
        A, G and counts as they should be afterwards, float64 on the CPU.
    """
    A, G, counts = factors
    w = None if mask is None else mask.double().flatten()
    total = x[..., 0].numel() if w is None else w.sum().cpu()
    old = torch.zeros(2).double() if beta == 0 else beta * counts.double().cpu()
    return (
        syrk_accumulate_(A, x.flatten(0, -2), w, 1.0, beta),
        syrk_accumulate_(G, delta.flatten(0, -2), w, alpha, beta),
        old + total,
    )


def khatri_rao_syrk_accumulate_(
    F: Tensor,
    a: Tensor,
    b: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Tensor:
    """Lower triangle of β F + α Σ_s g_s g_sᵀ, g_s the rows of `khatri_rao_rows`, beside F's own upper triangle.

    Args:
        F: (n, n) with n = r_b · r_a, or packed; not changed.
        a: (T, r_a).
        b: (T, r_b).
        cu_seqlens: (S + 1,) integers.
        weight: (T,) or None for ones.
        alpha: Factor of the new part.
        beta: Factor of the old part.

    Returns:
        F's shape, float64 on the CPU: what F should hold afterwards.
    """
    return syrk_accumulate_(F, khatri_rao_rows(a, b, cu_seqlens, weight), None, alpha, beta)


def symmetrize_(S: Tensor) -> Tensor:
    """S with its upper triangle mirrored from its lower, float64 on the CPU."""
    lower = torch.where(torch.ones(S.shape[-2:]).tril().bool(), S.double().cpu(), 0.0)
    return lower + lower.tril(-1).mT


def pack_lower(S: Tensor) -> Tensor:
    """P[i (i + 1) / 2 + j] = S[i, j] for j ≤ i, float64 on the CPU."""
    d = S.shape[-1]
    return torch.stack([S[..., i, j].double().cpu() for i in range(d) for j in range(i + 1)], -1)


def unpack_lower(P: Tensor) -> Tensor:
    """The symmetric S with S[i, j] = P[i (i + 1) / 2 + j] for j ≤ i, float64 on the CPU."""
    d = int((2 * P.shape[-1]) ** 0.5)
    rows = torch.arange(d)
    i, j = torch.maximum(rows[:, None], rows), torch.minimum(rows[:, None], rows)
    return P.double().cpu()[..., i * (i + 1) // 2 + j]


def symm_thin(A: Tensor, X: Tensor) -> Tensor:
    """A X for the symmetric matrix that A's lower triangle holds, float64 on the CPU."""
    return symmetrize_(A) @ X.double().cpu()


def residual(AX: Tensor, BX: Tensor, X: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """R = AX − θ BX and ‖r‖², ‖Ax‖², ‖Bx‖², ‖x‖² of every row, float64 on the CPU."""
    AX, BX, X = (t.double().cpu() for t in (AX, BX, X))
    R = AX - theta.cpu()[..., None] * BX
    return R, torch.stack([t.square().sum(-1) for t in (R, AX, BX, X)], -1)


def fused_eigh(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of A v = λ B v, λ ascending, VᵀBV = I, from the lower triangles; one pencil after another.

    Args:
        A: (…, n, n) symmetric, any dtype and device.
        B: (…, n, n) symmetric positive definite.

    Returns:
        Values (…, n) and vectors (…, n, n), float64 on the CPU, and info (…,) int32: 0, or 1 where B has no Cholesky
        factor and 2 where A or B is not finite; values and vectors are NaN there.
    """
    a, b = (symmetrize_(x) for x in (A, B))
    values, vectors = torch.full(a.shape[:-1], torch.nan).double(), torch.full(a.shape, torch.nan).double()
    info = torch.zeros(a.shape[:-2], dtype=torch.int32)
    for member in itertools.product(*map(range, a.shape[:-2])):
        if not (a[member].isfinite().all() and b[member].isfinite().all()):
            info[member] = 2
            continue
        L, indefinite = torch.linalg.cholesky_ex(b[member])
        if indefinite:
            info[member] = 1
            continue
        half = torch.linalg.solve_triangular(L, a[member], upper=False)
        values[member], y = torch.linalg.eigh(torch.linalg.solve_triangular(L, half.mT, upper=False))
        vectors[member] = torch.linalg.solve_triangular(L.mT, y, upper=True)
    return values, vectors, info


def sort_key(value: float, bits: int) -> int:
    """The bits of a float as an unsigned integer in the order of the values; NaN is the largest.

    Args:
        value: Any float; -0 has the key of 0.
        bits: 32 or 64: the width of the float.

    Returns:
        0 to 2^bits - 1.
    """
    if value != value:
        return 2**bits - 1
    code = int.from_bytes(struct.pack(">f" if bits == 32 else ">d", value + 0.0), "big")
    return code + 2 ** (bits - 1) if code < 2 ** (bits - 1) else 2**bits - 1 - code


def digit_histogram_(counts: Tensor, values: Tensor, prefix: int = 0, digit: int = 0) -> Tensor:
    """counts[j] + #{i : the key of values_i has the digits `prefix`, then the digit j}, of 16 bits each.

    Args:
        counts: (65536,) int64; not changed.
        values: Any shape.
        prefix: The first `digit` digits, as one number.
        digit: Which digit is counted.

    Returns:
        (65536,) int64 on the CPU: what counts should hold afterwards.
    """
    bits = 64 if values.dtype == torch.float64 else 32
    counts = counts.cpu().clone()
    for value in values.double().flatten().tolist():
        upper = sort_key(value, bits) >> (bits - 16 * (digit + 1))
        if upper >> 16 == prefix:
            counts[upper % 2**16] += 1
    return counts


def threshold_mask_(ties: Tensor, values: Tensor, threshold: float) -> tuple[Tensor, int]:
    """x_i > τ, or x_i = τ and fewer than `ties` values before it equal τ, and how many ties are left.

    Args:
        ties: (1,) int64; not changed.
        values: Any shape.
        threshold: τ.

    Returns:
        The mask, bool on the CPU, and what ties should hold afterwards.
    """
    left, mask = int(ties), []
    for value in values.double().flatten().tolist():
        tie = value == threshold and left > 0
        left -= tie
        mask.append(value > threshold or tie)
    return torch.tensor(mask, dtype=torch.bool).reshape(values.shape), left
