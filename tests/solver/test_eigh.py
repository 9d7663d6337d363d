"""`eigh` against scipy.linalg.eigh: its own tests, its meaning, batches, gradients."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse
import torch

from sst_kernels.eigh import eigh

DTYPES = [np.float32, np.float64, np.complex64, np.complex128]


RUN_SCIPYS_TESTS = """
import sys
import pytest
from scipy.linalg.tests import test_decomp
from sst_kernels.eigh import eigh

def ours(*args, **options):
    ours.calls += 1
    return eigh(*args, **options)

ours.calls = 0
test_decomp.eigh = ours
code = pytest.main(["-q", "-p", "no:cacheprovider", test_decomp.__file__ + "::TestEigh"])
sys.exit(code or ours.calls < 40)
"""


def test_scipys_own_tests_pass_whole(tmp_path):
    """TestEigh of the installed scipy with our function in place of its own.

    In a process of its own, where scipy's conftest declares the marks that its tests carry.
    """
    command = [sys.executable, "-c", RUN_SCIPYS_TESTS]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout
    assert "skipped" not in run.stdout and "failed" not in run.stdout


def check(a, b, w, v, *, problem: int = 1) -> None:
    """The residual of each problem type, and scipy's normalisation, relative to their terms."""
    dtype = np.promote_types(a.dtype, np.float64)
    a, b, v = (x.astype(dtype) for x in (a, b, v))
    left, right = {1: (a, b), 2: (a @ b, np.eye(len(a))), 3: (b @ a, np.eye(len(a)))}[problem]
    gram = v.conj().T @ (np.linalg.inv(b) if problem == 3 else b) @ v
    tolerance = 100 * len(a) * np.finfo(w.dtype).eps * np.linalg.cond(b)
    size = np.linalg.norm(left) + np.abs(w).max() * np.linalg.norm(right)
    assert np.linalg.norm(left @ v - right @ v * w) <= tolerance * size * np.linalg.norm(v)
    assert np.abs(gram - np.eye(v.shape[1])).max() <= tolerance


@pytest.mark.parametrize("problem", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 33, 100])
def test_generalized(random_pencil, device, n, dtype, problem):
    a, b = random_pencil(n, dtype, cond=10)
    w, v = (x.numpy(force=True) for x in eigh(*(torch.from_numpy(x).to(device) for x in (a, b)), type=problem))
    expected = scipy.linalg.eigh(a, b, eigvals_only=True, type=problem)
    assert w.dtype == expected.dtype and v.dtype == dtype
    np.testing.assert_allclose(w, expected, atol=100 * n * np.finfo(dtype).eps * np.abs(expected).max())
    check(a, b, w, v, problem=problem)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lower", [True, False])
def test_only_one_triangle_is_read(random_pencil, dtype, lower):
    a, b = random_pencil(7, dtype)
    keep = np.tri(7, dtype=bool) if lower else np.tri(7, dtype=bool).T
    half = [np.where(keep, x, dtype(99)) for x in (a, b)]
    w, v = eigh(*half, lower=lower)
    np.testing.assert_allclose(w, scipy.linalg.eigvalsh(a, b), rtol=1e-3)
    check(a, b, w, v)
    poisoned = [np.where(keep, x, dtype(np.nan)) for x in (a, b)]
    np.testing.assert_array_equal(eigh(*poisoned, lower=lower, check_finite=False)[0], w)


def test_standard_problem_with_and_without_vectors(random_pencil):
    a, _ = random_pencil(12)
    w, v = eigh(a)
    np.testing.assert_allclose(w, scipy.linalg.eigvalsh(a), atol=1e-13)
    np.testing.assert_allclose(a @ v, v * w, atol=1e-13)
    np.testing.assert_allclose(eigh(a, eigvals_only=True), w, atol=1e-13)


@pytest.mark.parametrize("values_only", [False, True])
def test_subset_by_index(random_pencil, values_only):
    a, b = random_pencil(9)
    expected = scipy.linalg.eigh(a, b, subset_by_index=[2, 5], eigvals_only=True)
    found = eigh(a, b, subset_by_index=[2, 5], eigvals_only=values_only)
    np.testing.assert_allclose(found if values_only else found[0], expected, rtol=1e-11)
    if not values_only:
        assert found[1].shape == (9, 4)
        check(a, b, *found)


