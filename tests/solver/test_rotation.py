"""B = B₁ ⊗ B₂ + γI rotated into its eigenbasis, and pencils in one eigenbasis, against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from pencils import draw, positive

from sst_kernels.combined import Damped, Scaled, Sum
from sst_kernels.operators import Dense, Diagonal, Kronecker
from sst_kernels.pencil import Pencil
from sst_kernels.result import Status
from sst_kernels.rotation import rotate_to_diagonal
from sst_kernels.solve import solve
from sst_kernels.structured import EKFAC, Gram

F64 = torch.float64
GOOD = Status.CONVERGED | Status.VERIFIED


def ekfac(dtype: torch.dtype = F64) -> EKFAC:
    u, w = (torch.linalg.qr(draw(n, n, seed=n, dtype=dtype)).Q for n in (3, 4))
    return EKFAC(u, w, (draw(3, 4).abs() + 0.1).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("left", ["kronecker", "sum", "ekfac", "gram"])
@pytest.mark.parametrize("right", ["damped", "plain", "ekfac"])
def test_the_rotated_pencil_is_the_same_problem(move, left, right, dtype):
    p, q = positive(3, 1, dtype), torch.stack([positive(4, 2, dtype), positive(4, 3, dtype)])
    one = Kronecker(positive(3, 4, dtype), positive(4, 5, dtype))
    a = {
        "kronecker": one,
        "sum": Damped(Sum([one, Scaled(Kronecker(p, positive(4, 6, dtype)), 0.5), ekfac(dtype)]), 0.1),
        "ekfac": ekfac(dtype),
        "gram": Gram(draw(5, 12, dtype=dtype)),
    }[left]
    b = {"damped": Damped(Kronecker(p, q), 0.01), "plain": Kronecker(p, q), "ekfac": Scaled(ekfac(dtype), 2.0)}[right]
    pencil = Pencil(move(a), move(b))
    rotated, back = rotate_to_diagonal(pencil)
    assert isinstance(rotated.B, Diagonal) and not isinstance(rotated.A, Dense)
    found = solve(rotated, 4, method="dense")
    v = back(found.vectors)
    assert pencil.backward_errors(found.values, v).max() < 1e-14
    assert pencil.b_orthogonality(v).max() < 1e-12
    matrices = (x.expand(*pencil.batch_shape, 12, 12).reshape(-1, 12, 12).numpy() for x in (a.to_dense(), b.to_dense()))
    for i, (am, bm) in enumerate(zip(*matrices, strict=True)):
        expected = scipy.linalg.eigvalsh(am, bm)[::-1][:4]
        np.testing.assert_allclose(found.values.reshape(-1, 4)[i].cpu(), expected, rtol=1e-11)


def test_a_bad_factor_is_seen_in_the_rotated_diagonal():
    q = torch.stack([positive(4), -9 * positive(4), torch.full((4, 4), torch.nan, dtype=F64)])
    rotated, _ = rotate_to_diagonal(Pencil(Kronecker(positive(3), positive(4)), Damped(Kronecker(positive(3), q), 0.1)))
    assert solve(rotated, 2, method="dense").status.tolist() == [GOOD, 8, 16]


def test_what_does_not_rotate():
    kron = Kronecker(positive(3), positive(4))
    assert rotate_to_diagonal(Pencil(Dense(positive(12)), Damped(kron, 1))) is None
    assert rotate_to_diagonal(Pencil(Kronecker(positive(4), positive(3)), Damped(kron, 1))) is None
    assert rotate_to_diagonal(Pencil(kron, Diagonal(torch.ones(12, dtype=F64)))) is None
    assert rotate_to_diagonal(Pencil(Sum([kron, Diagonal(torch.ones(12, dtype=F64))]), kron)) is None


@pytest.mark.parametrize("k", [1, 5, 12])
def test_one_eigenbasis_on_both_sides_is_solved_by_ratios(device, k):
    b = EKFAC(*(x.to(device) for x in (ekfac().left_vectors, ekfac().right_vectors, ekfac().entries)))
    a = Damped(EKFAC(b.left_vectors, b.right_vectors, draw(2, 3, 4).to(device)), 0.5)
    result = solve(Pencil(a, Scaled(b, 2.0)), k)
    assert result.method == "kronecker" and (result.status == GOOD).all()
    for i in range(2):
        expected = scipy.linalg.eigvalsh(a.to_dense()[i].cpu(), 2 * b.to_dense().cpu())[::-1][:k]
        np.testing.assert_allclose(result.values[i].cpu(), expected, rtol=1e-12)
    assert result.backward_errors.max() < 1e-15 and result.b_orthogonality.max() < 1e-14


def test_standard_problem_of_an_ekfac_operator():
    a = ekfac()
    result = solve(Pencil(a), 3)
    assert result.method == "kronecker"
    assert torch.equal(result.values, a.entries.flatten().sort(descending=True).values[:3])
    broken = EKFAC(a.left_vectors, a.right_vectors, -a.entries)
    assert solve(Pencil(a, broken), 3).status.item() == Status.NOT_POSITIVE_DEFINITE


def test_factored_damping_is_two_small_pencils():
    """Kronecker(Damped, Damped): the oracle λ = α_i β_j with damped factors, and sums of one term."""
    a1, b1, a2, b2 = positive(3), positive(3, 1), positive(4, 2), positive(4, 3)
    a = Sum([Scaled(Kronecker(a1, a2), 0.5)])
    b = Kronecker(Damped(b1, 0.1), Damped(Scaled(b2, 2.0), 0.2))
    result = solve(Pencil(a, b), 12)
    assert result.method == "kronecker" and result.status.item() == GOOD
    one = scipy.linalg.eigvalsh(a1, b1 + 0.1 * torch.eye(3, dtype=F64))
    two = scipy.linalg.eigvalsh(a2, 2 * b2 + 0.2 * torch.eye(4, dtype=F64))
    np.testing.assert_allclose(result.values, 0.5 * np.sort(np.outer(one, two).ravel())[::-1], rtol=1e-12)
