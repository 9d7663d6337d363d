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


def gradient_matching(
    utility: Tensor, safety: Tensor, fishers: tuple[Tensor, Tensor], prior: float, alpha: float
) -> Tensor:
    """Δ_i = ((δ+F_u,i)Δ_u,i + α(δ+F_s,i)Δ_s,i)/(δ + F_u,i + αF_s,i) (Daheim et al. 2024).

    θ = θ_0 + Σ_t α_t H̄⁻¹(H_0 + H_t)(θ_t − θ_0), H̄ = H_0 + Σ_t α_t H_t, with diagonal Fishers as Hessians and the
    weights α_u = 1, α_s = α. Without curvature it is task arithmetic; without prior and α = 1, Fisher averaging. In the
    source H_0 = δ + the pretrained model's own Fisher on pretraining data, which nobody has who merges: here it is δ
    alone. Its H_t are sums over the tasks' training sets; here both are means over calibration sequences, so that the
    tasks weigh alike, whatever their sizes. Fishers are those of `fisher_averaging`, not divided by their norms.

    Args:
        utility: Δ_u, any shape.
        safety: Δ_s, the same shape.
        fishers: Diagonal Fishers (F_u, F_s), the same shape.
        prior: δ > 0, in units of the Fishers.
        alpha: α.

    Returns:
        Δ, the same shape; α = 0 is Δ_u.
    """
    f_utility, f_safety = fishers
    pull = (prior + f_utility) * utility + alpha * (prior + f_safety) * safety
    return pull / (prior + f_utility + alpha * f_safety)


def shrunk_gram(gram: Tensor, reduction: float, epsilon: float) -> Tensor:
    """G̃ = aG + (1−a)diag G + ε·mean(diag G)·I: off-diagonal entries multiplied by a (Jin et al. 2023).

    Args:
        gram: G = XᵀX ⪰ 0, (d, d), symmetric.
        reduction: a in [0, 1]. Below 1, and where no input is always zero, G̃ is positive definite for any data.
        epsilon: ε > 0; inputs that were always zero would leave the solution open.

    Returns:
        G̃ ≻ 0, (d, d); zero where G is.
    """
    diagonal = gram.diagonal()
    return reduction * gram + torch.diag((1 - reduction) * diagonal + epsilon * diagonal.mean())


def regmean(utility: Tensor, safety: Tensor, grams: tuple[Tensor, Tensor], alpha: float) -> Tensor:
    """RegMean: Δ = (Σ_t w_tΔ_tG_t)(Σ_t w_tG_t)⁻¹, w = (1−α, α), the least Σ_t w_t‖(Δ − Δ_t)X_tᵀ‖² (Jin et al. 2023).

    θ_0 cancels: W_t = W_0 + Δ_t have the same average. G_t = X_tᵀX_t are Gram matrices of the inputs that the layer of
    model t sees on its own data. The source weighs tasks alike, α = ½ here.

    Args:
        utility: Δ_u, (r, d_in); or any matrix times it from the left.
        safety: Δ_s, the same.
        grams: (G_u, G_s), (d_in, d_in), positive definite: `shrunk_gram`.
        alpha: α in [0, 1]; 0 is Δ_u and 1 is Δ_s.

    Returns:
        Δ, (r, d_in).

    Cost: d_in³/3 + 2r·d_in² flops.
    """
    g_utility, g_safety = (1 - alpha) * grams[0], alpha * grams[1]
    factor = torch.linalg.cholesky(g_utility + g_safety)
    return utility + torch.cholesky_solve(g_safety @ (safety - utility).mT, factor).mT
