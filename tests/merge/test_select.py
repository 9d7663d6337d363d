"""Directions and filters against scipy, closed forms and the theorems of docs/method.md (T2, T4, T6)."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch

from sst_merge.directions import find_directions, shared_damping
from sst_merge.mixture import Statistics
from sst_merge.pencils import ALL_MODULES
from sst_merge.select import filtered_cores, kept_coefficients
from sst_merge.settings import SstParameters
from sst_merge.sums import FisherSums

SHAPES = {"a": (3, 4), "b": (2, 3), "c": (4, 3)}


def make_statistics(seed: int = 0, rows: int = 40, form: str = "exact") -> tuple[Statistics, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)

    def sums(scale: float, form: str = form) -> FisherSums:
        total = FisherSums(form, rows if form == "gram" else None)
        for name, (r, c) in SHAPES.items():
            n = r * c
            spread = torch.logspace(0, -2, n, dtype=torch.float64)
            total.add(name, scale * torch.randn(rows, n, dtype=torch.float64, generator=g) * spread, 1.0)
        total.add_count(1.0, torch.ones(rows))
        return total

    parts = [sums(s) for s in (2.0, 1.0, 2.0, 1.0)]
    patch = {n: torch.randn(r, c, dtype=torch.float64, generator=g) for n, (r, c) in SHAPES.items()}
    return Statistics(*parts, sums(3.0, "gradient")), patch


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
        np.testing.assert_allclose(d.gradient, v.T @ statistics.gradient(name).numpy(), rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose([d.gain_full, d.cost_full], [phi @ a @ phi, phi @ b @ phi], rtol=1e-9)
        np.testing.assert_allclose(d.damping_share, gamma * (v * v).sum(0), rtol=1e-9)
        held = SstParameters(fisher="exact", shrinkage=0.0)
        swapped = Statistics(
            statistics.harm_held,
            statistics.benign_held,
            *([statistics.harm] * 2),
            statistics.origin,
        )
        a_held, b_held = dense_pencil(swapped, name, held)
        b_held = (
            b_held
            - np.eye(len(b)) * shared_damping(statistics.benign_held, list(SHAPES), held.damping)
            + gamma * np.eye(len(b))
        )
        np.testing.assert_allclose(d.ray_held, (v * (a_held @ v)).sum(0) / (v * (b_held @ v)).sum(0), rtol=1e-9)


def filtered(statistics, patch, settings, alpha=1.0):
    """Directions, coefficients kept, and Filter(τ) as flat numpy vectors."""
    directions, _ = find_directions(statistics, patch, settings)
    kept = kept_coefficients(directions, settings, alpha)
    cores = filtered_cores(directions, kept, patch)
    return directions, kept, {name: core.numpy().ravel() for name, core in cores.items()}


@pytest.mark.parametrize("k", [1, 3, 5, 0.5])
def test_top_k_raises_the_quotient(k):
    """T4: Ray(P_kφ) >= Ray(φ), Ray(P_kφ) >= λ_k >= Ray((I−P_k)φ)."""
    statistics, patch = make_statistics()
    settings = SstParameters(k=k, scope="module")
    directions, kept, phis = filtered(statistics, patch, settings)
    for name, coefficients in kept.items():
        a, b = dense_pencil(statistics, name, settings)
        phi, part = patch[name].numpy().ravel(), phis[name]
        count = int((coefficients != 0).sum())
        assert count == (k if isinstance(k, int) else round(k * len(phi)))

        def ray(x, a=a, b=b):
            return (x @ a @ x) / (x @ b @ x)

        assert ray(part) >= ray(phi) - 1e-12
        assert ray(part) >= directions[name].values[count - 1] - 1e-9 >= ray(phi - part) - 2e-9


def test_global_ranking_takes_the_largest_values_of_all_modules():
    statistics, patch = make_statistics()
    directions, kept, _ = filtered(statistics, patch, SstParameters(k=10, scope="global"))
    values = np.concatenate([d.values for d in directions.values()])
    kept = np.concatenate([kept[name] for name in directions]) != 0
    assert kept.sum() == 10
    assert set(values[kept]) == set(np.sort(values)[-10:])


@pytest.mark.parametrize("scope", ["module", "global"])
@pytest.mark.parametrize("mu", [0.5, None])
def test_dof_keeps_as_many_directions_as_the_degrees_of_freedom(scope, mu):
    """N_μ = tr[A (A + μB)⁻¹], by a trace instead of eigenvalues."""
    statistics, patch = make_statistics()
    settings = SstParameters(select="dof", mu=mu, scope=scope)
    directions, kept, _ = filtered(statistics, patch, settings)
    pencils = {name: dense_pencil(statistics, name, settings) for name in SHAPES}
    spectra = {name: scipy.linalg.eigh(*p, eigvals_only=True) for name, p in pencils.items()}
    used = mu or np.sort(np.concatenate(list(spectra.values())))[14]  # torch's median of 30 is the lower one
    freedom = {name: np.trace(a @ np.linalg.inv(a + used * b)) for name, (a, b) in pencils.items()}
    counts = {name: int((coefficients != 0).sum()) for name, coefficients in kept.items()}
    if scope == "module":
        assert counts == {name: int(np.ceil(f)) for name, f in freedom.items()}
    else:
        assert sum(counts.values()) == int(np.ceil(sum(freedom.values())))
        largest = set(np.sort(np.concatenate(list(spectra.values())))[-sum(counts.values()) :].round(9))
        assert largest == {round(float(v), 9) for name, d in directions.items() for v in d.values[: counts[name]]}


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("share", [1e-3, 0.3, 2.0])
def test_budget_is_the_best_that_costs_as_much(alpha, share):
    """T5: no feasible f has more gain; scipy's linear program in f² is the judge."""
    statistics, patch = make_statistics()
    phi = {name: p.numpy().ravel() for name, p in patch.items()}
    pencils = {name: dense_pencil(statistics, name, SstParameters()) for name in SHAPES}
    whole = sum(phi[n] @ b @ phi[n] for n, (_, b) in pencils.items())
    rho = 0.5 * share * alpha**2 * whole
    directions, _, phis = filtered(statistics, patch, SstParameters(select="budget", rho=rho), alpha)
    gain = sum(phis[n] @ a @ phis[n] for n, (a, _) in pencils.items())
    cost = 0.5 * alpha**2 * sum(phis[n] @ b @ phis[n] for n, (_, b) in pencils.items())
    assert cost == pytest.approx(min(rho, 0.5 * alpha**2 * whole), rel=1e-9)
    value = np.concatenate([d.values for d in directions.values()])
    squares = np.concatenate([d.coefficients**2 for d in directions.values()])
    best = scipy.optimize.linprog(-value * squares, squares[None], [2 * rho / alpha**2], bounds=(0, 1))
    assert gain == pytest.approx(-best.fun, rel=1e-7)


