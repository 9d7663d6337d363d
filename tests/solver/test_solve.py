"""`solve` against scipy, closed forms and planted faults."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from pencils import eigenvalues_in_50_digits, errors, one_norm

from sst_kernels.eigh_topk import eigh_topk
from sst_kernels.operators import Dense, Diagonal, Kronecker
from sst_kernels.pencil import Pencil
from sst_kernels.result import Status
from sst_kernels.solve import solve

DTYPES = [np.float32, np.float64, np.complex64, np.complex128]
GOOD = Status.CONVERGED | Status.VERIFIED


def check_beside_scipy(a: np.ndarray, b: np.ndarray, k: int, device: torch.device, exact: np.ndarray) -> None:
    """Each error at most ten times scipy's, or 10·n·eps where scipy's is below that."""
    n = len(a)
    w, v = (x[..., ::-1][..., :k] for x in scipy.linalg.eigh(a, b))
    pencil = Pencil(torch.from_numpy(a).to(device), torch.from_numpy(b).to(device))
    result = solve(pencil, k, method="dense")
    assert result.converged.item()
    ours = [x.numpy(force=True) for x in (result.values, result.vectors)]
    assert ours[0].dtype == w.dtype and ours[1].dtype == v.dtype
    bar = 10 * np.maximum(errors(a, b, w, v, exact), n * np.finfo(a.dtype).eps)
    assert (errors(a, b, *ours, exact) <= bar).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 33, 100])
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_dense_beside_scipy(random_pencil, device, dtype, n, share):
    a, b = random_pencil(n, dtype)
    k = max(1, round(share * n))
    double = [x.astype(np.promote_types(dtype, np.float64)) for x in (a, b)]
    check_beside_scipy(a, b, k, device, scipy.linalg.eigvalsh(*double)[::-1][:k])


@pytest.mark.parametrize("exponent", range(0, 13, 2))
def test_near_singular_b_beside_scipy(random_pencil, device, exponent):
    a, b = random_pencil(15, cond=10.0**exponent)
    check_beside_scipy(a, b, 3, device, eigenvalues_in_50_digits(a, b)[:3])


def test_many_small_pencils_match_scipy_one_by_one(random_pencil, device):
    pairs = [random_pencil(8, cond=10.0 ** (seed % 5), seed=seed) for seed in range(200)]
    a, b = (torch.from_numpy(np.stack(x)).to(device) for x in zip(*pairs, strict=True))
    result = solve(Pencil(a, b), 3)
    assert (result.status & GOOD == GOOD).all()
    expected = np.stack([scipy.linalg.eigvalsh(*pair)[::-1][:3] for pair in pairs])
    np.testing.assert_allclose(result.values.numpy(force=True), expected, rtol=1e-9)


def test_reference_point_in_two_dimensions(device):
    """The best direction of the pencil is not that of A alone: Ray 10 against 0.5."""
    a, b = torch.tensor([2.0, 1.0], device=device), torch.tensor([4.0, 0.1], device=device)
    for pencil in (Pencil(a.diag(), b.diag()), Pencil(Diagonal(a), Diagonal(b))):
        result = solve(pencil, 2)
        assert result.values.tolist() == pytest.approx([10, 0.5], rel=1e-6)
        v = result.vectors.abs()
        assert v.flatten().tolist() == pytest.approx([0, 0.5, 10**0.5, 0], rel=1e-6)


def test_mikota_pair(device):
    """λ = 1, 4, …, n² (Mikota 2001)."""
    n = 30
    j = torch.arange(1, n + 1, dtype=torch.float64, device=device)
    a = torch.diag(2 * (n - j) + 1) + torch.diag(j[:-1] - n, 1) + torch.diag(j[:-1] - n, -1)
    result = solve(Pencil(a, Diagonal(1 / j)), n)
    assert result.method == "fused"
    assert torch.allclose(result.values, j.flip(0) ** 2, rtol=1e-11)


def test_elastic_rod(device):
    """Linear elements for −u″ = λu: λ_j = (6/h²)(1 − cos jπh)/(2 + cos jπh)."""
    n = 99
    h = 1 / (n + 1)
    near = torch.diag(torch.ones(n - 1, dtype=torch.float64, device=device), -1)  # lower is read
    eye = torch.eye(n, dtype=torch.float64, device=device)
    result = solve(Pencil((2 * eye - near) / h, (4 * eye + near) * (h / 6)), 5)
    c = torch.cos(torch.arange(n, n - 5, -1, dtype=torch.float64, device=device) * torch.pi * h)
    assert torch.allclose(result.values, 6 / h**2 * (1 - c) / (2 + c), rtol=1e-12)
    assert result.status.item() == GOOD


def planted(random_pencil, values: list[float]) -> Pencil:
    """Pencil with these λ: A = Lᴴ⁻¹-congruent to Q diag(λ) Qᵀ, B = LLᵀ."""
    x, b = random_pencil(len(values))
    factor, q = np.linalg.cholesky(b), np.linalg.qr(x)[0]
    basis = factor @ q
    return Pencil(torch.from_numpy((basis * values) @ basis.T), torch.from_numpy(b))


@pytest.mark.parametrize(
    ("k", "status"),
    [(1, GOOD), (2, Status.CONVERGED | Status.CLUSTER_AT_K), (4, GOOD), (5, GOOD), (6, GOOD)],
)
def test_cluster_is_reported_only_where_it_is_cut(random_pencil, k, status):
    pencil = planted(random_pencil, [9.0, 5.0, 5.0, 5.0, 2.0, 1.0])
    result = solve(pencil, k)
    assert result.status.item() == status
    assert result.values.tolist() == pytest.approx([9.0, 5.0, 5.0, 5.0, 2.0, 1.0][:k])
    assert result.b_orthogonality < 1e-12
    assert ("CLUSTER_AT_K" in "".join(result.explain())) == (k == 2)


def test_low_rank_a(random_pencil, device):
    """Beyond the rank all λ are zero: exact pairs, but the choice among them is arbitrary."""
    rows = np.random.default_rng(0).standard_normal((4, 20))
    a, b = rows.T @ rows, random_pencil(20)[1]
    pencil = Pencil(*(torch.from_numpy(x).to(device) for x in (a, b)))
    at_rank, beyond = solve(pencil, 4), solve(pencil, 6)
    assert at_rank.status.item() == GOOD
    assert beyond.status.item() == Status.CONVERGED | Status.CLUSTER_AT_K
    assert torch.allclose(beyond.values[:4], at_rank.values)
    assert beyond.values[4:].abs().max() < 1e-12 * at_rank.values[0]


@pytest.mark.parametrize(("up", "down"), [(1e150, 1e-150), (1e-150, 1e150), (1e150, 1e150)])
@pytest.mark.parametrize("kind", [Dense, Diagonal, Kronecker])
def test_extreme_scales(random_pencil, up, down, kind):
    a, b = (torch.from_numpy(x) for x in random_pencil(6))
    if kind is Dense:
        plain, scaled = Pencil(a, b), Pencil(a * up, b * down)
    elif kind is Diagonal:
        d, e = a.diagonal(), b.diagonal()
        plain, scaled = (
            Pencil(Diagonal(d), Diagonal(e)),
            Pencil(Diagonal(d * up), Diagonal(e * down)),
        )
    else:
        plain = Pencil(Kronecker(a, b), Kronecker(b, b))
        scaled = Pencil(Kronecker(a * up, b), Kronecker(b, b * down))
    expected, result = solve(plain, 2), solve(scaled, 2)
    assert torch.allclose(result.values, expected.values * (up / down), rtol=1e-10, atol=0)
    assert result.status.item() == expected.status.item()
    assert result.backward_errors.max() < 1e-14 and result.b_orthogonality < 1e-12


def broken_batch(random_pencil, dtype: type) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Pencils good, indefinite, good, singular, NaN in A, infinite in B, good; their faults."""
    pairs = [random_pencil(9, dtype, seed=seed) for seed in range(7)]
    a, b = (np.stack(x) for x in zip(*pairs, strict=True))
    b[1] -= 0.5 * np.eye(9, dtype=dtype)
    b[3] = np.ones((9, 9))
    a[4, 5, 2] = np.nan
    b[5, 8, 8] = np.inf
    indefinite, infinite = int(Status.NOT_POSITIVE_DEFINITE), int(Status.NON_FINITE)
    return a, b, [0, indefinite, 0, indefinite, infinite, infinite, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bad_pencils_do_not_harm_their_batch(random_pencil, device, dtype):
    a, b, faults = broken_batch(random_pencil, dtype)
    result = solve(Pencil(torch.from_numpy(a).to(device), torch.from_numpy(b).to(device)), 2)
    for i, fault in enumerate(faults):
        parts = (result.values, result.vectors, result.backward_errors, result.b_orthogonality)
        if fault:
            assert result.status[i].item() == fault
            assert all(torch.isnan(x[i]).all() for x in parts)
        else:
            expected = scipy.linalg.eigvalsh(a[i], b[i])[::-1][:2]
            tolerance = 1000 * np.finfo(dtype).eps
            np.testing.assert_allclose(result.values[i].cpu(), expected, rtol=tolerance)
            assert result.status[i].item() == GOOD
    lines = result.explain()
    assert [line.split(":")[0] for line in lines] == [f"pencil ({i},)" for i in (1, 3, 4, 5)]
    assert "add damping" in lines[0] and "NaN or infinity" in lines[2]


NUMBERS = {
    "zero": 0.0,
    "one": 1.0,
    "minus": -1.0,
    "huge": 1e308,
    "tiny": 5e-324,
    "nan": float("nan"),
    "-inf": float("-inf"),
}


@pytest.mark.parametrize("left", NUMBERS)
@pytest.mark.parametrize("right", NUMBERS)
def test_solve_never_raises_for_a_pencil(left, right):
    diagonals = [torch.full((3,), NUMBERS[name], dtype=torch.float64) for name in (left, right)]
    a, b = (Dense(x.diag()) for x in diagonals)
    kronecker = Pencil(Kronecker(a, a), Kronecker(b, b))
    for pencil in (Pencil(a, b), Pencil(*map(Diagonal, diagonals)), kronecker):
        result = solve(pencil, 2)
        status = result.status.item()
        failed = bool(status & (Status.NON_FINITE | Status.NOT_POSITIVE_DEFINITE))
        assert failed == bool(torch.isnan(result.values).any())
        assert failed != bool(status & (Status.CONVERGED | Status.STAGNATED))
        if right in ("zero", "minus") and left not in ("nan", "-inf") and pencil.n == 3:
            assert status == Status.NOT_POSITIVE_DEFINITE


def test_positive_definite_only_in_double_is_solved():
    """A float32 B that float32 rounding makes indefinite: λ_max from the 2×2 closed form."""
    b = next(b for b in close_to_singular() if torch.linalg.cholesky_ex(b).info > 0)
    assert torch.linalg.cholesky_ex(b.double()).info == 0
    good = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    result = solve(Pencil(torch.eye(2), torch.stack([good, b])), 1)
    det, trace = torch.linalg.det(b.double()), b.double().trace()
    smallest = det / (trace / 2 + (trace**2 / 4 - det).sqrt())
    assert result.values[1].item() == pytest.approx(1 / smallest.item(), rel=1e-6)
    assert result.values.dtype == torch.float32
    assert result.values[0].item() == pytest.approx(2 / (5 - 5**0.5), rel=1e-6)


def close_to_singular():
    """[[c, 1], [1, 1/c rounded up]]: determinant barely positive."""
    for c in torch.arange(1.0, 4.0, 0.01):
        z = torch.nextafter(1 / c, torch.tensor(torch.inf))
        yield torch.stack([torch.stack([c, torch.tensor(1.0)]), torch.stack([torch.tensor(1.0), z])])


def test_lapack_that_gives_up_costs_one_pencil_only(random_pencil, monkeypatch):
    """torch raises for the whole batch: the marked matrix fails, its neighbours do not."""
    pairs = [random_pencil(4, seed=seed) for seed in range(3)]
    a, b = (torch.from_numpy(np.stack(x)) for x in zip(*pairs, strict=True))
    a, b = a + 0j, b + 0j  # complex pencils are solved by torch.linalg.eigh at every size
    a[1], b[1] = 7 * torch.eye(4), torch.eye(4)
    genuine = torch.linalg.eigh

    def fails_on_seven(c: torch.Tensor):
        if (c[:, 0, 0] == 7).any():
            raise torch.linalg.LinAlgError("did not converge")
        return genuine(c)

    monkeypatch.setattr(torch.linalg, "eigh", fails_on_seven)
    result = solve(Pencil(a, b), 2)
    assert result.status.tolist() == [GOOD, Status.MAX_ITERATIONS, GOOD]
    assert torch.isnan(result.values[1]).all()


def test_method_of_small_pencils(random_pencil, device):
    """ "fused" or, for few pairs on the CPU, "subset"; "dense" for gradients, complex dtypes and one larger pencil."""
    fastest = "fused" if device.type == "cuda" else "subset"
    a, b = (torch.from_numpy(x).to(device) for x in random_pencil(6))
    wanting = a.clone().requires_grad_()
    assert solve(Pencil(a, b), 1).method == fastest
    assert solve(Pencil(a, b), 2).method == "fused"
    assert solve(Pencil(a + 0j, b + 0j), 2).method == solve(Pencil(wanting, b), 2).method == "dense"
    with torch.no_grad():
        assert solve(Pencil(wanting, b), 1).method == fastest
    with pytest.raises(ValueError, match=r"method 'fused' does not fit"):
        solve(Pencil(wanting, b), 2, method="fused")
    large = torch.eye(70, dtype=a.dtype, device=device).expand(2, 70, 70)
    assert solve(Pencil(large), 2).method == "fused"
    assert device.type == "cuda" or solve(Pencil(large[0]), 2).method == "dense"


@pytest.mark.parametrize("n", [5, 70])
def test_fused_and_dense_agree(random_pencil, device, n):
    pairs = [random_pencil(n, seed=seed) for seed in range(3)]
    a, b = (torch.from_numpy(np.stack(x)).to(device) for x in zip(*pairs, strict=True))
    b[1] -= torch.eye(n, dtype=b.dtype, device=device)
    by_fused, by_dense = (solve(Pencil(a, b), 3, method=method) for method in ("fused", "dense"))
    assert (by_fused.method, by_dense.method) == ("fused", "dense")
    assert torch.equal(by_fused.status, by_dense.status)
    torch.testing.assert_close(by_fused.values, by_dense.values, rtol=1e-12, atol=1e-12, equal_nan=True)
    expected = scipy.linalg.eigvalsh(a[2].cpu(), b[2].cpu())[::-1][:3]
    np.testing.assert_allclose(by_fused.values[2].cpu(), expected, rtol=1e-11)


def test_inaccurate_pairs_are_flagged_not_called_converged(random_pencil):
    """At cond(B) = 1e10 the smallest λ of a Cholesky solve have large backward errors."""
    a, b = (torch.from_numpy(x) for x in random_pencil(33, cond=1e10))
    result = solve(Pencil(a @ a, b), 33)
    assert result.status.item() == Status.STAGNATED
    assert "use float64" in result.explain()[0]
    assert solve(Pencil(a @ a, b), 33, tol=1e-3).status.item() == GOOD


@pytest.mark.parametrize("cond", [1e4, 1e6, 1e8])
def test_small_eigenvalues_are_refined_beyond_scipy(random_pencil, device, cond):
    """LAPACK leaves errors of eps·λ_max in every λ, so that its third pair often fails the test."""
    pairs = [random_pencil(8, cond=cond, seed=seed) for seed in range(100)]
    a, b = (torch.from_numpy(np.stack(x)).to(device) for x in zip(*pairs, strict=True))
    pencil = Pencil(a, b)
    result = solve(pencil, 3)
    assert result.converged.sum() >= 98
    plain = [scipy.linalg.eigh(*pair, subset_by_index=[5, 7]) for pair in pairs]
    w, v = (torch.from_numpy(np.stack(x)).to(device) for x in zip(*plain, strict=True))
    plain_errors = pencil.backward_errors(w, v).amax(-1)
    assert (plain_errors <= 10 * pencil.tolerance).sum() <= 95
    assert result.b_orthogonality.max() < 10 * pencil.b_orthogonality(v).max()


@pytest.mark.parametrize("cond", [1e4, 1e6])
def test_refinement_does_not_cost_orthogonality(random_pencil, device, cond):
    """Steep A: refining all pairs regardless would lose 75 and 400 times scipy's VᵀBV − I."""
    a, b = random_pencil(60, cond=1e6, seed=9)[1], random_pencil(60, cond=cond, seed=2)[1]
    result = solve(Pencil(*(torch.from_numpy(x).to(device) for x in (a, b))), 60)
    v, plain = result.vectors.numpy(force=True), scipy.linalg.eigh(a, b)[1]
    assert one_norm(v.T @ b @ v - np.eye(60)) < 10 * one_norm(plain.T @ b @ plain - np.eye(60))


def test_tolerance_decides_between_converged_and_stagnated(random_pencil):
    pencil = Pencil(*(torch.from_numpy(x) for x in random_pencil(20)))
    worst = solve(pencil, 20).backward_errors.max().item()
    for tol, expected in (
        (2 * worst, GOOD),
        (worst / 2, GOOD | Status.STAGNATED),
        (worst / 20, Status.STAGNATED),
    ):
        assert solve(pencil, 20, tol=tol).status.item() == expected


@pytest.mark.parametrize("k", [1, 7, 12])
def test_kronecker_equals_dense(random_pencil, device, k):
    (a1, b1), (a2, b2) = ([torch.from_numpy(x).to(device) for x in random_pencil(n)] for n in (3, 4))
    pencil = Pencil(Kronecker(a1, a2), Kronecker(b1, b2))
    result, dense = solve(pencil, k), solve(pencil, k, method="dense")
    assert (result.method, dense.method) == ("kronecker", "dense")
    expected = scipy.linalg.eigvalsh(*(np.kron(x.cpu(), y.cpu()) for x, y in ((a1, a2), (b1, b2))))
    np.testing.assert_allclose(result.values.cpu(), expected[::-1][:k], rtol=1e-12)
    assert torch.allclose(result.values, dense.values)
    assert result.status.item() == GOOD and dense.status.item() & GOOD == GOOD
    overlap = dense.vectors.mT @ (pencil.B @ result.vectors)
    eye = torch.eye(k, dtype=overlap.dtype, device=device)
    assert torch.allclose(overlap.abs(), eye, atol=1e-10)


def test_kronecker_takes_products_of_two_negative_eigenvalues():
    a = Kronecker(torch.diag(torch.tensor([-5.0, 1.0])), torch.diag(torch.tensor([2.0, -3.0])))
    assert solve(Pencil(a), 4).values.tolist() == pytest.approx([15, 2, -3, -10])


def test_kronecker_of_kronecker_and_diagonal(random_pencil):
    """Nested structure is solved by its parts: λ = α_i β_j γ_l."""
    (a1, b1), (a2, b2) = ([torch.from_numpy(x) for x in random_pencil(n)] for n in (3, 2))
    d = torch.tensor([4.0, 0.5, -1.0], dtype=torch.float64)
    pencil = Pencil(
        Kronecker(a1, Kronecker(Diagonal(d), a2)),
        Kronecker(b1, Kronecker(Diagonal(d.abs()), b2)),
    )
    result = solve(pencil, 5)
    w1, w2 = (scipy.linalg.eigvalsh(a, b) for a, b in ((a1, b1), (a2, b2)))
    expected = np.sort(np.multiply.outer(np.multiply.outer(w1, [1, 1, -1]), w2).ravel())[::-1]
    np.testing.assert_allclose(result.values, expected[:5], rtol=1e-12)
    assert result.method == "kronecker" and result.backward_errors.max() < 1e-15


def test_kronecker_batch_with_a_bad_factor(random_pencil):
    pairs = [random_pencil(3, seed=seed) for seed in range(2)]
    a1, b1 = (torch.from_numpy(np.stack(x)) for x in zip(*pairs, strict=True))
    a2, b2 = (torch.from_numpy(x) for x in random_pencil(4))
    b1[0, 0, 0] = -1.0
    result = solve(Pencil(Kronecker(a1, a2), Kronecker(b1, b2)), 2)
    assert result.status.tolist() == [Status.NOT_POSITIVE_DEFINITE, GOOD]
    assert torch.isnan(result.vectors[0]).all() and torch.isfinite(result.vectors[1]).all()


def test_kronecker_factors_that_do_not_pair_are_formed():
    a = Kronecker(torch.eye(2), torch.diag(torch.tensor([1.0, 2.0, 3.0])))
    b = Kronecker(torch.eye(3), torch.eye(2))
    assert solve(Pencil(a, b), 2).method == "fused"
    with pytest.raises(ValueError, match=r"method 'kronecker' does not fit A and B"):
        solve(Pencil(a, b), 2, method="kronecker")


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_diagonal_is_the_ratio(device, dtype):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 50)), rng.random((3, 50)) + 0.1
    operators = (Diagonal(torch.from_numpy(x).to(device, dtype)) for x in (a, b))
    result = solve(Pencil(*operators), 6)
    assert result.method == "diagonal" and (result.status == GOOD).all()
    np.testing.assert_allclose(result.values.cpu(), np.sort(a / b, axis=-1)[:, ::-1][:, :6], rtol=1e-6)
    assert result.b_orthogonality.max() < 1e-6 and result.backward_errors.max() < 1e-6


