"""Operators against explicit matrices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from sst_kernels.combined import Damped, Scaled, Sum
from sst_kernels.operators import Dense, Diagonal, Kronecker, Operator
from sst_kernels.scaling import scale_by_power
from sst_kernels.structured import EKFAC, FunctionOperator, Gram, LowRankPlusDiagonal

F64 = torch.float64


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Small integers, so that float32 sums are exact."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-4, 5, shape)).double()


def symmetric(*shape: int, seed: int = 0) -> torch.Tensor:
    lower = integers(*shape, shape[-1], seed=seed).tril()
    return lower + lower.tril(-1).mT


def turn(n: int, seed: int = 0) -> torch.Tensor:
    """Signed permutation: an orthogonal matrix of integers."""
    rng = np.random.default_rng(seed)
    return torch.eye(n, dtype=F64)[torch.from_numpy(rng.permutation(n))] * torch.from_numpy(rng.choice([-1.0, 1.0], n))


def basis(n1: int, n2: int) -> torch.Tensor:
    return torch.kron(turn(n1), turn(n2, seed=1))


A5, B5, D5, J5, U5, C3 = (symmetric(5), symmetric(5, seed=1), integers(5), integers(4, 5), integers(5, 3), symmetric(3))
EIGEN = integers(3, 4, seed=5)

# name: (the operator times a scale, its matrix)
CASES: dict[str, tuple[Callable[[torch.Tensor], Operator], torch.Tensor]] = {
    "dense": (lambda c: Dense(c * A5), A5),
    "dense batch": (lambda c: Dense(c * symmetric(2, 3, 5)), symmetric(2, 3, 5)),
    "diagonal": (lambda c: Diagonal(c * integers(3, 6)), torch.diag_embed(integers(3, 6))),
    "kronecker": (
        lambda c: Kronecker(c * symmetric(3), symmetric(4, seed=1)),
        torch.kron(symmetric(3), symmetric(4, seed=1)),
    ),
    "kronecker batch": (
        lambda c: Kronecker(c * symmetric(2, 3), symmetric(4, seed=1)),
        torch.stack([torch.kron(p, symmetric(4, seed=1)) for p in symmetric(2, 3)]),
    ),
    "kronecker of three": (
        lambda c: Kronecker(symmetric(2), Kronecker(Diagonal(c * integers(3)), symmetric(2, seed=1))),
        torch.kron(symmetric(2), torch.kron(torch.diag(integers(3)), symmetric(2, seed=1))),
    ),
    "ekfac": (
        lambda c: EKFAC(turn(3), turn(4, seed=1), c * EIGEN),
        basis(3, 4) @ torch.diag(EIGEN.flatten()) @ basis(3, 4).T,
    ),
    "ekfac batch": (
        lambda c: EKFAC(turn(3), turn(4, seed=1).expand(2, 4, 4), c * EIGEN),
        (basis(3, 4) @ torch.diag(EIGEN.flatten()) @ basis(3, 4).T).expand(2, 12, 12),
    ),
    "gram": (lambda c: Gram(c.sqrt() * J5), J5.T @ J5 / 4),
    "gram of more rows, counted": (
        lambda c: Gram(c.sqrt() * integers(9, 5), 16),
        integers(9, 5).T @ integers(9, 5) / 16,
    ),
    "gram batch": (
        lambda c: Gram(c.sqrt() * J5, torch.tensor([2.0, 8.0])),
        torch.stack([J5.T @ J5 / 2, J5.T @ J5 / 8]),
    ),
    "low rank plus diagonal": (
        lambda c: LowRankPlusDiagonal(c.sqrt() * U5, c * D5, C3),
        torch.diag(D5) + U5 @ C3 @ U5.T,
    ),
    "low rank without core, batch": (
        lambda c: LowRankPlusDiagonal(c.sqrt() * U5, c * integers(2, 5)),
        torch.diag_embed(integers(2, 5)) + U5 @ U5.T,
    ),
    "scaled": (lambda c: Scaled(A5, c * torch.tensor([0.5, -4.0], dtype=F64)), torch.stack([A5 / 2, -4 * A5])),
    "damped": (lambda c: Damped(c * A5, c * 3), A5 + 3 * torch.eye(5)),
    "damped batch": (
        lambda c: Damped(c * A5, c * torch.tensor([1.0, 64.0], dtype=F64)),
        torch.stack([A5 + torch.eye(5), A5 + 64 * torch.eye(5)]),
    ),
    "sum": (
        lambda c: Sum([c * A5, Diagonal(c * D5), Gram(c.sqrt() * integers(2, 4, 5))]),
        A5 + torch.diag(D5) + integers(2, 4, 5).mT @ integers(2, 4, 5) / 4,
    ),
    "sum of one": (lambda c: Sum([Dense(c * A5)]), A5),
    "function": (lambda c: FunctionOperator(lambda x: c * (A5 @ x), (5, 5), F64), A5),
    "function batch": (
        lambda c: FunctionOperator(
            lambda x: (c * symmetric(2, 5)) @ x, (2, 5, 5), F64, "cpu", c * diagonals(symmetric(2, 5))
        ),
        symmetric(2, 5),
    ),
}


def diagonals(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest):
    make, matrix = CASES[request.param]
    return make(torch.ones((), dtype=F64)), matrix


def test_matrix_and_its_parts(case):
    operator, matrix = case
    assert operator.shape == matrix.shape
    assert operator.batch_shape == matrix.shape[:-2]
    assert operator.n == matrix.shape[-1]
    assert operator.dtype == F64 and operator.device.type == "cpu"
    assert torch.equal(operator.to_dense(), matrix)
    assert torch.equal(operator.diagonal().expand(matrix.shape[:-1]), diagonals(matrix))
    assert torch.equal(operator.trace().expand(matrix.shape[:-2]), diagonals(matrix).sum(-1))
    assert operator.mH is operator and operator.mT is operator


@pytest.mark.parametrize("columns", [0, 1, 3])
def test_product(case, columns):
    operator, matrix = case
    x = integers(operator.n, columns, seed=2)
    assert torch.equal(operator @ x, matrix @ x)
    batched = x.expand(*operator.batch_shape, *x.shape) + integers(*operator.batch_shape, 1, 1, seed=3)
    assert torch.equal(operator @ batched, matrix @ batched)
    more = integers(7, *[1] * len(operator.batch_shape), operator.n, columns)
    assert torch.equal(operator @ more, matrix @ more)


@pytest.mark.parametrize("name", [name for name in CASES if "function" not in name])
def test_products_and_norms_on_each_device(move, device, name):
    make, matrix = CASES[name]
    operator = move(make(torch.ones((), dtype=F64)))
    x = integers(operator.n, 3, seed=2)
    assert torch.equal((operator @ x.to(device)).cpu(), matrix @ x)
    assert torch.equal(operator.diagonal().cpu().expand(matrix.shape[:-1]), diagonals(matrix))
    small, exponent = operator.normalized()
    assert small.device.type == operator.norm().device.type == exponent.device.type == device.type


def test_identity_keeps_structure(case):
    operator, matrix = case
    identity = operator.identity()
    assert isinstance(identity, Kronecker) == isinstance(operator, Kronecker)
    assert torch.equal(identity.to_dense().expand_as(matrix), torch.eye(operator.n, dtype=F64).expand_as(matrix))


def test_norm_is_never_above_the_spectral_norm_and_close(case):
    operator, matrix = case
    true = torch.linalg.matrix_norm(matrix, ord=2)
    assert operator.norm().shape == true.shape
    assert (operator.norm() <= true * (1 + 1e-14)).all()
    assert (operator.norm() >= 0.7 * true).all()


@pytest.mark.parametrize("power", [-900, -4, 0, 8, 900])
@pytest.mark.parametrize("name", CASES)
def test_normalized_is_exact(name, power):
    make, matrix = CASES[name]
    scale = torch.tensor(float(power), dtype=F64).exp2()
    small, exponent = make(scale).normalized()
    assert (exponent % 2 == 0).all()
    assert (small.to_dense().abs() <= 8).all() and small.norm().min() > 1 / 64
    back = scale_by_power(small.to_dense(), exponent[..., None, None])
    assert torch.equal(back.expand_as(matrix), matrix * scale)


@pytest.mark.parametrize("kind", [Sum, Damped])
def test_a_zero_part_does_not_decide_the_exponent(kind):
    """Else the other part would be scaled out of range: 2⁻⁹⁰⁰ beside a zero of exponent 0."""
    tiny = A5 * 2.0**-900
    parts = Sum([Dense(0 * A5), Dense(tiny)]) if kind is Sum else Damped(Dense(tiny), 0.0)
    small, exponent = parts.normalized()
    assert small.norm() > 1 / 64
    assert torch.equal(scale_by_power(small.to_dense(), exponent), tiny)


@pytest.mark.parametrize("power", [-600, 600])
@pytest.mark.parametrize("kind", [LowRankPlusDiagonal, Damped, Sum])
def test_the_larger_part_decides_the_exponent(kind, power):
    other = torch.tensor(2.0**power, dtype=F64)
    operator = {
        LowRankPlusDiagonal: LowRankPlusDiagonal(U5, D5 * other),
        Damped: Damped(A5, other),
        Sum: Sum([A5, Diagonal(D5 * other)]),
    }[kind]
    small, exponent = operator.normalized()
    assert small.to_dense().abs().max() <= 8 and small.norm() > 1 / 64
    largest = scale_by_power(small.to_dense(), exponent).abs().max()
    assert largest == operator.to_dense().abs().max()


def test_apply_cost_counts_multiply_adds():
    """Against the products written out: two flops for each entry of every matrix that is applied."""
    ones = torch.ones((), dtype=F64)
    costs = {name: CASES[name][0](ones).apply_cost(7) for name in CASES}
    assert costs["dense"] == 2 * 5 * 5 * 7 == costs["function"]
    assert costs["kronecker"] == (2 * 9 * 4 + 2 * 16 * 3) * 7
    assert costs["ekfac"] == (2 * (2 * 9 * 4 + 2 * 16 * 3) + 12) * 7
    assert costs["gram"] == 2 * (2 * 4 * 5) * 7
    assert costs["low rank plus diagonal"] == (2 * (2 * 5 * 3) + 2 * 3 * 3 + 5) * 7
    assert costs["scaled"] == costs["damped"] == costs["dense"] + 2 * 5 * 7


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


@pytest.mark.parametrize(
    "batches", [((), ()), ((2,), (2,)), ((), (2, 3)), ((3,), (2, 3)), ((2, 3), (2, 3)), ((2, 3), ())]
)
def test_large_matrices_multiply_as_they_are_stored(batches):
    """By symm_thin, or formed where batches broadcast; integers, so exactly; in the end and in derivatives."""
    n = 260
    matrix, x = (torch.randint(-3, 4, (*batch, n, m)).double() for batch, m in zip(batches, (n, 2), strict=True))
    full = matrix.tril() + matrix.tril(-1).mT
    stored = (matrix.tril() + torch.full((n, n), torch.nan).triu(1).nan_to_num(7)).requires_grad_()
    y = Dense(stored) @ x.transpose(-1, -2).contiguous().mT
    assert torch.equal(y, full @ x)
    y.sum(0).sum().backward()
    outer = torch.ones_like(y) @ x.mT
    expected = (outer.tril() + outer.mT.tril(-1)).sum_to_size(matrix.shape)
    assert torch.equal(stored.grad, expected)


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
