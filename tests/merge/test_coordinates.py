"""Core coordinates against a dense SVD, and their independence of the gauge."""

from __future__ import annotations

import pytest
import torch

from sst_merge.adapters import LowRank
from sst_merge.coordinates import core_basis, from_core, to_core, weight_basis


def random_update(d_out: int, d_in: int, r: int, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(d_out, r, generator=generator), torch.randn(r, d_in, generator=generator))


def signs_fixed(q: torch.Tensor) -> torch.Tensor:
    return torch.stack([column * column[column.abs().argmax()].sign() for column in q.mT], dim=1)


def test_basis_is_the_singular_vectors_of_the_stacked_updates():
    updates = [random_update(31, 17, 3, seed=0), random_update(31, 17, 5, seed=1)]
    basis = core_basis(updates)
    dense = [u.up.double() @ u.down.double() for u in updates]
    left = torch.linalg.svd(torch.cat(dense, dim=1)).U[:, :8]
    right = torch.linalg.svd(torch.cat(dense, dim=0)).Vh[:8].mT
    torch.testing.assert_close(basis.q_out, signs_fixed(left), rtol=0, atol=1e-10)
    torch.testing.assert_close(basis.q_in, signs_fixed(right), rtol=0, atol=1e-10)


def test_every_update_is_exact_in_its_core():
    updates = [random_update(31, 17, 3, seed=0), random_update(31, 17, 5, seed=1)]
    basis = core_basis(updates)
    for update in updates:
        rebuilt = basis.q_out @ to_core(basis, update) @ basis.q_in.mT
        torch.testing.assert_close(rebuilt, update.up.double() @ update.down.double(), rtol=0, atol=1e-12)


def test_basis_and_core_do_not_depend_on_the_gauge():
    a, b = random_update(31, 17, 3, seed=0), random_update(31, 17, 5, seed=1)
    a, b = (LowRank(u.up.double(), u.down.double()) for u in (a, b))
    g = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gauged = LowRank(b.up @ g, torch.linalg.solve(g, b.down))
    basis, other = core_basis([a, b]), core_basis([a, gauged])
    torch.testing.assert_close(other.q_out, basis.q_out, rtol=0, atol=1e-9)
    torch.testing.assert_close(other.q_in, basis.q_in, rtol=0, atol=1e-9)
    torch.testing.assert_close(to_core(other, gauged), to_core(basis, b), rtol=0, atol=1e-9)


def test_shared_directions_and_zero_updates_lower_the_rank():
    update = random_update(31, 17, 3, seed=0)
    nothing = LowRank(torch.zeros(31, 0), torch.zeros(0, 17))
    assert core_basis([update, update.scaled(2.0)]).core_shape == (3, 3)
    assert core_basis([update, nothing]).core_shape == (3, 3)
    zero = LowRank(torch.zeros(31, 2), torch.randn(2, 17))
    assert core_basis([update, zero]).core_shape == (3, 3)


@pytest.mark.parametrize("rank", [None, 2])
def test_from_core_is_the_best_update_of_its_rank(rank):
    update = random_update(31, 17, 3, seed=0)
    basis = core_basis([update])
    low, error = from_core(basis, to_core(basis, update), rank)
    dense = update.up.double() @ update.down.double()
    sigma = torch.linalg.svdvals(dense)
    kept = 3 if rank is None else rank
    assert low.rank == kept
    expected = float(sigma[kept:].norm() / sigma.norm()) if rank else 0.0
    assert error == pytest.approx(expected, abs=1e-7)
    residual = dense - low.up.double() @ low.down.double()
    assert float(residual.norm() / dense.norm()) == pytest.approx(expected, abs=1e-6)


def test_weight_coordinates_are_the_weights():
    update = random_update(5, 7, 2, seed=0)
    basis = weight_basis(update)
    torch.testing.assert_close(to_core(basis, update).float(), update.dense())