def test_diagonal_entries_far_apart_are_still_positive_definite():
    b = torch.tensor([1e30, 1e-20])
    result = solve(Pencil(Diagonal(torch.ones(2)), Diagonal(b)), 1)
    assert result.values.item() == pytest.approx(1e20, rel=1e-6)


def test_batches_broadcast_and_strides_do_not_matter(random_pencil, device):
    pairs = [random_pencil(5, seed=seed) for seed in range(6)]
    a, b = (torch.from_numpy(np.stack(x)).to(device) for x in zip(*pairs, strict=True))
    wide = torch.full((3, 1, 5, 10), torch.nan, dtype=a.dtype, device=device)
    wide[:, 0, :, ::2] = a[:3]
    result = solve(Pencil(wide[..., ::2], b[:2].mT), 2)
    assert result.values.shape == (3, 2, 2) and result.vectors.shape == (3, 2, 5, 2)
    for i in range(3):
        for j in range(2):
            expected = scipy.linalg.eigvalsh(a[i].cpu(), b[j].cpu())[::-1][:2]
            np.testing.assert_allclose(result.values[i, j].cpu(), expected, rtol=1e-11)


def test_inputs_are_not_changed(random_pencil):
    a, b = (torch.from_numpy(x) for x in random_pencil(5))
    kept = a.clone(), b.clone()
    solve(Pencil(a, b), 2)
    assert torch.equal(a, kept[0]) and torch.equal(b, kept[1])


