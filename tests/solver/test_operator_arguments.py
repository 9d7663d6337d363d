"""What operators refuse, and what a callable may do wrong."""

from __future__ import annotations

import pytest
import torch

from sst_kernels.combined import Damped, Scaled, Sum
from sst_kernels.operators import Dense, Diagonal
from sst_kernels.structured import EKFAC, FunctionOperator, Gram, LowRankPlusDiagonal

F64 = torch.float64
E2, E3 = torch.eye(2), torch.eye(3)


def callable_returning(y: object) -> FunctionOperator:
    return FunctionOperator(lambda _: y, (3, 3), torch.float32)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: EKFAC(E2, E3, torch.zeros(3, 2)), ValueError, r"entries must be .*\(\.\.\., 2, 3\).*got \(3, 2\)"),
        (lambda: EKFAC(E2, torch.zeros(2, 3), torch.zeros(2, 3)), ValueError, r"right_vectors must be square"),
        (lambda: EKFAC(E2, E3.double(), torch.zeros(2, 3)), TypeError, r"one dtype, got torch\.float32 and torch\.fl"),
        (lambda: EKFAC(E2, E3.expand(2, 3, 3), torch.zeros(4, 2, 3)), ValueError, r"must broadcast, got"),
        (lambda: EKFAC(E2, E3, torch.zeros(2, 3, device="meta")), ValueError, r"must be on one device, got cpu and m"),
        (lambda: Gram(torch.zeros(3)), ValueError, r"rows must be \(\.\.\., N, n\), got \(3,\)"),
        (lambda: Gram(E3, 0), ValueError, r"count must be positive, got 0"),
        (lambda: Gram(E3, float("nan")), ValueError, r"count must be positive, got nan"),
        (lambda: Gram(E3, "3"), TypeError, r"count must be a number or a real torch\.Tensor, got str"),
        (lambda: Gram(E3.expand(2, 3, 3), torch.ones(4)), ValueError, r"batch dimensions of count and operator"),
        (lambda: Gram(E3.half()), TypeError, r"rows must be float32"),
        (lambda: LowRankPlusDiagonal(E3, torch.ones(2)), ValueError, r"factor must be .*got \(3, 3\) and \(2,\)"),
        (lambda: LowRankPlusDiagonal(E3, torch.ones(3), E2), ValueError, r"core must be .*r = 3.*got \(2, 2\)"),
        (lambda: Scaled(E3, 1j), TypeError, r"scale must be a number or a real"),
        (
            lambda: Scaled(E3, torch.ones(2, dtype=torch.complex64)),
            TypeError,
            r"scale must be real, got torch\.complex",
        ),
        (lambda: Scaled(E3, torch.ones(2, device="meta")), ValueError, r"scale must be on the operator's device cpu"),
        (lambda: Scaled([1.0], 2), TypeError, r"Scaled: operator must be a torch\.Tensor or an Operator, got list"),
        (lambda: Damped(E3, -1e-3), ValueError, r"damping must be >= 0, got -0\.001"),
        (lambda: Damped(E3, float("nan")), ValueError, r"damping must be >= 0, got nan"),
        (lambda: Damped(E3.expand(2, 3, 3), torch.ones(3)), ValueError, r"damping and operator must broadcast"),
        (lambda: Sum([]), ValueError, r"terms must be a sequence of at least one operator"),
        (lambda: Sum(Dense(E3)), ValueError, r"terms must be a sequence"),
        (lambda: Sum([E3, E2]), ValueError, r"terms\[1\] must be of the order of terms\[0\]"),
        (lambda: Sum([E3, E3.double()]), TypeError, r"terms\[0\] and terms\[1\] must have one dtype"),
        (lambda: Sum([E3, None]), TypeError, r"Sum: terms\[1\] must be a torch\.Tensor or an Operator"),
        (lambda: FunctionOperator(E3, (3, 3), F64), TypeError, r"function must be callable, got Tensor"),
        (lambda: FunctionOperator(abs, (3, 2), F64), ValueError, r"shape must be \(\.\.\., n, n\), got \(3, 2\)"),
        (lambda: FunctionOperator(abs, 3, F64), ValueError, r"shape must be \(\.\.\., n, n\), got 3"),
        (lambda: Dense(E3.to_sparse()), TypeError, r"matrix must be strided, got torch\.sparse_coo; convert with"),
        (lambda: Diagonal(E3[0].to_sparse()), TypeError, r"entries must be strided"),
        (lambda: FunctionOperator(abs, (3, 3), torch.half), TypeError, r"dtype must be float32.*float16"),
        (
            lambda: FunctionOperator(abs, (3, 3), F64, "cpu", torch.ones(2, dtype=F64)),
            ValueError,
            r"diagonal must have shape \(3,\), got \(2,\)",
        ),
        (
            lambda: callable_returning(torch.zeros(3, 1)) @ E3,
            ValueError,
            r"returns must have shape \(3, 3\), got \(3, 1",
        ),
        (
            lambda: callable_returning(E3.double()) @ E3,
            ValueError,
            r"must have dtype torch\.float32, got torch\.float64",
        ),
        (lambda: callable_returning(E3.to("meta")) @ E3, ValueError, r"must have device cpu, got meta"),
        (lambda: callable_returning(None) @ E3, TypeError, r"must return a torch\.Tensor, got NoneType"),
    ],
)
def test_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_an_exception_in_a_callable_arrives_as_it_is():
    class OwnError(RuntimeError):
        pass

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise OwnError("out of coffee")

    operator = FunctionOperator(fail, (3, 3), torch.float32)
    for use in (lambda: operator @ E3, operator.norm, operator.to_dense, operator.normalized):
        with pytest.raises(OwnError, match="out of coffee"):
            use()


