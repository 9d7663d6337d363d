"""Pencil: arguments, and certificates against their definitions in float64."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from sst_kernels.operators import Diagonal, Kronecker
from sst_kernels.pencil import Pencil
from sst_kernels.structured import FunctionOperator, LowRankPlusDiagonal

DTYPES = [np.float32, np.float64, np.complex64, np.complex128]


def test_backward_error_of_planted_residuals(random_pencil):
    """An exact pair plus a known perturbation has the η that the definition gives."""
    a, b = random_pencil(33)
    w, v = scipy.linalg.eigh(a, b)
    rng = np.random.default_rng(1)
    v = v + 1e-3 * rng.standard_normal(v.shape)
    residual = np.linalg.norm(a @ v - b @ v * w, axis=0)
    size = np.linalg.norm(a, 2) + np.abs(w) * np.linalg.norm(b, 2)
    expected = residual / (size * np.linalg.norm(v, axis=0))
    pencil = Pencil(torch.from_numpy(a), torch.from_numpy(b))
    found = pencil.backward_errors(torch.from_numpy(w), torch.from_numpy(v)).numpy()
    assert (found >= expected * (1 - 1e-10)).all()  # norms are estimated from below
    assert (found <= expected * 1.5).all()


@pytest.mark.parametrize("power", [-480, 480])
def test_certificates_do_not_depend_on_scale(random_pencil, power):
    a, b = (torch.from_numpy(x) for x in random_pencil(10))
    w, v = (torch.from_numpy(x) for x in scipy.linalg.eigh(a.numpy(), b.numpy()))
    v = v + 1e-3
    up, down = 2.0**power, 2.0**-power
    plain, scaled = Pencil(a, b), Pencil(a * up, b * down)
    w2, v2 = w * up / down, v * 2.0 ** (power // 2)
    assert torch.equal(plain.backward_errors(w, v), scaled.backward_errors(w2, v2))
    assert torch.equal(plain.b_orthogonality(v), scaled.b_orthogonality(v2))


def test_b_orthogonality_is_the_largest_entry(random_pencil):
    a, b = random_pencil(7)
    v = np.random.default_rng(0).standard_normal((7, 3))
    found = Pencil(torch.from_numpy(a), torch.from_numpy(b)).b_orthogonality(torch.from_numpy(v))
    assert found.item() == pytest.approx(np.abs(v.T @ b @ v - np.eye(3)).max(), rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [0, 70])
@pytest.mark.parametrize("strides", ["rows", "columns", "shared"])
def test_certificates_of_large_pencils(random_pencil, dtype, power, strides):
    """Read where they are stored, NaN above the diagonal, whatever their size (2⁷⁰ squared overflows in float32)."""
    n, k = 300, 5
    a, b = (torch.from_numpy(np.stack([random_pencil(n, seed=seed)[i] for seed in range(2)])) for i in range(2))
    if strides == "shared":
        b = b[0]
    w, v = torch.rand(2, k).double() + 1, torch.randn(2, n, k).double()
    unit = v / torch.linalg.vector_norm(v, dim=-2, keepdim=True)
    size = torch.linalg.matrix_norm(a, 2)[:, None] + w * torch.linalg.matrix_norm(b, 2).reshape(-1, 1)
    expected = torch.linalg.vector_norm(a @ unit - b @ unit * w[:, None, :], dim=-2) / size
    gram = (v.mT @ b @ v - torch.eye(k)).abs().amax((-2, -1))
    above = torch.ones(n, n).triu(1) == 1
    a, b, w, v = (x.to(dtype) for x in (a * 2.0**power, b * 2.0**power, w, v * 2.0 ** -(power // 2)))
    if strides == "columns":
        v = v.mT.contiguous().mT
    pencil = Pencil(a.masked_fill(above, torch.nan), b.masked_fill(above, torch.nan))
    errors, orthogonality = pencil.certificates(w, v)
    assert torch.equal(errors, pencil.backward_errors(w, v))
    assert torch.equal(orthogonality, pencil.b_orthogonality(v))
    rounding = n * torch.finfo(dtype).eps
    assert (errors >= expected * (1 - rounding)).all() and (errors <= expected * 1.5).all()
    torch.testing.assert_close(orthogonality.double(), gram, rtol=rounding, atol=0)


def test_zero_pencil_has_zero_backward_error():
    pencil = Pencil(torch.zeros(3, 3), torch.eye(3))
    assert torch.equal(pencil.backward_errors(torch.zeros(3), torch.eye(3)), torch.zeros(3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 33])
def test_count_above_between_all_eigenvalues(random_pencil, dtype, n):
    a, b = random_pencil(n, dtype)
    w = scipy.linalg.eigvalsh(a, b)
    between = np.concatenate([[w[0] - 1], (w[1:] + w[:-1]) / 2, [w[-1] + 1]])
    batch = Pencil(torch.from_numpy(a).expand(n + 1, n, n), torch.from_numpy(b))
    counts = batch.count_above(torch.from_numpy(between))
    assert counts.tolist() == list(range(n, -1, -1))


def test_count_above_a_number(random_pencil):
    a, b = (torch.from_numpy(x) for x in random_pencil(9))
    middle = float(scipy.linalg.eigvalsh(a, b)[5:7].mean())
    a, b = torch.stack([a, -a]), b.expand(2, 9, 9)
    pencil = Pencil(a, b)
    assert pencil.count_above(middle)[0] == 3
    assert torch.equal(pencil.count_above(middle), pencil.count_above(torch.full((2,), middle)))
    with pytest.raises(ValueError, match=r"count_above: batch dimensions of t and operator must broadcast"):
        pencil.count_above(torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_what_is_not_hermitian_is_found_on_request(random_pencil, dtype):
    a, b = (torch.from_numpy(x).to(dtype).repeat(2, 3, 1, 1) for x in random_pencil(40))
    rounded = a * (1 + torch.finfo(dtype).eps * torch.rand(a.shape, dtype=dtype.to_real()).tril())
    for fine in (Pencil(rounded, b), Pencil(Kronecker(a, b)), Pencil(FunctionOperator(a.matmul, a.shape, dtype), b)):
        fine.check_hermitian()
    Pencil(0 * a, b * torch.nan).check_hermitian()  # solve says what is wrong with these
    skew = b.clone()
    skew[1, 2, 0, 7] += 1e-3
    with pytest.raises(ValueError, match=r"B must be Hermitian, got max \|M - Mᴴ\| = .* in its Dense \(1, 2\), with"):
        Pencil(a, skew).check_hermitian()
    core = torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=dtype)
    for operator, part in (
        (Kronecker(a, skew), "Dense"),
        (FunctionOperator(skew.matmul, skew.shape, dtype), "FunctionOperator"),
        (LowRankPlusDiagonal(b[0, 0, :, :2], b[0, 0].diagonal(), core), "LowRankPlusDiagonal"),
    ):
        with pytest.raises(ValueError, match=f"A must be Hermitian.* in its {part}"):
            Pencil(operator).check_hermitian()


def test_identity_is_the_default():
    a = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    assert isinstance(Pencil(a).B, Diagonal)
    assert isinstance(Pencil(Kronecker(a, a)).B, Kronecker)
    assert torch.equal(Pencil(a).dense()[1], torch.eye(2))


def test_batches_broadcast():
    pencil = Pencil(torch.zeros(3, 1, 4, 4), torch.zeros(2, 4, 4))
    assert pencil.batch_shape == (3, 2)
    assert [tuple(x.shape) for x in pencil.dense()] == [(3, 2, 4, 4)] * 2


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"B must be of the order of A, got A \(2, 2\) and B \(3"):
        Pencil(torch.zeros(2, 2), torch.zeros(3, 3))
    with pytest.raises(TypeError, match=r"A and B must have one dtype"):
        Pencil(torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"batch dimensions of A and B must broadcast"):
        Pencil(torch.zeros(2, 2, 2), torch.zeros(3, 2, 2))
    with pytest.raises(ValueError, match=r"A and B must be on one device"):
        Pencil(torch.zeros(2, 2), torch.zeros(2, 2, device="meta"))
    with pytest.raises(TypeError, match=r"Pencil: A must be a torch\.Tensor or an Operator"):
        Pencil(np.eye(2))