@pytest.mark.parametrize("kind", [Dense, Diagonal, Kronecker])
def test_empty_batch(kind):
    if kind is Dense:
        operator = Dense(torch.zeros(0, 2, 4, 4))
    elif kind is Diagonal:
        operator = Diagonal(torch.zeros(0, 2, 4))
    else:
        operator = Kronecker(torch.zeros(0, 2, 2, 2), torch.zeros(2, 2))
    result = solve(Pencil(operator, operator), 3)
    assert result.values.shape == (0, 2, 3) and result.vectors.shape == (0, 2, 4, 3)
    assert result.status.shape == result.b_orthogonality.shape == (0, 2)
    assert result.explain() == []


def test_counts_are_the_products_of_the_certificate(random_pencil):
    result = solve(Pencil(*(torch.from_numpy(x) for x in random_pencil(5))), 3)
    assert result.counts == (3, 3, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"k": 0}, ValueError, r"k must be in 1\.\.n with n = 2, got k = 0"),
        ({"k": 3}, ValueError, r"n = 2, got k = 3"),
        ({"k": 1.0}, TypeError, r"k must be an int, got float"),
        ({"k": True}, TypeError, r"k must be an int, got bool"),
        ({"method": "diagnoal"}, ValueError, r"method must be one of .*'dense'.* got 'diagnoal'"),
        ({"method": "diagonal"}, ValueError, r"'diagonal' does not fit A and B, which are Dense"),
        ({"tol": 0.0}, ValueError, r"tol must be positive and finite, got 0\.0"),
        ({"tol": float("nan")}, ValueError, r"tol must be positive and finite, got nan"),
        ({"pencil": Pencil(torch.eye(2, device="meta"))}, ValueError, r"on device meta, where nothing can be computed"),
        ({"options": {"block": 4}}, TypeError, r"options must be a DavidsonOptions, got dict"),
        ({"pencil": torch.eye(2)}, TypeError, r"pencil must be a Pencil, got Tensor; write Pencil"),
    ],
)
def test_arguments_are_checked(arguments, error, match):
    given = {"pencil": Pencil(torch.eye(2), torch.eye(2)), "k": 1} | arguments
    with pytest.raises(error, match=match):
        solve(given.pop("pencil"), given.pop("k"), **given)


