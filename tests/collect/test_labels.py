"""Labels depend on their counters alone, and follow the model's distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sst_kernels.labels import counter_uniform, sample_labels

MASK = (1 << 64) - 1


def splitmix(x: int) -> int:
    """SplitMix64's finaliser on Python integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


@pytest.mark.parametrize("counters", [(0, 0, 0, 0), (7, 3, 511, 1), (2**40 + 5, 2**33, 2**20, 9), (-1, 12, 5, 0)])
def test_uniform_is_splitmix_of_the_counters(counters):
    seed, *rest = counters
    state = splitmix((seed + 0x9E3779B97F4A7C15) & MASK)
    for counter in rest:
        state = splitmix(((state ^ counter) + 0x9E3779B97F4A7C15) & MASK)
    expected = (state >> 11) / 2**53
    sequence, position, sample = rest
    assert counter_uniform(seed, torch.tensor(sequence), torch.tensor(position), sample).item() == expected


def test_uniform_looks_uniform_and_independent():
    sequence = torch.arange(300).repeat_interleave(300)
    position = torch.arange(300).repeat(300)
    u = counter_uniform(3, sequence, position)
    v = counter_uniform(3, sequence, position, sample=1)
    n = len(u)
    assert abs(u.mean() - 0.5) < 5 / (12 * n) ** 0.5
    histogram = torch.histc(u, bins=50, min=0, max=1)
    assert ((histogram - n / 50) ** 2 / (n / 50)).sum() < 49 + 5 * (2 * 49) ** 0.5
    grid = u.reshape(300, 300)
    for a, b in (
        (u, v),
        (grid[:-1].flatten(), grid[1:].flatten()),
        (grid[:, :-1].flatten(), grid[:, 1:].flatten()),
    ):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / len(a) ** 0.5


def test_labels_do_not_depend_on_batch_or_order():
    logits = torch.randn(40, 11)
    sequence, position = torch.arange(40) // 8, torch.arange(40) % 8
    whole = sample_labels(logits, counter_uniform(1, sequence, position))
    order = torch.randperm(40)
    shuffled = sample_labels(logits[order], counter_uniform(1, sequence[order], position[order]))
    assert torch.equal(whole[order], shuffled)
    one_by_one = [
        sample_labels(logits[i : i + 1], counter_uniform(1, sequence[i : i + 1], position[i : i + 1]))
        for i in range(40)
    ]
    assert torch.equal(whole, torch.cat(one_by_one))


def test_labels_are_the_inverse_cdf():
    logits = torch.tensor([[0.0, -torch.inf, np.log(3.0), -torch.inf]]).repeat(6, 1)  # p = 1/4, 0, 3/4, 0
    u = torch.tensor([0.0, 0.2499, 0.2501, 0.6, 0.9, 1 - 2.0**-53], dtype=torch.float64)
    assert sample_labels(logits, u).tolist() == [0, 0, 2, 2, 2, 2]


def test_label_frequencies_follow_the_softmax():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -3.0])
    p = logits.softmax(0)
    n = 200_000
    labels = sample_labels(logits.expand(n, 5), counter_uniform(0, torch.arange(n), torch.zeros(n, dtype=torch.int64)))
    counts = torch.bincount(labels, minlength=5)
    assert ((counts - n * p) ** 2 / (n * p)).sum() < 4 + 5 * 8**0.5
