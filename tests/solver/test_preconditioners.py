"""Inverses against dense float64 ones, faults, and preconditioners by the condition they leave."""

from __future__ import annotations

import pytest
import torch
from pencils import draw, positive

from sst_kernels.combined import Damped, Scaled, Sum
from sst_kernels.operators import Dense, Diagonal, Kronecker, Operator
from sst_kernels.preconditioners import _nearest_kronecker, factored_inverse, inverse, preconditioner
from sst_kernels.result import Status
from sst_kernels.structured import EKFAC, FunctionOperator, Gram, LowRankPlusDiagonal

F64 = torch.float64
NOT_PD, NON_FINITE = int(Status.NOT_POSITIVE_DEFINITE), int(Status.NON_FINITE)


def power_law(n: int, seed: int = 0) -> torch.Tensor:
    """Covariance of eigenvalues 1/i."""
    q = torch.linalg.qr(draw(n, n, seed=seed)).Q
    return (q / torch.arange(1, n + 1)) @ q.mT


def ekfac(n1: int, n2: int, dtype: torch.dtype = F64, seed: int = 0) -> EKFAC:
    u, w = (torch.linalg.qr(draw(n, n, seed=seed + n, dtype=dtype)).Q for n in (n1, n2))
    return EKFAC(u, w, (draw(n1, n2, seed=seed).abs() + 0.01).to(dtype))


GAMMA = torch.tensor([1e-3, 2.0], dtype=F64)