def test_k_may_be_a_numpy_integer(random_pencil):
    pencil = Pencil(*(torch.from_numpy(x) for x in random_pencil(5)))
    for method in ("fused", "dense", "davidson"):
        assert solve(pencil, np.int64(2), method=method).values.shape == (2,)


def test_order_zero_has_no_valid_k():
    with pytest.raises(ValueError, match=r"n = 0, got k = 1"):
        solve(Pencil(torch.zeros(0, 0)), 1)


def test_gradient_of_values_and_projectors(random_pencil):
    """gradcheck of Σλ and of V f(Λ) Vᵀ, which no sign of a vector can change."""
    a, b = (torch.from_numpy(x).requires_grad_() for x in random_pencil(5))

    def outputs(x: torch.Tensor, y: torch.Tensor):
        result = solve(Pencil((x + x.mT) / 2, (y + y.mT) / 2), 2)
        weighted = result.vectors * result.values[..., None, :]
        return result.values, weighted @ result.vectors.mT

    assert torch.autograd.gradcheck(outputs, (a, b))


@pytest.mark.parametrize("cond", [1e2, 1e6])
def test_gradient_of_values_in_closed_form(random_pencil, device, cond):
    """∂λ/∂A = vvᵀ and ∂λ/∂B = −λvvᵀ, refined pairs (cond 1e6) included."""
    a, b = (torch.from_numpy(x).to(device) for x in random_pencil(8, cond=cond))
    x, y = (m.clone().requires_grad_() for m in (a, b))
    solve(Pencil((x + x.mT) / 2, (y + y.mT) / 2), 3).values.sum().backward()
    w, v = (z[..., 5:] for z in scipy.linalg.eigh(a.cpu(), b.cpu()))
    np.testing.assert_allclose(x.grad.cpu(), v @ v.T, atol=1e-9 * np.abs(v @ v.T).max())
    np.testing.assert_allclose(y.grad.cpu(), -(v * w) @ v.T, atol=1e-9 * (w * v**2).max())


