"""Isotropic merging and KnOTS against examples worked by hand and their authors' formulas on dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sst_merge.baselines import isotropic, knots


def close(actual: torch.Tensor, wanted: object) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(wanted, dtype=actual.dtype), rtol=1e-9, atol=1e-9)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def low_rank(d_out: int, d_in: int, rank: int, seed: int) -> torch.Tensor:
    return randn(d_out, rank, seed=seed) @ randn(rank, d_in, seed=seed + 100)


def turned(d: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(randn(d, d, seed=seed)).Q


def test_iso_c_worked_example():
    # the sum has σ = 6, 3, 3 and zeros, which stay: mean 4
    u = torch.tensor([5.0, 1.0, 0.0, 0.0]).double().diag()
    s = torch.tensor([1.0, 2.0, 3.0, 0.0]).double().diag()
    close(isotropic([u, s], 1.0), torch.tensor([4.0, 4.0, 4.0, 0.0]).diag())


def test_iso_cts_worked_example():
    # Σ = diag(9, 8, 3, 2): common 0.5 keeps e_1, e_2; of what is left u has 3 on e_3 and s has 2 on e_4.
    u = torch.tensor([9.0, 0.0, 3.0, 0.0]).double().diag()
    s = torch.tensor([0.0, 8.0, 0.0, 2.0]).double().diag()
    close(isotropic([u, s], 0.5), (9 + 8 + 3 + 2) / 4 * torch.eye(4))
    # A task's own direction that the sum hides: −3 + 2 on e_3 leaves |−1|, but u's own σ there is 3 and s's is 2.
    u, s = torch.tensor([9.0, -3.0]).double().diag(), torch.tensor([1.0, 2.0]).double().diag()
    close(isotropic([u, s], 1.0), (10 + 1) / 2 * torch.tensor([1.0, -1.0]).diag())


@pytest.mark.parametrize("common", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_isotropic_is_the_authors_on_full_rank_matrices(common):
    """Their counts, sums and polar factors, in numpy; min(d_out, d_in) = rank, so that there is no departure."""
    tasks = [randn(7, 10, seed=i).numpy() for i in range(3)]
    rank, count = 7, len(tasks)
    k = int(rank * common)
    k = rank - round((rank - k) / count) * count
    k = k if k >= 0 else rank - rank // count * count  # theirs would cut negative columns
    each = (rank - k) // count
    u, sigma, vh = np.linalg.svd(sum(tasks), full_matrices=False)
    us, sigmas, vhs = [u[:, :k]], [sigma[:k]], [vh[:k]]
    for w in tasks:
        u_t, sigma_t, vh_t = np.linalg.svd(w - u[:, :k] @ u[:, :k].T @ w, full_matrices=False)
        us.append(u_t[:, :each]), sigmas.append(sigma_t[:each]), vhs.append(vh_t[:each])
    p, _, q = np.linalg.svd(np.concatenate(us, axis=1), full_matrices=False)
    r, _, t = np.linalg.svd(np.concatenate(vhs), full_matrices=False)
    wanted = np.concatenate(sigmas).mean() * (p @ q) @ (r @ t)
    close(isotropic([torch.from_numpy(w) for w in tasks], common), wanted)


@pytest.mark.parametrize("common", [0.5, 1.0])
def test_isotropic_keeps_to_the_directions_there_are(common):
    """Bases may be turned, tasks exchanged, one of them may be nothing, equal ones count once."""
    u, s, zero = low_rank(9, 8, 2, 1), low_rank(9, 8, 3, 2), torch.zeros(9, 8).double()
    merged = isotropic([u, s], common)
    close(isotropic([s, u], common), merged)
    p, q = turned(9, 5), turned(8, 6)
    close(isotropic([p @ u @ q, p @ s @ q], common), p @ merged @ q)
    sigma = np.linalg.svd(merged.numpy(), compute_uv=False)
    assert (sigma > 1e-9).sum() == 5 and np.allclose(sigma[:5], sigma[0])
    alone = isotropic([u, zero], common)
    left, sigma, right = np.linalg.svd(u.numpy())
    close(alone, sigma[:2].mean() * left[:, :2] @ right[:2])
    close(isotropic([u, u], common), 2 * alone)


def test_isotropic_of_updates_that_cancel_is_zero():
    u = low_rank(4, 3, 2, 1)
    assert not isotropic([u, -u], 0.5).any()
    assert not isotropic([torch.zeros(3, 2), torch.zeros(3, 2)], 0.5).any()


def test_knots_worked_example():
    # In output directions turned by 45° u is [[4, 1], [1, −2]] and s is [[2, −2], [2, 3]], their rows orthogonal side
    # by side. (4, 2) and (1, 2) are averaged, of (1, −2) and (−2, 3) the larger are elected.
    turn = torch.tensor([[1.0, -1.0], [1.0, 1.0]]).double() / 2**0.5
    u, s = (turn @ torch.tensor(t).double() for t in ([[4.0, 1.0], [1.0, -2.0]], [[2.0, -2.0], [2.0, 3.0]]))
    close(knots([u, s], 1.0, 0.5), 0.5 * turn @ torch.tensor([[3.0, -2.0], [1.5, 3.0]]).double())
    close(knots([u, s], 0.25, 1.0), turn @ torch.tensor([[4.0, 0.0], [0.0, 3.0]]).double())  # one entry of each stays


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_knots_is_the_authors_on_dense_matrices(density):
    u, s = low_rank(9, 8, 2, 1), low_rank(9, 8, 3, 2)
    left, sigma, right = np.linalg.svd(np.concatenate([u, s], axis=1), full_matrices=False)
    keep = sigma > 1e-5
    parts = [np.diag(sigma[keep]) @ v for v in np.split(right[keep], 2, axis=1)]
    trimmed = []
    for part in parts:
        k = round(density * part.size)
        trimmed.append(np.where(np.abs(part) >= np.sort(np.abs(part).ravel())[-k], part, 0))
    sign = np.sign(sum(trimmed))
    agree = [(np.sign(part) == sign) * (part != 0) for part in trimmed]
    mean = sum(part * a for part, a in zip(trimmed, agree, strict=True)) / np.maximum(sum(agree), 1)
    close(knots([u, s], density, 0.7), 0.7 * left[:, keep] @ mean)


def test_knots_invariances():
    u, s, zero = low_rank(9, 8, 2, 1), low_rank(9, 8, 3, 2), torch.zeros(9, 8).double()
    merged = knots([u, s], 0.5, 1.0)
    close(knots([s, u], 0.5, 1.0), merged)
    p = turned(9, 5)
    close(knots([p @ u, p @ s], 0.5, 1.0), p @ merged)  # outputs turned; inputs are where entries are
    close(knots([u, zero], 1.0, 1.0), u)
    close(knots([zero, u], 1.0, 1.0), u)  # an SVD leaves 1e-16 there, which would vote
    close(knots([u, u], 1.0, 1.0), u)
    assert not knots([zero, zero], 0.5, 1.0).any()
