"""The Gram method against its closed form, dense references, planted faults, and its promise of no n × n."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from pencils import draw, positive
from torch.utils._python_dispatch import TorchDispatchMode

from sst_kernels.combined import Damped, Scaled, Sum
from sst_kernels.operators import Dense, Diagonal, Kronecker, Operator
from sst_kernels.pencil import Pencil
from sst_kernels.result import Status
from sst_kernels.solve import solve
from sst_kernels.structured import EKFAC, FunctionOperator, Gram, LowRankPlusDiagonal

F64 = torch.float64
DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]
GOOD = Status.CONVERGED | Status.VERIFIED


def oracle(harm: np.ndarray, benign: np.ndarray, gamma: float) -> np.ndarray:
    """λ of [G_hh − G_hb (n_b γ I + G_bb)⁻¹ G_bh] / (γ n_h), descending, in float64."""
    inner = len(benign) * gamma * np.eye(len(benign)) + benign @ benign.T
    cross = harm @ benign.T
    small = (harm @ harm.T - cross @ np.linalg.solve(inner, cross.T)) / (gamma * len(harm))
    return np.linalg.eigvalsh(small)[::-1]


class NothingLargerThan(TorchDispatchMode):
    """Fails when an op returns a tensor of more entries than the limit."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            assert not isinstance(x, torch.Tensor) or x.numel() <= self.limit, (func, x.shape)
        return result


def test_the_oracle_at_n_5000_without_a_matrix_of_that_order():
    n, harm, benign = 5000, draw(40, 5000), draw(60, 5000, seed=1)
    pencil = Pencil(Gram(harm), Damped(Gram(benign), 1e-2))
    with NothingLargerThan(200 * n):
        result = solve(pencil, 12)
    assert result.method == "gram" and result.status.item() == GOOD
    np.testing.assert_allclose(result.values, oracle(harm.numpy(), benign.numpy(), 1e-2)[:12], rtol=1e-10)
    v = result.vectors
    with NothingLargerThan(200 * n):  # the definition, by products of our own
        bv = benign.mT @ (benign @ v) / 60 + 1e-2 * v
        residual = harm.mT @ (harm @ v) / 40 - bv * result.values
    assert torch.linalg.norm(residual) < 1e-10 * torch.linalg.norm(bv * result.values)
    assert torch.allclose(v.mT @ bv, torch.eye(12, dtype=F64), atol=1e-12)


