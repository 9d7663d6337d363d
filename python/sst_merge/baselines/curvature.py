"""Merges weighted by Fishers, or by the inputs of the layers."""

from __future__ import annotations

import torch
from torch import Tensor

from .entrywise import interpolation


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