def test_subset_by_value_is_half_open():
    a = np.diag([3.0, 1.0, 2.0, 5.0])
    w, v = eigh(a, subset_by_value=[1.0, 3.0])
    assert w.tolist() == [2.0, 3.0] == scipy.linalg.eigh(a, subset_by_value=[1, 3])[0].tolist()
    assert np.abs(v).argmax(0).tolist() == [2, 0]
    assert eigh(a, subset_by_value=[6, np.inf])[1].shape == (4, 0)


def test_subset_by_value_in_a_batch_needs_equal_counts():
    a = torch.stack([torch.diag(torch.tensor(d)) for d in ([1.0, 2.0, 3.0], [4.0, 2.5, 0.0])])
    w, v = eigh(a, subset_by_value=[1.5, 3.0 - 1e-3])
    assert w.tolist() == [[2.0], [2.5]] and v.shape == (2, 3, 1)
    with pytest.raises(ValueError, match=r"equally many pairs.*got \[1, 2\]"):
        eigh(a, subset_by_value=[1.5, 3.0])


def test_kind_and_device_of_input_are_kept(random_pencil, device):
    a, b = random_pencil(4, np.float32)
    assert all(isinstance(x, np.ndarray) for x in eigh(a.tolist(), b.tolist()))
    assert eigh(a.tolist())[0].dtype == np.float64
    w, v = eigh(*(torch.from_numpy(x).to(device) for x in (a, b)))
    assert w.device.type == v.device.type == device.type
    assert w.dtype == torch.float32


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (np.float32, np.float64, np.float64),
        (np.float64, np.complex64, np.complex128),
        (np.int32, np.float32, np.float64),
    ],
)
def test_dtypes_are_promoted(first, second, expected):
    a, b = np.eye(2, dtype=first), np.eye(2, dtype=second)
    for found in (eigh(a, b), eigh(torch.from_numpy(a), torch.from_numpy(b))):
        assert torch.as_tensor(found[1]).numpy().dtype == expected


def test_arrays_from_anywhere(random_pencil):
    """Negative strides, Fortran order, another byte order, read-only memory."""
    a, b = random_pencil(5)
    expected = scipy.linalg.eigvalsh(a, b)
    a2, b2 = a[::-1, ::-1], np.asfortranarray(b)[::-1, ::-1]
    np.testing.assert_allclose(eigh(a2, b2, eigvals_only=True), expected, rtol=1e-11)
    b3 = b.astype(">f8")
    b3.flags.writeable = False
    np.testing.assert_allclose(eigh(a.astype(">f8"), b3, eigvals_only=True), expected, rtol=1e-11)


def test_batches_broadcast_and_match_one_by_one(random_pencil, device):
    pairs = [random_pencil(6, seed=seed) for seed in range(6)]
    a, b = (torch.from_numpy(np.stack(x)).to(device) for x in zip(*pairs, strict=True))
    w, v = eigh(a[:3, None], b[:2])
    assert w.shape == (3, 2, 6) and v.shape == (3, 2, 6, 6)
    for i in range(3):
        for j in range(2):
            check(*(x.numpy(force=True) for x in (a[i], b[j], w[i, j], v[i, j])))


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 4, 4), (0, 0), (3, 0, 0)])
def test_empty(shape):
    w, v = eigh(torch.zeros(shape), torch.zeros(shape))
    assert w.shape == shape[:-1] and v.shape == shape
    assert eigh(torch.zeros(shape), eigvals_only=True).shape == shape[:-1]


def test_a_single_bad_pencil_raises_what_scipy_and_torch_users_catch(random_pencil):
    a, b = random_pencil(4)
    for caught in (np.linalg.LinAlgError, scipy.linalg.LinAlgError, torch.linalg.LinAlgError):
        for convert in (np.asarray, torch.from_numpy):
            with pytest.raises(caught, match=r"B is not positive definite; add damping"):
                eigh(convert(a), convert(-b))
    a[0, 3] = np.nan
    with pytest.raises(ValueError, match=r"must not contain infs or NaNs"):
        eigh(a, b)


