r"""Core coordinates: the gauge-free, orthonormal space in which low-rank updates of one module live.

Factors (lora_A, lora_B) are no coordinates: lora_B·lora_A = (lora_B G)(G⁻¹lora_A) for every invertible G. Instead,
with Q_out the left singular vectors of [ΔW₁, ΔW₂, …] (side by side) and Q_in the right singular vectors of the same
stacked, every update of the module is ΔW_i = Q_out C_i Q_inᵀ, and C_i does not depend on G. Other orthonormal bases of
the same spaces would make the diagonal of a Fisher, and shrinkage towards it, depend on the gauge.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from sst_kernels.collect import CoreBasis

from .adapters import RANK_TOLERANCE, LowRank, factor


def _fix_signs(vectors: Tensor) -> Tensor:
    """Flip each column so that its entry of largest magnitude is positive."""
    largest = vectors.abs().argmax(0, keepdim=True)
    return vectors * vectors.gather(0, largest).sign()


def _left_singular_vectors(ups: Sequence[Tensor], downs: Sequence[Tensor]) -> Tensor:
    """Left singular vectors of [U₁D₁, U₂D₂, …], never formed: with D_iᵀ = Q_iR_i they are those of [U_iR_iᵀ, …]."""
    parts = [up @ torch.linalg.qr(down.mT, mode="r").R.mT for up, down in zip(ups, downs, strict=True)]
    q, r = torch.linalg.qr(torch.cat(parts, dim=1))
    left, sigma, _ = torch.linalg.svd(r, full_matrices=False)
    return _fix_signs(q @ left[:, sigma > RANK_TOLERANCE * sigma.max()])


def core_basis(updates: Sequence[LowRank]) -> CoreBasis:
    """Q_out, Q_in of the updates of one module: left and right singular vectors of them stacked.

    Args:
        updates: Low-rank updates of one module, of equal (d_out, d_in). Zero updates add nothing.

    Returns:
        float64 bases on the updates' device; r_out, r_in ≤ Σ ranks (both 0 when every update is zero).

    Cost: O((d_out + d_in) r²) flops with r = Σ ranks; no d_out × d_in matrix.
    """
    ups, downs = [u.up.double() for u in updates], [u.down.double() for u in updates]
    q_out = _left_singular_vectors(ups, downs)
    q_in = _left_singular_vectors([d.mT for d in downs], [u.mT for u in ups])
    return CoreBasis(q_out, q_in)


@lru_cache
def _identity(size: int, device: torch.device) -> Tensor:
    """Identity, shared by all modules: they take slices of it."""
    return torch.eye(size, device=device)


def weight_basis(update: LowRank) -> CoreBasis:
    """Identity bases: C = ΔW, for methods that are defined in weight coordinates.

    Args:
        update: Any update of the module.

    Returns:
        Identities, (d_out, d_out) and (d_in, d_in).
    """
    d_out, d_in = update.shape
    eye = _identity(max(d_out, d_in), update.up.device)
    return CoreBasis(eye[:d_out, :d_out], eye[:d_in, :d_in])


def to_core(basis: CoreBasis, update: LowRank) -> Tensor:
    """C = Q_outᵀ ΔW Q_in, (r_out, r_in), float64."""
    return (basis.q_out.double().mT @ update.up.double()) @ (update.down.double() @ basis.q_in.double())


def factor_gradients(rows: Tensor, update: LowRank) -> Tensor:
    """(∂/∂B, ∂/∂A) = (G Aᵀ, BᵀG) from G = ∂/∂ΔW, for ΔW = BA: gradients in the trap itself, to compare with.

    They depend on how the factors are scaled and mixed, and so does all that is made of them.

    Args:
        rows: (S, d_out·d_in), vec(G), row-major.
        update: B = `up`, the adapter's scale folded in, and A = `down`.

    Returns:
        (S, (d_out + d_in)·r): vec(∂/∂B), then vec(∂/∂A).
    """
    g = rows.unflatten(1, update.shape)
    up, down = update.up.to(rows), update.down.to(rows)
    return torch.cat([(g @ down.mT).flatten(1), (up.mT @ g).flatten(1)], dim=1)


def from_core(basis: CoreBasis, core: Tensor, rank: int | None = None) -> tuple[LowRank, float]:
    """ΔW = Q_out C Q_inᵀ as factors.

    Args:
        basis: The module's bases.
        core: (r_out, r_in).
        rank: Rank to truncate to; the numerical rank of C when None.

    Returns:
        The update, float32, and the relative Frobenius error of the truncation.
    """
    small, error = factor(core.float(), rank)
    return LowRank(basis.q_out.float() @ small.up, small.down @ basis.q_in.mT.float()), error
