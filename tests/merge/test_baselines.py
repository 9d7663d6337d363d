"""Baselines against examples worked by hand and against their definitions entry by entry."""

from __future__ import annotations

import pytest
import torch

from sst_merge.baselines import (
    dare,
    diagonal_sst_mask,
    interpolation,
    keep_largest,
    task_arithmetic,
    ties,
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
