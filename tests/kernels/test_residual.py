"""_residual: exact on small integers, rounded once otherwise; strides, refusals, what torch must know."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sst_kernels import reference

Maker = Callable[..., Tensor]
residual = torch.ops.sst_kernels._residual.default
WIDE = [torch.float32, torch.float64]


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("shape", [(2, 3, n) for n in (0, 1, 7, 16, 33, 1030)] + [(0, 3, 5), (3, 0, 5)])
def test_exact(shape: tuple[int, int, int], dtype: torch.dtype, integers: Maker) -> None:
    AX, BX, X = (integers(*shape, dtype=dtype) for _ in range(3))
    theta = integers(*shape[:2], dtype=torch.float64)
    R, norms = residual(AX, BX, X, theta)
    assert (R.dtype, norms.dtype) == (dtype, torch.float64)
    for given, expected in zip((R, norms), reference.residual(AX, BX, X, theta), strict=True):
        assert torch.equal(given.double().cpu(), expected)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", WIDE)
def test_strides(dtype: torch.dtype, integers: Maker) -> None:
    frame = integers(4, 9, 50, dtype=dtype)
    AX, BX, X = frame[::2, :3, 1:41], frame[1:3, 3:9:2, 2:42], frame.transpose(0, 1)[:2, :3, 5:45]
    theta = integers(3, 2, dtype=torch.float64).mT
    R, norms = residual(AX, BX, X, theta)
    expected = reference.residual(AX, BX, X, theta)
    assert R.is_contiguous()
    assert torch.equal(R.double().cpu(), expected[0])
    assert torch.equal(norms.cpu(), expected[1])


@pytest.mark.parametrize("dtype", WIDE)
def test_rounding(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    AX, BX, X = (torch.randn(2, 4, 5000, dtype=dtype, device=device) for _ in range(3))
    theta = torch.randn(2, 4, dtype=torch.float64, device=device)
    R, norms = residual(AX, BX, X, theta)
    expected, squares = reference.residual(AX, BX, X, theta)
    scale = AX.double().cpu().abs() + (theta[..., None] * BX.double()).abs().cpu()
    assert ((R.double().cpu() - expected).abs() <= torch.finfo(dtype).eps * scale).all()
    squares[..., 0] = R.double().cpu().square().sum(-1)  # of the R that was written
    torch.testing.assert_close(norms.cpu(), squares, rtol=1e-14, atol=0)
    for member in range(2):  # a row does not depend on its neighbours
        one = residual(*(t[member : member + 1] for t in (AX, BX, X, theta)))
        assert torch.equal(one[0][0], R[member])
        assert torch.equal(one[1][0], norms[member])


@pytest.mark.parametrize("dtype", WIDE)
def test_opcheck(dtype: torch.dtype, device: torch.device) -> None:
    AX, BX, X = (torch.randn(2, 3, 8, dtype=dtype, device=device) for _ in range(3))
    theta = torch.randn(2, 3, dtype=torch.float64, device=device)
    torch.library.opcheck(residual, (AX, BX, X, theta))
    with pytest.raises(ValueError, match="_residual: BX requires a gradient"):
        residual(AX, BX.requires_grad_(), X, theta)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"X": torch.zeros(3, 4)}, r"X must be \(N, m, n\), got \(3, 4\)"),
        ({"X": torch.zeros(2, 3, 4).half()}, r"X must be float32 or float64, got float16"),
        ({"AX": torch.zeros(2, 3, 5)}, r"AX must be \(2, 3, 4\) as X is, got \(2, 3, 5\)"),
        ({"BX": torch.zeros(2, 3, 4).double()}, r"BX must be float32 to match X, got float64"),
        ({"BX": torch.zeros(2, 4, 3).mT}, r"BX must have adjacent elements"),
        ({"theta": torch.zeros(2, 4).double()}, r"theta must be \(2, 3\) to match X \(2, 3, 4\), got \(2, 4\)"),
        ({"theta": torch.zeros(2, 3)}, r"theta must be float64 whatever X's dtype, got float32"),
        ({"AX": torch.zeros(2, 3, 4, device="meta")}, r"on one device, got cpu and meta"),
    ],
)
def test_refusals(change: dict[str, Tensor], message: str) -> None:
    arguments = {name: torch.zeros(2, 3, 4) for name in ("AX", "BX", "X")} | {"theta": torch.zeros(2, 3).double()}
    with pytest.raises(ValueError, match=message):
        residual(*(arguments | change).values())
