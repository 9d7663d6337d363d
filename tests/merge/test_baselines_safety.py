"""SafeLoRA and SafeMERGE against examples worked by hand and the authors' formula on dense matrices."""

from __future__ import annotations

import math

import pytest
import torch

from sst_merge.baselines import aligned_part, is_unsafe, safe_lora, safe_merge


def close(actual: torch.Tensor, wanted: object) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(wanted, dtype=actual.dtype), rtol=1e-12, atol=1e-12)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


U = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]).double()
S = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 0.0]]).double()
"""VVᵀ/‖V‖ = diag(4, 0, 0)/2, and the projector diag(1, 0, 0): CΔ_u is (6, 0) or (3, 0) on the first row; cos = 3/5."""


def test_aligned_part_worked_example():
    close(aligned_part(U, S, exact=False), [[6.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    close(aligned_part(U, S, exact=True), [[3.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    close(aligned_part(U, 0.1 * S, exact=False), [[0.6, 0.0], [0.0, 0.0], [0.0, 0.0]])  # V's scale is that of C
    close(aligned_part(U, 0.1 * S, exact=True), [[3.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    for exact in (False, True):
        assert not aligned_part(U, 0 * S, exact).any()


@pytest.mark.parametrize("exact", [False, True])
def test_verdicts_worked_example(exact):
    assert not is_unsafe(U, S, 0.59, exact) and is_unsafe(U, S, 0.61, exact)
    assert not is_unsafe(U, S, 0.0, exact) and not is_unsafe(S, S, 1 - 1e-9, exact)
    assert is_unsafe(0 * U, S, 0.01, exact)  # nothing of it is aligned
    assert not is_unsafe(U, 0 * S, 1.0, exact)  # nothing is known


def test_safe_lora_worked_example():
    close(safe_lora(U, S, 0.61, False, 0.5), [[6.0 + 0.5 * 2, 0.0], [0.0, 0.0], [0.0, 0.0]])
    close(safe_lora(U, S, 0.61, True, 0.0), [[3.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    close(safe_lora(U, S, 0.59, False, 0.5), U + 0.5 * S)
    close(safe_lora(U, 0 * S, 1.0, False, 0.5), U)
    close(safe_lora(0 * U, S, 1.0, False, 0.5), 0.5 * S)


def test_safe_merge_worked_example():
    close(safe_merge(U, S, 0.61, False, 0.2), 0.8 * U + 0.2 * S)
    close(safe_merge(U, S, 0.59, False, 0.2), U)
    close(safe_merge(U, S, 1.0, False, 0.0), U)
    close(safe_merge(U, S, 1.0, True, 1.0), S)
    close(safe_merge(U, 0 * S, 1.0, False, 0.2), U)


@pytest.mark.parametrize("exact", [False, True])
def test_projection_is_the_authors_on_dense_matrices(exact):
    """C Δ with C made whole; V of rank 2 in the first, of full column rank where (VᵀV)⁻¹ exists."""
    update = randn(6, 5, seed=1)
    v = randn(6, 3, seed=2) if exact else randn(6, 2, seed=3) @ randn(2, 5, seed=4)
    c = v @ torch.linalg.inv(v.mT @ v) @ v.mT if exact else v @ v.mT / torch.linalg.matrix_norm(v)
    wanted = c @ update
    torch.testing.assert_close(aligned_part(update, v, exact), wanted, rtol=1e-9, atol=1e-9)
    cosine = float((wanted * update).sum() / (wanted.norm() * update.norm()))
    assert 0.05 < cosine < 0.95
    assert is_unsafe(update, v, cosine + 1e-6, exact) and not is_unsafe(update, v, cosine - 1e-6, exact)


@pytest.mark.parametrize("exact", [False, True])
def test_bases_may_be_turned(exact):
    """Cores stand for ΔW: both methods are made of inner products."""
    u, s = randn(4, 3, seed=1), randn(4, 3, seed=2)
    q_out, q_in = torch.linalg.qr(randn(9, 4, seed=3)).Q, torch.linalg.qr(randn(8, 3, seed=4)).Q
    for threshold in (0.1, 0.9):
        for method in (safe_lora, safe_merge):
            dense = method(q_out @ u @ q_in.mT, q_out @ s @ q_in.mT, threshold, exact, 0.3)
            close(dense, q_out @ method(u, s, threshold, exact, 0.3) @ q_in.mT)


def test_exact_cosine_is_the_share_of_the_norm():
    update, v = randn(6, 5, seed=1), randn(6, 2, seed=2)
    share = float(aligned_part(update, v, exact=True).norm() / update.norm())
    assert is_unsafe(update, v, math.nextafter(share, 2) + 1e-12, True)
    assert not is_unsafe(update, v, share - 1e-12, True)
