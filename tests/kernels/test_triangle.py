from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sst_kernels import pack_lower, reference, symmetrize_, syrk_accumulate_, unpack_lower

Maker = Callable[..., Tensor]
NAN = float("nan")
SHAPES = [(1, 1), (33, 33), (2, 3, 40, 40), (130, 130), (300, 2, 2)]


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_copies_are_exact(shape: tuple[int, ...], wide: torch.dtype, integers: Maker, device: torch.device) -> None:
    S = torch.randn(*shape, device=device, dtype=wide)
    S.masked_fill_(torch.ones_like(S).triu(1).bool(), NAN)
    packed = pack_lower(S)
    assert torch.equal(packed.double().cpu(), reference.pack_lower(S))
    assert torch.equal(unpack_lower(packed).double().cpu(), reference.unpack_lower(packed))
    symmetrize_(S)
    assert torch.equal(S, unpack_lower(packed))
    assert torch.equal(S, S.mT)


@pytest.mark.sanitize
def test_strides(integers: Maker) -> None:
    frame = torch.full((3, 50, 60), NAN, device=integers(1).device)
    S = frame[:, 4:44, 7:47]
    S.copy_(integers(3, 40, 40))
    expected = reference.symmetrize_(S)
    assert torch.equal(pack_lower(S).double().cpu(), reference.pack_lower(S))
    symmetrize_(S)
    assert torch.equal(S.double().cpu(), expected)
    assert frame.isnan().sum() == frame.numel() - S.numel()


def test_packed_accumulation_equals_square(integers: Maker, device: torch.device) -> None:
    X = integers(2, 300, 270)
    square, packed = torch.zeros(2, 270, 270, device=device), torch.zeros(2, 270 * 271 // 2, device=device)
    syrk_accumulate_(square, X)
    syrk_accumulate_(packed, X)
    symmetrize_(square)
    assert torch.equal(unpack_lower(packed), square)


@pytest.mark.sanitize
def test_empty(device: torch.device) -> None:
    assert pack_lower(torch.zeros(0, 0, device=device)).shape == (0,)
    assert unpack_lower(torch.zeros(3, 0, device=device)).shape == (3, 0, 0)
    symmetrize_(torch.zeros(0, 5, 5, device=device))


@pytest.mark.parametrize(
    ("op", "argument", "message"),
    [
        (symmetrize_, torch.zeros(3, 4), r"S must be \(…, d, d\), got \(3, 4\)"),
        (symmetrize_, torch.zeros(3, 3).half(), r"S must be float32 or float64, got float16"),
        (symmetrize_, torch.zeros(3).expand(3, 3), r"S .* is written in place, but several"),
        (pack_lower, torch.zeros(3), r"S must be \(…, d, d\), got \(3,\)"),
        (pack_lower, torch.zeros(3, 6)[:, ::2], r"adjacent elements"),
        (unpack_lower, torch.zeros(4), r"P must be \(…, d \(d \+ 1\) / 2\) for some d, got \(4,\)"),
        (unpack_lower, torch.zeros(()), r"P must be"),
    ],
)
def test_refusals(op: Callable, argument: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{op.__name__}: .*{message}"):
        op(argument)
