"""`solve(method="lapack")`: against planted spectra, which LAPACK's own are only the means to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pencils import FAULTS, SPECTRA, planted, with_fault

from sst_kernels import Pencil, Status, solve
from sst_kernels.choose import choose


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spectrum", sorted(SPECTRA))
@pytest.mark.parametrize("k", [1, 9, 10, 25, 40])
def test_planted_spectra(spectrum, dtype, k):
    """Both drivers, the change between them (k + 1 > n / 4) included; upper triangles hold NaN."""
    n = 40
    values = np.sort(SPECTRA[spectrum](n, np.random.default_rng(1)))[::-1]
    pair = [torch.from_numpy(x).to(dtype) for x in planted(values, 100.0, 3)[:2]]
    exact = [x.double().clone().numpy() for x in pair]
    for x in pair:
        x[torch.ones(n, n).triu(1) == 1] = torch.nan
    result = solve(Pencil(*pair), k, method="lapack")
    assert result.method == "lapack" and result.converged
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(result.values, values[:k], rtol=0, atol=100 * n * eps * np.abs(values).max())
    v = result.vectors.double().numpy()
    assert np.abs(v.T @ exact[1] @ v - np.eye(k)).max() <= 100 * n * eps
    assert result.b_orthogonality <= 100 * n * eps
    residual = exact[0] @ v - exact[1] @ v * result.values.double().numpy()
    assert np.abs(residual).max() <= 100 * n * eps * np.abs(values).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [20, 100])
@pytest.mark.parametrize("batch", [(), (1,), (2,)])
def test_certificates_of_large_pencils(dtype, k, batch):
    """Read where they are stored; both drivers."""
    n = 300
    values = 1 + np.arange(n)[::-1] / n
    a, b = (torch.from_numpy(x).to(dtype) for x in planted(values, 10.0, 3)[:2])
    exact = Pencil(a.double(), b.double())
    a, b = (x.masked_fill(torch.ones(n, n).triu(1) == 1, torch.nan).expand(*batch, n, n) for x in (a, b))
    result = solve(Pencil(a, b), k, method="lapack")
    assert result.method == "lapack" and result.converged.all()
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(result.values.reshape(-1, k)[0], values[:k], rtol=100 * eps)
    for w, v, errors, orthogonality in zip(
        *(x.reshape(-1, *x.shape[len(batch) :]) for x in (result.values, result.vectors, result.backward_errors)),
        result.b_orthogonality.reshape(-1),
        strict=True,
    ):
        true_errors, true_orthogonality = exact.certificates(w.double(), v.double())
        assert (errors - true_errors).abs().max() <= 2 * eps
        assert (orthogonality - true_orthogonality).abs() <= 20 * eps


def test_complex_hermitian():
    rng = np.random.default_rng(0)
    n, values = 30, np.arange(30.0)[::-1] - 9
    f, q = (x + 1j * y for x, y in rng.standard_normal((2, 2, n, n)))
    q = np.linalg.qr(q)[0]
    f = f + 10 * np.eye(n)
    a, b = f.conj().T @ (q * values) @ q.conj().T @ f, f.conj().T @ f
    a, b = ((x + x.conj().T) / 2 for x in (a, b))
    for k in (3, 20):
        result = solve(Pencil(torch.from_numpy(a), torch.from_numpy(b)), k, method="lapack")
        assert (result.method, result.status.item()) == ("lapack", Status.CONVERGED)
        np.testing.assert_allclose(result.values, values[:k], atol=1e-11)
        v = result.vectors.numpy()
        assert np.abs(a @ v - b @ v * values[:k]).max() < 1e-9 * np.abs(a).max()


def test_faults_in_a_batch_are_named_and_harm_no_other():
    values = 2.0 ** -np.arange(24)
    pairs = [planted(values, 10.0, seed)[:2] for seed in range(2)]
    pairs[1:1] = [with_fault(fault, *planted(values, 10.0, 7)[:2]) for fault in FAULTS]
    a, b = (torch.from_numpy(np.stack(x)) for x in zip(*pairs, strict=True))
    result = solve(Pencil(a[None], b[None]), 3, method="lapack", verify=True)
    good = int(Status.CONVERGED | Status.VERIFIED)
    status = result.status[0].tolist()
    assert status[1:-1] == list(FAULTS.values())
    assert status[0] & Status.CONVERGED and status[-1] & Status.CONVERGED
    assert {status[0], status[-1]} == {good}
    for i in (0, -1):
        np.testing.assert_allclose(result.values[0, i], values[:3], rtol=1e-13)
    assert result.values[0, 1:-1].isnan().all()


def test_cluster_at_k_is_seen_beside_a_large_negative_eigenvalue():
    """Rounding moves λ by eps·|λ|_max, which is not among the values that were asked for."""
    values = np.concatenate([[3.0, 2.0, 2.0 - 1e-9], np.linspace(1, 0.5, 36), [-1e8]])
    pencil = Pencil(*(torch.from_numpy(x) for x in planted(values, 10.0, 5)[:2]))
    assert solve(pencil, 2, method="lapack").status.item() & Status.CLUSTER_AT_K
    assert not solve(pencil, 1, method="lapack").status.item() & Status.CLUSTER_AT_K


def test_auto_takes_it_for_many_pairs_of_large_pencils():
    large = Pencil(torch.empty(1024, 1024), torch.empty(1024, 1024))
    assert [choose(large, k, "auto")[1] for k in (25, 64, 256)] == ["davidson", "subset", "lapack"]
    larger = Pencil(torch.empty(2048, 2048), torch.empty(2048, 2048))
    assert [choose(larger, k, "auto")[1] for k in (51, 64, 2048)] == ["davidson", "lapack", "lapack"]
    wanting = Pencil(torch.empty(2048, 2048, requires_grad=True), torch.empty(2048, 2048))
    assert choose(wanting, 64, "auto")[1] == "dense"
    with pytest.raises(ValueError, match=r"method 'lapack' does not fit"):
        solve(wanting, 64, method="lapack")


def test_views_and_tensors_that_require_gradients():
    a, b = (torch.from_numpy(x) for x in planted(np.arange(12.0), 10.0, 2)[:2])
    with torch.no_grad():
        result = solve(Pencil(a.requires_grad_(), b), 3, method="lapack")
    np.testing.assert_allclose(result.values, [11, 10, 9], rtol=1e-12)
    complex_a, complex_b = a.detach() + 0j, b + 0j
    complex_a[3, 1] += 0.5j
    complex_a[1, 3] -= 0.5j
    plain = solve(Pencil(complex_a, complex_b), 3, method="lapack")
    view = solve(Pencil(complex_a.conj(), complex_b), 3, method="lapack")
    torch.testing.assert_close(plain.values, view.values)
    assert (view.backward_errors < 1e-14).all()


def test_empty_batch():
    result = solve(Pencil(torch.empty(0, 5, 5)), 2, method="lapack")
    assert result.values.shape == (0, 2) and result.vectors.shape == (0, 5, 2)