def right_sides(dtype: torch.dtype) -> dict[str, Operator]:
    diagonal = Diagonal((draw(12).abs() + 0.1).to(dtype))
    u, w = (torch.linalg.qr(draw(n, n, dtype=dtype)).Q for n in (3, 4))
    return {
        "diagonal": diagonal,
        "dense": Dense(positive(12, 3, dtype)),
        "kronecker": Kronecker(positive(3, 1, dtype), positive(4, 2, dtype)),
        "damped kronecker": Damped(Kronecker(positive(3, 1, dtype), positive(4, 2, dtype)), 0.1),
        "ekfac": EKFAC(u, w, (draw(3, 4).abs() + 0.1).to(dtype)),
        "low rank plus diagonal": LowRankPlusDiagonal(draw(12, 2, dtype=dtype), diagonal.entries),
        "damped gram": Damped(Gram(draw(7, 12, seed=5, dtype=dtype)), 0.1),
        "damped gram of many rows": Damped(Gram(draw(20, 12, seed=5, dtype=dtype)), 0.1),
        "shrunk gram": Damped(Sum([Scaled(Gram(draw(7, 12, dtype=dtype)), 0.7), Scaled(diagonal, 0.3)]), 0.01),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", right_sides(F64))
@pytest.mark.parametrize("k", [1, 4, 5, 9, 12])
def test_beside_scipy_for_every_right_side(move, name, dtype, k):
    """k = 5 is the rank; 9 and 12 are completed by null vectors."""
    b = right_sides(dtype)[name]
    rows = torch.stack([draw(5, 12, seed=8, dtype=dtype), draw(5, 12, seed=9, dtype=dtype)])
    result = solve(Pencil(move(Scaled(Gram(rows), 3.0)), move(b)), k)
    assert result.method == "gram"
    expected = GOOD if k in (1, 4, 5, 12) else Status.CONVERGED | Status.CLUSTER_AT_K
    assert (result.status == expected).all()
    assert result.values.dtype == dtype.to_real() and result.vectors.dtype == dtype
    double = torch.promote_types(dtype, F64)
    values, vectors = result.values.double().cpu().numpy(), result.vectors.to("cpu", double)
    for i in range(2):
        a, bm, v = (x.to(double).numpy() for x in (3 * rows[i].mH @ rows[i] / 5, b.to_dense(), vectors[i]))
        reference = scipy.linalg.eigh(a, bm, eigvals_only=True)[::-1][:k]
        eps = torch.finfo(dtype).eps
        np.testing.assert_allclose(values[i], reference, atol=300 * eps * reference[0])
        assert np.abs(v.conj().T @ bm @ v - np.eye(k)).max() < 200 * eps
        residual = np.linalg.norm(a @ v - bm @ v * values[i], axis=0)
        size = np.linalg.norm(a, 2) + values[i] * np.linalg.norm(bm, 2)
        assert (residual <= 50 * eps * size * np.linalg.norm(v, axis=0)).all()


@pytest.mark.parametrize("gamma", [1e-4, 1e-7, 1e-10])
def test_little_damping_of_the_same_rows(gamma):
    """A = JᵀJ/N and B = A + γI: λ = σ²/(σ² + γ) is near 1, far below ‖A‖/γ where Woodbury cancels."""
    rows = draw(9, 50)
    result = solve(Pencil(Gram(rows), Damped(Gram(rows), gamma)), 6)
    sigma2 = torch.linalg.svdvals(rows)[:6] ** 2 / 9
    assert result.converged and result.b_orthogonality < 1e-13
    torch.testing.assert_close(1 - result.values, gamma / (sigma2 + gamma), rtol=0, atol=1e-14)


def test_null_vectors_beside_large_eigenvalues():
    """λ₁‖Bv₁‖ is 10⁶ times ‖B‖: rounding along v₁, unseen by B, must be taken out of a null vector."""
    pencil = Pencil(Gram(draw(20, 150)), Damped(Gram(draw(30, 150, seed=1)), 1e-6))
    result = solve(pencil, 150)
    assert result.status.item() == GOOD
    assert (result.values[20:] == 0).all() and result.backward_errors.max() < 1e-15


@pytest.mark.parametrize("k", [3, 30])
def test_graded_rows_and_an_ill_conditioned_b(k):
    """λ over 12 decades: null vectors made from J alone would lose VᵀBV = I (3e-2 was seen)."""
    rows = draw(8, 30) * torch.logspace(0, -6, 8, dtype=F64)[:, None]
    b = Diagonal(torch.logspace(0, -4, 30, dtype=F64))
    result = solve(Pencil(Gram(rows), b), k)
    assert result.status.item() == GOOD and result.b_orthogonality < 1e-13
    s = torch.linalg.svdvals(rows * b.entries.rsqrt())
    np.testing.assert_allclose(result.values[:3], s[:3] ** 2 / 8, rtol=1e-11)
    assert (result.values[8:] < 1e-14 * result.values[0]).all()


def test_single_precision_with_an_ill_conditioned_b_is_solved_in_double():
    """cond(B) = 10⁹ is beyond float32, but not beyond its stored entries in float64."""
    rows, benign = draw(6, 40).float(), draw(3, 40, seed=1).float()
    pencil = Pencil(Gram(rows), Damped(Gram(benign), 1e-8))
    result = solve(pencil, 4)
    assert result.values.dtype == result.vectors.dtype == torch.float32
    assert result.status.item() == GOOD
    gamma = pencil.B.damping.double().item()
    expected = oracle(rows.double().numpy(), benign.double().numpy(), gamma)[:4]
    np.testing.assert_allclose(result.values, expected, rtol=1e-5)


def test_rows_that_depend_on_one_another():
    """Rank 3 of 6 rows: four positive definite directions less than k, filled from the null space."""
    rows = draw(6, 3) @ draw(3, 30, seed=1)
    result = solve(Pencil(Gram(rows), Diagonal(draw(30).abs() + 0.1)), 5)
    assert result.status.item() == Status.CONVERGED | Status.CLUSTER_AT_K
    assert (result.values[:3] > 1e-3).all() and (result.values[3:] == 0).all()
    assert torch.linalg.norm(rows @ result.vectors[:, 3:]) < 1e-12
    assert result.b_orthogonality < 1e-13


def test_zero_rows():
    result = solve(Pencil(Gram(torch.zeros(2, 6)), Diagonal(torch.arange(1.0, 7.0))), 3)
    assert (result.values == 0).all() and result.converged and result.b_orthogonality < 1e-5
    assert solve(Pencil(Scaled(Gram(torch.ones(2, 6)), 0.0), Diagonal(torch.ones(6))), 3).values.tolist() == [0, 0, 0]


def test_padded_batches_of_unequal_counts():
    """Zero rows and their own count: as each alone."""
    first, second = draw(4, 20), draw(7, 20, seed=1)
    padded = torch.stack([torch.cat([first, first.new_zeros(3, 20)]), second])
    b = Diagonal(draw(20).abs() + 0.1)
    result = solve(Pencil(Gram(padded, torch.tensor([4.0, 7.0])), b), 3)
    for i, rows in enumerate((first, second)):
        assert torch.allclose(result.values[i], solve(Pencil(Gram(rows), b), 3).values, rtol=1e-12)
    assert (result.status == GOOD).all()


def test_cut_cluster_is_reported():
    rows = torch.linalg.qr(draw(10, 4)).Q.mT * torch.tensor([3.0, 2.0, 2.0, 1.0], dtype=F64)[:, None]
    statuses = [
        solve(Pencil(Gram(rows), Damped(Diagonal(torch.zeros(10, dtype=F64)), 1.0)), k).status.item() for k in (1, 2, 3)
    ]
    assert statuses == [GOOD, Status.CONVERGED | Status.CLUSTER_AT_K, GOOD]


@pytest.mark.parametrize(
    ("pencil", "status"),
    [
        (Pencil(Gram(draw(3, 8)), Damped(Gram(draw(2, 8)), torch.tensor([1.0, 0.0, -1.0]))), [0, 8, 8]),
        (Pencil(Gram(draw(3, 8)), Diagonal(torch.tensor([[1.0] * 8, [1.0] * 7 + [-1.0]]).double())), [0, 8]),
        (Pencil(Gram(draw(3, 8)), Diagonal(torch.tensor([[1.0] * 8, [torch.nan] + [1.0] * 7]).double())), [0, 16]),
        (Pencil(Gram(torch.stack([draw(3, 8), draw(3, 8) * torch.inf])), Diagonal(torch.ones(8, dtype=F64))), [0, 16]),
        (
            Pencil(Gram(draw(3, 8)), Damped(Kronecker(torch.stack([positive(2), -9 * positive(2)]), positive(4)), 1.0)),
            [0, 8],
        ),
    ],
)
def test_a_bad_pencil_harms_no_other(pencil, status):
    result = solve(pencil, 2)
    assert result.method == "gram"
    assert result.status.tolist() == [s or int(GOOD) for s in status]
    assert torch.isfinite(result.vectors[0]).all() and torch.isnan(result.vectors[1:]).all()


def test_where_it_does_not_fit():
    few, call = Gram(draw(3, 6)), FunctionOperator(torch.clone, (6, 6), F64)
    for a, b in (
        (Gram(draw(6, 6)), Diagonal(torch.ones(6, dtype=F64))),  # as many rows as columns
        (Scaled(few, -1.0), Diagonal(torch.ones(6, dtype=F64))),
        (few, call),
        (few, few),
    ):
        assert solve(Pencil(a, b), 1).method in ("subset", "fused", "dense")
        with pytest.raises(ValueError, match=r"method 'gram' does not fit A and B, which are"):
            solve(Pencil(a, b), 1, method="gram")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_do_not_depend_on_scale(dtype):
    power = 50 if dtype == torch.float32 else 400
    rows, d = draw(4, 12).to(dtype), (draw(12).abs() + 0.1).to(dtype)
    plain = solve(Pencil(Gram(rows), Diagonal(d)), 3)
    scaled = solve(Pencil(Gram(rows * 2.0 ** (power // 2)), Diagonal(d * 2.0**power)), 3)
    torch.testing.assert_close(scaled.values, plain.values)
    assert scaled.status.item() == GOOD


def test_empty_batch():
    result = solve(Pencil(Gram(torch.zeros(0, 2, 6)), Diagonal(torch.ones(6))), 3)
    assert result.values.shape == (0, 3) and result.vectors.shape == (0, 6, 3) and result.method == "gram"


@pytest.mark.parametrize("order", [1, 2])
def test_gradients(order):
    """In J, in B's rows and in γ; the inverse itself is a constant, its refinement carries the derivatives."""
    parts = [x.requires_grad_() for x in (draw(3, 7), draw(2, 7, seed=1), torch.tensor(0.3, dtype=F64))]

    def outputs(rows: torch.Tensor, benign: torch.Tensor, gamma: torch.Tensor):
        result = solve(Pencil(Gram(rows), Damped(Gram(benign), gamma)), 2, method="gram")
        return result.values, (result.vectors * result.values[..., None, :]) @ result.vectors.mT

    check = torch.autograd.gradcheck if order == 1 else torch.autograd.gradgradcheck
    assert check(outputs, parts, **({} if order == 1 else {"atol": 1e-3, "rtol": 1e-4}))


def test_no_rows():
    result = solve(Pencil(Gram(torch.zeros(0, 6)), 2 * torch.eye(6)), 2)
    assert result.values.tolist() == [0, 0]
    assert result.status == Status.CONVERGED | Status.CLUSTER_AT_K
