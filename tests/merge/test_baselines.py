"""Baselines against examples worked by hand and against their definitions entry by entry."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sst_kernels import eigh
from sst_merge.baselines import (
    dare,
    diagonal_sst_mask,
    fisher_averaging,
    interpolation,
    keep_largest,
    ratio_mask,
    single_fisher,
    sst_m_ratio,
    sst_v_ratio,
    subspace_boosting,
    task_arithmetic,
    ties,
    top_eigenvectors,
    tsv,
)


def test_linear_baselines():
    u, s = torch.tensor([1.0, 2.0]), torch.tensor([10.0, -4.0])
    assert task_arithmetic(u, s, 0.5).tolist() == [6.0, 0.0]
    assert interpolation(u, s, 0.25).tolist() == [3.25, 0.5]


def test_ties_worked_example():
    # Figure 1 of Yadav et al. in small: trim to half, elect the sign of the sum, mean of those that agree.
    a = torch.tensor([5.0, -3.0, 0.1, 2.0, -0.2, 0.3])  # keeps 5, -3, 2
    b = torch.tensor([-1.0, -4.0, 6.0, 3.0, 0.0, 0.1])  # keeps -4, 6, 3
    merged = ties([a, b], density=0.5, scale=2.0)
    assert merged.tolist() == [10.0, -7.0, 12.0, 5.0, 0.0, 0.0]


def test_ties_disagreement_goes_to_the_larger_mass_and_ties_to_zero():
    a, b, c = torch.tensor([3.0, 1.0]), torch.tensor([-2.0, -1.0]), torch.tensor([-2.0, 0.0])
    assert ties([a, b, c], density=1.0, scale=1.0).tolist() == [-2.0, 0.0]


def test_keep_largest_breaks_ties_by_position():
    assert keep_largest(torch.tensor([1.0, 2.0, 1.0, 1.0]), 0.5).tolist() == [
        True,
        True,
        False,
        False,
    ]
    assert keep_largest(torch.tensor([[1.0, 5.0]]), 0.01).tolist() == [[False, True]]


@pytest.mark.parametrize("drop", [0.0, 0.3, 0.9])
def test_dare_drops_and_rescales(drop):
    update = torch.ones(400, 500)
    out = dare(update, drop, torch.Generator().manual_seed(0))
    kept = out != 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - drop)))
    n = out.numel()
    assert abs(kept.double().mean() - (1 - drop)) <= 5 * (drop * (1 - drop) / n) ** 0.5
    assert torch.equal(out, dare(update, drop, torch.Generator().manual_seed(0)))


def test_diagonal_sst_masks():
    harm, benign = torch.tensor([4.0, 1.0, 0.0, 9.0]), torch.tensor([1.0, 0.0, 5.0, 8.0])
    ratio = torch.tensor([4 / 2, 1 / 1, 0 / 6, 9 / 9])  # epsilon = 1
    torch.testing.assert_close(diagonal_sst_mask(harm, benign, 1.0, None), ratio / 2)
    assert diagonal_sst_mask(harm, benign, 1.0, 0.5).tolist() == [1.0, 1.0, 0.0, 0.0]


def close(actual: torch.Tensor, wanted: object) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(wanted, dtype=actual.dtype), rtol=1e-12, atol=1e-12)


def test_masks_where_every_ratio_is_zero():
    assert ratio_mask(torch.zeros(4), None).tolist() == [0.0] * 4
    assert ratio_mask(torch.zeros(4), 0.25).sum() == 1


def test_sst_v_worked_example():
    u, s = torch.tensor([1.0, 2.0, 0.0, -1.0]), torch.tensor([3.0, 2.0, 1.0, 1.0])
    # (s − u)² = 4, 0, 1, 4 over u² + 1 = 2, 5, 1, 2
    assert sst_v_ratio(u, s, 1.0).tolist() == [2.0, 0.0, 1.0, 2.0]


def test_sst_m_worked_example():
    base, u, s = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 1.0, -0.5]), torch.tensor([-4.0, 0.0, 1.5])
    # |θ_s| = |−3|, |−2|, |2| over |θ_u| + 1 = 3 + 1, 1 + 1, 0 + 1
    assert sst_m_ratio(base, u, s, 1.0).tolist() == [0.75, 1.0, 2.0]


def test_single_fisher_replaces_what_refusals_feel_most_and_ignores_the_cost():
    """The 2-D counterexample: A = diag(2, 1), B = diag(4, 0.1)."""
    a, b = (torch.tensor(d, dtype=torch.float64).diag() for d in ([2.0, 1.0], [4.0, 0.1]))
    q = top_eigenvectors(a, 1)
    u, s = torch.tensor([[3.0, 5.0]]).double(), torch.tensor([[10.0, 20.0]]).double()
    close(single_fisher(u, s, q, 0.5), [[0.5 * 10, 5.0]])  # Q = e_1: the first entry from s, the second from u
    close(single_fisher(u, s, q, 0.0), [[0.0, 5.0]])
    close(single_fisher(u, s, torch.eye(2).double(), 1.0), s)
    close(single_fisher(u, s, torch.zeros(2, 0).double(), 1.0), u)
    ray = (q * (a @ q)).sum() / (q * (b @ q)).sum()
    close(ray, 2 / 4)  # the pencil's first direction is the other one, e_2, with 1/0.1
    close(eigh(a, b)[0][-1], 10.0)


def test_single_fisher_in_turned_coordinates():
    # F = 9 v vᵀ + w wᵀ, v = (3, 4)/5, w = (−4, 3)/5; QQᵀ = v vᵀ = [[9, 12], [12, 16]]/25
    v, w = torch.tensor([3.0, 4.0]).double() / 5, torch.tensor([-4.0, 3.0]).double() / 5
    q = top_eigenvectors(9 * torch.outer(v, v) + torch.outer(w, w), 1)
    u, s = torch.tensor([[25.0], [0.0]]).double(), torch.tensor([[0.0], [25.0]]).double()
    # (I − QQᵀ)u = (25 − 9, −12) and QQᵀs = (12, 16)
    close(single_fisher(u, s, q, 2.0), [[16 + 2 * 12.0], [-12 + 2 * 16.0]])


def test_top_eigenvectors_never_reach_into_the_kernel():
    rows = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = top_eigenvectors(rows.mT @ rows, 6)
    assert q.shape == (8, 3)
    close(q @ (q.mT @ rows.mT), rows.mT)  # all of the range
    assert top_eigenvectors(torch.zeros(4, 4), 2).shape == (4, 0)


def test_tsv_worked_example():
    # u_1 at 0°, u_2 at 60°. The nearest orthonormal pair lies about the same bisector, 30°: at −15° and 75°.
    degrees = torch.tensor([0.0, 60.0, -15.0, 75.0], dtype=torch.float64) * math.pi / 180
    u1, u2, w1, w2 = torch.stack([degrees.cos(), degrees.sin()]).mT
    v1, v2 = torch.eye(2).double()
    merged_update = tsv([2 * torch.outer(u1, v1), torch.outer(u2, v2)], 1.0)
    close(merged_update, 2 * torch.outer(w1, v1) + torch.outer(w2, v2))


def test_tsv_keeps_the_largest_triples_of_each():
    diagonals = [3.0, 2.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 6.0, 5.0, 4.0]
    first, second = (torch.tensor(d).double().diag() for d in diagonals)
    # ranks 3: floor(0.5 · 3) = 1, floor(0.7 · 3) = 2 triples of each, already orthogonal
    for share, kept in ((0.5, [3.0, 0, 0, 6, 0, 0]), (0.7, [3.0, 2, 0, 6, 5, 0]), (0.1, [3.0, 0, 0, 6, 0, 0])):
        close(tsv([first, second], share), torch.tensor(kept).diag())


def test_tsv_of_equal_updates_is_the_update_and_of_one_alone_is_that_one():
    update = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, sigma, vh = np.linalg.svd(update.numpy(), full_matrices=False)
    close(tsv([update, update], 1.0), update)
    close(tsv([update, update], 0.5), (u[:, :2] * sigma[:2]) @ vh[:2])
    close(tsv([update, torch.zeros_like(update)], 0.5), update)
    close(tsv([torch.zeros(3, 2), torch.zeros(3, 2)], 0.5), torch.zeros(3, 2))


def test_subspace_boosting_worked_example():
    # σ = 4, 3, 2, 1 (sum 10), cumulated 4, 7, 9, 10; a zero value stays zero
    merged_update = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0]).double().diag()
    for beta, wanted in (
        (0.01, [4.0, 4, 4, 4, 0]),  # 0.1 is reached at once
        (0.5, [4.0, 3, 3, 3, 0]),  # 5 at the second
        (0.8, [4.0, 3, 2, 2, 0]),  # 8 at the third
        (0.0, [4.0, 4, 4, 4, 0]),
        (1.0, [4.0, 3, 2, 1, 0]),
    ):
        close(subspace_boosting(merged_update, beta), torch.tensor(wanted).diag())
    assert subspace_boosting(torch.zeros(3, 2), 0.5).tolist() == torch.zeros(3, 2).tolist()


def test_fisher_averaging_worked_example():
    u, s = torch.ones(3).double(), 3 * torch.ones(3).double()
    fishers = torch.tensor([1.0, 3.0, 1.0]).double(), torch.tensor([1.0, 1.0, 0.5]).double()
    # (1·1 + 1·3)/2, (3·1 + 1·3)/4, (1·1 + 0.5·3)/1.5
    close(fisher_averaging(u, s, fishers, 0.5), [2.0, 1.5, 5 / 3])
    # (0.75·1 + 0.25·3)/1, (2.25·1 + 0.25·3)/2.5, (0.75·1 + 0.125·3)/0.875
    close(fisher_averaging(u, s, fishers, 0.25), [1.5, 1.2, 1.125 / 0.875])
    close(fisher_averaging(u, s, fishers, 0.0), u)
    close(fisher_averaging(u, s, fishers, 1.0), s)
