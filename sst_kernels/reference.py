"""The slow, readable meaning of each compiled op, in float64 on the CPU: the specification.

The kernels are tested against these functions. Nothing here is fast, and nothing else uses it.
"""

from __future__ import annotations

import itertools

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
        S: (…, d, d), any dtype and device; not changed.
        X: (…, T, d).
        weight: (…, T) or None for ones; a row of weight 0 is left out, whatever it holds.
        alpha: Factor of the new part.
        beta: Factor of the old part; 0 leaves S's lower triangle unread.

    Returns:
        (…, d, d) float64 on the CPU: what S should hold afterwards.
    """
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
