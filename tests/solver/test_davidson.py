"""The block Jacobi–Davidson method beside LAPACK: locking, warm starts, batches, faults, callables, interruption."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from pencils import FAULTS, SPECTRA, Known, errors, kfac, planted, scipy_largest, with_fault
from torch import Tensor

from sst_kernels.davidson import DavidsonOptions, davidson
from sst_kernels.operators import Dense, Diagonal, Kronecker
from sst_kernels.pencil import Pencil
from sst_kernels.result import EigenResult, Spectrum, Status
from sst_kernels.solve import solve
from sst_kernels.structured import EKFAC, FunctionOperator, Gram, LowRankPlusDiagonal

N = 240  # well above the search space for k <= 10


def power_law(n: int = N, seed: int = 0) -> Pencil:
    """cond(B) ≈ 100, λ decaying slowly: some twenty iterations."""
    return Pencil(*(torch.from_numpy(x) for x in kfac(n, damping=1.0, seed=seed)[:2]))


def exact_vectors(pencil: Pencil) -> Tensor:
    """All eigenvectors as columns, λ descending, of a pencil without batch."""
    vectors = scipy.linalg.eigh(*(x.numpy() for x in pencil.dense()))[1]
    return torch.from_numpy(vectors[:, ::-1].copy())


def check(result: EigenResult, pencil: Pencil, *, where: Tensor | None = None) -> None:
    """Each pencil (of the mask `where`) beside LAPACK in float64: values, residual, B-orthogonality, status."""
    n, k = pencil.n, result.values.shape[-1]
    a, b = (x.reshape(-1, n, n).double().numpy(force=True) for x in pencil.dense())
    values, vectors = result.values.reshape(-1, k), result.vectors.reshape(-1, n, k)
    claimed = result.backward_errors.reshape(-1, k).double().numpy(force=True)
    eps, tol = torch.finfo(pencil.dtype).eps, pencil.tolerance
    for i in range(len(a)):
        if where is not None and not where.flatten()[i]:
            continue
        assert int(result.status.flatten()[i]) & ~int(Status.VERIFIED | Status.CLUSTER_AT_K) == Status.CONVERGED
        exact = scipy.linalg.eigvalsh(a[i], b[i])[::-1][:k]
        w, v = (x[i].double().numpy(force=True) for x in (values, vectors))
        assert (np.diff(w) <= 0).all()
        norms = np.linalg.norm(a[i], 2) + np.abs(w) * np.linalg.norm(b[i], 2)
        residual = (
            np.linalg.norm(a[i] @ v - b[i] @ v * w, axis=0) / np.linalg.norm(v, axis=0) / np.maximum(norms, 1e-300)
        )
        assert (residual <= tol + n * eps).all()
        # certificates are never flattered, but by rounding
        assert (claimed[i] >= 0.9 * residual - n * eps).all()
        gram = v.T @ b[i] @ v
        assert np.abs(gram - np.eye(k)).max() <= 30 * eps * np.linalg.cond(b[i])
        # |λ − θ| <= vᵀ r for B-normed v, so at most this
        size = norms * tol / np.linalg.eigvalsh(b[i])[0]
        np.testing.assert_allclose(w, exact, rtol=0, atol=size.max() + n * eps * np.abs(exact).max())


@pytest.mark.parametrize("single_start", [False, True])
def test_more_pairs_than_the_window_are_locked(single_start):
    pencil = power_law()
    result = solve(pencil, 20, method="davidson", options=DavidsonOptions(window=4, single_start=single_start))
    check(result, pencil)
    assert (result.backward_errors > 0).all()  # each was judged


def test_sixty_pairs_by_the_default_window():
    pencil = power_law(400)
    result = solve(pencil, 60, method="davidson")
    check(result, pencil)
    assert (result.backward_errors > 0).all()
    assert result.status.item() == Status.CONVERGED | Status.VERIFIED


def test_a_start_that_fills_the_window_over_and_over():
    """All that is sought converges without a direction to expand by, before there is room to lock."""
    pencil = power_law()
    start = exact_vectors(pencil)[:, :21]
    options = DavidsonOptions(window=4, single_start=False, start=start)
    check(solve(pencil, 20, method="davidson", options=options), pencil)


def with_start(pencil: Pencil, start: Tensor, k: int = 5, **options: object) -> EigenResult:
    return solve(pencil, k, method="davidson", options=DavidsonOptions(start=start, **options))


def test_exact_start_needs_no_iteration():
    pencil = power_law()
    result = with_start(pencil, exact_vectors(pencil)[:, :6])
    check(result, pencil)
    assert result.counts.iterations <= 2


@pytest.mark.parametrize("columns", [0, 1, 3, 6, 60, 100, N])
def test_start_of_any_number_of_columns(columns):
    pencil = power_law()
    cold = solve(pencil, 5, method="davidson")
    result = with_start(pencil, exact_vectors(pencil)[:, :columns])
    check(result, pencil)
    assert result.counts.iterations <= cold.counts.iterations + 8


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_useless_columns_of_a_start_count_for_nothing(value):
    pencil = power_law()
    start = exact_vectors(pencil)[:, :8].clone()
    start[:, 6] = value
    start[3, 7] = value
    check(with_start(pencil, start), pencil)
    check(with_start(pencil, torch.full((N, 7), value, dtype=torch.float64)), pencil)


def test_start_of_repeated_columns():
    pencil = power_law()
    check(with_start(pencil, exact_vectors(pencil)[:, :1].expand(-1, 9)), pencil)
    check(with_start(pencil, torch.ones(N, 1, dtype=torch.float64) * 1e-200), pencil)


@pytest.mark.parametrize(
    "start",
    [
        torch.zeros(N - 1, 3, dtype=torch.float64),
        torch.zeros(2, N, 3, dtype=torch.float64),
        torch.zeros(N, dtype=torch.float64),
        torch.zeros(N, 3),
    ],
)
def test_start_of_wrong_shape_or_dtype(start):
    with pytest.raises(ValueError, match=rf"start must be .*\({N}, 'm'\).*got"):
        with_start(power_law(), start)


def callable_of(matrix: Tensor) -> FunctionOperator:
    return FunctionOperator(lambda x: matrix @ x, matrix.shape, matrix.dtype)


@pytest.mark.parametrize("sides", ["A", "B", "AB"])
@pytest.mark.parametrize("fault", ["nan in A", "indefinite"])
def test_a_bad_pencil_in_a_batch_of_callables(sides, fault):
    """Callables cannot be called for a part of their batch, so the whole of it is taken along."""
    pairs = [kfac(N, 1.0, seed=seed)[:2] for seed in range(3)]
    pairs[1] = with_fault(fault, *pairs[1])
    a, b = (torch.from_numpy(np.stack(x)) for x in zip(*pairs, strict=True))
    pencil = Pencil(callable_of(a.tril() + a.tril(-1).mT) if "A" in sides else a, callable_of(b) if "B" in sides else b)
    result = solve(pencil, 4, method="davidson")
    assert result.status[1] == FAULTS[fault]
    check(result, Pencil(a, b), where=torch.tensor([True, False, True]))


@pytest.mark.parametrize(
    ("entry", "status"),
    [(-1e-3, Status.NOT_POSITIVE_DEFINITE), (0.0, Status.NOT_POSITIVE_DEFINITE), (np.nan, Status.NON_FINITE)],
)
@pytest.mark.parametrize("kind", ["Diagonal", "Kronecker", "EKFAC", "LowRankPlusDiagonal"])
def test_faults_that_the_structure_of_b_shows(kind, entry, status):
    """Found by looking, not by a direction that the iteration happens to take."""
    good = torch.linspace(1, 2, N, dtype=torch.float64)
    bad = torch.where(torch.arange(N) == 7, entry, good)
    a = power_law().A
    if kind == "Diagonal":
        b = Diagonal(torch.stack([good, bad]))
    elif kind == "Kronecker":
        b = Kronecker(Diagonal(torch.stack([good[:12], bad[:12]])), Diagonal(good[:20]))
    elif kind == "EKFAC":
        u, w = torch.eye(12, dtype=torch.float64), torch.eye(20, dtype=torch.float64)
        b = EKFAC(u, w, torch.stack([good, bad]).reshape(2, 12, 20))
    else:
        many = torch.where(torch.arange(N) < 9, bad[7], good)  # more than the rank can lift
        b = LowRankPlusDiagonal(torch.eye(N, 3, dtype=torch.float64), torch.stack([good, many]))
    result = solve(Pencil(a, b), 4, method="davidson")
    assert result.status.tolist() == [Status.CONVERGED, status]
    assert result.values[1].isnan().all()
    check(result, Pencil(a, b), where=torch.tensor([True, False]))


@pytest.mark.parametrize("n", [1, 2, 40])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("kind", ["Dense", "Diagonal", "callable"])
def test_infinite_last_entry_of_b(kind, value, n):
    """The Cholesky factor of such a dense B exists."""
    entries = torch.where(torch.arange(n) == n - 1, value, 2.0).double()
    b = {"Dense": Dense(entries.diag()), "Diagonal": Diagonal(entries)}.get(kind, callable_of(entries.diag()))
    result = solve(Pencil(power_law(n).A, b), 1, method="davidson")
    assert result.status == Status.NON_FINITE


def test_preconditioner_of_another_pencil():
    for other in (Diagonal(torch.ones(N - 1, dtype=torch.float64)), Diagonal(torch.ones(N))):
        with pytest.raises(ValueError, match="preconditioner must be .* as A and B"):
            solve(power_law(), 3, method="davidson", options=DavidsonOptions(preconditioner=other))


@pytest.mark.parametrize("side", ["A", "B"])
def test_parts_of_rank_zero(side):
    b = power_law().B
    empty = LowRankPlusDiagonal(torch.zeros(N, 0, dtype=torch.float64), torch.arange(1.0, N + 1, dtype=torch.float64))
    pencil = Pencil(empty, b) if side == "A" else Pencil(b, empty)
    check(solve(pencil, 3, method="davidson"), pencil)


def test_empty_batch():
    a, b = power_law(20).dense()
    for pencil in (Pencil(a.expand(0, -1, -1), b), Pencil(Diagonal(b.diagonal()), b.expand(2, 0, -1, -1))):
        result = solve(pencil, 3, method="davidson")
        assert result.values.shape == (*pencil.batch_shape, 3)
        assert result.vectors.shape == (*pencil.batch_shape, 20, 3)


@pytest.mark.parametrize(
    "sizes",
    [
        {"block": 0},
        {"window": 0},
        {"window": 4, "keep": 4},
        {"keep": 8, "capacity": 15, "block": 4},
        {"max_iterations": -1},
        {"inner_steps": -1},
    ],
)
def test_options_that_contradict(sizes):
    with pytest.raises(ValueError, match=r"DavidsonOptions: .* got"):
        solve(power_law(), 6, method="davidson", options=DavidsonOptions(**sizes))


@pytest.mark.parametrize("k", [1, 3, 200])
def test_zero_matrix(k):
    """All λ are 0: a cluster, unless k = n cuts none."""
    n = 200
    pencil = Pencil(torch.zeros(n, n, dtype=torch.float64), power_law(n).B)
    result = solve(pencil, k, method="davidson")
    assert result.values.abs().max() == 0
    assert result.b_orthogonality < 1e-12
    assert result.status.item() & ~Status.VERIFIED == Status.CONVERGED | (Status.CLUSTER_AT_K if k < n else 0)


@pytest.mark.parametrize(("k", "cut"), [(4, False), (5, False), (6, True), (12, True), (60, True), (N, False)])
def test_pairs_beyond_the_rank(k, cut):
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((5, N)))
    pencil = Pencil(Gram(rows), power_law().B)
    result = solve(pencil, k, method="davidson")
    check(result, pencil)
    assert bool(result.status.item() & Status.CLUSTER_AT_K) == cut


@pytest.mark.parametrize(("k", "cut"), [(2, True), (3, False), (4, True), (9, False)])
def test_clusters(k, cut):
    known = planted(np.repeat(2.0 ** -np.arange(N // 3), 3), 100)
    pencil = Pencil(torch.from_numpy(known.a), torch.from_numpy(known.b))
    result = solve(pencil, k, method="davidson")
    check(result, pencil)
    assert bool(result.status.item() & Status.CLUSTER_AT_K) == cut


def test_a_guard_of_low_accuracy_hides_no_cluster():
    """θ_(k+1) may be off by η cond(B): it is sought until it can be told from λ_k, or has converged."""
    for n in range(6, 40):
        known = planted(SPECTRA["clusters"](n, np.random.default_rng(n)), 1e3)
        a, b = (x.astype(np.float32) for x in known[:2])
        pencil = Pencil(torch.from_numpy(a), torch.from_numpy(b))
        found = davidson(pencil, 2, pencil.tolerance, 0, DavidsonOptions())
        exact = scipy.linalg.eigvalsh(a.astype(float), b.astype(float))[::-1]
        assert found.values[2] == pytest.approx(exact[2], abs=3e-4)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orders_below_the_search_space(n, whole, dtype):
    pencil = Pencil(*(x.to(dtype) for x in power_law(n).dense()))
    result = solve(pencil, n if whole else 1, method="davidson")
    check(result, pencil)
    assert result.status.item() == Status.CONVERGED | Status.VERIFIED


@pytest.mark.parametrize(("k", "window", "limit"), [(5, None, 1), (5, None, 0), (40, 4, 0), (40, 4, 9), (60, 4, 3)])
@pytest.mark.parametrize("single_start", [False, True])
def test_iteration_limit_leaves_honest_pairs(k, window, limit, single_start):
    pencil = power_law()
    options = DavidsonOptions(max_iterations=limit, window=window, single_start=single_start)
    result = solve(pencil, k, method="davidson", options=options)
    assert result.status.item() & ~Status.CLUSTER_AT_K == Status.MAX_ITERATIONS
    assert result.counts.iterations == limit
    assert "MAX_ITERATIONS" in result.explain()[0]
    # Ritz pairs: B-orthonormal, each with the error that it has
    torch.testing.assert_close(
        result.backward_errors, pencil.backward_errors(result.values, result.vectors), rtol=0.3, atol=1e-15
    )
    assert pencil.b_orthogonality(result.vectors) < 1e-12
    exact = torch.from_numpy(scipy.linalg.eigvalsh(*(x.numpy() for x in pencil.dense()))[::-1][:k].copy())
    assert (result.values <= exact * (1 + 1e-12)).all()
    assert (result.values > 0).all()


def test_iteration_limit_is_raised_by_going_on():
    """What one call has found is the start of the next."""
    pencil, start = power_law(), None
    for _ in range(20):
        result = solve(pencil, 5, method="davidson", options=DavidsonOptions(max_iterations=4, start=start))
        start = result.vectors
        if not result.status.item() & Status.MAX_ITERATIONS:
            break
    check(result, pencil)


def check_beside_scipy(known: Known, k: int, dtype: type, options: DavidsonOptions | None = None) -> None:
    """Each error at most ten times scipy's, or 10·n·eps; the residual at the tolerance."""
    a, b = known.a.astype(dtype), known.b.astype(dtype)
    pencil = Pencil(torch.from_numpy(a), torch.from_numpy(b))
    result = solve(pencil, k, method="davidson", options=options)
    assert result.status.item() & ~Status.VERIFIED == Status.CONVERGED
    w, v = scipy_largest(a, b, k)
    ours = errors(a, b, result.values.numpy(), result.vectors.numpy(), known.values[:k])
    theirs = np.maximum(errors(a, b, w, v, known.values[:k]), len(a) * np.finfo(dtype).eps)
    assert ours[0] <= pencil.tolerance
    assert (ours[1:] <= 10 * theirs[1:]).all()