def test_gradients_do_not_see_a_bad_neighbour(random_pencil):
    """B is shared with a NaN pencil, whose own gradient is zero."""
    a, b = (torch.from_numpy(x) for x in random_pencil(5))
    stacked = torch.stack([a, torch.full_like(a, torch.nan)]).requires_grad_()
    shared, alone, b_alone = (m.clone().requires_grad_() for m in (b, a, b))
    result = solve(Pencil(stacked, shared), 2)
    (result.values[0].sum() + result.vectors[0].square().sum()).backward()
    expected = solve(Pencil(alone, b_alone), 2)
    (expected.values.sum() + expected.vectors.square().sum()).backward()
    torch.testing.assert_close(stacked.grad[0], alone.grad)
    torch.testing.assert_close(shared.grad, b_alone.grad)
    assert (stacked.grad[1] == 0).all()


def test_gradient_of_degenerate_vectors_is_not_a_number():
    """Vectors of equal eigenvalues have no derivative: never a finite wrong one."""
    a = torch.eye(3, dtype=torch.float64, requires_grad=True)
    solve(Pencil(a), 2).vectors.square().sum().backward()
    assert not torch.isfinite(a.grad).all()


def test_integers_are_promoted():
    a, b = torch.diag(torch.arange(1, 7)), 2 * torch.eye(6, dtype=torch.int64)
    for values in (solve(Pencil(a, b), 2).values, torch.ops.sst_kernels.eigh_topk(a, b, 2)[0], eigh_topk(a, b, 2)[0]):
        torch.testing.assert_close(values, torch.tensor([3.0, 2.5], dtype=torch.float64))
