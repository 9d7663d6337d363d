"""Merges made of singular values and vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..adapters import RANK_TOLERANCE


def _triples(update: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, σ, Vᵀ of the nonzero singular values, those above RANK_TOLERANCE of the largest."""
    u, sigma, vh = torch.linalg.svd(update, full_matrices=False)
    rank = int((sigma > RANK_TOLERANCE * sigma[:1]).sum())
    return u[:, :rank], sigma[:rank], vh[:rank]


def _polar(matrix: Tensor) -> Tensor:
    """W of M = W (MᵀM)^½, zero on M's kernel; of full rank, the nearest matrix with orthonormal columns."""
    u, _, vh = _triples(matrix)
    return u @ vh


def tsv(updates: Sequence[Tensor], share: float) -> Tensor:
    """TSV-Merge: Δ = polar([U_1 … U_T]) diag(σ_1 … σ_T) polar([V_1 … V_T])ᵀ (Gargiulo et al. 2025).

    Of each task's update the largest singular triples are kept; the singular vectors of all tasks, side by side, are
    made orthogonal by their polar factors. Departures: the source keeps ⌊min(d_out, d_in)/T⌋ triples, which of a LoRA
    update is usually all of them (share 1 here); the share is of each update's rank instead. Where the vectors kept are
    linearly dependent, the polar factor is not unique and the source takes what its SVD gives; here it is the partial
    isometry, so equal updates merge to themselves. An update that alone is not zero meets no interference and is
    returned whole.

    Args:
        updates: Δ of each task, or their cores in common bases; equal shapes.
        share: Share of the triples of each update kept, rounded down, at least one. 1/T in the source's spirit.

    Returns:
        Δ, the same shape.

    Cost: T + 2 singular value decompositions of the shape of an update.
    """
    changed = [update for update in updates if update.any()]
    if len(changed) < 2:
        return sum(updates)
    parts = []
    for u, sigma, vh in map(_triples, changed):
        k = max(1, int(share * len(sigma)))
        parts.append((u[:, :k], sigma[:k], vh[:k].mT))
    left, sigma, right = (torch.cat(tensors, dim=-1) for tensors in zip(*parts, strict=True))
    return (_polar(left) * sigma) @ _polar(right).mT


def subspace_boosting(merged: Tensor, beta: float) -> Tensor:
    """σ_i ← max(σ_i, σ_c) of the merged Δ, c the first index with Σ_{i≤c} σ_i ≥ β Σ σ_i (Skorobogat et al. 2025).

    Departure: singular values that are zero stay zero. The source raises them too, along vectors that are arbitrary; of
    an update of low rank that is nearly all of them. Beware of small β: with r nonzero values σ_1 alone is at least a
    share 1/r, so β ≤ 1/r makes all of them equal to σ_1.

    Args:
        merged: Δ or its core.
        beta: β in [0, 1]; 0 raises all to the largest, 1 to the smallest, which changes nothing.

    Returns:
        Boosted Δ, the same shape.
    """
    u, sigma, vh = _triples(merged)
    if not len(sigma):
        return merged
    total = sigma.cumsum(0)
    cutoff = sigma[total >= beta * total[-1]].max()
    return (u * sigma.clamp(min=cutoff)) @ vh
