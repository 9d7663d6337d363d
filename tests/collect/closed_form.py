"""One linear layer whose δ is known, and its sums."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sst_kernels.factors import Factors
from sst_kernels.labels import counter_uniform, sample_labels


def linear(d_in: int = 3, d_out: int = 4) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(d_in, d_out, bias=False).double()


def rows(count: int = 5, d: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(count, d, generator=torch.Generator().manual_seed(seed)).double()


def square_sums(model: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Σ x xᵀ and Σ δ δᵀ of the loss ½ Σ y², whose δ is y."""
    y = x @ model.weight.detach().T
    return x.T @ x, y.T @ y


def half_square(y: Tensor) -> Tensor:
    return y.square().sum() / 2


def sums(factors: Factors, name: str = "") -> tuple[Tensor, Tensor, list[float]]:
    a, g = factors.mean(name)
    counts = factors.layers[name].counts
    return a * counts[0], g * counts[1], counts.tolist()


def assert_sums(factors: Factors, expected: tuple[Tensor, Tensor], count: float) -> None:
    a, g, counts = sums(factors)
    torch.testing.assert_close(a, expected[0])
    torch.testing.assert_close(g, expected[1])
    assert counts == [count, count]


def sampled_sums(
    model: nn.Linear, x: Tensor, sequence: Tensor, position: Tensor, sample: int = 0, seed: int = 0
) -> Tensor:
    """Σ δ δᵀ with δ = softmax(y) − onehot(ŷ)."""
    y = x @ model.weight.detach().T
    labels = sample_labels(y, counter_uniform(seed, sequence, position, sample))
    delta = y.softmax(-1) - nn.functional.one_hot(labels, y.shape[-1])
    return delta.T @ delta
