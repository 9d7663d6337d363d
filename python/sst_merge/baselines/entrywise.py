"""Merges that look at entries: linear ones, trims, drops and masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sst_kernels import top_mask


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
        share: In (0, 1]; at least one entry is kept, if there is any.

    Returns:
        bool, the same shape. ValueError for NaN.
    """
    if not values.numel():
        return torch.zeros_like(values, dtype=torch.bool)
    return top_mask(values, max(1, round(share * values.numel())))


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
    return scale * agreeing_mean([u * keep_largest(u.abs(), density) for u in updates])


def agreeing_mean(updates: Sequence[Tensor]) -> Tensor:
    """Elect the sign of the sum, mean of the entries that have it (TIES' second and third step).

    Args:
        updates: Δ of each task, equal shapes; zeros take no part.

    Returns:
        Δ, the same shape; 0 where the sum is 0 (mergekit then takes the positive ones) or there is nothing.
    """
    stacked = torch.stack(list(updates))
    elected = stacked.sum(0).sign()
    agrees = (stacked.sign() == elected) & (stacked != 0)
    return (stacked * agrees).sum(0) / agrees.sum(0).clamp(min=1)


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


def magprune_drop(update: Tensor, drop: float, window: float) -> Tensor:
    """p_ij = p + ε(½ − rank_ij/(n−1)), the rank by magnitude within the row: 0 smallest, n−1 largest.

    Args:
        update: Δ, (..., n); a vector is one row.
        drop: p, the mean.
        window: ε, largest probability less the smallest, p ± ε/2 in [0, 1).

    Returns:
        p_ij, the same shape and dtype; equal magnitudes are ranked by position, a row of one entry has p.
    """
    rank = update.abs().argsort(dim=-1, stable=True).argsort(dim=-1)
    return drop + window * (0.5 - rank.to(update.dtype) / max(1, update.shape[-1] - 1)) * (update.shape[-1] > 1)


def della(updates: Sequence[Tensor], drop: float, window: float, scale: float, generator: torch.Generator) -> Tensor:
    """DELLA (Deep et al. 2024): drop small entries more often and rescale by 1/(1−p_ij), elect the sign, mean, scale.

    MAGPRUNE's probabilities are those of `magprune_drop`, which reach both ends of the window as in the authors' code;
    the other two steps are TIES' without a trim, the mean being over the tasks that agree. mergekit's `della` rescales
    each tensor to its ℓ₁ norm instead, after which the expectation is not the update.

    Args:
        updates: Δ of each task, equal shapes (..., n); rows are along the last dimension.
        drop: p, the mean probability of dropping an entry.
        window: ε, as for `magprune_drop`.
        scale: λ, multiplies the result.
        generator: CPU generator: the masks are the same on every device.

    Returns:
        Δ, the same shape.
    """
    pruned = []
    for update in updates:
        p = magprune_drop(update, drop, window)
        keep = torch.rand(update.shape, generator=generator).to(update.device) >= p
        pruned.append(update * keep / (1 - p))
    return scale * agreeing_mean(pruned)


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
