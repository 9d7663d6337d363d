"""Merges made of singular values and vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..adapters import RANK_TOLERANCE
from .entrywise import ties


def _triples(update: Tensor, whole: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U, σ, Vᵀ of the nonzero singular values: those above RANK_TOLERANCE of the largest, or of the norm of `whole`."""
    u, sigma, vh = torch.linalg.svd(update, full_matrices=False)
    rank = int((sigma > RANK_TOLERANCE * (sigma[:1] if whole is None else whole.norm())).sum())
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


def isotropic(updates: Sequence[Tensor], common: float) -> Tensor:
    """Iso-C and Iso-CTS: Δ = σ̄ polar([U_c U_1 … U_T]) polar([V_c V_1 … V_T])ᵀ (Marczak et al. 2025).

    (U_c, V_c) are the leading singular vectors of ΣΔ_t, (U_t, V_t) those of what task t has outside them,
    (I − U_cU_cᵀ)Δ_t; σ̄ is the mean of the singular values that belong to all of these. With `common` 1 nothing is left
    to the tasks, and ΣΔ_t gets all its singular values equal: Iso-C. Departures: the source counts min(d_out, d_in)
    directions and takes the mean over as many. Of low-rank updates nearly all of those are arbitrary vectors of
    singular value zero, which would carry nearly the whole merged update; here the directions are the rank of ΣΔ_t, and
    so is the mean. (Iso-C keeps the sum of the singular values either way.) Only tasks that change the tensor count.
    Where the vectors kept are linearly dependent, the polar factors are as in `tsv`.

    Args:
        updates: Δ of each task, or their cores in common bases; equal shapes.
        common: Share of the directions in the common subspace, in [0, 1]; rounded so that tasks get equal numbers.

    Returns:
        Δ, the same shape.

    Cost: T + 3 singular value decompositions of the shape of an update.
    """
    changed = [update for update in updates if update.any()]
    u, sigma, vh = _triples(sum(updates))
    if not len(sigma):
        return sum(updates)
    rank, tasks = len(sigma), len(changed)
    each = min(round((rank - int(common * rank)) / tasks), rank // tasks)
    k = rank - each * tasks
    parts = [(u[:, :k], sigma[:k], vh[:k].mT)]
    for update in changed if each else ():
        u_t, sigma_t, vh_t = _triples(update - u[:, :k] @ (u[:, :k].mT @ update), whole=update)
        parts.append((u_t[:, :each], sigma_t[:each], vh_t[:each].mT))
    left, sigma, right = (torch.cat(tensors, dim=-1) for tensors in zip(*parts, strict=True))
    return sigma.mean() * _polar(left) @ _polar(right).mT


def knots(updates: Sequence[Tensor], density: float, scale: float) -> Tensor:
    """KnOTS-TIES: Δ = U·TIES(ΣV_1ᵀ, …, ΣV_Tᵀ), [Δ_1 … Δ_T] = UΣ[V_1ᵀ … V_Tᵀ] (Stoica et al. 2024).

    The tasks are laid side by side, so that one U serves all and ΣV_tᵀ = UᵀΔ_t are their parts in the same directions;
    these are merged entry by entry. Σ stays on V, as in the authors' runs, and singular values that are zero are left
    out (theirs: below 1e-5; here relative to the largest). Departure: the source trims over all tensors at once, here
    each by itself, as `ties`. Where singular values are equal, U is not unique, and neither is the merge.

    Args:
        updates: Δ of each task, equal shapes; all may be multiplied from the left by one matrix of orthonormal rows.
        density: Share of the entries of ΣV_tᵀ each task keeps, in (0, 1]; the source's Llama runs keep all.
        scale: λ, multiplies the result.

    Returns:
        Δ, the same shape.
    """
    u, _, _ = _triples(torch.cat(list(updates), dim=1))
    return u @ ties([u.mT @ update for update in updates], density, scale)  # ΣV_tᵀ, and 0 where Δ_t is


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
