"""Merges that project the utility update, or mix it, where it leaves what alignment changed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapters import RANK_TOLERANCE
from .entrywise import interpolation


def aligned_part(update: Tensor, alignment: Tensor, exact: bool) -> Tensor:
    """CΔ: C = VVᵀ/‖V‖_F, or exactly V(VᵀV)⁺Vᵀ, the projector on the columns of V (Hsu et al. 2024).

    The first, which the source prefers for its speed, is no projector: it multiplies the part of Δ along V's i-th left
    singular vector by σ_i²/‖V‖_F, so that a small V all but erases Δ. In the source V is the difference of two whole
    models; of a LoRA update the second is cheap.

    Args:
        update: Δ, (d_out, d_in), or its core.
        alignment: V, aligned less unaligned weights, or its core in the same bases.
        exact: Which C.

    Returns:
        CΔ, the same shape; zero where V is.
    """
    if exact:
        u, sigma, _ = torch.linalg.svd(alignment, full_matrices=False)
        u = u[:, sigma > RANK_TOLERANCE * sigma[:1]]
        return u @ (u.mT @ update)
    return alignment @ (alignment.mT @ update) / alignment.norm().clamp(min=torch.finfo(alignment.dtype).tiny)


def is_unsafe(update: Tensor, alignment: Tensor, threshold: float, exact: bool) -> bool:
    """cos(Δ, CΔ) < τ: too little of an update lies in the directions of alignment (Hsu et al. 2024).

    Args:
        update: Δ or its core; the cosine of a zero update is 0.
        alignment: V, as for `aligned_part`. Where it is zero nothing is known, and no update is called unsafe: a
            departure from the source, whose V is nowhere zero.
        threshold: τ.
        exact: Which C.

    Returns:
        The verdict.
    """
    projected = aligned_part(update, alignment, exact).flatten()
    cosine = torch.nn.functional.cosine_similarity(update.flatten(), projected, dim=0)
    return bool(alignment.any()) and float(cosine) < threshold


def safe_lora(utility: Tensor, safety: Tensor, threshold: float, exact: bool, alpha: float) -> Tensor:
    """Δ = αΔ_s + (CΔ_u where cos(Δ_u, CΔ_u) < τ, else Δ_u): SafeLoRA (Hsu et al. 2024).

    The source's V is an aligned model less its unaligned base, and its result is the aligned model with the projected
    update. Here the alignment is Δ_s, the safety adapter's: α = 1 is the source's model, and α = 0 leaves alignment to
    the base, as where θ_0 is aligned itself. The source projects lora_B, which is the same as projecting ΔW.

    Args:
        utility: Δ_u or its core.
        safety: Δ_s = V, or its core in the same bases.
        threshold: τ in [0, 1]; 0 projects nothing.
        exact: Which C, as for `aligned_part`.
        alpha: α.

    Returns:
        Δ, the same shape.
    """
    unsafe = is_unsafe(utility, safety, threshold, exact)
    return alpha * safety + (aligned_part(utility, safety, exact) if unsafe else utility)


def safe_merge(utility: Tensor, safety: Tensor, threshold: float, exact: bool, alpha: float) -> Tensor:
    """Δ = (1−α)Δ_u + αΔ_s where cos(Δ_u, CΔ_u) < τ, else Δ_u: SafeMERGE (Djuhera et al. 2025).

    The source has its C from an aligned model and its base, here from the safety adapter's own Δ_s. Its weights of the
    two adapters, 0.8 and 0.2, are 1 − α and α. Its code mixes lora_A and lora_B, each by the roots of the weights
    (PEFT's "linear"), which adds cross terms √(α(1−α))(B_uA_s + B_sA_u) that depend on how the factors are scaled; here
    ΔW is mixed. Modules that the safety adapter does not change keep Δ_u.

    Args:
        utility: Δ_u or its core.
        safety: Δ_s or its core in the same bases.
        threshold: τ; 0 keeps Δ_u everywhere, above 1 it is interpolation.
        exact: Which C, as for `aligned_part`.
        alpha: α in [0, 1].

    Returns:
        Δ, the same shape.
    """
    return interpolation(utility, safety, alpha) if is_unsafe(utility, safety, threshold, exact) else utility