def invertible(dtype: torch.dtype) -> dict[str, tuple[Operator, type]]:
    p, q, rows = positive(3, 1, dtype), positive(4, 2, dtype), draw(5, 12, dtype=dtype)
    diagonal = Diagonal((draw(12).abs() + 0.1).to(dtype))
    hermitian = draw(5, 5, seed=7, dtype=dtype)
    core = 0.01 * (hermitian + hermitian.mH)  # of either sign
    return {
        "diagonal": (diagonal, Diagonal),
        "dense": (Dense(torch.stack([positive(12, 3, dtype), positive(12, 4, dtype)])), Dense),
        "kronecker": (Kronecker(p, q), Kronecker),
        "kronecker of damped": (Kronecker(Damped(p, GAMMA), Diagonal(diagonal.entries[:4])), Kronecker),
        "damped kronecker": (Damped(Kronecker(p, q), GAMMA), EKFAC),
        "damped kronecker of three": (
            Damped(Kronecker(positive(2, 5, dtype), Kronecker(positive(2, 6, dtype), p)), 1),
            EKFAC,
        ),
        "ekfac": (ekfac(3, 4, dtype), EKFAC),
        "damped gram": (Damped(Gram(rows), GAMMA), LowRankPlusDiagonal),
        "gram and diagonal": (Sum([Scaled(Gram(rows), 3), diagonal]), LowRankPlusDiagonal),
        "low rank with core": (LowRankPlusDiagonal(0.1 * rows.mH, diagonal.entries, core), LowRankPlusDiagonal),
        "damped gram of many rows": (Damped(Gram(draw(40, 12, dtype=dtype)), GAMMA), Dense),
        "scaled sum": (Scaled(Sum([Damped(diagonal, 1)]), 0.25), Diagonal),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("name", invertible(F64))
def test_inverse_of_each_structure(move, name, dtype):
    operator, kind = invertible(dtype)[name]
    found = factored_inverse(move(operator))
    assert isinstance(found.operator, kind) and (found.fault == 0).all()
    assert found.operator.dtype == dtype and found.operator.batch_shape == operator.batch_shape == found.fault.shape
    matrix = operator.to_dense().to(torch.promote_types(dtype, F64))
    error = found.operator.to_dense().to("cpu", matrix.dtype) @ matrix - torch.eye(12)
    assert error.abs().max() <= 100 * torch.finfo(dtype).eps * torch.linalg.cond(matrix).max()
    assert torch.equal(inverse(move(operator)).to_dense(), found.operator.to_dense())


def test_woodbury_does_not_cancel():
    """γ = 1e-10: the inverse's range part is 1e-10 of its rest, lost where 1/γ is subtracted from."""
    rows = torch.linalg.qr(draw(30, 4)).Q.mT
    found = inverse(Damped(Gram(rows, 1), 1e-10))
    outside = torch.linalg.qr(torch.cat([rows, draw(1, 30)]).mT).Q[:, -1:]
    torch.testing.assert_close(found @ outside, 1e10 * outside, rtol=1e-12, atol=0.0)
    x = found @ rows.mT
    assert torch.allclose(rows @ x, torch.eye(4, dtype=F64), rtol=0, atol=1e-5)


def good() -> torch.Tensor:
    return positive(3)


def stacked(bad: torch.Tensor) -> torch.Tensor:
    return torch.stack([good(), bad])


NAN3 = torch.full((3, 3), torch.nan, dtype=F64)
ROWS = draw(2, 6)


@pytest.mark.parametrize(
    ("operator", "fault"),
    [
        (Diagonal(torch.tensor([[1.0, 2.0], [1.0, 0.0]])), NOT_PD),
        (Diagonal(torch.tensor([[1.0, 2.0], [1.0, torch.inf]])), NON_FINITE),
        (Dense(stacked(-good())), NOT_PD),
        (Dense(stacked(NAN3)), NON_FINITE),
        (Kronecker(stacked(-good()), positive(2)), NOT_PD),
        (Damped(Kronecker(stacked(-9 * good()), positive(2)), 1), NOT_PD),
        (Damped(Kronecker(stacked(NAN3), positive(2)), 1), NON_FINITE),
        (Damped(Kronecker(good(), positive(2)), torch.tensor([1.0, -9.0])), NOT_PD),
        (Scaled(ekfac(2, 3), torch.tensor([1.0, -1.0])), NOT_PD),
        (EKFAC(torch.stack([torch.eye(2), NAN3[:2, :2].float()]), torch.eye(3), torch.ones(2, 3)), NON_FINITE),
        (Damped(Gram(ROWS), torch.tensor([1.0, 0.0])), NOT_PD),
        (Damped(Gram(ROWS), torch.tensor([1.0, -1e-3])), NOT_PD),
        (Damped(Gram(torch.stack([ROWS, ROWS * torch.nan])), 1), NON_FINITE),
        (Damped(Scaled(Gram(ROWS), torch.tensor([1.0, -1.0])), 0.1), NOT_PD),
        (LowRankPlusDiagonal(torch.eye(6)[:, :1], torch.ones(6), torch.tensor([[[-0.5]], [[-1.01]]])), NOT_PD),
        (Damped(Gram(draw(9, 6)), torch.tensor([0.0, -99.0])), NOT_PD),
    ],
)
def test_faults_stay_in_their_own_matrix(operator, fault):
    found = factored_inverse(operator)
    assert found.fault.tolist() == [0, fault]
    first, second = found.operator.to_dense()
    matrix = operator.to_dense()[0]
    torch.testing.assert_close(first @ matrix, torch.eye(operator.n, dtype=matrix.dtype), rtol=0, atol=1e-4)
    assert (torch.linalg.eigvalsh(second) > 0).all()


def test_a_diagonal_that_low_rank_may_lift_has_no_woodbury():
    """d = (0, 1), U = e₁ is positive definite: not to be called otherwise."""
    assert inverse(LowRankPlusDiagonal(torch.tensor([[2.0], [0.0], [0.0]]), torch.tensor([0.0, 1.0, 1.0]))) is None


def test_structures_without_an_inverse():
    call = FunctionOperator(torch.clone, (6, 6), F64)
    for operator in (Gram(ROWS), call, Damped(call, 1), Sum([Kronecker(good(), positive(2)), ekfac(3, 2)])):
        assert inverse(operator) is None


def test_float32_definite_only_in_double():
    """[[c, 1], [1, 1/c rounded up]]: determinant barely positive, lost by a float32 factorisation."""
    c = torch.arange(1.0, 4.0, 0.01)
    z = torch.nextafter(1 / c, torch.tensor(torch.inf))
    one = torch.ones_like(c)
    p = torch.stack([torch.stack([c, one], -1), torch.stack([one, z], -1)], -1)
    hidden = p[torch.linalg.cholesky_ex(p).info > 0]
    assert len(hidden) and (factored_inverse(Dense(hidden)).fault == 0).all()


def condition(inverse_operator: Operator, operator: Operator) -> torch.Tensor:
    """Largest over smallest eigenvalue of M⁻¹B."""
    lower = torch.linalg.cholesky(inverse_operator.to_dense())
    values = torch.linalg.eigvalsh(lower.mT @ operator.to_dense() @ lower)
    assert (values > 0).all()
    return values[..., -1] / values[..., 0]


def test_exact_where_there_is_an_inverse():
    operator = Damped(Kronecker(power_law(5), power_law(6, 1)), 1e-4)
    assert condition(preconditioner(operator), operator) < 1 + 1e-8


def test_a_sum_of_kroneckers_is_preconditioned_by_the_nearest(move):
    """K-FAC with gradient factors that differ from batch to batch: nearly, not exactly, one product."""
    terms = [
        Kronecker(power_law(8) + 0.05 * positive(8, t), power_law(12, 1) + 0.02 * positive(12, t)) for t in range(3)
    ]
    terms = [move(term) for term in terms]
    operator = Damped(Sum(terms), 1e-3)
    found = preconditioner(operator)
    assert isinstance(found, EKFAC)
    assert condition(found, operator) < 20
    plain = Diagonal(1 / operator.diagonal())
    assert condition(plain, operator) > 10 * condition(found, operator)
    single = inverse(Damped(Scaled(terms[0], 3), 1e-3))
    assert condition(found, operator) < condition(single, operator)


def test_the_nearest_kronecker_of_proportional_terms_is_exact():
    p, q = power_law(5), power_law(6, 1)
    operator = Damped(Sum([Kronecker(p, q), Kronecker(3 * p, q), ekfac_of(p, q)]), 1e-3)
    assert condition(preconditioner(operator), operator) < 1 + 1e-8


def test_the_nearest_kronecker_is_van_loans():
    """The leading singular pair of the rearranged sum, whose rows are vec P and columns vec Q."""
    pairs = [(10.0**-t * positive(3, t), positive(4, t + 5)) for t in range(3)]
    rearranged = sum(torch.outer(p.flatten(), q.flatten()) for p, q in pairs)
    u, _, v = torch.linalg.svd(rearranged)
    for found, expected in zip(_nearest_kronecker([Kronecker(*pair) for pair in pairs]), (u[:, 0], v[0]), strict=True):
        found = found.flatten() / torch.linalg.norm(found)
        torch.testing.assert_close(found, expected * expected.sum().sign(), rtol=1e-6, atol=1e-6)


def ekfac_of(p: torch.Tensor, q: torch.Tensor) -> EKFAC:
    (a, u), (b, w) = torch.linalg.eigh(p), torch.linalg.eigh(q)
    return EKFAC(u, w, a[:, None] * b)


def test_the_entries_basis_is_kept_where_the_diagonal_dominates():
    """A batch of two: one nearly diagonal, one nearly Kronecker; each gets the better basis."""
    weights = torch.tensor([1e-4, 1.0], dtype=F64)
    far = Diagonal(torch.logspace(0, 3, 30, dtype=F64)[torch.randperm(30, generator=torch.Generator().manual_seed(0))])
    kron = Kronecker(power_law(5), power_law(6, 1))
    operator = Sum(
        [
            Scaled(kron, weights),
            Scaled(kron, weights),
            Scaled(far, 1.0001 - weights),
            Diagonal(torch.full((30,), 1e-3, dtype=F64)),
        ]
    )
    found = preconditioner(operator)
    plain = Diagonal(1 / operator.diagonal())
    ours, entries = condition(found, operator), condition(plain, operator)
    assert ours[0] <= entries[0] * (1 + 1e-9) < 2 and ours[1] < entries[1]


def test_anything_with_a_diagonal_gets_its_inverse():
    d = torch.tensor([4.0, 0.5, 2.0], dtype=F64)
    call = FunctionOperator(lambda x: d[:, None] * x, (3, 3), F64, "cpu", d)
    for operator, expected in ((call, 1 / d), (Damped(Scaled(call, 2), 1), 1 / (2 * d + 1))):
        found = preconditioner(operator)
        assert isinstance(found, Diagonal) and torch.allclose(found.entries, expected)
    assert preconditioner(FunctionOperator(torch.clone, (3, 3), F64)) is None


def test_a_diagonal_that_is_not_positive_still_gives_a_positive_preconditioner():
    d = torch.tensor([[4.0, 0.0, -1.0], [-1.0, -2.0, -3.0], [torch.nan, 1.0, 1.0]], dtype=F64)
    call = FunctionOperator(lambda x: d[..., None] * x, (3, 3, 3), F64, "cpu", d)
    found = preconditioner(call).entries
    assert (found > 0).all() and torch.isfinite(found).all()
    assert found[0, 0] == 0.25


@pytest.mark.parametrize("power", [-60, 60])
def test_preconditioners_do_not_depend_on_scale(power):
    terms = [Kronecker(power_law(3, t).float(), power_law(4, t + 9).float()) for t in range(2)]
    plain = preconditioner(Damped(Sum(terms), 1e-2))
    scale = 2.0**power
    scaled = preconditioner(Damped(Scaled(Sum(terms), scale), 1e-2 * scale))
    torch.testing.assert_close(scaled.to_dense() * scale, plain.to_dense(), rtol=1e-4, atol=1e-4)
