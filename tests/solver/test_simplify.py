"""`simplified` against the matrices of what it was given, and the structure that it must find."""

from __future__ import annotations

import pytest
import torch
from pencils import draw

from sst_kernels.combined import Damped, Scaled, Sum
from sst_kernels.operators import Dense, Diagonal, Kronecker
from sst_kernels.simplify import simplified
from sst_kernels.structured import EKFAC, FunctionOperator, Gram, LowRankPlusDiagonal

F64 = torch.float64


def symmetric(n: int, seed: int = 0) -> torch.Tensor:
    x = draw(n, n, seed=seed)
    return x + x.mT


DENSE, DIAGONAL = Dense(symmetric(6)), Diagonal(draw(6))
KRONECKER = Kronecker(symmetric(2), symmetric(3))
EK = EKFAC(torch.linalg.qr(draw(2, 2)).Q, torch.linalg.qr(draw(3, 3)).Q, draw(2, 3))
GRAM = Gram(draw(2, 6, seed=3))
LOW_RANK = LowRankPlusDiagonal(draw(6, 1, seed=1), draw(6, seed=2))
CALL = FunctionOperator(lambda x: 3 * x, (6, 6), F64)
C = torch.tensor([2.0, -0.5], dtype=F64)


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        (Scaled(DENSE, C), Dense),
        (Scaled(DIAGONAL, -2), Diagonal),
        (Scaled(KRONECKER, C), Kronecker),
        (Scaled(EK, C), EKFAC),
        (Scaled(GRAM, C), Gram),
        (Scaled(LOW_RANK, C), LowRankPlusDiagonal),
        (Scaled(Scaled(CALL, 2), C), Scaled),
        (Scaled(Damped(CALL, 2), C), Damped),
        (Scaled(Sum([KRONECKER, CALL]), C), Sum),
        (Damped(DENSE, C), Dense),
        (Damped(DIAGONAL, C), Diagonal),
        (Damped(EK, C), EKFAC),
        (Damped(GRAM, C), LowRankPlusDiagonal),
        (Damped(LOW_RANK, C), LowRankPlusDiagonal),
        (Damped(KRONECKER, C), Damped),
        (Damped(Damped(KRONECKER, 1), C), Damped),
        (Damped(Scaled(Damped(GRAM, 1), 2), C), LowRankPlusDiagonal),
        (Damped(Sum([DIAGONAL, KRONECKER]), C), Sum),
        (Damped(Sum([KRONECKER, EK]), C), Sum),
        (Kronecker(Damped(symmetric(2), 1), Scaled(symmetric(3), 2)), Kronecker),
        (Sum([GRAM]), Gram),
        (Sum([Sum([DIAGONAL]), DIAGONAL]), Diagonal),
        (Sum([Scaled(GRAM, 0.5), DIAGONAL]), LowRankPlusDiagonal),
        (Sum([GRAM, LOW_RANK, Damped(GRAM, 0.1)]), LowRankPlusDiagonal),
        (Sum([Scaled(GRAM, C), GRAM]), LowRankPlusDiagonal),
        (Sum([DENSE, KRONECKER, Damped(GRAM, C)]), Dense),
        (Sum([DENSE, CALL]), Sum),
        (Sum([KRONECKER, Damped(Sum([GRAM, KRONECKER]), 1), DIAGONAL]), Sum),
    ],
)
def test_the_same_matrix_in_simpler_terms(operator, kind):
    found = simplified(operator)
    assert isinstance(found, kind)
    torch.testing.assert_close(found.to_dense(), operator.to_dense(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.diagonal(), operator.diagonal(), rtol=1e-13, atol=1e-13)


def test_what_is_left_holds_nothing_that_can_be_folded():
    found = simplified(Sum([KRONECKER, Damped(Sum([GRAM, KRONECKER]), 1), DIAGONAL]))
    assert [type(term) for term in found.terms] == [Kronecker, Kronecker, LowRankPlusDiagonal]
    found = simplified(Damped(Damped(KRONECKER, 1), C))
    assert isinstance(found.operator, Kronecker) and found.damping.tolist() == [3.0, 0.5]


def test_plain_operators_are_returned_themselves():
    for operator in (DENSE, DIAGONAL, EK, GRAM, LOW_RANK, CALL):
        assert simplified(operator) is operator


def test_a_scaled_eigenbasis_is_still_the_same_tensor():
    """By this `solve` knows that two EKFAC operators share it."""
    assert simplified(Damped(Scaled(EK, 2), 1)).left_vectors is EK.left_vectors