def test_bad_pencils_of_a_batch_are_blank_and_named_once(random_pencil):
    pairs = [random_pencil(4, seed=seed) for seed in range(4)]
    a, b = (np.stack(x) for x in zip(*pairs, strict=True))
    b[1] *= -1
    a[2, 0, 3] = np.inf  # in the triangle that is not read: checked all the same, as scipy does
    with pytest.warns(RuntimeWarning) as caught:
        w, v = eigh(a, b)
    assert len(caught) == 1
    assert "(1,) (B is not positive" in str(caught[0].message)
    assert "(2,) (NaN or infinity" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert np.isnan(w[1:3]).all() and np.isnan(v[1:3]).all()
    for i in (0, 3):
        check(a[i], b[i], w[i], v[i])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eigh(a[::3], b[::3])


def test_inputs_are_kept_even_when_overwriting_is_allowed(random_pencil):
    a, b = random_pencil(5)
    kept = a.copy(), b.copy()
    eigh(a, b, overwrite_a=True, overwrite_b=True)
    np.testing.assert_array_equal(a, kept[0])
    np.testing.assert_array_equal(b, kept[1])


EYE = torch.eye(3)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: eigh(EYE.half()), TypeError, r"a must be float32.*float16; convert with \.float"),
        (lambda: eigh(EYE.bfloat16()), TypeError, r"got torch\.bfloat16"),
        (lambda: eigh(np.eye(3, dtype=np.float16)), TypeError, r"got float16; convert with \.ast"),
        (lambda: eigh(np.eye(3, dtype=np.longdouble)), TypeError, r"convert with \.astype"),
        (lambda: eigh(EYE, np.eye(3)), TypeError, r"both be tensors or neither, got Tensor and nd"),
        (lambda: eigh(scipy.sparse.eye(3)), ValueError, r"make sparse matrices dense"),
        (lambda: eigh(np.ma.masked_invalid(np.eye(3))), ValueError, r"masked array"),
        (lambda: eigh(torch.zeros(3)), ValueError, r"a must be square, \(\.\.\., n, n\), got \(3"),
        (lambda: eigh(EYE, torch.zeros(3, 2)), ValueError, r"b must be square.*got \(3, 2\)"),
        (lambda: eigh(EYE, torch.eye(2)), ValueError, r"b must be of the order of a, got a \(3"),
        (lambda: eigh(EYE, EYE.to("meta")), ValueError, r"a and b must be on one device"),
        (lambda: eigh(EYE.expand(2, 3, 3), EYE.expand(4, 3, 3)), ValueError, r"must broadcast"),
        (lambda: eigh(EYE, EYE, type=4), ValueError, r"type must be 1, 2 or 3, got 4"),
        (lambda: eigh(EYE, driver="gv"), ValueError, r"'evr', 'evx'\) without b, got 'gv'"),
        (lambda: eigh(EYE, EYE, driver="ev"), ValueError, r"'gvx'\) with b, got 'ev'"),
        (lambda: eigh(EYE, subset_by_index=[1, 3]), ValueError, r"hi < n = 3, got \[1, 3\]"),
        (lambda: eigh(EYE, subset_by_value=[2, 1]), ValueError, r"lo < hi, got \[2, 1\]"),
    ],
)
def test_arguments_are_checked(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("problem", [1, 2, 3])
def test_gradients(random_pencil, problem):
    """First and second order, through symmetrised arguments and a loss that no sign can change."""
    a, b = (torch.from_numpy(x).requires_grad_() for x in random_pencil(4))

    def outputs(x: torch.Tensor, y: torch.Tensor):
        w, v = eigh((x + x.mT) / 2, (y + y.mT) / 2, type=problem, subset_by_index=[1, 3])
        return w, (v * w) @ v.mT

    assert torch.autograd.gradcheck(outputs, (a, b))
    assert torch.autograd.gradgradcheck(outputs, (a, b), atol=1e-3, rtol=1e-4)


def test_gradient_of_complex_values(random_pencil):
    a, b = (torch.from_numpy(x).requires_grad_() for x in random_pencil(4, np.complex128))

    def values(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return eigh((x + x.mH) / 2, (y + y.mH) / 2, eigvals_only=True)

    assert torch.autograd.gradcheck(values, (a, b))
