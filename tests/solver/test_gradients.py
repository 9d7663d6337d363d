"""Derivatives of `eigh`: every type and dtype, equal eigenvalues, torch.func, torch.compile."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from pencils import hermitian
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from sst_kernels import eigh

OP = torch.ops.sst_kernels
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
Pencils = Callable[..., tuple]


def pencil(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A indefinite and B positive definite, neither exactly symmetric."""
    torch.manual_seed(seed)
    x, y = torch.randn(2, *shape, shape[-1], dtype=dtype)
    return x, y @ y.mH + torch.eye(shape[-1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("problem", [None, 1, 2, 3])
@pytest.mark.parametrize("subset", [None, [0, 1], [1, 2], [2, 3]])
def test_first_and_second_order(dtype: torch.dtype, problem: int | None, subset: list[int] | None) -> None:
    """In both modes, of values and of what no sign of a vector can change."""
    matrices = [x.requires_grad_() for x in pencil(4, dtype=dtype)[: 1 if problem is None else 2]]

    def outputs(*matrices: Tensor) -> tuple[Tensor, Tensor]:
        w, v = eigh(*map(hermitian, matrices), type=problem or 1, subset_by_index=subset)
        return w, (v * w) @ v.mH

    assert gradcheck(outputs, matrices, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(outputs, matrices, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("values_only", [True, False])
def test_derivatives_belong_to_the_triangle_that_is_read(lower: bool, values_only: bool) -> None:
    a, b = (hermitian(x).requires_grad_() for x in pencil(5))

    def total(a: Tensor, b: Tensor) -> Tensor:
        return eigh(a, b, lower=lower, eigvals_only=values_only)[0 if not values_only else slice(None)].pow(3).sum()

    assert gradcheck(total, (a, b))
    total(a, b).backward()
    for x in (a, b):
        outside = x.grad.triu(1) if lower else x.grad.tril(-1)
        assert not outside.any() and x.grad.any()


def test_batches_share_what_they_broadcast() -> None:
    a, b = pencil(3, 1, 4)[0].requires_grad_(), pencil(2, 4, seed=1)[1].requires_grad_()
    assert gradcheck(lambda a, b: eigh(hermitian(a), hermitian(b), eigvals_only=True), (a, b))


def rotated(values: list[float]) -> Tensor:
    torch.manual_seed(1)
    q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))[0]
    return (q * torch.tensor(values, dtype=torch.float64)) @ q.T


def finite_difference(loss: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> tuple[float, float]:
    """Central difference of the loss in a random symmetric direction, beside its derivative there."""
    torch.manual_seed(2)
    da, db = (hermitian(torch.randn_like(x)) for x in (a, b))
    h = 1e-5
    with torch.no_grad():
        difference = float(loss(a + h * da, b + h * db) - loss(a - h * da, b - h * db)) / (2 * h)
    a, b = (x.clone().requires_grad_() for x in (a, b))
    loss(a, b).backward()
    return difference, float((a.grad * da).sum() + (b.grad * db).sum())


WEIGHT = hermitian(torch.arange(25, dtype=torch.float64).reshape(5, 5).sin())
WHOLE_SPACES = [[1.0, 1, 1, 2, 5], [1.0, 2, 3, 3, 3], [4.0, 4, 7, 7, 9], [2.0, 2, 2, 2, 2]]


@pytest.mark.parametrize("values", WHOLE_SPACES)
@pytest.mark.parametrize("problem", [1, 2, 3])
def test_projectors_of_whole_eigenspaces(values: list[float], problem: int) -> None:
    """tr W V Vᵀ, V the eigenspace of the largest λ, against finite differences."""
    warnings.simplefilter("ignore")  # the op cannot know what the loss is
    chol = torch.linalg.cholesky(pencil(5)[1])
    b = chol @ chol.T
    a = chol @ rotated(values) @ chol.T if problem == 1 else torch.linalg.inv(chol).T @ rotated(values) @ chol.inverse()
    largest = sum(value == values[-1] for value in values)

    def projector(a: Tensor, b: Tensor) -> Tensor:
        v = eigh(a, b, type=problem)[1][:, -largest:]
        return (WEIGHT * (v @ v.T)).sum()

    difference, derivative = finite_difference(projector, a, b)
    assert derivative == pytest.approx(difference, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("values", WHOLE_SPACES)
def test_symmetric_functions_of_equal_eigenvalues(values: list[float]) -> None:
    """Σ λ³ = tr (B⁻¹A)³."""
    chol = torch.linalg.cholesky(pencil(5)[1])
    a, b = chol @ rotated(values) @ chol.T, chol @ chol.T
    found = finite_difference(lambda a, b: eigh(a, b)[0].pow(3).sum(), a, b)
    expected = finite_difference(lambda a, b: torch.linalg.solve(b, a).matrix_power(3).trace(), a, b)
    assert found[1] == pytest.approx(expected[1], rel=1e-9)


def test_functions_that_join_equal_eigenvalues_and_vectors_are_warned_of() -> None:
    for matrix in (torch.eye(3, dtype=torch.float64), rotated([1.0, 3, 3])):
        a = matrix.requires_grad_()
        w, v = eigh(a)
        with pytest.warns(RuntimeWarning, match=r"such as V f\(w\) Vᴴ"):
            ((v * w.sqrt()) @ v.T)[0, 1].backward()


def test_a_choice_within_an_eigenspace_is_warned_of() -> None:
    a = rotated([1.0, 3, 3]).requires_grad_()
    weight = torch.randn(3, 3, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="depends on the choice of vectors within an eigenspace") as caught:
        (eigh(a)[1] * weight).sum().backward()
    assert caught[0].filename == __file__
    assert torch.isfinite(a.grad).all()


def test_a_phase_is_warned_of() -> None:
    a = hermitian(pencil(3, dtype=torch.complex128)[0]).requires_grad_()
    with pytest.warns(RuntimeWarning, match="phase of a complex vector"):
        eigh(a)[1].imag.sum().backward()


def test_second_derivatives_of_equal_eigenvalues_are_warned_of() -> None:
    a = rotated([1.0, 3, 3]).requires_grad_()
    with pytest.warns(RuntimeWarning, match="for second derivatives"):
        torch.autograd.grad(eigh(a, eigvals_only=True).pow(2).sum(), a, create_graph=True)
    distinct = rotated([1.0, 2, 3]).requires_grad_()
    torch.autograd.grad(eigh(distinct)[0].pow(2).sum(), distinct, create_graph=True)


@pytest.mark.parametrize("problem", [1, 2, 3])
def test_a_faulty_pencil_has_derivative_zero_and_harms_no_other(problem: int) -> None:
    a, b = (hermitian(x).expand(4, 5, 5).clone() for x in pencil(5))
    b[1] *= -1
    a[2, 3, 1] = torch.nan
    alone = [x[0].clone().requires_grad_() for x in (a, b)]
    a, b = a.requires_grad_(), b.requires_grad_()

    def loss(a: Tensor, b: Tensor) -> Tensor:
        w, v = eigh(a, b, type=problem)
        return (w**2).nan_to_num().sum() + (v**4).nan_to_num().sum()

    with pytest.warns(RuntimeWarning, match=r"no result for pencils \(1,\)"):
        loss(a, b).backward()
    loss(*alone).backward()
    for x, one in zip((a, b), alone, strict=True):
        for i in (0, 3):
            torch.testing.assert_close(x.grad[i], one.grad)
        assert not x.grad[1:3].any()


def loss(a: Tensor, b: Tensor) -> Tensor:
    w, v = eigh(a, b)
    return (w**3).sum() + ((v * w.sin()[..., None, :]) @ v.mT)[..., 0, 1].sum() + v[..., -1].pow(4).sum()


def test_torch_func() -> None:
    a, b = pencil(2, 3)[0], pencil(3)[1]
    expected = torch.stack([torch.autograd.functional.jacobian(lambda x: loss(x, b), x) for x in a])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss), (0, None))(a, b), expected)
    torch.testing.assert_close(torch.func.grad(lambda a: torch.func.vmap(loss, (0, None))(a, b).sum())(a), expected)
    jacobian = torch.func.jacrev(lambda b: torch.func.vmap(loss, (0, None))(a, b))(b)
    torch.testing.assert_close(jacobian.sum(0), torch.func.grad(lambda b: loss(a, b).sum())(b))
    hessian = torch.autograd.functional.hessian(lambda x: loss(x, b), a[0])
    torch.testing.assert_close(torch.func.hessian(loss)(a[0], b), hessian)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(loss))(a[0], b), hessian)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 1), (2, 0)])
