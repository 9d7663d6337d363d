"""Merge methods to compare with: short pure functions of one module's true ΔW, or of its core.

A core C, ΔW = Q_out C Q_inᵀ with orthonormal Q_out and Q_in, stands for ΔW exactly wherever a method is linear, or made
of singular values and vectors. Methods that look at entries say in which coordinates. Only `sst_m_ratio` sees base
weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sst_kernels import top_mask

from .adapters import RANK_TOLERANCE


def task_arithmetic(utility: Tensor, safety: Tensor, alpha: float | Tensor) -> Tensor:
    """Δ = Δ_u + αΔ_s (Ilharco et al. 2023).

    Args:
        utility: Δ_u, any shape.
        safety: Δ_s, the same shape.
        alpha: α, or one for every entry.

    Returns:
        Δ, the same shape.
    """
    return utility + alpha * safety


def interpolation(utility: Tensor, safety: Tensor, alpha: float | Tensor) -> Tensor:
    """Δ = (1−α)Δ_u + αΔ_s.

    Args:
        utility: Δ_u, any shape.
        safety: Δ_s, the same shape.
        alpha: α, or one for every entry.

    Returns:
        Δ, the same shape.
    """
    return (1 - alpha) * utility + alpha * safety


def keep_largest(values: Tensor, share: float) -> Tensor:
    """Mask of the `share` of entries of largest value; ties broken by position, lower first.

    Args:
        values: Any shape, ranked as they are.
        share: In (0, 1]; at least one entry is kept.

    Returns:
        bool, the same shape. ValueError for NaN.
    """
    count = max(1, round(share * values.numel()))
    return top_mask(values, count)


def ties(updates: Sequence[Tensor], density: float, scale: float) -> Tensor:
    """TIES (Yadav et al. 2023, algorithm 1): trim each by magnitude, elect the sign of the sum, mean where they agree.

    Args:
        updates: Δ of each task, equal shapes.
        density: Share of entries each task keeps (their "k"), in (0, 1].
        scale: λ, multiplies the result.

    Returns:
        Δ, the same shape.

    Example:
        >>> ties([torch.tensor([4.0, 1.0, 3.0]), torch.tensor([2.0, -5.0, -1.0])], density=2 / 3, scale=1.0)
        tensor([ 3., -5.,  3.])
    """
    trimmed = torch.stack([u * keep_largest(u.abs(), density) for u in updates])
    elected = trimmed.sum(0).sign()
    agrees = (trimmed.sign() == elected) & (trimmed != 0)
    total = (trimmed * agrees).sum(0)
    return scale * total / agrees.sum(0).clamp(min=1)


def dare(update: Tensor, drop: float, generator: torch.Generator) -> Tensor:
    """DARE (Yu et al. 2024): drop each entry with probability p, rescale the rest by 1/(1−p).

    Args:
        update: Δ, any shape.
        drop: p in [0, 1).
        generator: CPU generator: the mask is the same on every device.

    Returns:
        Δ, the same shape; its expectation is `update`.
    """
    keep = torch.rand(update.shape, generator=generator) >= drop
    return update * keep.to(update.device) / (1 - drop)


def ratio_mask(ratio: Tensor, share: float | None) -> Tensor:
    """M from r: hard, 1 for the top share of r and 0 elsewhere; or soft, r/max r.

    Args:
        ratio: r ≥ 0, any shape.
        share: Share of entries kept by a hard mask; None for the soft mask.

    Returns:
        m in [0, 1], the same shape and dtype; a soft mask of zeros where every r is zero.
    """
    if share is None:
        return ratio / ratio.max().clamp(min=torch.finfo(ratio.dtype).tiny)
    return keep_largest(ratio, share).to(ratio.dtype)


def diagonal_sst_mask(harm: Tensor, benign: Tensor, epsilon: float, share: float | None) -> Tensor:
    """M from r_i = f_harm,i/(f_benign,i + ε) (SST-Merge's authors' code).

    Args:
        harm: Diagonal Fisher of refusals, any shape.
        benign: Diagonal Fisher of behaviour, the same shape.
        epsilon: ε, in units of f_benign.
        share: As for `ratio_mask`.

    Returns:
        m in [0, 1], the same shape; the merge is Δ_u + α m⊙Δ_s.
    """
    return ratio_mask(harm / (benign + epsilon), share)


def sst_v_ratio(utility: Tensor, safety: Tensor, epsilon: float) -> Tensor:
    """r_i = (Δ_s − Δ_u)_i²/(Δ_u,i² + ε): SST-V, squared updates in the place of Fishers; needs no data.

    Source: SST-Merge (public repository shhk-prog/SST-merge). Its data-free code takes Δ_s² as the numerator, one
    mask over all modules, a sigmoid of the standardised r as the soft one, and lays the mask over lora_A and lora_B;
    here it is the ratio above, per tensor, in weight coordinates of ΔW, with the masks of `ratio_mask`.

    Args:
        utility: Δ_u = θ_u − θ_0, any shape.
        safety: Δ_s, the same shape.
        epsilon: ε > 0, in units of Δ_u².

    Returns:
        r ≥ 0, the same shape.
    """
    return (safety - utility).square() / (utility.square() + epsilon)


def sst_m_ratio(base: Tensor, utility: Tensor, safety: Tensor, epsilon: float) -> Tensor:
    """r_i = |θ_s,i|/(|θ_u,i| + ε), θ = θ_0 + Δ: SST-M, magnitudes in the place of Fishers; needs no data.

    Args:
        base: θ_0, any shape.
        utility: Δ_u, the same shape.
        safety: Δ_s, the same shape.
        epsilon: ε > 0, in units of |θ_u|.

    Returns:
        r ≥ 0, the same shape; near 1 wherever both updates are small beside the weight.
    """
    return (base + safety).abs() / ((base + utility).abs() + epsilon)


def top_eigenvectors(fisher: Tensor, count: int) -> Tensor:
    """Q: eigenvectors of F's largest eigenvalues; those of eigenvalue zero, which are arbitrary, are left out.

    Args:
        fisher: F ⪰ 0, (n, n), symmetric.
        count: How many are wanted.

    Returns:
        Q, (n, k), orthonormal, k = min(count, numerical rank of F).

    Cost: O(n³) flops.
    """
    values, vectors = torch.linalg.eigh(fisher)
    rank = int((values > len(values) * torch.finfo(values.dtype).eps * values[-1]).sum())
    return vectors[:, len(values) - min(count, rank) :]


def single_fisher(utility: Tensor, safety: Tensor, q: Tensor, alpha: float) -> Tensor:
    """Δ = (I − QQᵀ)Δ_u + αQQᵀΔ_s: the refusal-sensitive part of Δ_u is replaced by that of Δ_s.

    AlignGuard-LoRA (Das et al. 2025) splits an update while it is trained, by the top eigenvectors Q of the safety
    data's Fisher, and penalises the part QQᵀΔ that would undo the alignment. At merge time that part of Δ_u is removed,
    and what the safety adapter has there is put in its place. Its other regularisers (of the task part, and of
    collisions) act on training and have no counterpart. No F_benign: a direction is taken however much it costs.

    Args:
        utility: Core of Δ_u, (r_out, r_in).
        safety: Core of Δ_s, the same shape.
        q: Q, (r_out·r_in, k), orthonormal, in row-major coordinates of the core.
        alpha: α; 1 exchanges the two parts, 0 removes Δ_u's.

    Returns:
        Core of Δ.
    """
    change = (alpha * safety - utility).flatten()
    return utility + (q @ (q.mT @ change)).reshape(utility.shape)


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


def fisher_averaging(utility: Tensor, safety: Tensor, fishers: tuple[Tensor, Tensor], alpha: float) -> Tensor:
    """Δ_i = ((1−α)F_u,iΔ_u,i + αF_s,iΔ_s,i)/((1−α)F_u,i + αF_s,i) (Matena and Raffel 2022).

    The base weights θ_0 cancel: θ = θ_0 + Δ is the same average of θ_u and θ_s. In the source F_u is at θ_u on the
    utility data and F_s at θ_s on the safety data, both with labels sampled from their model, and each is divided by
    its norm over the whole model. `methods` takes the collected F_benign and F_harm and divides them likewise; F_harm
    has the refusals themselves as labels, and both are taken at the same points t of the path from θ_u to θ_s: both
    ends by default, each Fisher being the mean of the two; `where: local` puts F_u where the source has it, and
    `points: [1]` F_s. The source raises small entries of the target model's Fisher alone, to 10⁻⁶ in its units;
    `methods` raises those of both, to ε of their mean, so that α = 0 and α = 1 give Δ_u and Δ_s.

    Args:
        utility: Δ_u, any shape.
        safety: Δ_s, the same shape.
        fishers: Diagonal Fishers (F_u, F_s) in the same coordinates and shape, all positive.
        alpha: α in [0, 1], the safety model's coefficient.

    Returns:
        Δ, the same shape; every entry lies between the two.
    """
    f_utility, f_safety = (1 - alpha) * fishers[0], alpha * fishers[1]
    return interpolation(utility, safety, f_safety / (f_utility + f_safety))