@pytest.mark.parametrize("share", [1e-4, 0.1, 1e6])
def test_signed_is_the_best_step_within_the_budget(share):
    """argmax ḡᵀφ − ½φᵀAφ with φᵀBφ ≤ 2ρ: the optimality conditions of the dense problem over all modules."""
    statistics, patch = make_statistics()
    pencils = {name: dense_pencil(statistics, name, SstParameters()) for name in SHAPES}
    a, b = (scipy.linalg.block_diag(*(p[i] for p in pencils.values())) for i in (0, 1))
    g = np.concatenate([statistics.gradient(name).numpy() for name in SHAPES])
    free = np.linalg.solve(a, g)  # A is regular: 40 rows
    rho = 0.5 * share * (free @ b @ free)
    _, _, phis = filtered(statistics, patch, SstParameters(select="signed", rho=rho))
    phi = np.concatenate([phis[name] for name in SHAPES])
    if share > 1:
        np.testing.assert_allclose(phi, free, rtol=1e-6, atol=1e-9 * np.abs(free).max())
        return
    assert 0.5 * phi @ b @ phi == pytest.approx(rho, rel=1e-9)
    residual = g - a @ phi  # = μ B φ with μ > 0
    mu = (residual @ phi) / (phi @ b @ phi)
    assert mu > 0
    np.testing.assert_allclose(residual, mu * (b @ phi), atol=1e-8 * np.abs(g).max())


@pytest.mark.parametrize("mu", [0.5, None])
def test_soft_filter_is_the_closed_form(mu):
    """T6: Σ λ/(λ+μ) c v = (A + μB)⁻¹ A τ."""
    statistics, patch = make_statistics()
    settings = SstParameters(select="soft", mu=mu)
    directions, _, phis = filtered(statistics, patch, settings)
    used = mu or float(torch.cat([d.values for d in directions.values()]).median())
    for name in SHAPES:
        a, b = dense_pencil(statistics, name, settings)
        expected = np.linalg.solve(a + used * b, a @ patch[name].numpy().ravel())
        np.testing.assert_allclose(phis[name], expected, rtol=1e-8, atol=1e-10)