def test_vmap_is_a_batch(in_dims: tuple[int | None, int | None]) -> None:
    a, b = (hermitian(x) for x in pencil(3, 4))
    moved = [x[0] if dim is None else x.movedim(0, dim) for x, dim in zip((a, b), in_dims, strict=True)]
    w, v = torch.vmap(eigh, in_dims)(*moved)
    for i in range(3):
        one = eigh(*(x[0 if dim is None else i] for x, dim in zip((a, b), in_dims, strict=True)))
        torch.testing.assert_close(w[i], one[0])
        torch.testing.assert_close(v[i].abs(), one[1].abs())
    b = b.clone()
    b[1] *= -1
    with pytest.warns(RuntimeWarning, match=r"no result for pencils \(1,\)"):
        assert torch.isnan(torch.vmap(eigh)(a, b)[0]).all(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("subset", [None, [1, 2]])
@pytest.mark.parametrize("values_only", [True, False])
def test_compiles_to_one_graph(values_only: bool, subset: list[int] | None) -> None:
    def total(a: Tensor, b: Tensor) -> Tensor:
        found = eigh(a, b, eigvals_only=values_only, subset_by_index=subset)
        return found.sin().sum() if values_only else (found[0].sin() * found[1].abs().sum(-2)).sum()

    torch._dynamo.reset()
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    pairs = [[x.clone().requires_grad_() for x in pencil(2, 4)] for _ in range(2)]
    for call, (a, b) in zip((compiled, total), pairs, strict=True):
        call(a, b).backward()
    torch.testing.assert_close(compiled(*pairs[0]), total(*pairs[0]))
    for x, y in zip(*pairs, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def test_errors_and_warnings_of_a_compiled_call() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(eigh, fullgraph=True, backend="aot_eager")
    a, b = (hermitian(x) for x in pencil(2, 4))
    with pytest.raises(torch.linalg.LinAlgError, match="B is not positive definite"):
        compiled(a[0], -b[0])
    with pytest.raises(ValueError, match="must not contain infs or NaNs"):
        compiled(a[0] * torch.nan, b[0])
    b[1] *= -1
    with pytest.warns(RuntimeWarning, match=r"no result for pencils \(1,\)"):
        assert torch.isnan(compiled(a, b)[0]).all(-1).tolist() == [False, True]


def test_fake_tensors() -> None:
    a = torch.zeros(3, 1, 5, 5, dtype=torch.complex64, device="meta")
    w, v = eigh(a, a[0], subset_by_index=[1, 3])
    assert (w.shape, w.dtype, v.shape, v.dtype) == ((3, 1, 3), torch.float32, (3, 1, 5, 3), torch.complex64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("arguments", [(1, 0, 4, False), (2, 1, 3, False), (3, 0, 4, True)])
def test_opcheck(dtype: torch.dtype, arguments: tuple) -> None:
    a, b = (hermitian(x).requires_grad_() for x in pencil(3, 4, dtype=dtype))
    warnings.simplefilter("ignore")  # it differentiates functions of the phase of vectors
    torch.library.opcheck(OP._eigh.default, (a, b, *arguments, False))
    torch.library.opcheck(OP._eigh.default, (a, None, 1, 0, 4, False, False))
    values = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(OP._inverse_gaps.default, (values, torch.zeros(3, 4, 4, dtype=dtype), False))


@pytest.mark.parametrize("problem", [1, 2, 3])
def test_the_op_with_fewer_vectors_than_all(problem: int) -> None:
    """Its derivatives solve once more; `eigh` asks for all vectors beforehand."""
    a, b = (x.requires_grad_() for x in pencil(4))

    def outputs(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        w, v, _ = OP._eigh(hermitian(a), hermitian(b), problem, 1, 3, False, False)
        return OP._eigh(hermitian(a), hermitian(b), problem, 0, 4, True, False)[0], (v * w[1:3]) @ v.mT

    assert gradcheck(outputs, (a, b), check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(outputs, (a, b), fast_mode=True)