@pytest.mark.parametrize("cond", [1e8, 1e10, 1e12])
@pytest.mark.parametrize("spectrum", ["power law", "spread", "low rank"])
def test_ill_conditioned_b_beside_scipy(cond, spectrum):
    known = planted(SPECTRA[spectrum](N, np.random.default_rng(0)), cond)
    check_beside_scipy(known, 5, np.float64)
    start = torch.from_numpy(np.random.default_rng(1).standard_normal((N, 4)))
    check_beside_scipy(known, 5, np.float64, DavidsonOptions(start=start))


def test_warm_start_beside_a_large_ill_conditioned_b():
    """From order 1152 on the factor of B is made in blocks, and holds anything above them."""
    n = 1152
    known = planted(2.0 ** -np.arange(n), 1e10)
    a, b = (torch.from_numpy(x) for x in known[:2])
    b[torch.ones(n, n).triu(1) == 1] = torch.nan
    exact = solve(Pencil(a, b), 3, method="davidson").vectors
    result = solve(Pencil(a, b), 2, method="davidson", options=DavidsonOptions(start=exact))
    assert result.converged and result.history[0, 2] < 1e-10
    np.testing.assert_allclose(result.values, known.values[:2], rtol=1e-5)


@pytest.mark.parametrize("cond", [1e3, 1e5])
@pytest.mark.parametrize("spectrum", ["power law", "spread", "steep"])
def test_ill_conditioned_b_in_float32_beside_scipy(cond, spectrum):
    known = planted(SPECTRA[spectrum](N, np.random.default_rng(0)), cond)
    stored = [x.astype(np.float32).astype(float) for x in known[:2]]
    check_beside_scipy(Known(*stored, scipy.linalg.eigvalsh(*stored)[::-1]), 5, np.float32)