def test_keeping_everything_returns_the_patch():
    statistics, patch = make_statistics()
    _, _, phis = filtered(statistics, patch, SstParameters(k=1.0))
    for name, phi in phis.items():
        np.testing.assert_allclose(phi, patch[name].numpy().ravel(), rtol=1e-5)


@pytest.mark.parametrize("rows", [9, 40])  # fewer and more than the 30 coordinates
@pytest.mark.parametrize("shrinkage", [0.0, 0.4])
def test_gram_is_the_dense_pencil_over_all_modules(rows, shrinkage):
    """Curvature across modules: the 30 × 30 Fishers of the rows side by side, blocks off the diagonal included."""
    statistics, patch = make_statistics(rows=rows, form="gram")
    settings = SstParameters(fisher="gram", shrinkage={"benign": shrinkage}, damping=0.2, select="soft", mu=0.7)
    directions, _, phis = filtered(statistics, patch, settings)
    d = directions[ALL_MODULES]

    def joint(sums):
        rows = np.concatenate([sums.rows[name].numpy() for name in SHAPES], 1)
        return rows.T @ rows / sums.count

    benign = joint(statistics.benign)
    gamma = 0.2 * np.trace(benign) / 30
    a, b = joint(statistics.harm), (1 - shrinkage) * benign + shrinkage * np.diag(np.diag(benign)) + gamma * np.eye(30)
    values = scipy.linalg.eigh(a, b, eigvals_only=True)[::-1]
    assert len(d.values) == min(rows, 30)
    np.testing.assert_allclose(d.values, values[: len(d.values)], rtol=1e-8)
    phi = np.concatenate([patch[name].numpy().ravel() for name in SHAPES])
    expected = np.linalg.solve(a + 0.7 * b, a @ phi)
    np.testing.assert_allclose(np.concatenate([phis[name] for name in SHAPES]), expected, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose([d.gain_full, d.cost_full], [phi @ a @ phi, phi @ b @ phi], rtol=1e-8)
    v = d.vectors.numpy()
    held = joint(statistics.harm_held), joint(statistics.benign_held) + gamma * np.eye(30)
    ratio = [(v * (m @ v)).sum(0) for m in held]
    np.testing.assert_allclose(d.ray_held, ratio[0] / ratio[1], rtol=1e-8)


@pytest.mark.parametrize(("scope", "where"), [("module", "module 'b' has n = 6"), ("global", "the model has n = 30")])
def test_k_larger_than_n_is_refused(scope, where):
    statistics, patch = make_statistics()
    directions, _ = find_directions(statistics, patch, SstParameters())
    directions = {"b": directions["b"]} if scope == "module" else directions
    with pytest.raises(ValueError, match=f"{where} directions, got k = 31"):
        kept_coefficients(directions, SstParameters(k=31, scope=scope), 1.0)


def test_unsolvable_pencil_names_module_and_remedy():
    statistics, patch = make_statistics()
    statistics.harm.second["b"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="pencil of module 'b'.*damping"):
        find_directions(statistics, patch, SstParameters())


def test_signed_spends_nothing_on_rounding_noise():
    """Fewer rows than coordinates and ḡ among them: a large budget buys the free maximum A⁺ḡ and no null directions."""
    statistics, patch = make_statistics(rows=5)
    for name in SHAPES:
        statistics.origin.first[name] = statistics.harm.first[name].clone()  # the mean of the five rows themselves
    statistics.origin.count = statistics.harm.count
    _, _, phis = filtered(statistics, patch, SstParameters(select="signed", rho=1e6))
    for name in SHAPES:
        a, b = dense_pencil(statistics, name, SstParameters())
        values, vectors = scipy.linalg.eigh(a, b)
        kept = values > 1e-9 * values.max()
        free = vectors[:, kept] @ ((vectors[:, kept].T @ statistics.gradient(name).numpy()) / values[kept])
        np.testing.assert_allclose(phis[name], free, rtol=1e-5, atol=1e-7 * np.abs(free).max())
