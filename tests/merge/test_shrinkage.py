"""Targets of shrinkage against an SVD of the rearranged matrix; the intensity by formula against the best there is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sst_kernels import EKFAC, Dense, Diagonal, Gram, Kronecker
from sst_merge.settings import FisherForm, SstParameters
from sst_merge.shrinkage import intensity, nearest_kronecker, shrunk, targets
from sst_merge.sums import FisherSums

SHAPE = 3, 4


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthonormal(n: int) -> torch.Tensor:
    return torch.linalg.qr(draw(n, n, seed=n)).Q


def example(kind: str):
    """An operator F ⪰ 0 of order 12."""
    if kind == "Gram":
        return Gram(draw(5, 12))
    if kind == "Dense":
        rows = draw(40, 12)
        return Dense((rows.mT @ rows / 40).tril())
    if kind == "Diagonal":
        return Diagonal(draw(12).square())
    return EKFAC(orthonormal(3), orthonormal(4), draw(3, 4).square())


@pytest.mark.parametrize("kind", ["Gram", "Dense", "Diagonal", "EKFAC"])
def test_the_nearest_kronecker_product_is_the_leading_singular_pair(kind):
    operator = example(kind)
    full = operator.to_dense().numpy()
    rearranged = full.reshape(*SHAPE, *SHAPE).transpose(0, 2, 1, 3).reshape(9, 16)
    left, sigma, right = np.linalg.svd(rearranged)
    p, q = left[:, 0].reshape(3, 3), right[0].reshape(4, 4)
    sign = np.sign(np.trace(p))
    found = nearest_kronecker(operator, SHAPE)
    np.testing.assert_allclose(found.to_dense(), sigma[0] * np.kron(sign * p, sign * q), rtol=1e-8, atol=1e-10)
    if isinstance(found, Kronecker):
        for factor in (found.left, found.right):
            assert np.linalg.eigvalsh(factor.to_dense().numpy()).min() > -1e-12
    distance = np.linalg.norm(full) ** 2 - np.linalg.norm(found.to_dense()) ** 2
    np.testing.assert_allclose(np.linalg.norm(full - found.to_dense().numpy()) ** 2, distance, rtol=1e-9)
    assert type(found) is (type(operator) if kind in ("Diagonal", "EKFAC") else Kronecker)


def test_a_kronecker_product_is_its_own_nearest():
    rows = draw(9, 3), draw(9, 4)
    planted = Kronecker(*(x.mT @ x for x in rows)).to_dense()
    torch.testing.assert_close(nearest_kronecker(Dense(planted), SHAPE).to_dense(), planted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("target", ["diagonal", "kronecker"])
@pytest.mark.parametrize("kind", ["Gram", "Dense", "Diagonal", "EKFAC"])
@pytest.mark.parametrize("s", [0.0, 0.3, 1.0])
def test_shrunk_is_the_mean_of_both(kind, target, s):
    operator = example(kind)
    (aim,) = targets([operator], [SHAPE], target)
    expected = (1 - s) * operator.to_dense() + s * aim.to_dense()
    torch.testing.assert_close(shrunk(operator, aim, s).to_dense(), expected, rtol=1e-10, atol=1e-12)


def truth(kind: str) -> torch.Tensor:
    """A Fisher of order 12: nearly a Kronecker product, or rotated at random."""
    spectrum = torch.logspace(0, -1.5, 12, dtype=torch.float64)
    if kind == "general":
        return orthonormal(12) @ spectrum.diag() @ orthonormal(12).mT
    p, q = (orthonormal(n) @ spectrum[:: 12 // n].diag() @ orthonormal(n).mT for n in SHAPE)
    return torch.kron(p, q) + 0.1 * truth("general")


def sample(root: torch.Tensor, count: int, seed: int, representation: str, capacity: int | None) -> FisherSums:
    sums = FisherSums(representation, capacity)
    sums.add("a", draw(count, 12, seed=seed) @ root, 1.0)
    sums.add_count(1.0, torch.ones(count))
    return sums


@pytest.mark.parametrize("target", ["diagonal", "kronecker"])
@pytest.mark.parametrize("kind", ["general", "nearly Kronecker"])
@pytest.mark.parametrize("count", [10, 60, 400])
def test_the_formula_is_near_the_best_intensity(count, kind, target):
    """Mean loss E‖(1−s)F + sT − 𝔽‖² over 200 draws: at the formula's s, and at the best fixed s, which sees 𝔽."""
    population = truth(kind)
    root = torch.linalg.cholesky(population).mT
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    losses, chosen, found = torch.zeros(101, dtype=torch.float64), 0.0, []
    for seed in range(200):
        sums = sample(root, count, seed, "exact", count)
        operator = sums.operator("a", "exact")
        (aim,) = targets([operator], [SHAPE], target)
        s = intensity(sums, FisherForm("exact", "ledoit_wolf", target), {"a": aim})
        full, goal = operator.to_dense(), aim.to_dense()
        mixtures = (1 - grid)[:, None, None] * full + grid[:, None, None] * goal
        losses += (mixtures - population).square().sum((1, 2)) / 200
        chosen += float(((1 - s) * full + s * goal - population).square().sum()) / 200
        found.append(s)
    best = float(grid[losses.argmin()])
    assert chosen < (1.15 if count == 10 else 1.05) * float(losses.min())
    assert abs(np.mean(found) - best) < 0.12


