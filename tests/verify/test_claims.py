"""Every claim holds on planted pencils, and fails on what is sabotaged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import scipy.linalg
import torch

from sst_merge.verify import certificates, extremal, filters, planted
from sst_merge.verify.checks import Check, failures, summarise
from sst_merge.verify.counterexample import counterexample
from sst_merge.verify.solved import Solved

CLAIMS = {
    "pairs": lambda s, rng: certificates.pairs(s),
    "inertia": lambda s, rng: certificates.inertia(s),
    "solvers": lambda s, rng: certificates.agreement(s)[0],
    "T1": lambda s, rng: extremal.most_gain(s, rng, 16),
    "T2, T3": lambda s, rng: extremal.subspaces(s, rng, 16),
    "T4": lambda s, rng: filters.projection(s, rng, 16),
    "T5": lambda s, rng: filters.knapsack(s.name, s.values, s.coefficients, rng, 16),
    "T6": lambda s, rng: filters.ridge(s, rng, 16),
}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def exact(condition: float = 1e3) -> Solved:
    """λ = 1, ½, …, 1/40, solved."""
    rng = generator()
    values = 1 / torch.arange(1.0, 41, dtype=torch.float64)
    return planted.planted("power law", values, condition, rng).solved(rng)


def statements(checks: list[Check], passed: bool) -> str:
    return " | ".join(f"{c.claim} {c.statement}" for c in checks if c.passed is passed)


def scaled(s: Solved, i: int, factor: float) -> Solved:
    """One λ wrong."""
    values = s.values.clone()
    values[i] *= factor
    return replace(s, values=values)


def rotated(s: Solved, i: int, j: int, angle: float) -> Solved:
    """Two vectors turned in their plane: still B-orthonormal."""
    vectors, t = s.vectors.clone(), torch.tensor(angle)
    vectors[:, i] = t.cos() * s.vectors[:, i] + t.sin() * s.vectors[:, j]
    vectors[:, j] = t.cos() * s.vectors[:, j] - t.sin() * s.vectors[:, i]
    return replace(s, vectors=vectors)


def without(s: Solved, i: int) -> Solved:
    """One pair not found."""
    keep = [j for j in range(s.m) if j != i]
    return replace(s, values=s.values[keep], vectors=s.vectors[:, keep])


def stretched(s: Solved, i: int, factor: float) -> Solved:
    """One vector longer than 1 in the metric B."""
    scale = torch.ones(s.m, dtype=torch.float64)
    scale[i] = factor
    return replace(s, vectors=s.vectors * scale)


@pytest.fixture(scope="module")
def pencils() -> list[planted.Planted]:
    return list(planted.pencils(generator()))


@pytest.mark.parametrize("claim", CLAIMS)
def test_claims_hold_on_planted_pencils(claim, pencils):
    rng = generator()
    for one in pencils:
        checks = CLAIMS[claim](one.solved(rng).normalised(), rng)
        assert checks and not failures(checks)


def test_planted_spectra_are_those_of_lapack(pencils):
    for one in pencils:
        expected = torch.from_numpy(scipy.linalg.eigh(one.a.numpy(), one.b.numpy(), eigvals_only=True)).flip(0)
        error = float(expected[0]) * float(torch.linalg.cond(one.b)) * 1e-14
        torch.testing.assert_close(one.values, expected, rtol=0, atol=error)


def test_the_bound_is_that_of_the_users_guide():
    s = exact(1e4)
    norm_a, norm_b = torch.linalg.matrix_norm(s.a, 2), torch.linalg.matrix_norm(s.b, 2)
    inverse = torch.linalg.matrix_norm(torch.linalg.inv(s.b), 2)
    expected = 40 * 2.0**-52 * (norm_a * inverse / s.values[0] + norm_b * inverse)
    assert s.delta == pytest.approx(float(expected), rel=1e-6)


SABOTAGE = {
    "λ₁ too small": (lambda s: scaled(s, 0, 0.999), "T1", "Ray(v) ≤ λ₁"),
    "λ₁ too large": (lambda s: scaled(s, 0, 1.001), "T1", "Ray(v₁) = λ₁"),
    "λ₁ too small, no factor": (lambda s: scaled(s, 0, 0.999), "T1", "LLᵀ"),
    "λ₂ too small": (lambda s: scaled(s, 1, 0.999), "T2, T3", "min_{v∈S}"),
    "sum too small": (lambda s: scaled(s, 1, 0.999), "T2, T3", "tr WᵀAW ≤"),
    "first and last turned": (lambda s: rotated(s, 0, 39, 1e-3), "T2, T3", "tr V_kᵀAV_k ="),
    "the first missing": (lambda s: without(s, 0), "T1", "Ray(v) ≤ λ₁"),
    "the second missing": (lambda s: without(s, 1), "inertia", "just below"),
    "the third missing": (lambda s: without(s, 2), "solvers", "λ by scipy"),
    "λ wrong": (lambda s: scaled(s, 3, 1 + 1e-6), "pairs", "Av = λBv"),
    "vectors turned": (lambda s: rotated(s, 3, 4, 1e-6), "pairs", "Av = λBv"),
    "too long": (lambda s: stretched(s, 7, 1 + 1e-6), "pairs", "VᵀBV = I"),
    "not falling": (lambda s: replace(s, values=s.values.flip(0)), "pairs", "λ_i ≥ λ_{i+1}"),
    "λ₁ too large, counted": (lambda s: scaled(s, 0, 1.01), "inertia", "just below"),
    "span turned": (lambda s: rotated(s, 0, 1, 1e-3), "solvers", "span V_k by dense"),
    "first and last turned, projected": (lambda s: rotated(s, 1, 39, 0.3), "T4", "Ray(P_kφ) ≥ λ_k"),
    "projector of long vectors": (lambda s: stretched(s, 0, 1 + 1e-6), "T4", "P_k² = P_k"),
    "minimiser of wrong vectors": (lambda s: rotated(s, 0, 39, 1e-3), "T6", "(A+μB)φ = Aτ"),
    "freedom of wrong λ": (lambda s: scaled(s, 0, 1.01), "T6", "N_μ"),
}


@pytest.mark.parametrize("fault", SABOTAGE)
def test_sabotage_breaks_the_claim(fault):
    spoil, claim, statement = SABOTAGE[fault]
    s = exact()
    assert not failures(CLAIMS[claim](s, generator()))
    assert statement in statements(CLAIMS[claim](spoil(s), generator()), False)


def test_a_pencil_that_is_none_is_found():
    s = exact()
    assert not failures(certificates.assumptions(s))
    assert "A ⪰ 0" in statements(certificates.assumptions(replace(s, a=-s.a)), False)


def test_the_euclidean_projector_is_not_that_of_the_theorem():
    def euclidean(vectors: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        q = torch.linalg.qr(vectors).Q
        return q @ q.mT

    broken = statements(filters.projection(exact(), generator(), 16, euclidean), False)
    assert "BP_k = P_kᵀB" in broken and "λ_k ≥ Ray((I−P_k)φ)" in broken


def test_a_projector_on_other_directions_lowers_gain_per_cost():
    s = exact()

    def last(vectors: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return filters.b_projector(s.vectors[:, -vectors.shape[1] :], b)

    broken = statements(filters.projection(s, generator(), 16, last), False)
    assert "Ray(P_kφ) ≥ Ray(φ)" in broken and "Ray(P_kφ) ≥ λ_k" in broken


RULES = {
    "a share of each": (lambda v, c, rho: c * (rho / c.square().sum()).sqrt(), "greedy's"),
    "the last first": (lambda v, c, rho: filters.greedy(-v, c, rho), "greedy's"),
    "over the budget": (lambda v, c, rho: filters.greedy(v, c, 1.01 * rho), "Σ f²c² ≤ ρ for greedy f"),
    "f above 1": (lambda v, c, rho: (torch.arange(len(c)) == 0) * rho**0.5, "0 ≤ f ≤ 1"),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_filter_that_is_not_greedy_is_found(rule):
    s, (filtered, statement) = exact(), RULES[rule]
    checks = filters.knapsack(s.name, s.values, s.coefficients, generator(), 16, filtered)
    assert statement in statements(checks, False)


def test_the_dual_bound_by_hand():
    # λ = 3, 2, 1 and c² = 1, 2, 4: with ρ = 2 the first whole and half of the second, 3 + 2.
    values, costs = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 4.0])
    assert filters._dual(values, costs, 2.0) == 5.0
    assert filters._dual(values, costs, 100.0) == 11.0  # all there is
    kept = filters.greedy(values.double(), costs.double().sqrt(), 2.0).square()
    torch.testing.assert_close(kept, torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))


def test_a_minimiser_with_the_wrong_factor_is_found():
    s = exact()
    wrong = filters.ridge(s, generator(), 16, lambda v, c, mu: c * v / (v + 1.1 * mu))
    assert "(A+μB)φ = Aτ" in statements(wrong, False) and "is least" in statements(wrong, False)


def test_what_a_run_keeps():
    s = exact()
    c = s.coefficients
    f = torch.linspace(1, 0, s.m, dtype=torch.float64)
    assert not failures(filters.of_run(s, c, f * c))
    assert "f falls with λ" in statements(filters.of_run(s, c, f.flip(0) * c), False)
    assert "Ray(Filter(τ)) ≥ Ray(τ)" in statements(filters.of_run(s, c, (f < 0.1) * c), False)
    assert "0 ≤ f ≤ 1" in statements(filters.of_run(s, c, 2 * f * c), False)
    assert len(filters.of_run(s, c, 0 * c)) == 2  # nothing kept has no quotient


def test_scaling_into_range_loses_nothing():
    s = exact()
    far = replace(s, a=s.a * 2.0**400, b=s.b * 2.0**-300, values=s.values * 2.0**700, vectors=s.vectors * 2.0**150)
    near = far.normalised()
    assert near.a.abs().max() < 4 and near.b.abs().max() < 4
    torch.testing.assert_close(near.a @ near.vectors, near.b @ near.vectors * near.values, rtol=0, atol=1e-12)
    assert not failures(CLAIMS["pairs"](near, generator()))


def test_the_counterexample():
    numbers, checks = counterexample()
    assert not failures(checks)
    assert numbers["A alone"]["ray"] == pytest.approx(0.5) and numbers["the pencil"]["ray"] == pytest.approx(10)
    assert numbers["A alone"]["direction"] == [1, 0] and numbers["the pencil"]["direction"] == [0, 1]


def test_a_summary_shows_the_worst_and_says_what_is_not_decided():
    near, far = (Check("T1", where, "x ≤ y", margin, 1e-9, "") for where, margin in (("near", -5e-10), ("far", 1.0)))
    vague = Check("T1", "vague", "x ≤ y", -0.4, 0.5, "")
    (row,) = summarise([far, near, vague])
    assert (row["where"], row["checked"], row["undecided"], row["passed"]) == ("near", 3, 1, True)
    assert summarise([vague])[0]["passed"] is None
    for margin in (-2e-9, float("nan"), float("-inf")):
        (row,) = summarise([near, far, Check("T1", "broken", "x ≤ y", margin, 1e-9, "")])
        assert (row["where"], row["failed"], row["passed"]) == ("broken", 1, False)
    assert summarise([Check("T1", "", "x ≤ y", -0.6, 0.5, "")])[0]["passed"] is False  # vague, yet broken
