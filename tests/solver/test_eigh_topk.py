"""`eigh_topk` against scipy and `eigh`: values, both engines of its derivatives, torch's transforms."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from pencils import hermitian
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from sst_kernels import Status, eigh, eigh_topk, resolvent

OP = torch.ops.sst_kernels
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


@pytest.fixture(params=["iterated", "direct"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which engine solves for derivatives off the span of the vectors; the other one must not run."""
    other = {"iterated": "_by_spectrum", "direct": "_iterate"}[request.param]
    monkeypatch.setattr(resolvent, "_iterating_pays", lambda n, k: request.param == "iterated")
    monkeypatch.setattr(resolvent, other, lambda *_: pytest.fail(f"{other} ran"))
    return request.param


def pencil(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    x, y = torch.randn(2, *shape, shape[-1], dtype=dtype)
    return hermitian(x), y @ y.mH + torch.eye(shape[-1])


def with_spectrum(values: list[float], seed: int = 0) -> tuple[Tensor, Tensor]:
    """A pencil with those eigenvalues."""
    torch.manual_seed(seed)
    x, y = torch.randn(2, len(values), len(values), dtype=torch.float64)
    q, chol = torch.linalg.qr(x)[0], torch.linalg.cholesky(y @ y.T + torch.eye(len(values)))
    a = chol @ (q * torch.tensor(values, dtype=torch.float64)) @ q.T @ chol.T
    return hermitian(a), chol @ chol.T


def loss(w: Tensor, v: Tensor) -> Tensor:
    """Of each value and of projectors; no sign changes it."""
    return (w**3).sum() + ((v * w.sin()[..., None, :]) @ v.mH)[..., 0, 1].abs().sum() + v[..., -1].abs().pow(4).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("k", [1, 4, 9])
def test_against_scipy(k: int, dtype: torch.dtype, device: torch.device) -> None:
    """Only lower triangles are read."""
    a, b = (x.to(device) for x in pencil(2, 9, dtype=dtype))
    poisoned = [x + torch.full_like(x, torch.nan).triu(1) for x in (a, b)]
    values, vectors, status = OP.eigh_topk(*poisoned, k)
    for i in range(2):
        expected = scipy.linalg.eigh(a[i].cpu().numpy(), b[i].cpu().numpy(), subset_by_index=[9 - k, 8])
        eps = torch.finfo(dtype).eps
        np.testing.assert_allclose(values[i].cpu(), expected[0][::-1], atol=100 * eps * np.abs(expected[0]).max())
        overlap = np.abs(vectors[i].cpu().numpy().conj().T @ b[i].cpu().numpy() @ expected[1][:, ::-1])
        np.testing.assert_allclose(overlap, np.eye(k), atol=2e3 * eps)
    assert (status & Status.CONVERGED).all() and status.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("shapes", [((5,), (5,)), ((2, 1, 5), (2, 5))])
def test_first_and_second_order(engine: str, dtype: torch.dtype, k: int, shapes: tuple) -> None:
    a = pencil(*shapes[0], dtype=dtype)[0].requires_grad_()
    b = pencil(*shapes[1], dtype=dtype, seed=1)[1].requires_grad_()

    def outputs(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        w, v, _ = eigh_topk(hermitian(a), hermitian(b), k)
        return w, (v * w[..., None, :]) @ v.mH

    assert gradcheck(outputs, (a, b), check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(outputs, (a, b), check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_a_large_pencil(engine: str, dtype: torch.dtype) -> None:
    """Against `eigh`, which knows the whole spectrum, in float64."""
    a, b = with_spectrum([1 / (i + 1) for i in range(120)])
    gradients = []
    for run, cast in ((lambda a, b: eigh_topk(a, b, 6)[:2], dtype), (top_by_eigh, torch.float64)):
        x, y = (m.to(cast).requires_grad_() for m in (a, b))
        loss(*run(x, y)).backward()
        gradients.append((x.grad.double(), y.grad.double()))
    for found, expected in zip(*gradients, strict=True):
        assert not found.triu(1).any()
        error = torch.linalg.norm(found - expected) / torch.linalg.norm(expected)
        assert error < 1e4 * torch.finfo(dtype).eps


def top_by_eigh(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    w, v = eigh(a, b)
    return w[-6:].flip(-1), v[:, -6:].flip(-1)


def test_where_the_iteration_fails_the_whole_spectrum_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind λ_k a hundred eigenvalues, graded down to 1e-9 of a gap: too hard for the limit of iterations."""
    monkeypatch.setattr(resolvent, "_iterating_pays", lambda n, k: True)
    pencils, direct = [], resolvent._by_spectrum
    monkeypatch.setattr(resolvent, "_by_spectrum", lambda *args: pencils.append(len(args[0])) or direct(*args))
    hard = [3.0, 2.0, *(2 - 10 ** (-9 + 9 * i / 120) for i in range(118))]
    easy = [3.0, 2.0, *(1 / (i + 1) for i in range(118))]
    a, b = (torch.stack(x) for x in zip(with_spectrum(hard), with_spectrum(easy), strict=True))
    gradients = []
    for vector in (lambda a: eigh_topk(a, b, 60)[1][..., 1], lambda a: eigh(a, b)[1][..., -2]):
        x = a.clone().requires_grad_()
        vector(x).pow(4).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5 * float(gradients[1].abs().max()))
    assert pencils == [1]


def projector(a: Tensor, b: Tensor, k: int) -> Tensor:
    v = eigh_topk(a, b, k)[1]
    return (v @ v.T)[0, 1]


@pytest.mark.parametrize("iterating", [True, False])
def test_k_that_cuts_a_cluster(monkeypatch: pytest.MonkeyPatch, iterating: bool) -> None:
    """Finite derivatives, and a warning at the line of the user, even of the values alone."""
    monkeypatch.setattr(resolvent, "_iterating_pays", lambda n, k: iterating)
    a, b = (m.requires_grad_() for m in with_spectrum([5.0, 3, 3, 1, 0.5, 0.2]))
    with pytest.warns(RuntimeWarning, match="k cuts a cluster") as caught:
        projector(a, b, 2).backward()
    assert caught[0].filename == __file__
    assert torch.isfinite(a.grad).all() and torch.isfinite(b.grad).all()
    with pytest.warns(RuntimeWarning, match="k cuts a cluster"):
        eigh_topk(a, b, 2)[0].sum().backward()


def test_projector_of_a_whole_cluster(engine: str) -> None:
    """Against finite differences."""
    warnings.simplefilter("ignore")  # the op cannot know what the loss is
    a, b = with_spectrum([5.0, 3, 3, 1, 0.5, 0.2])
    x, y = (m.clone().requires_grad_() for m in (a, b))
    projector(x, y, 3).backward()
    torch.manual_seed(2)
    da, db = (hermitian(torch.randn_like(m)) for m in (a, b))
    h = 1e-5
    difference = float(projector(a + h * da, b + h * db, 3) - projector(a - h * da, b - h * db, 3)) / (2 * h)
    assert float((x.grad * da).sum() + (y.grad * db).sum()) == pytest.approx(difference, rel=1e-6, abs=1e-7)


def test_a_pencil_without_a_result_has_derivative_zero() -> None:
    """B is shared: its gradient is that of the sound pencils."""
    a, b = pencil(6)
    stacked = torch.stack([a, a, a * torch.nan]).requires_grad_()
    bs = torch.stack([b, -b, b]).requires_grad_()
    w, v, status = eigh_topk(stacked, bs, 2)
    loss(w, v).backward()
    x, y = (m.clone().requires_grad_() for m in (a, b))
    loss(*eigh_topk(x, y, 2)[:2]).backward()
    for found, expected in ((stacked.grad, x.grad), (bs.grad, y.grad)):
        torch.testing.assert_close(found[0], expected)
        assert not found[1:].any()
    assert [int(s) & (Status.NOT_POSITIVE_DEFINITE | Status.NON_FINITE) for s in status] == [0, 8, 16]
    shared = b.clone().requires_grad_()
    loss(*eigh_topk(stacked.detach()[::2], shared, 2)[:2]).backward()
    torch.testing.assert_close(shared.grad, y.grad)


def total(a: Tensor, b: Tensor) -> Tensor:
    return loss(*eigh_topk(a, b, 2)[:2])


def test_torch_func() -> None:
    a, b = pencil(2, 4)[0], pencil(4)[1]
    expected = torch.stack([torch.autograd.functional.jacobian(lambda x: total(x, b), x) for x in a])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(total), (0, None))(a, b), expected)
    torch.testing.assert_close(torch.func.grad(lambda a: torch.func.vmap(total, (0, None))(a, b).sum())(a), expected)
    hessian = torch.autograd.functional.hessian(lambda x: total(x, b), a[0])
    torch.testing.assert_close(torch.func.hessian(total)(a[0], b), hessian)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(total))(a[0], b), hessian)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 1), (2, 0), (-1, -1)])
def test_vmap(in_dims: tuple[int | None, int | None]) -> None:
    a, b = pencil(3, 2, 4)[0], pencil(3, 4, seed=1)[1]
    moved = [x[0] if dim is None else x.movedim(0, dim) for x, dim in zip((a, b), in_dims, strict=True)]
    found = torch.vmap(lambda a, b: eigh_topk(a, b, 2), in_dims)(*moved)
    for i in range(3):
        expected = eigh_topk(*(x[0 if dim is None else i] for x, dim in zip((a, b), in_dims, strict=True)), 2)
        torch.testing.assert_close(found[0][i], expected[0])
        torch.testing.assert_close(found[1][i].abs(), expected[1].abs())
        assert torch.equal(found[2][i], expected[2])


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    a, b = pencil(2, 5)
    gradients = []
    for call in (torch.compile(total, fullgraph=True, backend="aot_eager"), total):
        x, y = (m.clone().requires_grad_() for m in (a, b))
        call(x, y).backward()
        gradients += [x.grad, y.grad]
    torch.testing.assert_close(gradients[:2], gradients[2:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_opcheck(dtype: torch.dtype) -> None:
    warnings.simplefilter("ignore")  # it differentiates functions of the phase of vectors
    a, b = (x.requires_grad_() for x in pencil(3, 4, dtype=dtype))
    torch.library.opcheck(OP.eigh_topk.default, (a, b[0], 2))
    w, v, status = (x.detach() for x in eigh_topk(a, b, 2))
    torch.library.opcheck(
        OP._resolvent.default, (a, b, w.requires_grad_(), v.requires_grad_(), status, torch.randn_like(v))
    )


def test_empty_batches_and_meta_tensors() -> None:
    w, v, status = eigh_topk(torch.zeros(0, 3, 4, 4), torch.eye(4).requires_grad_(), 2)
    assert (w.shape, v.shape, status.shape) == ((0, 3, 2), (0, 3, 4, 2), (0, 3))
    v.sum().backward()
    w, v, status = eigh_topk(torch.zeros(3, 4, 4, device="meta"), torch.zeros(4, 4, device="meta"), 2)
    assert (w.shape, v.shape, status.shape) == ((3, 2), (3, 4, 2), (3,))


EYE = torch.eye(3)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: eigh_topk(EYE, EYE, 4), ValueError, r"k must be in 1\.\.n with n = 3"),
        (lambda: eigh_topk(EYE, torch.eye(2), 1), ValueError, r"of the order of A"),
        (lambda: eigh_topk(EYE.half(), EYE.half(), 1), TypeError, r"must be float32"),
        (lambda: eigh_topk(EYE, EYE, 1, method="magic"), ValueError, r"method must be one of"),
        (lambda: eigh_topk(EYE, EYE, 1, tol=-1.0), ValueError, r"tol must be positive"),
        (lambda: eigh_topk(EYE, EYE.to("meta"), 1), ValueError, r"must be on one device, got cpu and meta"),
        (lambda: OP.eigh_topk(EYE.to("meta"), EYE, 1), ValueError, r"must be on one device, got meta and cpu"),
        (lambda: eigh_topk(EYE.to("meta"), EYE.to("meta"), 4), ValueError, r"k must be in 1\.\.n with n = 3"),
        (lambda: eigh_topk(EYE, EYE, 1.0), TypeError, r"k must be an int, got float"),
        (lambda: eigh_topk([[1.0]], EYE, 1), TypeError, r"eigh_topk: a must be a torch\.Tensor, got list"),
        (lambda: eigh_topk(EYE, EYE.to_sparse(), 1), TypeError, r"b must be strided, got torch\.sparse_coo"),
    ],
)
def test_arguments_are_checked(call: Callable[[], None], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
