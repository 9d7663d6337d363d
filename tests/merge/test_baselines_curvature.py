"""Gradient matching and RegMean against examples worked by hand, their authors' formulas and least squares."""

from __future__ import annotations

import pytest
import torch

from sst_merge.baselines import fisher_averaging, gradient_matching, regmean, shrunk_gram


def close(actual: torch.Tensor, wanted: object, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(wanted, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_gradient_matching_worked_example():
    u, s = torch.tensor([1.0, 1.0, 2.0]).double(), torch.tensor([3.0, 3.0, 0.0]).double()
    fishers = torch.tensor([1.0, 0.0, 3.0]).double(), torch.tensor([1.0, 4.0, 0.0]).double()
    # δ = 1, α = ½: (2·1 + ½·2·3)/(2 + ½), (1·1 + ½·5·3)/(1 + 2), (4·2 + 0)/4
    close(gradient_matching(u, s, fishers, 1.0, 0.5), [2.0, 8.5 / 3, 2.0])
    close(gradient_matching(u, s, fishers, 1.0, 0.0), u)


def test_gradient_matching_is_the_authors_with_matrices():
    """θ_0 + Σ_t α_t H̄⁻¹(H_0 + H_t)(θ_t − θ_0), H̄ = H_0 + Σ_t α_t H_t, by linear solves."""
    theta_0, u, s = randn(5, seed=1), randn(5, seed=2), randn(5, seed=3)
    diagonals = randn(5, seed=4).square(), randn(5, seed=5).square()
    h_0, (h_u, h_s) = 0.3 * torch.eye(5).double(), (d.diag() for d in diagonals)
    h_bar = h_0 + 1.0 * h_u + 0.7 * h_s
    steps = (h_0 + h_u) @ ((theta_0 + u) - theta_0) + 0.7 * (h_0 + h_s) @ ((theta_0 + s) - theta_0)
    wanted = theta_0 + torch.linalg.solve(h_bar, steps)
    close(theta_0 + gradient_matching(u, s, diagonals, 0.3, 0.7), wanted)


def test_gradient_matching_lies_between_task_arithmetic_and_fisher_averaging():
    u, s = randn(6, seed=1), randn(6, seed=2)
    fishers = randn(6, seed=3).square() + 0.1, randn(6, seed=4).square() + 0.1
    nothing = torch.zeros(6).double(), torch.zeros(6).double()
    close(gradient_matching(u, s, nothing, 1.0, 0.7), u + 0.7 * s)
    close(gradient_matching(u, s, fishers, 1e12, 0.7), u + 0.7 * s, 1e-9)
    close(gradient_matching(u, s, fishers, 1e-14, 1.0), fisher_averaging(u, s, fishers, 0.5), 1e-9)
    close(gradient_matching(u, s, fishers, 0.5, 1.0), gradient_matching(s, u, fishers[::-1], 0.5, 1.0))


def test_regmean_worked_example():
    # G_u = diag(3, 1), G_s = diag(1, 1): the first input is u's by 3 to 1, the second is shared
    u, s = torch.tensor([[4.0, 0.0]]).double(), torch.tensor([[0.0, 2.0]]).double()
    grams = torch.tensor([3.0, 1.0]).double().diag(), torch.eye(2).double()
    close(regmean(u, s, grams, 0.5), [[3.0, 1.0]])
    close(regmean(u, s, grams, 0.75), [[4 * 0.75 / 1.5, 1.5]])  # weights ¾ and ¾ on the first


@pytest.mark.parametrize("alpha", [0.2, 0.5])
def test_regmean_is_least_squares_on_the_layers_outputs(alpha):
    """The merged layer's outputs on both models' inputs are nearest to each model's own, W_0 included."""
    w_0, u, s = randn(4, 6, seed=1), randn(4, 6, seed=2), randn(4, 6, seed=3)
    x_u, x_s = randn(20, 6, seed=4), randn(30, 6, seed=5) @ torch.diag(torch.arange(1.0, 7.0).double())
    roots = (1 - alpha) ** 0.5, alpha**0.5
    inputs = torch.cat([roots[0] * x_u, roots[1] * x_s])
    outputs = torch.cat([roots[0] * x_u @ (w_0 + u).mT, roots[1] * x_s @ (w_0 + s).mT])
    wanted = torch.linalg.lstsq(inputs, outputs).solution.mT - w_0
    close(regmean(u, s, (x_u.mT @ x_u, x_s.mT @ x_s), alpha), wanted, 1e-9)


def test_regmean_limits_and_symmetry():
    u, s = randn(3, 5, seed=1), randn(3, 5, seed=2)
    g_u, g_s = (shrunk_gram(x.mT @ x, 0.9, 1e-6) for x in (randn(4, 5, seed=3), randn(4, 5, seed=4)))
    close(regmean(u, s, (g_u, g_s), 0.0), u, 1e-9)
    close(regmean(u, s, (g_u, g_s), 1.0), s, 1e-9)
    close(regmean(u, s, (g_u, g_u), 0.3), 0.7 * u + 0.3 * s, 1e-9)
    close(regmean(u, s, (g_u, g_s), 0.3), regmean(s, u, (g_s, g_u), 0.7), 1e-9)
    left = randn(7, 3, seed=5)
    close(left @ regmean(u, s, (g_u, g_s), 0.3), regmean(left @ u, left @ s, (g_u, g_s), 0.3), 1e-9)


def test_shrunk_gram_worked_example():
    gram = torch.tensor([[4.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 0.0]]).double()
    wanted = torch.tensor([[4.2, 1.0, 0.0], [1.0, 2.2, 0.0], [0.0, 0.0, 0.2]], dtype=torch.float64)
    close(shrunk_gram(gram, 0.5, 0.1), wanted)  # mean of the diagonal: 2
    close(shrunk_gram(gram, 1.0, 0.0), gram)
    torch.linalg.cholesky(shrunk_gram(gram, 1.0, 1e-6))  # an input that is always zero
