"""`simplified`: the same operator with scales, damping and sums folded into the entries they act on.

Structure methods look at what is left: Scaled, Damped and Sum remain only where no part can hold them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from .combined import Damped, Scaled, Sum
from .operators import Dense, Diagonal, Kronecker, Operator
from .structured import EKFAC, Gram, LowRankPlusDiagonal


def simplified(operator: Operator) -> Operator:
    """The same operator, with scales, damping and sums folded in.

    Args:
        operator: any.

    Returns:
        Dense, Diagonal, Kronecker, EKFAC, Gram, LowRankPlusDiagonal or a callable where the parts
        allow; Scaled only of a callable, Damped only of a callable, Kronecker or Sum. Entries of
        folded parts are copies.
    """
    if type(operator) is Dense:
        return operator
    if isinstance(operator, Scaled):
        return _scaled(simplified(operator.operator), operator.scale)
    if isinstance(operator, Damped):
        return _damped(simplified(operator.operator), operator.damping)
    if isinstance(operator, Sum):
        return _sum([simplified(term) for term in operator.terms])
    if isinstance(operator, Kronecker):
        return Kronecker(simplified(operator.left), simplified(operator.right))
    return operator


def converted(operator: Operator, dtype: torch.dtype) -> Operator:
    """The same operator in another precision.

    Args:
        operator: any but a callable.
        dtype: real or complex as the operator's own.

    Returns:
        Its copy; real parts, such as counts and damping, in the real dtype of that precision.
    """

    def part(x: object) -> object:
        if isinstance(x, Operator):
            return converted(x, dtype)
        if isinstance(x, tuple):
            return tuple(converted(term, dtype) for term in x)
        return x if x is None else x.to(dtype if x.dtype == operator.dtype else dtype.to_real())

    return replace(operator, **{field.name: part(getattr(operator, field.name)) for field in fields(operator)})


def _scaled(operator: Operator, c: Tensor) -> Operator:
    """Product c A for a simplified A."""
    if isinstance(operator, Dense):
        return Dense(c[..., None, None] * operator.matrix)
    if isinstance(operator, Diagonal):
        return Diagonal(c[..., None] * operator.entries)
    if isinstance(operator, Kronecker):
        return Kronecker(_scaled(operator.left, c), operator.right)
    if isinstance(operator, EKFAC):
        return EKFAC(operator.left_vectors, operator.right_vectors, c[..., None, None] * operator.entries)
    if isinstance(operator, Gram):
        return Gram(operator.rows, operator.count / c)
    if isinstance(operator, LowRankPlusDiagonal):
        core = c[..., None, None] * _core(operator)
        return LowRankPlusDiagonal(operator.factor, c[..., None] * operator.entries, core)
    if isinstance(operator, Scaled):
        return _scaled(operator.operator, c * operator.scale)
    if isinstance(operator, Damped):
        return Damped(_scaled(operator.operator, c), c * operator.damping)
    if isinstance(operator, Sum):
        return Sum([_scaled(term, c) for term in operator.terms])
    return Scaled(operator, c)


def _damped(operator: Operator, damping: Tensor) -> Operator:
    """A + γI for a simplified A."""
    ones = torch.ones(operator.n, dtype=operator.dtype, device=operator.device)
    if isinstance(operator, Dense):
        return Dense(operator.matrix + torch.diag_embed(damping[..., None] * ones))
    if isinstance(operator, Diagonal):
        return Diagonal(operator.entries + damping[..., None])
    if isinstance(operator, EKFAC):
        return EKFAC(operator.left_vectors, operator.right_vectors, operator.entries + damping[..., None, None])
    if isinstance(operator, Gram | LowRankPlusDiagonal):
        return _low_rank([operator, Diagonal(damping[..., None] * ones)])
    if isinstance(operator, Damped):
        return _damped(operator.operator, operator.damping + damping)
    if isinstance(operator, Sum):
        *others, last = sorted(operator.terms, key=lambda term: isinstance(term, _HOLD_DAMPING))
        if isinstance(last, _HOLD_DAMPING):
            return Sum([*others, _damped(last, damping)])
    return Damped(operator, damping)


_HOLD_DAMPING = Dense | Diagonal | EKFAC | Gram | LowRankPlusDiagonal


def _sum(terms: Sequence[Operator]) -> Operator:
    """Sum of simplified terms."""
    flat, dampings = [], []
    queue = list(terms)
    while queue:
        term = queue.pop(0)
        if isinstance(term, Sum):
            queue[:0] = term.terms
        elif isinstance(term, Damped):
            dampings.append(term.damping)
            queue.insert(0, term.operator)
        else:
            flat.append(term)
    kinds = (
        _HOLD_DAMPING | Kronecker
        if any(isinstance(term, Dense) for term in flat)
        else Diagonal | Gram | LowRankPlusDiagonal
    )
    chosen = [term for term in flat if isinstance(term, kinds)]
    if len(chosen) > 1:
        flat = [term for term in flat if term not in chosen] + [_merged(chosen)]
    total = flat[0] if len(flat) == 1 else Sum(flat)
    for damping in dampings:
        total = _damped(total, damping)
    return total


def _merged(terms: Sequence[Operator]) -> Dense | Diagonal | LowRankPlusDiagonal:
    """Sum of terms as one: dense where one is, diagonal where all are, else low rank plus diagonal."""
    if any(isinstance(term, Dense) for term in terms):  # n² entries are stored already
        return Dense(Sum(terms).to_dense())
    if all(isinstance(term, Diagonal) for term in terms):
        return Diagonal(Sum(terms).diagonal())
    return _low_rank(terms)


def _low_rank(terms: Sequence[Gram | LowRankPlusDiagonal | Diagonal]) -> LowRankPlusDiagonal:
    """Sum of Gram, LowRankPlusDiagonal and Diagonal terms: factors side by side, cores on the diagonal."""
    entries, factors, cores = [], [], []
    for term in terms:
        if isinstance(term, Diagonal | LowRankPlusDiagonal):
            entries.append(Diagonal(term.entries))
        if isinstance(term, Gram | LowRankPlusDiagonal):
            factors.append(term.rows.mH if isinstance(term, Gram) else term.factor)
            cores.append(_core(term))
    n, r = terms[0].n, sum(core.shape[-1] for core in cores)
    if not entries:
        entries.append(Diagonal(factors[0].new_zeros(n)))
    batch = torch.broadcast_shapes(*(x.shape[:-2] for x in [*factors, *cores]))
    core, first = factors[0].new_zeros(*batch, r, r), 0
    for block in cores:
        size = block.shape[-1]
        core = core + torch.nn.functional.pad(block, (first, r - first - size) * 2)
        first += size
    factor = torch.cat([x.expand(*batch, n, -1) for x in factors], -1)
    return LowRankPlusDiagonal(factor, Sum(entries).diagonal(), core)


def _core(operator: Gram | LowRankPlusDiagonal) -> Tensor:
    """C of U C Uᴴ; I/N for a Gram operator."""
    if isinstance(operator, LowRankPlusDiagonal) and operator.core is not None:
        return operator.core
    rank = operator.rows.shape[-2] if isinstance(operator, Gram) else operator.factor.shape[-1]
    eye = torch.eye(rank, dtype=operator.dtype, device=operator.device)
    return eye / operator.count[..., None, None] if isinstance(operator, Gram) else eye
