"""DELLA by hand, and TIES, DARE and DELLA beside mergekit's, where that is right."""

from __future__ import annotations

import pytest
import torch
from mergekit import sparsify
from mergekit.merge_methods.generalized_task_arithmetic import get_mask

from sst_merge.baselines import agreeing_mean, dare, della, magprune_drop, ties


def close(actual: torch.Tensor, wanted: object) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(wanted, dtype=actual.dtype), rtol=1e-12, atol=1e-12)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_magprune_worked_example():
    # ranks within a row: 2, 0, 1 and 0, 1, 2 (equal magnitudes by position); p = 0.5 + 0.2·(½ − rank/2)
    update = torch.tensor([[-9.0, 1.0, 3.0], [2.0, 2.0, -2.0]]).double()
    close(magprune_drop(update, 0.5, 0.2), [[0.4, 0.6, 0.5], [0.6, 0.5, 0.4]])
    close(magprune_drop(update[0], 0.5, 0.2), [0.4, 0.6, 0.5])
    close(magprune_drop(update[:, :1], 0.5, 0.2), [[0.5], [0.5]])  # 0/0 in the authors' code


def test_magprune_keeps_with_mergekits_probabilities(monkeypatch):
    update = torch.randn(7, 33, generator=generator())
    monkeypatch.setattr(torch, "bernoulli", lambda probabilities: probabilities)
    kept = sparsify.della_magprune(torch.ones_like(update) * update, density=0.7, epsilon=0.07)
    torch.testing.assert_close(update * (1 - magprune_drop(update, 0.3, 0.14)), kept)


def test_della_drops_small_entries_more_often_and_keeps_the_expectation():
    update = torch.tensor([[1.0, -2.0, 4.0, -8.0]]).double().expand(40_000, 4)
    merged = della([update], 0.5, 0.6, 1.0, generator())
    kept = (merged != 0).double().mean(0)
    p = torch.tensor([0.8, 0.6, 0.4, 0.2], dtype=torch.float64)
    assert ((kept - (1 - p)).abs() <= 5 * (p * (1 - p) / 40_000).sqrt()).all()
    close(merged[merged != 0], (update / (1 - p))[merged != 0])
    torch.testing.assert_close(merged.mean(0), update[0], rtol=0.05, atol=0)


def test_della_without_dropping_is_ties_without_a_trim():
    a, b = torch.randn(2, 5, 6, dtype=torch.float64, generator=generator()).unbind()
    close(della([a, b], 0.0, 0.0, 0.7, generator()), ties([a, b], 1.0, 0.7))
    close(della([b, a], 0.0, 0.0, 0.7, generator()), ties([a, b], 1.0, 0.7))
    assert torch.equal(della([a, b], 0.3, 0.1, 1.0, generator(3)), della([a, b], 0.3, 0.1, 1.0, generator(3)))
    assert not torch.equal(della([a, b], 0.3, 0.1, 1.0, generator(3)), della([a, b], 0.3, 0.1, 1.0, generator(4)))


def test_della_elects_among_what_survives(monkeypatch):
    # Uniform numbers 0.5: an entry with p > ½ goes. Rows of a: p = 0.6, 0.4; of b: 0.4, 0.6.
    monkeypatch.setattr(torch, "rand", lambda shape, generator: torch.full(shape, 0.5))
    a, b = torch.tensor([[1.0, 6.0]]).double(), torch.tensor([[-3.0, 0.5]]).double()
    close(della([a, b], 0.5, 0.2, 2.0, generator()), [[2 * -3 / 0.6, 2 * 6 / 0.6]])


def test_agreeing_mean_by_hand():
    a, b = torch.tensor([1.0, 2.0, -1.0, 0.0, 3.0]), torch.tensor([3.0, -1.0, 1.0, 0.0, 0.0])
    assert agreeing_mean([a, b]).tolist() == [2.0, 2.0, 0.0, 0.0, 3.0]


@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
def test_ties_is_mergekits(density):
    updates = list(torch.randn(3, 6, 8, generator=generator()))
    stacked = torch.stack([sparsify.magnitude(u, density) for u in updates])
    mask = get_mask(stacked, "sum")
    count = mask.sum(0).clamp(min=1)
    torch.testing.assert_close(ties(updates, density, 0.5), 0.5 * (stacked * mask).sum(0) / count)


def test_a_sum_of_zero_elects_nothing_where_mergekit_elects_the_positive():
    """sgn(0) = 0 in Yadav et al.; the limits from either side are 1 and −1, their mean is 0."""
    stacked = torch.tensor([[2.0], [-2.0]])
    assert (stacked * get_mask(stacked, "sum")).sum() == 2
    assert agreeing_mean(list(stacked)).tolist() == [0.0]


def test_dare_is_mergekits_mask_rescaled_as_its_paper_has_it(monkeypatch):
    """mergekit rescales to the ℓ₁ norm of each tensor, or not at all; Yu et al. by 1/(1−p)."""
    update = torch.randn(30, 20, generator=generator())
    mask = torch.rand(update.shape, generator=generator(1)) >= 0.4
    monkeypatch.setattr(torch, "bernoulli", lambda probabilities: mask.to(probabilities))
    theirs = sparsify.bernoulli(update, density=0.6)
    torch.testing.assert_close(dare(update, 0.4, generator(1)), theirs / 0.6)
