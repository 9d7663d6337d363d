"""`solve(method="subset")`: the k largest pairs by tridiagonalisation, against scipy and planted spectra."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from sst_kernels import Pencil, Status, solve

GOOD = int(Status.CONVERGED | Status.VERIFIED)


def leading(a, b, k, tol=1e-13):
    """The op alone: a status of 0 where it leaves the pencil to another method."""
    return torch.ops.sst_kernels._leading_eigh(a, b, k, tol)


def planted(values, seed=0):
    """A with these eigenvalues beside a B of condition 100, and B, whose upper triangles hold NaN."""
    rng, n = np.random.default_rng(seed), len(values)
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    f = np.linalg.qr(rng.standard_normal((n, n)))[0] * np.linspace(1, 10, n)  # B = FᵀF, A = Fᵀ Q Λ Qᵀ F
    a, b = (torch.from_numpy((x + x.T) / 2) for x in (f.T @ (q * values) @ q.T @ f, f.T @ f))
    for x in (a, b):
        x[torch.ones(n, n).triu(1) == 1] = torch.nan
    return a, b


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 15, 16, 17, 33, 64, 70, 131])
def test_against_scipy(random_pencil, dtype, n):
    a, b = random_pencil(n)
    for k in sorted({1, (n + 3) // 4, n // 2, n} - {0}):
        result = solve(Pencil(*(torch.from_numpy(x).to(dtype) for x in (a, b))), k, method="subset")
        assert (result.method, result.status.item()) == ("subset", GOOD)
        eps, v = torch.finfo(dtype).eps, result.vectors.double().numpy()
        a1, b1 = (np.asarray(torch.from_numpy(x).to(dtype).double()) for x in (a, b))
        w = scipy.linalg.eigvalsh(a1, b1)[::-1]
        np.testing.assert_allclose(result.values, w[:k], rtol=0, atol=10 * n * eps * np.abs(w).max())
        assert np.abs(v.T @ b1 @ v - np.eye(k)).max() <= 10 * n * eps
        assert result.backward_errors.max() <= 10 * eps
        measured = np.linalg.norm(a1 @ v - b1 @ v * result.values.double().numpy(), axis=0) / np.linalg.norm(v, axis=0)
        size = np.linalg.norm(a1, 2) + np.abs(w[:k]) * np.linalg.norm(b1, 2)
        assert (measured <= size * (result.backward_errors.numpy() + eps / 8)).all()


@pytest.mark.parametrize("n", [40, 200])
def test_equal_eigenvalues_are_all_found(n):
    values = np.concatenate([[5.0] * 11, np.linspace(3, 2, 6), -np.ones(n - 17)])
    a, b = planted(values)
    result = solve(Pencil(a, b), 17, method="subset")
    assert (result.method, result.status.item()) == ("subset", GOOD)
    np.testing.assert_allclose(result.values, values[:17], rtol=1e-12)
    assert result.b_orthogonality < 1e-12


def test_cluster_at_k_is_left_to_the_whole_spectrum():
    a, b = planted(np.array([9.0, 5, 5, 1, 0.5, 0.1]))
    result = solve(Pencil(a, b), 2, method="subset")
    assert result.method != "subset"
    assert result.status.item() == Status.CONVERGED | Status.CLUSTER_AT_K


def test_verify_reaches_pencils_that_it_leaves():
    values = np.linspace(2, 1, 600)
    values[1] = values[2]
    a, b = planted(values)
    for verify in (None, True):
        result = solve(Pencil(a, b), 1, method="subset", verify=verify, tol=1e-13)
        assert result.status.item() & Status.VERIFIED
    left = solve(Pencil(a * 1e-60, b), 1, method="subset", verify=True)
    assert left.method == "dense" and left.status.item() & Status.VERIFIED


def test_batch_of_good_and_faulty_pencils():
    a, b = (torch.stack(x) for x in zip(*(planted(np.arange(20.0), seed) for seed in range(6)), strict=True))
    b[1, 7, 7] = -1
    a[2, 9, 3] = torch.inf
    a[3], b[3] = planted(np.repeat(np.arange(10.0), 2))
    b[4] *= 1e-120
    result = solve(Pencil(a.reshape(2, 3, 20, 20), b.reshape(2, 3, 20, 20)), 3)
    status = result.status.flatten().tolist()
    assert status[:3] == [GOOD, Status.NOT_POSITIVE_DEFINITE, Status.NON_FINITE]
    assert status[3:] == [Status.CONVERGED | Status.CLUSTER_AT_K, GOOD, GOOD]
    values, scale = result.values.reshape(6, 3), torch.tensor([1, 1, 1, 1, 1e120, 1], dtype=a.dtype)
    for i, expected in ((0, [19, 18, 17]), (3, [9, 9, 8]), (4, [19, 18, 17]), (5, [19, 18, 17])):
        np.testing.assert_allclose(values[i] / scale[i], expected, rtol=1e-11)
    assert values[1:3].isnan().all() and result.vectors.reshape(6, 20, 3)[1:3].isnan().all()
    alone = leading(a[5:], b[5:], 3)
    assert torch.equal(leading(a, b, 3)[1][5], alone[1][0])


def test_diagonal_and_split_matrices():
    """T falls apart where off-diagonal entries vanish."""
    d = torch.arange(1.0, 31, dtype=torch.float64)
    values, vectors, _, _, status = leading(d.diag(), torch.eye(30, dtype=torch.float64), 4)
    assert status.item() == GOOD
    np.testing.assert_allclose(values, [30, 29, 28, 27, 26], rtol=1e-14)
    np.testing.assert_allclose(vectors.abs(), torch.eye(30).flip(1)[:, :4], atol=1e-14)


def test_any_strides(random_pencil):
    a, b = (torch.from_numpy(x) for x in random_pencil(21))
    wide = torch.full((21, 60), torch.nan, dtype=a.dtype)
    wide[:, 1:43:2] = a
    plain, strided = leading(a, b, 5), leading(wide[:, 1:43:2], b.mT.contiguous().mT, 5)
    assert all(map(torch.equal, plain, strided))


def test_small_tolerance_is_kept(random_pencil):
    a, b = (torch.from_numpy(x) for x in random_pencil(12))
    assert leading(a, b, 3, 1e-20)[4].item() == 0
    assert solve(Pencil(a, b), 3, tol=1e-20).status.item() & Status.STAGNATED


def test_arguments_and_empty_batches():
    eye = torch.eye(4)
    with pytest.raises(ValueError, match=r"A and B must both be \(…, n, n\), got \(4, 4\) and \(3, 3\)"):
        leading(eye, eye[:3, :3], 1)
    with pytest.raises(ValueError, match=r"k must be in 1\.\.n with n = 4, got 5"):
        leading(eye, eye, 5)
    result = solve(Pencil(torch.empty(0, 4, 4)), 2)
    assert result.values.shape == (0, 2) and result.vectors.shape == (0, 4, 2)
