"""symm_thin and symm_thin_pair: exact on small integers, whatever the layout; gradients, vmap, fake tensors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from sst_kernels import reference, symm_thin, symm_thin_pair

Maker = Callable[..., Tensor]
NAN = float("nan")
WIDE = [torch.float32, torch.float64]
SIZES = [1, 2, 7, 33, 64, 65, 130, 300]
COLUMNS = [1, 2, 3, 8, 9, 16, 24, 31, 70]


@pytest.fixture(params=WIDE, ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def lower(integers: Maker) -> Maker:
    """Maker of matrices whose upper triangle is NaN, rows 3 further apart than they are long."""

    def make(*shape: int, dtype: torch.dtype) -> Tensor:
        frame = integers(*shape[:-1], shape[-1] + 3, dtype=dtype)
        A = frame[..., 1 : 1 + shape[-1]]
        A.masked_fill_(torch.ones_like(A).triu(1).bool(), NAN)
        return A

    return make


def exact(A: Tensor, X: Tensor, Y: Tensor) -> bool:
    return torch.equal(Y.double().cpu(), reference.symm_thin(A, X))


@pytest.mark.sanitize
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("m", COLUMNS)
def test_exact_in_either_order(n: int, m: int, dtype: torch.dtype, lower: Maker, integers: Maker) -> None:
    A, rows = lower(2, n, n, dtype=dtype), integers(2, m, n, dtype=dtype)
    for X in (rows.mT, rows.mT.contiguous()):
        Y = symm_thin(A, X)
        assert exact(A, X, Y)
        assert Y.dtype == dtype
        assert Y.stride() == torch.empty_like(X).stride() or 1 in (n, m)


@pytest.mark.parametrize(("n", "m"), [(513, 5), (777, 40), (1030, 17)])
def test_many_blocks(n: int, m: int, dtype: torch.dtype, lower: Maker, integers: Maker) -> None:
    A, B, X = lower(n, n, dtype=dtype), lower(n, n, dtype=dtype), integers(m, n, dtype=dtype).mT
    AX, BX = symm_thin_pair(A, B, X)
    assert exact(A, X, AX)
    assert exact(B, X, BX)


@pytest.mark.sanitize
def test_pair_and_strides(dtype: torch.dtype, lower: Maker, integers: Maker) -> None:
    A, B = lower(5, 70, 70, dtype=dtype)[::2], lower(3, 70, 70, dtype=dtype)
    X = integers(3, 90, 14, dtype=dtype)[:, 10:80, 1::2]
    AX, BX = symm_thin_pair(A, B, X)
    assert exact(A, X, AX)
    assert exact(B, X, BX)
    assert AX.is_contiguous()


@pytest.mark.sanitize
def test_one_matrix_for_a_batch(dtype: torch.dtype, lower: Maker, integers: Maker) -> None:
    A, X = lower(40, 40, dtype=dtype), integers(2, 3, 40, 5, dtype=dtype)
    assert exact(A, X, symm_thin(A, X))
    assert exact(A, X[:, 0], symm_thin(A.expand(2, 40, 40), X[:, 0]))


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding(dtype: torch.dtype, device: torch.device) -> None:
    """The root mean square of the errors, in units of |A| |X|, against torch's: a largest error is a matter of luck."""
    A, X = torch.randn(600, 600, dtype=dtype), torch.randn(600, 12, dtype=dtype)
    A = A.tril() + A.tril(-1).mT
    wide = [t.double().numpy().astype(np.longdouble) for t in (A, X)]
    exact, scale = wide[0] @ wide[1], np.abs(wide[0]) @ np.abs(wide[1])

    def error(Y: Tensor) -> float:
        return float(np.sqrt(np.mean(((Y.double().cpu().numpy() - exact) / scale) ** 2)))

    assert error(symm_thin(A.to(device), X.to(device))) <= 2 * error(A @ X)


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("shared", [False, True])
def test_gradients(batch: tuple[int, ...], shared: bool, device: torch.device) -> None:
    shape = () if shared else batch
    A, B = (torch.randn(*shape, 5, 5, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    X = torch.randn(*batch, 5, 3, dtype=torch.float64, device=device, requires_grad=True)
    for function, inputs in ((symm_thin, (A, X)), (symm_thin_pair, (A, B, X))):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
    if batch:  # a cotangent of uneven strides
        A2, X2 = (x.detach().expand(3, *x.shape).clone().requires_grad_() for x in (A.expand(*batch, 5, 5), X))
        (symm_thin(A2, X2).sum(0) ** 2).sum().backward()
        full = A2.detach().tril() + A2.detach().tril(-1).mT
        summed = 2 * (full @ X2.detach()).sum(0)
        torch.testing.assert_close(X2.grad, full @ summed)
    symm_thin_pair(A, B, X)[1].sum().backward()
    assert not B.grad.triu(1).any()
    assert not A.grad.any()


@pytest.mark.parametrize("dims", [(0, 0), (1, 0), (None, 0), (None, 2), (0, None)])
@pytest.mark.parametrize("lead", [(), (3,)])
def test_vmap(dims: tuple[int | None, int | None], lead: tuple[int, ...], integers: Maker) -> None:
    a_dim, x_dim = dims
    plain = integers(*lead, 6, 6).double(), integers(*lead, 6, 2).double()
    A, X = (
        t if dim is None else torch.stack([t, 2 * t, t + 1, 3 - t], dim) for t, dim in zip(plain, dims, strict=True)
    )
    for columns in (False, True):
        block = X.mT.contiguous().mT if columns and x_dim != 2 else X
        Y, pair = (torch.vmap(f, dims)(A, block) for f in (symm_thin, lambda a, x: symm_thin_pair(a, 2 * a, x)))
        for i in range(4):
            a, x = (t if dim is None else t.select(dim, i) for t, dim in ((A, a_dim), (block, x_dim)))
            assert exact(a, x, Y[i])
            assert torch.equal(pair[0][i], Y[i])
            assert torch.equal(pair[1][i], 2 * Y[i])


def test_vmap_of_one_matrix_for_a_batch(integers: Maker) -> None:
    A, X = integers(4, 6, 6), integers(4, 3, 2, 6, 5)
    Y = torch.vmap(symm_thin)(A, X)
    for i in range(4):
        assert exact(A[i], X[i], Y[i])


def test_opcheck(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    A, B = (torch.randn(2, 9, 9, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    for X in (torch.randn(2, 9, 3, device=device, dtype=dtype), torch.randn(2, 3, 9, device=device, dtype=dtype).mT):
        torch.library.opcheck(torch.ops.sst_kernels.symm_thin.default, (A, X.requires_grad_()))
        torch.library.opcheck(torch.ops.sst_kernels.symm_thin_pair.default, (A, B, X))


def test_compiles_to_one_graph(device: torch.device) -> None:
    A, X = torch.randn(2, 9, 9, device=device), torch.randn(2, 3, 9, device=device).mT

    def step(A: Tensor, X: Tensor) -> Tensor:
        AX, BX = symm_thin_pair(A, 2 * A, X)
        return symm_thin(A, AX) + BX

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(A, X), step(A, X))


@pytest.mark.parametrize(
    ("A", "X", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(4, 2), r"A must be \(…, n, n\) with n = 4 to match X \(4, 2\)"),
        (torch.zeros(2, 4, 4), torch.zeros(3, 4, 2), r"its leading dimensions X's or none, got \(2, 4, 4\)"),
        (torch.zeros(4, 4), torch.zeros(4), r"X must be \(…, n, m\), got \(4,\)"),
        (torch.zeros(4, 4).half(), torch.zeros(4, 2).half(), r"X must be float32 or float64, got float16"),
        (torch.zeros(4, 4).double(), torch.zeros(4, 2), r"A must be float32 to match X, got float64"),
        (torch.zeros(4, 8)[:, ::2], torch.zeros(4, 2), r"A must have adjacent elements"),
        (torch.zeros(4, 4, device="meta"), torch.zeros(4, 2), r"on one device, got cpu and meta"),
    ],
)
def test_refusals(A: Tensor, X: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        symm_thin(A, X)


def test_arguments_are_tensors() -> None:
    with pytest.raises(TypeError, match=r"symm_thin: X must be a torch\.Tensor, got list"):
        symm_thin(torch.zeros(2, 2), [1, 2])
