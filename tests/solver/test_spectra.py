"""Every method of `solve` beside scipy on pencils of known spectrum, at its bars; and planted faults."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from pencils import (
    FAULTS,
    METHODS,
    SPECTRA,
    Known,
    eigenvalues_in_50_digits,
    elastic_rod,
    errors,
    gram,
    kfac,
    kronecker,
    lapack_ratio,
    laplacian,
    mikota,
    planted,
    sakurai,
    scipy_largest,
    with_fault,
)

from sst_kernels.pencil import Pencil
from sst_kernels.result import EigenResult, Status
from sst_kernels.solve import solve

pytestmark = pytest.mark.parametrize("method", METHODS)
DTYPES = [np.float32, np.float64]
FAULTY = Status.NOT_POSITIVE_DEFINITE | Status.NON_FINITE | Status.MAX_ITERATIONS


def spectrum(name: str, n: int, cond: float, seed: int = 0) -> Known:
    return planted(SPECTRA[name](n, np.random.default_rng((n, seed))), cond, seed)


FAMILIES: dict[str, tuple[Callable[[], Known], int]] = {  # and how many pairs
    "mikota": (lambda: mikota(60), 5),
    "sakurai": (lambda: sakurai(80), 6),
    "elastic rod": (lambda: elastic_rod(99), 4),
    "laplacian": (lambda: laplacian(17), 8),
    "kronecker": (lambda: kronecker(planted([9, 4, 2, 0.5], 30), planted(np.arange(1.0, 31), 30)), 7),
    "gram": (lambda: gram(120, 20, 30, 1e-2), 20),
    "kfac 65": (lambda: kfac(65), 1),
    "kfac 300": (lambda: kfac(300), 16),
    "one by one": (lambda: planted([3.0], 1), 1),
    "all pairs": (lambda: spectrum("uniform", 8, 1e2), 8),
    "half of the pairs": (lambda: spectrum("power law", 50, 1e3), 25),
    "all but one": (lambda: spectrum("uniform", 33, 1e2), 32),
    **{name: (lambda name=name: spectrum(name, 130, 1e3), 9) for name in SPECTRA},
}


def run(method: str, device: torch.device, a: np.ndarray, b: np.ndarray, k: int) -> EigenResult:
    return solve(Pencil(*(torch.from_numpy(x).to(device) for x in (a, b))), k, method=method)


def check_bars(a: np.ndarray, b: np.ndarray, exact: np.ndarray, result: EigenResult) -> None:
    """Each error at most ten times scipy's, or 10·n·eps where scipy's is below that.

    This holds for the residual of an iteration at the default tolerance too: backward errors up to
    4√n·eps give a residual up to 4n·eps in the 1-norm.
    """
    w, v = (x.numpy(force=True) for x in (result.values, result.vectors))
    assert w.dtype == v.dtype == a.dtype
    assert (np.diff(w) <= 0).all()
    bar = 10 * np.maximum(errors(a, b, *scipy_largest(a, b, len(w)), exact), len(a) * np.finfo(a.dtype).eps)
    assert (errors(a, b, w, v, exact) <= bar).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_beside_scipy(method, device, family, dtype):
    make, k = FAMILIES[family]
    known = make()
    a, b = known.a.astype(dtype), known.b.astype(dtype)
    exact = known.values if dtype == np.float64 else scipy.linalg.eigvalsh(a.astype(float), b.astype(float))[::-1]
    result = run(method, device, a, b, k)
    assert result.status.item() & (FAULTY | Status.CONVERGED) == Status.CONVERGED
    check_bars(a, b, exact[:k], result)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cond", [1, 1e2, 1e4])
@pytest.mark.parametrize("n", [3, 40, 150])
@pytest.mark.parametrize("name", ["power law", "uniform"])
def test_lapack_ratio(method, device, name, n, cond, dtype):
    known = spectrum(name, n, cond)
    a, b = known.a.astype(dtype), known.b.astype(dtype)
    result = run(method, device, a, b, max(1, n // 5))
    assert lapack_ratio(a, b, *(x.numpy(force=True) for x in (result.values, result.vectors))) < 20


@pytest.mark.parametrize("exponent", range(2, 13, 2))
@pytest.mark.parametrize("name", ["uniform", "power law", "clusters"])
def test_near_singular_b(method, device, name, exponent):
    """A reaches into the directions where B is small, so that λ are of one size throughout."""
    known = spectrum(name, 12, 10.0**exponent, seed=exponent)
    check_bars(
        known.a, known.b, (exact := eigenvalues_in_50_digits(*known[:2])[:5]), run(method, device, *known[:2], 5)
    )
    assert exact == pytest.approx(known.values[:5], rel=10.0 ** (exponent - 14))


@pytest.mark.parametrize("exponent", range(2, 13, 2))
def test_near_singular_b_that_a_does_not_follow(method, device, exponent):
    """λ₁ ≈ ‖A‖‖B⁻¹‖."""
    a, b = planted(1 / np.arange(1.0, 13), 1e2)[0], planted(np.ones(12), 10.0**exponent, seed=1)[1]
    check_bars(a, b, eigenvalues_in_50_digits(a, b)[:5], run(method, device, a, b, 5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("values", "cut"), [([9.0, 5, 5, 5, 2, 1], (2, 3)), ([7.0, 7, 3, 1, 1, 0.5], (1, 4))])
@pytest.mark.parametrize("n", [6, 70])
def test_cluster_is_reported_where_it_is_cut(method, device, n, values, cut, dtype):
    """λ_k = λ_(k+1) at k in `cut` and at no other k; the pairs are good all the same."""
    known = planted(np.concatenate([values, np.linspace(0.4, 0, n - 6)]), 10)
    a, b = known.a.astype(dtype), known.b.astype(dtype)
    for k in range(1, 6):
        result = run(method, device, a, b, k)
        assert bool(result.status.item() & Status.CLUSTER_AT_K) == (k in cut)
        assert result.converged.item()
        np.testing.assert_allclose(result.values.cpu(), known.values[:k], rtol=100 * np.finfo(dtype).eps)
        assert result.b_orthogonality < 100 * np.finfo(dtype).eps


@pytest.mark.parametrize("k", [2, 3, 4, 7])
def test_pairs_beyond_the_rank_of_a(method, device, k):
    """rank A = 3: λ₄ = … = λₙ = 0 exactly, a cluster at every k from 4 on."""
    rows = np.random.default_rng(0).standard_normal((3, 90))
    a, b = rows.T @ rows, planted(np.ones(90), 100)[1]
    exact = np.zeros(k)
    exact[:3] = scipy.linalg.eigvalsh(rows @ np.linalg.solve(b, rows.T))[::-1][:k]
    result = run(method, device, a, b, k)
    assert bool(result.status.item() & Status.CLUSTER_AT_K) == (k > 3)
    assert result.converged.item()
    check_bars(a, b, exact, result)


SCALES = {np.float32: [(50, -50), (-50, 50), (50, 50), (-50, -50)], np.float64: [(498, -498), (-498, 498), (498, 498)]}


@pytest.mark.parametrize(
    ("dtype", "up", "down"), [(dtype, *powers) for dtype, pairs in SCALES.items() for powers in pairs]
)
@pytest.mark.parametrize("n", [20, 100])
def test_extreme_scales(method, device, n, dtype, up, down):
    """2ᵘᵖ A and 2ᵈᵒʷⁿ B, about 10^±15 in float32 and 10^±150 in float64: λ 2^(up − down), V 2^(−down/2)."""
    known = spectrum("power law", n, 1e2)
    a, b = known.a.astype(dtype), known.b.astype(dtype)
    plain = run(method, device, a, b, 4)
    scaled = run(method, device, np.ldexp(a, up), np.ldexp(b, down), 4)
    assert scaled.status.item() == plain.status.item()
    values, vectors = (x.numpy(force=True) for x in (scaled.values, scaled.vectors))
    exact = scipy.linalg.eigvalsh(a.astype(float), b.astype(float))[::-1][:4]
    back = EigenResult(
        values=torch.from_numpy(np.ldexp(values, down - up)),
        vectors=torch.from_numpy(np.ldexp(vectors, down // 2)),
        **{
            name: getattr(scaled, name) for name in ("backward_errors", "b_orthogonality", "status", "method", "counts")
        },
    )
    check_bars(a, b, exact, back)
    assert scaled.backward_errors.max() < 10 * 4 * n**0.5 * np.finfo(dtype).eps


def mixed_batch(n: int, dtype: type) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[int]]:
    """Easy, hard and broken pencils in turn, and the faults of each."""
    sound = [spectrum("uniform", n, 1), kfac(n), spectrum("clusters", n, 1e3), spectrum("low rank", n, 10), mikota(n)]
    pairs, faults = [], []
    for i, fault in enumerate(FAULTS):
        easy, hard = sound[i], sound[i - 1]
        pairs += [easy[:2], with_fault(fault, *hard[:2])]
        faults += [0, int(FAULTS[fault])]
    return [(a.astype(dtype), b.astype(dtype)) for a, b in pairs], faults


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(9, 2), (80, 5)])
def test_bad_pencils_harm_no_other(method, device, n, k, dtype):
    """A pencil comes out of a batch as it does alone, and the status of each names its fault."""
    pairs, faults = mixed_batch(n, dtype)
    a, b = (torch.from_numpy(np.stack(x)).to(device) for x in zip(*pairs, strict=True))
    result = solve(Pencil(a, b), k, method=method)
    for i, fault in enumerate(faults):
        parts = (result.values, result.vectors, result.backward_errors, result.b_orthogonality)
        if fault:
            assert result.status[i].item() == fault
            assert all(torch.isnan(x[i]).all() for x in parts)
            continue
        alone = solve(Pencil(a[i], b[i]), k, method=method)
        for one in (result.status[i], alone.status):
            assert one.item() & (FAULTY | Status.CONVERGED) == Status.CONVERGED
        np.testing.assert_allclose(result.values[i].cpu(), alone.values.cpu(), rtol=20 * n * np.finfo(dtype).eps)
        one = EigenResult(*(x[i] for x in (*parts, result.status)), result.method, result.counts)
        exact = scipy.linalg.eigvalsh(*(x.astype(float) for x in pairs[i]))[::-1][:k]
        check_bars(*pairs[i], exact, one)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [3, 100])
@pytest.mark.parametrize("fault", FAULTS)
def test_status_names_the_planted_fault(method, device, fault, n, dtype):
    a, b = (x.astype(dtype) for x in with_fault(fault, *spectrum("uniform", n, 10)[:2]))
    result = run(method, device, a, b, 2)
    assert result.status.item() == FAULTS[fault]
    assert torch.isnan(result.values).all() and torch.isnan(result.vectors).all()


@pytest.mark.parametrize("n", [40, 200])
def test_verified_means_that_nothing_is_missed(method, device, n):
    """`verified` may be withheld, but where it is set the k values are the k largest."""
    for seed in range(5):
        known = spectrum("spread", n, 1e2, seed)
        result = run(method, device, *known[:2], 6)
        assert result.status.item() == Status.CONVERGED | Status.VERIFIED
        np.testing.assert_allclose(result.values.cpu(), known.values[:6], rtol=1e-11)