def test_a_callable_gets_the_whole_batch_and_chunks_of_the_identity():
    shapes = []

    def double(x: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(x.shape))
        return 2 * x

    operator = FunctionOperator(double, (2, 600, 600), F64)
    assert torch.equal(operator.to_dense(), 2 * torch.eye(600, dtype=F64).expand(2, 600, 600))
    assert torch.equal(operator.diagonal(), torch.full((2, 600), 2.0, dtype=F64))
    assert max(shape[-1] for shape in shapes) <= 256 and all(shape[:2] == (2, 600) for shape in shapes)


def test_has_diagonal_only_where_it_is_known():
    unknown = FunctionOperator(torch.clone, (3, 3), torch.float32)
    known = FunctionOperator(torch.clone, (3, 3), torch.float32, diagonal=torch.ones(3))
    assert known.has_diagonal and Damped(Scaled(known, 2), 1).has_diagonal and Sum([known, E3]).has_diagonal
    assert not (unknown.has_diagonal or Damped(unknown, 1).has_diagonal or Sum([E3, unknown]).has_diagonal)


def test_the_transpose_of_a_complex_operator_is_not_itself():
    operator = Diagonal(torch.ones(3, dtype=torch.complex64))
    assert operator.mH is operator
    with pytest.raises(TypeError, match=r"complex Diagonal is not the operator itself; use \.mH"):
        operator.mT  # noqa: B018


def test_norms_and_products_of_a_large_structured_operator_form_no_matrix():
    """n = 10⁶: one n × n matrix would take 4 TB."""
    n = 10**6
    rows = torch.zeros(2, n).index_fill(1, torch.tensor([7]), 3.0)
    gram, low_rank = Gram(rows), LowRankPlusDiagonal(rows.mT, torch.ones(n))
    ekfac = EKFAC(torch.eye(1000), torch.eye(1000), torch.full((1000, 1000), 4.0))
    for operator, norm in (
        (gram, 9.0),
        (low_rank, 19.0),
        (Damped(gram, 1.0), 10.0),
        (Scaled(gram, -2.0), 18.0),
        (Sum([gram, low_rank]), 28.0),
        (ekfac, 4.0),
    ):
        assert operator.norm().item() == pytest.approx(norm, rel=1e-3)
        assert operator.normalized()[0].norm() <= 64


def test_complex_structures_match_their_formulas():
    """Conjugations, which real matrices cannot show."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.complex128, generator=generator)

    u, w, j = torch.linalg.qr(draw(3, 3)).Q, torch.linalg.qr(draw(2, 2)).Q, draw(4, 6)
    d, core, f = torch.rand(3, 2, dtype=F64).to(j.dtype), draw(2, 2), draw(6, 2)
    core = core + core.mH
    uw = torch.kron(u, w)
    for operator, matrix in (
        (EKFAC(u, w, d), uw @ torch.diag(d.flatten()) @ uw.mH),
        (Gram(j), j.mH @ j / 4),
        (LowRankPlusDiagonal(f, d.flatten(), core), torch.diag(d.flatten()) + f @ core @ f.mH),
    ):
        x = draw(6, 3)
        torch.testing.assert_close(operator @ x, matrix @ x)
        torch.testing.assert_close(operator.to_dense(), matrix)
        torch.testing.assert_close(operator.diagonal(), matrix.diagonal().real.to(j.dtype))
        assert (
            0.7 * torch.linalg.matrix_norm(matrix, 2)
            <= operator.norm()
            <= 1.0000001 * torch.linalg.matrix_norm(matrix, 2)
        )
