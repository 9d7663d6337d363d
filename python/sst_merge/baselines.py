"""Merge methods to compare with: short pure functions of one module's true ΔW (or of its core, where linear).

Every function takes the updates of one tensor and returns the merged update. None sees the base weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def task_arithmetic(utility: Tensor, safety: Tensor, alpha: float) -> Tensor:
    """Δ = Δ_u + αΔ_s (Ilharco et al. 2023).

    Args:
        utility: Δ_u, any shape.
        safety: Δ_s, the same shape.
        alpha: α.

    Returns:
        Δ, the same shape.
    """
    return utility + alpha * safety


def interpolation(utility: Tensor, safety: Tensor, alpha: float) -> Tensor:
    """Δ = (1−α)Δ_u + αΔ_s.

    Args:
        utility: Δ_u, any shape.
        safety: Δ_s, the same shape.
        alpha: α.

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
        bool, the same shape.
    """
    count = max(1, round(share * values.numel()))
    order = values.flatten().argsort(descending=True, stable=True)[:count]
    mask = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    mask[order] = True
    return mask.reshape(values.shape)


def ties(updates: Sequence[Tensor], density: float, scale: float) -> Tensor:
    """TIES (Yadav et al. 2023, algorithm 1): trim each by magnitude, elect the sign of the sum, mean where they agree.

    Args:
        updates: Δ of each task, equal shapes.
        density: Share of entries each task keeps (their "k"), in (0, 1].
        scale: λ, multiplies the result.

    Returns:
        Δ, the same shape.
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


def diagonal_sst_mask(harm: Tensor, benign: Tensor, epsilon: float, share: float | None) -> Tensor:
    """M from r_i = f_harm,i/(f_benign,i + ε): hard, the top share of r; or soft, r/max r (SST-Merge's authors' code).

    Args:
        harm: Diagonal Fisher of refusals, any shape.
        benign: Diagonal Fisher of behaviour, the same shape.
        epsilon: ε, in units of f_benign.
        share: Share of coordinates kept by a hard mask; None for the soft mask.

    Returns:
        m in [0, 1], the same shape; the merge is Δ_u + α m⊙Δ_s.
    """
    ratio = harm / (benign + epsilon)
    if share is None:
        return ratio / ratio.max()
    return keep_largest(ratio, share).to(ratio.dtype)