@pytest.mark.parametrize("target", ["diagonal", "kronecker"])
def test_rows_and_matrices_give_one_intensity(target):
    """In float64: the variances by their definition, Σ_s ‖g gᵀ − F‖²/(N(N−1)), off the diagonal for that target."""
    rows = draw(9, 12)
    intensities = []
    for capacity in (9, None):
        sums = FisherSums("exact", capacity)
        sums.add("a", rows, 1.0)
        sums.add_count(1.0, torch.ones(9))
        assert ("a" in sums.rows) == (capacity is not None)
        operator = sums.operator("a", "exact")
        (aim,) = targets([operator], [SHAPE], target)
        intensities.append(intensity(sums, FisherForm("exact", "ledoit_wolf", target), {"a": aim}))
    fisher = rows.mT @ rows / 9
    deviations = rows[:, :, None] * rows[:, None] - fisher
    apart = 1 - torch.eye(12, dtype=torch.float64) if target == "diagonal" else 1
    spread = (apart * deviations).square().sum() / (9 * 8)
    distance = (fisher - aim.to_dense()).square().sum()
    assert intensities == pytest.approx([min(1.0, float(spread / distance))] * 2, rel=1e-9)


def test_points_of_one_sequence_count_as_one():
    """The same rows at two points of weight ½ are no more evidence than at one."""
    rows, form = (
        draw(30, 12) @ torch.linalg.cholesky(truth("general")).mT,
        FisherForm("exact", "ledoit_wolf", "diagonal"),
    )
    once, twice = FisherSums("gram", 30), FisherSums("gram", 60)
    once.add("a", rows, 1.0)
    for _ in range(2):
        twice.add("a", rows, 0.5)
    for sums in (once, twice):
        sums.add_count(1.0, torch.ones(30))
    aims = [targets([sums.operator("a", "exact")], [SHAPE], "diagonal") for sums in (once, twice)]
    both = [intensity(sums, form, {"a": aim[0]}) for sums, aim in zip((once, twice), aims, strict=True)]
    assert both[1] == pytest.approx(both[0], rel=1e-12) and 0 < both[0] < 1


def test_sides_have_intensities_and_targets_of_their_own():
    settings = SstParameters(
        fisher={"harm": "ekfac", "benign": "gram"},
        approximation="reduce",
        shrinkage={"benign": "ledoit_wolf"},
        shrinkage_target={"harm": "kronecker"},
    )
    assert settings.form("harm") == FisherForm("ekfac_reduce", 0.0, "kronecker")
    assert settings.form("benign") == FisherForm("gram", "ledoit_wolf", "diagonal")
    assert settings.collected == ("core", ("exact", "gram"))
