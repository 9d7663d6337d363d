"""Directions and filters against scipy, closed forms and the theorems of the method (T2, T4, T6)."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from sst_merge.fisher import FisherSums, Statistics
from sst_merge.select import (
    apply_filter,
    filter_factors,
    find_directions,
    shared_damping,
)
from sst_merge.settings import SstParameters

SHAPES = {"a": (3, 4), "b": (2, 3), "c": (4, 3)}


def make_statistics(seed: int = 0, rows: int = 40) -> tuple[Statistics, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)

    def sums(scale: float) -> FisherSums:
        total = FisherSums(diagonal=False)
        for name, (r, c) in SHAPES.items():
            n = r * c
            spread = torch.logspace(0, -2, n, dtype=torch.float64)
            total.add(name, scale * torch.randn(rows, n, dtype=torch.float64, generator=g) * spread, 1.0)
        total.count = rows
        return total

    parts = [sums(s) for s in (2.0, 1.0, 2.0, 1.0)]
    gradient = {n: torch.randn(r * c, dtype=torch.float64, generator=g) for n, (r, c) in SHAPES.items()}
    patch = {n: torch.randn(r, c, dtype=torch.float64, generator=g) for n, (r, c) in SHAPES.items()}
    return Statistics(*parts, gradient), patch


def dense_pencil(statistics: Statistics, name: str, s: SstParameters) -> tuple[np.ndarray, np.ndarray]:
    """A and B straight from the definition."""

    def symmetric(sums):
        lower = sums.second[name].numpy() / sums.count
        full = np.tril(lower) + np.tril(lower, -1).T
        diagonal = np.diag(np.diag(full))
        return diagonal if s.fisher == "diagonal" else (1 - s.shrinkage) * full + s.shrinkage * diagonal

    traces = sum(np.trace(statistics.benign.second[n].numpy()) for n in SHAPES) / statistics.benign.count
    gamma = s.damping * traces / sum(r * c for r, c in SHAPES.values())
    n = SHAPES[name][0] * SHAPES[name][1]
    return symmetric(statistics.harm), symmetric(statistics.benign) + gamma * np.eye(n)


@pytest.mark.parametrize("representation", ["exact", "diagonal"])
@pytest.mark.parametrize("shrinkage", [0.0, 0.4])
def test_directions_solve_the_pencil(representation, shrinkage):
    statistics, patch = make_statistics()
    settings = SstParameters(fisher=representation, shrinkage=shrinkage, damping=0.2)
    directions, gamma = find_directions(statistics, patch, settings)
    assert gamma == pytest.approx(shared_damping(statistics.benign, list(SHAPES), 0.2))
    for name, d in directions.items():
        a, b = dense_pencil(statistics, name, settings)
        np.testing.assert_allclose(d.values, scipy.linalg.eigh(a, b, eigvals_only=True)[::-1], rtol=1e-9, atol=1e-12)
        v, phi = d.vectors.numpy(), patch[name].numpy().ravel()
        np.testing.assert_allclose(v.T @ b @ v, np.eye(len(b)), atol=1e-9)
        np.testing.assert_allclose(v @ d.coefficients.numpy(), phi, atol=1e-9)
        np.testing.assert_allclose((d.coefficients**2).sum(), phi @ b @ phi, rtol=1e-9)  # cost
        np.testing.assert_allclose((d.values * d.coefficients**2).sum(), phi @ a @ phi, rtol=1e-9)  # gain
        np.testing.assert_allclose(d.slope.sum(), statistics.gradient[name].numpy() @ phi, rtol=1e-9)
        np.testing.assert_allclose(d.damping_share, gamma * (v * v).sum(0), rtol=1e-9)
        held = SstParameters(fisher="exact", shrinkage=0.0)
        swapped = Statistics(
            statistics.harm_held,
            statistics.benign_held,
            *([statistics.harm] * 2),
            statistics.gradient,
        )
        a_held, b_held = dense_pencil(swapped, name, held)
        b_held = (
            b_held
            - np.eye(len(b)) * shared_damping(statistics.benign_held, list(SHAPES), held.damping)
            + gamma * np.eye(len(b))
        )
        np.testing.assert_allclose(d.ray_held, (v * (a_held @ v)).sum(0) / (v * (b_held @ v)).sum(0), rtol=1e-9)


@pytest.mark.parametrize("k", [1, 3, 5, 0.5])
def test_top_k_raises_the_quotient(k):
    """T4: Ray(P_kφ) >= Ray(φ), Ray(P_kφ) >= λ_k >= Ray((I−P_k)φ)."""
    statistics, patch = make_statistics()
    settings = SstParameters(k=k, scope="module")
    directions, _ = find_directions(statistics, patch, settings)
    for name, factors in filter_factors(directions, settings).items():
        a, b = dense_pencil(statistics, name, settings)
        phi = patch[name].numpy().ravel()
        kept = apply_filter(directions[name], factors, SHAPES[name]).numpy().ravel()
        count = int(factors.sum())
        assert count == (k if isinstance(k, int) else round(k * len(phi)))

        def ray(x, a=a, b=b):
            return (x @ a @ x) / (x @ b @ x)

        assert ray(kept) >= ray(phi) - 1e-12
        assert ray(kept) >= directions[name].values[count - 1] - 1e-9 >= ray(phi - kept) - 2e-9


def test_global_ranking_takes_the_largest_values_of_all_modules():
    statistics, patch = make_statistics()
    settings = SstParameters(k=10, scope="global")
    directions, _ = find_directions(statistics, patch, settings)
    factors = filter_factors(directions, settings)
    values = np.concatenate([d.values for d in directions.values()])
    kept = np.concatenate([factors[name] for name in directions]).astype(bool)
    assert kept.sum() == 10
    assert set(values[kept]) == set(np.sort(values)[-10:])


@pytest.mark.parametrize("mu", [0.5, None])
def test_soft_filter_is_the_closed_form(mu):
    """T6: Σ λ/(λ+μ) c v = (A + μB)⁻¹ A τ."""
    statistics, patch = make_statistics()
    settings = SstParameters(select="soft", mu=mu)
    directions, _ = find_directions(statistics, patch, settings)
    factors = filter_factors(directions, settings)
    used = mu or float(torch.cat([d.values for d in directions.values()]).median())
    for name in SHAPES:
        a, b = dense_pencil(statistics, name, settings)
        expected = np.linalg.solve(a + used * b, a @ patch[name].numpy().ravel())
        actual = apply_filter(directions[name], factors[name], SHAPES[name])
        np.testing.assert_allclose(actual.numpy().ravel(), expected, rtol=1e-8, atol=1e-10)


def test_keeping_everything_returns_the_patch():
    statistics, patch = make_statistics()
    settings = SstParameters(k=1.0)
    directions, _ = find_directions(statistics, patch, settings)
    for name, factors in filter_factors(directions, settings).items():
        torch.testing.assert_close(apply_filter(directions[name], factors, SHAPES[name]), patch[name])


@pytest.mark.parametrize(("scope", "where"), [("module", "module 'b' has n = 6"), ("global", "the model has n = 30")])
def test_k_larger_than_n_is_refused(scope, where):
    statistics, patch = make_statistics()
    directions, _ = find_directions(statistics, patch, SstParameters())
    directions = {"b": directions["b"]} if scope == "module" else directions
    with pytest.raises(ValueError, match=f"{where} directions, got k = 31"):
        filter_factors(directions, SstParameters(k=31, scope=scope))


def test_unsolvable_pencil_names_module_and_remedy():
    statistics, patch = make_statistics()
    statistics.harm.second["b"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="pencil of module 'b'.*damping"):
        find_directions(statistics, patch, SstParameters())
