"""Operators written down for the compiled solver: every class on either side, in every batch, against `to_dense`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from sst_kernels.combined import Damped, Scaled, Sum
from sst_kernels.davidson import DavidsonOptions, davidson
from sst_kernels.operators import Dense, Diagonal, Kronecker, Operator
from sst_kernels.pencil import Pencil
from sst_kernels.program import Program
from sst_kernels.result import Status
from sst_kernels.structured import EKFAC, FunctionOperator, Gram, LowRankPlusDiagonal

N1, N2, N3 = 4, 5, 11
N = N1 * N2 * N3
Batch = tuple[int, ...]


class Make:
    """Random parts of operators of one batch shape and dtype."""

    def __init__(self, batch: Batch, dtype: torch.dtype, seed: int = 0) -> None:
        self.batch, self.dtype = batch, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn((*self.batch, *shape), generator=self.generator, dtype=torch.float64).to(self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        x = torch.rand((*self.batch, *shape), generator=self.generator, dtype=torch.float64)
        return (0.2 + x).to(self.dtype)

    def definite(self, n: int) -> Tensor:
        x = self.normal(n, n)
        return x @ x.mT / n + 0.3 * torch.eye(n, dtype=self.dtype)

    def orthogonal(self, n: int) -> Tensor:
        return torch.linalg.qr(self.normal(n, n))[0]

    def kronecker(self) -> Kronecker:
        return Kronecker(self.definite(N1), Kronecker(self.definite(N2), self.definite(N3)))

    def ekfac(self) -> EKFAC:
        return EKFAC(self.orthogonal(N1 * N2), self.orthogonal(N3), self.uniform(N1 * N2, N3))

    def low_rank(self) -> LowRankPlusDiagonal:
        return LowRankPlusDiagonal(self.normal(N, 6), self.uniform(N))

    def with_core(self) -> LowRankPlusDiagonal:
        return LowRankPlusDiagonal(self.normal(N, 6), self.uniform(N), self.definite(6))

    def function(self) -> FunctionOperator:
        matrix = self.definite(N)
        return FunctionOperator(lambda x: matrix @ x, matrix.shape, matrix.dtype, diagonal=matrix.diagonal(0, -2, -1))


def dense(spoil: Callable[[Tensor], Tensor]) -> Callable[[Make], Operator]:
    return lambda make: Dense(spoil(make.definite(N)))


def junk_above(x: Tensor) -> Tensor:
    return x.tril() + torch.full_like(x, torch.nan).triu(1)


def inside(x: Tensor) -> Tensor:
    """A window of a larger matrix, its rows two apart and not adjacent."""
    room = x.new_full((*x.shape[:-2], 2 * N + 1, N + 3), torch.nan)
    room[..., 1::2, 2:-1] = x
    return room[..., 1::2, 2:-1]


def gaps(x: Tensor) -> Tensor:
    room = x.new_full((*x.shape[:-1], 2 * N), torch.nan)
    room[..., ::2] = x
    return room[..., ::2]


KINDS: dict[str, Callable[[Make], Operator]] = {
    "Dense": dense(lambda x: x),
    "Dense, lower triangle": dense(junk_above),
    "Dense by columns": dense(lambda x: x.mT.contiguous().mT),
    "Dense, lower triangle by columns": dense(lambda x: junk_above(x).mT.contiguous().mT),
    "Dense in rows of a larger one": dense(inside),
    "Dense with gaps": dense(gaps),
    "Diagonal": lambda make: Diagonal(make.uniform(N)),
    "Diagonal with gaps": lambda make: Diagonal(make.uniform(2 * N)[..., ::2]),
    "Kronecker": lambda make: Kronecker(make.definite(N1 * N2), make.definite(N3)),
    "Kronecker of triangles": lambda make: Kronecker(junk_above(make.definite(N1 * N2)), junk_above(make.definite(N3))),
    "nested Kronecker": Make.kronecker,
    "Kronecker nested to the left": lambda make: Kronecker(
        Kronecker(make.definite(N1), Diagonal(make.uniform(N2))), make.definite(N3)
    ),
    "Kronecker of Diagonals": lambda make: Kronecker(Diagonal(make.uniform(N1 * N2)), Diagonal(make.uniform(N3))),
    "Kronecker of EKFAC and Gram": lambda make: Kronecker(
        EKFAC(make.orthogonal(N1), make.orthogonal(N2), make.uniform(N1, N2)), Damped(Gram(make.normal(7, N3)), 0.3)
    ),
    "Kronecker of a callable": lambda make: (
        lambda q: Kronecker(make.definite(N1 * N2), FunctionOperator(lambda x: q @ x, q.shape, q.dtype))
    )(make.definite(N3)),
    "Sum": lambda make: Sum([make.kronecker(), make.ekfac(), Diagonal(make.uniform(N)), make.low_rank()]),
    "Sum of one": lambda make: Sum([make.kronecker()]),
    "Scaled": lambda make: Scaled(make.kronecker(), make.uniform()),
    "Scaled Sum": lambda make: Scaled(Sum([make.kronecker(), Scaled(make.ekfac(), 0.5)]), 3.0),
    "Damped": lambda make: Damped(make.kronecker(), make.uniform()),
    "Damped twice": lambda make: Damped(Damped(make.function(), 0.1), make.uniform()),
    "EKFAC": Make.ekfac,
    "Gram": lambda make: Gram(make.normal(300, N)),
    "Gram of few rows, damped": lambda make: Damped(Gram(make.normal(9, N), 20 * make.uniform()), 0.2),
    "LowRankPlusDiagonal": Make.low_rank,
    "LowRankPlusDiagonal with core": Make.with_core,
    "FunctionOperator": Make.function,
}


def check(pencil: Pencil, k: int) -> None:
    """The operators as they are, without `simplified` before, against LAPACK in float64."""
    eps = torch.finfo(pencil.dtype).eps
    found = davidson(pencil, k, pencil.tolerance, 0, DavidsonOptions())
    assert (found.status & int(Status.NOT_POSITIVE_DEFINITE | Status.NON_FINITE | Status.MAX_ITERATIONS) == 0).all()
    assert found.values.dtype == found.vectors.dtype == pencil.dtype
    assert found.vectors.shape == (*pencil.batch_shape, N, k)
    a, b = (x.reshape(-1, N, N).double().numpy() for x in pencil.dense())
    values, vectors = (
        found.values.double().reshape(-1, found.values.shape[-1]),
        found.vectors.double().reshape(-1, N, k),
    )
    for i in range(len(a)):
        exact = scipy.linalg.eigvalsh(a[i], b[i])[::-1]
        condition = np.linalg.cond(b[i])
        w, v = values[i, :k].numpy(), vectors[i].numpy()
        size = (np.linalg.norm(a[i], 2) + w * np.linalg.norm(b[i], 2)) * np.linalg.norm(v, axis=0)
        assert (np.linalg.norm(a[i] @ v - b[i] @ v * w, axis=0) <= (pencil.tolerance + N * eps) * size).all()
        assert np.abs(v.T @ b[i] @ v - np.eye(k)).max() <= 30 * eps * condition
        np.testing.assert_allclose(w, exact[:k], rtol=50 * pencil.tolerance * condition)
    if found.errors is not None:
        assert (found.errors <= 10 * pencil.tolerance).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch_a", "batch_b"), [((), ()), ((3,), ()), ((), (2,)), ((2, 1), (3,))])
def test_every_operator_on_either_side(kind, batch_a, batch_b, dtype):
    op = KINDS[kind](Make(batch_a, dtype))
    other = Make(batch_b, dtype, seed=1)
    check(Pencil(op, Dense(other.definite(N))), 3)
    check(Pencil(Dense(other.definite(N)), op), 3)


@pytest.mark.parametrize("kind", KINDS)
def test_every_operator_on_both_sides(kind):
    check(Pencil(KINDS[kind](Make((2,), torch.float64)), KINDS[kind](Make((), torch.float64, seed=1))), 4)


def test_parts_of_unequal_batch_shapes():
    """U of no batch beside D (3, …), and so on: each part is broadcast by itself."""
    one, two, three = (Make(batch, torch.float64) for batch in ((), (2, 1), (3,)))
    check(Pencil(EKFAC(one.orthogonal(20), two.orthogonal(11), three.uniform(20, 11)), one.definite(N)), 2)
    check(Pencil(one.definite(N), LowRankPlusDiagonal(two.normal(N, 3), three.uniform(N), one.definite(3))), 2)
    check(Pencil(Gram(two.normal(9, N), 10 * three.uniform()), Kronecker(three.definite(20), two.definite(11))), 2)
    check(Pencil(Sum([two.kronecker(), Diagonal(three.uniform(N))]), Damped(one.kronecker(), two.uniform())), 2)
    check(Pencil(Scaled(one.kronecker(), two.uniform()), Scaled(three.function(), 2.0)), 2)


def test_operators_are_not_changed():
    make = Make((2,), torch.float64)
    parts = [make.definite(N), make.uniform(N), make.normal(9, N)]
    before = [x.clone() for x in parts]
    pencil = Pencil(Sum([Gram(parts[2]), Diagonal(parts[1])]), Dense(parts[0]))
    davidson(pencil, 3, pencil.tolerance, 0, DavidsonOptions())
    assert all(torch.equal(x, y) for x, y in zip(parts, before, strict=True))


def test_operators_of_other_classes_are_named():
    class Shift(Diagonal):
        pass

    class Odd(FunctionOperator):
        pass

    shift = Shift(torch.ones(3))
    assert Program(torch.Size()).encode(shift)  # a subclass is what its base is
    assert Program(torch.Size()).encode(Odd(lambda x: x, (3, 3), torch.float32))
    with pytest.raises(TypeError, match="does not know object; wrap it in a FunctionOperator"):
        Program(torch.Size()).encode(object())


def test_programs_have_handles_of_their_own():
    """Also beside one another, where one is entered while the other runs."""
    ops = [FunctionOperator(lambda x, i=i: x * i, (3, 3), torch.float64) for i in range(3)]
    programs = [Program(torch.Size()) for _ in ops]
    codes = [program.encode(op) for program, op in zip(programs, ops, strict=True)]
    assert len({code[1] for code in codes}) == 3
    x = torch.ones(1, 2, 3, dtype=torch.float64)
    with programs[0], programs[1], programs[2]:
        for i, code in enumerate(codes):
            assert torch.equal(torch.ops.sst_kernels._apply(x, code[1]), i * x)
    with pytest.raises(KeyError):
        torch.ops.sst_kernels._apply(x, codes[0][1])
