"""Operators against explicit matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sst_kernels.operators import Dense, Diagonal, Kronecker, scale_by_power

F64 = torch.float64


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Small integers, so that float32 sums are exact."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-4, 5, shape)).double()


def symmetric(*shape: int, seed: int = 0) -> torch.Tensor:
    lower = integers(*shape, shape[-1], seed=seed).tril()
    return lower + lower.tril(-1).mT


CASES = {
    "dense": (Dense(symmetric(5)), symmetric(5)),
    "dense batch": (Dense(symmetric(2, 3, 5)), symmetric(2, 3, 5)),
    "diagonal": (Diagonal(integers(3, 6)), torch.diag_embed(integers(3, 6))),
    "kronecker": (
        Kronecker(symmetric(3), symmetric(4, seed=1)),
        torch.kron(symmetric(3), symmetric(4, seed=1)),
    ),
    "kronecker batch": (
        Kronecker(symmetric(2, 3), symmetric(4, seed=1)),
        torch.stack([torch.kron(p, symmetric(4, seed=1)) for p in symmetric(2, 3)]),
    ),
    "kronecker of three": (
        Kronecker(symmetric(2), Kronecker(Diagonal(integers(3)), symmetric(2, seed=1))),
        torch.kron(symmetric(2), torch.kron(torch.diag(integers(3)), symmetric(2, seed=1))),
    ),
}


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest):
    return CASES[request.param]


def test_matrix_and_its_parts(case):
    operator, matrix = case
    assert operator.shape == matrix.shape
    assert operator.batch_shape == matrix.shape[:-2]
    assert operator.n == matrix.shape[-1]
    assert operator.dtype == F64 and operator.device.type == "cpu"
    assert torch.equal(operator.to_dense(), matrix)
    assert torch.equal(operator.diagonal(), matrix.diagonal(dim1=-2, dim2=-1))
    assert torch.equal(operator.trace(), matrix.diagonal(dim1=-2, dim2=-1).sum(-1))


@pytest.mark.parametrize("columns", [0, 1, 3])
def test_product(case, columns):
    operator, matrix = case
    x = integers(operator.n, columns, seed=2)
    assert torch.equal(operator @ x, matrix @ x)
    batched = x.expand(*operator.batch_shape, *x.shape) + integers(*operator.batch_shape, 1, 1, seed=3)
    assert torch.equal(operator @ batched, matrix @ batched)


def test_identity_keeps_structure(case):
    operator, matrix = case
    identity = operator.identity()
    assert isinstance(identity, Kronecker) == isinstance(operator, Kronecker)
    assert torch.equal(identity.to_dense(), torch.eye(operator.n, dtype=F64).expand_as(matrix))


def test_norm_is_never_above_the_spectral_norm_and_close(case):
    operator, matrix = case
    true = torch.linalg.matrix_norm(matrix, ord=2)
    assert (operator.norm() <= true * (1 + 1e-14)).all()
    assert (operator.norm() >= 0.7 * true).all()


@pytest.mark.parametrize("power", [-900, -3, 0, 7, 900])
def test_normalized_is_exact(case, power):
    operator, matrix = case
    scale = torch.tensor(float(power), dtype=F64).exp2()
    if isinstance(operator, Kronecker):
        scaled = Kronecker(Dense(operator.left.to_dense() * scale), operator.right)
    else:
        scaled = Dense(matrix * scale)
    small, exponent = scaled.normalized()
    assert (exponent % 2 == 0).all()
    assert ((small.to_dense().abs() <= 1).all()) and small.norm().min() > 1 / 64
    assert torch.equal(scale_by_power(small.to_dense(), exponent[..., None, None]), matrix * scale)


def test_row_major_vec_convention():
    p, q, c = symmetric(3), symmetric(4, seed=1), integers(3, 4, seed=2)
    result = Kronecker(p, q) @ c.flatten()[:, None]
    assert torch.equal(result[:, 0], (p @ c @ q.T).flatten())


def test_dense_reads_the_lower_triangle_only():
    matrix = symmetric(5)
    poisoned = matrix.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), torch.nan)
    assert torch.equal(Dense(poisoned).to_dense(), matrix)
    assert torch.equal(Dense(poisoned) @ torch.eye(5, dtype=F64), matrix)


def test_complex_dense_is_hermitian_with_a_real_diagonal():
    x = torch.complex(integers(4, 4), integers(4, 4, seed=1))
    full = Dense(x).to_dense()
    assert torch.equal(full, full.mH)
    assert torch.equal(full.tril(-1), x.tril(-1))
    assert torch.equal(full.diagonal(), x.diagonal().real.to(x.dtype))


def test_strided_matrices():
    base = integers(2, 7, 14)
    strided = base[:, :5, ::2][:, :, :5]
    assert torch.equal(Dense(strided).to_dense(), Dense(strided.contiguous()).to_dense())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_dtypes_without_the_digits_are_refused_with_advice(dtype):
    with pytest.raises(TypeError, match=r"matrix must be float32.*got torch\.\w+; convert with"):
        Dense(torch.zeros(2, 2, dtype=dtype))
    with pytest.raises(TypeError, match=r"entries must be float32"):
        Diagonal(torch.zeros(2, dtype=dtype))


def test_shapes_and_types_are_checked():
    with pytest.raises(ValueError, match=r"Dense: matrix must be square.*got \(2, 3\)"):
        Dense(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"entries must be \(\.\.\., n\)"):
        Diagonal(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"Kronecker: left must be a torch\.Tensor or an Operator"):
        Kronecker([[1.0]], torch.eye(2))
    with pytest.raises(TypeError, match=r"one dtype, got torch\.float32 and torch\.float64"):
        Kronecker(torch.eye(2), torch.eye(2, dtype=F64))
    with pytest.raises(ValueError, match=r"left and right must broadcast, got \(2, 3, 3\) and"):
        Kronecker(torch.zeros(2, 3, 3), torch.zeros(3, 4, 4))