@pytest.mark.parametrize("bad", [None, "indefinite"])
def test_ill_conditioned_and_ordinary_pencils_in_one_batch(bad):
    knowns = [planted(2.0 ** -np.arange(N), cond) for cond in (1e12, 10, 100)]
    pairs = [(known.a, known.b) for known in knowns]
    if bad:
        pairs[1] = with_fault(bad, *pairs[1])
    a, b = (torch.from_numpy(np.stack(x)) for x in zip(*pairs, strict=True))
    result = solve(Pencil(a, b), 3, method="davidson")
    assert result.status[1] & ~Status.VERIFIED == (FAULTS[bad] if bad else Status.CONVERGED)
    for i in (0, 2):
        assert result.status[i] & Status.CONVERGED
        rtol = 1e-15 * np.linalg.cond(pairs[i][1]) + 1e-12
        np.testing.assert_allclose(result.values[i].numpy(), knowns[i].values[:3], rtol=rtol)


@pytest.mark.parametrize("scale", [1e-140, 1e140])
@pytest.mark.parametrize("diagonal", [False, True])
def test_scales(scale, diagonal):
    pencil = power_law()
    expected = solve(pencil, 4, method="davidson").values
    b = Diagonal(pencil.B.diagonal()) if diagonal else pencil.B
    if diagonal:
        expected = solve(Pencil(pencil.A, b), 4, method="davidson").values
        b = Diagonal(b.entries / scale)
    else:
        b = Dense(b.matrix / scale)
    result = solve(Pencil(pencil.A.matrix * scale, b), 4, method="davidson")
    assert result.status.item() & ~Status.VERIFIED == Status.CONVERGED
    torch.testing.assert_close(result.values, expected * scale**2, rtol=1e-11, atol=0)


def spectrum(pencil: Pencil, k: int, **options: int) -> Spectrum:
    return davidson(pencil, k, pencil.tolerance, 0, DavidsonOptions(**options))


def test_an_indefinite_b_leaves_its_batch_in_float32():
    good = power_law()
    b = torch.stack([good.B.to_dense(), -good.B.to_dense()])
    found = spectrum(Pencil(good.A.to_dense().expand_as(b), b), 4)
    # certificates of the pencil itself, not of L⁻¹AL⁻ᵀ in float64
    assert found.errors is not None and found.status.tolist() == [0, int(Status.NOT_POSITIVE_DEFINITE)]
    torch.testing.assert_close(found.values[0, :4], spectrum(good, 4).values[:4], rtol=1e-12, atol=0)


@pytest.mark.parametrize("n", [3, 9])
def test_no_values_beyond_the_order(n):
    assert spectrum(power_law(n), n).values.shape == (n,)


def test_products_of_the_start_are_counted():
    counts = spectrum(power_law(), 5, max_iterations=0).counts
    assert counts.iterations == 0 and counts.preconditioner_products == 6
