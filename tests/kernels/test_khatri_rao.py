from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sst_kernels import khatri_rao_rows, reference

Maker = Callable[..., Tensor]
NAN = float("nan")


def boundaries(lengths: list[int], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(dtype)


# r_a, r_b on both sides of the tile and panel widths; lengths on both sides of a token block.
SHAPES = [
    ([5, 0, 1, 9], 3, 2),
    ([33, 7], 33, 47),
    ([300, 256, 257], 16, 17),
    ([40], 1, 65),
    ([2] * 50, 16, 16),
]


@pytest.mark.sanitize
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("lengths", "r_a", "r_b"), SHAPES)
def test_exact_on_integers(
    lengths: list[int],
    r_a: int,
    r_b: int,
    weighted: bool,
    dtype: torch.dtype,
    device: torch.device,
    integers: Maker,
    accumulator: Callable[[torch.dtype], torch.dtype],
) -> None:
    tokens = sum(lengths)
    a, b = integers(tokens, r_a, dtype=dtype), integers(tokens, r_b, dtype=dtype)
    weight = integers(tokens, dtype=accumulator(dtype)) if weighted else None
    cu = boundaries(lengths, device)
    out = khatri_rao_rows(a, b, cu, weight)
    assert out.dtype == accumulator(dtype)
    assert out.device == a.device
    assert torch.equal(out.double().cpu(), reference.khatri_rao_rows(a, b, cu, weight))


def test_is_the_weight_gradient_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 4, bias=False, dtype=torch.float64)
    x = torch.randn(9, 6, dtype=torch.float64)
    y = layer(x)
    loss = y.tanh().sum()
    (delta,) = torch.autograd.grad(loss, y, retain_graph=True)
    (expected,) = torch.autograd.grad(loss, layer.weight)
    row = khatri_rao_rows(x, delta, torch.tensor([0, 9]))
    torch.testing.assert_close(row[0], expected.reshape(-1))


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("offsets", "kept"),
    [
        ([-7, 3, 99], [range(3), range(3, 6)]),
        ([4, 2, 6], [range(0), range(2, 6)]),
        ([50, 60], [range(0)]),
        ([-9, -1], [range(0)]),
        ([2, 5, 5, 3], [range(2, 5), range(0), range(0)]),
    ],
)
def test_offsets_are_clamped(
    offsets: list[int], kept: list[range], dtype: torch.dtype, integers: Maker, device: torch.device
) -> None:
    a, b = integers(6, 5), integers(6, 3)
    out = khatri_rao_rows(a, b, torch.tensor(offsets, dtype=dtype, device=device))
    for row, tokens in zip(out, kept, strict=True):
        expected = sum((torch.outer(b[t], a[t]) for t in tokens), torch.zeros(3, 5, device=device))
        assert torch.equal(row.view(3, 5), expected)


def test_extreme_int64_offsets(integers: Maker, device: torch.device) -> None:
    a = integers(6, 5)
    limits = torch.iinfo(torch.int64)
    out = khatri_rao_rows(a, a, torch.tensor([limits.min, limits.max], device=device))
    assert torch.equal(out.view(5, 5), a.T @ a)


@pytest.mark.sanitize
def test_zero_weight_tokens_are_not_read(
    dtype: torch.dtype, integers: Maker, device: torch.device, accumulator: Callable
) -> None:
    a, b = integers(40, 18, dtype=dtype), integers(40, 17, dtype=dtype)
    weight = (torch.arange(40, device=device) % 3 != 0).to(accumulator(dtype))
    cu = boundaries([0, 13, 27], device)
    expected = reference.khatri_rao_rows(a, b, cu, weight)
    a[::3], b[::3] = NAN, float("inf")
    assert torch.equal(khatri_rao_rows(a, b, cu, weight).double().cpu(), expected)


def test_nan_reaches_its_own_sequence_only(integers: Maker, device: torch.device) -> None:
    a, b = integers(8, 3), integers(8, 2)
    a[5, 1] = NAN
    out = khatri_rao_rows(a, b, boundaries([4, 4], device)).view(2, 2, 3)
    assert out.isnan().nonzero().tolist() == [[1, 0, 1], [1, 1, 1]]


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("tokens", "offsets", "shape"),
    [(0, [0, 0, 0], (2, 12)), (0, [0], (0, 12)), (5, [0], (0, 12)), (5, [3, 3], (1, 12))],
)
def test_empty(tokens: int, offsets: list[int], shape: tuple[int, int], integers: Maker, device: torch.device) -> None:
    cu = torch.tensor(offsets, device=device)
    out = khatri_rao_rows(integers(tokens, 4), integers(tokens, 3), cu)
    assert out.shape == shape
    assert not out.any()


def test_zero_width(integers: Maker, device: torch.device) -> None:
    cu = boundaries([2, 3], device)
    assert khatri_rao_rows(integers(5, 0), integers(5, 3), cu).shape == (2, 0)


@pytest.mark.sanitize
def test_row_strides(integers: Maker, device: torch.device) -> None:
    wide = integers(50, 100)
    a, b, repeated = wide[:, 3:40], wide[:, 61:78], integers(1, 20).expand(50, 20)
    cu = boundaries([20, 30], device, torch.int32)
    for left, right in [(a, b), (wide[::2, :33], wide[1::2, :9]), (repeated, b)]:
        expected = reference.khatri_rao_rows(left, right, cu)
        assert torch.equal(khatri_rao_rows(left, right, cu).double().cpu(), expected)


def test_misaligned_pointers(integers: Maker, device: torch.device) -> None:
    flat = integers(1 + 33 * 16)
    a = flat[1:].view(33, 16)
    cu = boundaries([33], device)
    assert torch.equal(khatri_rao_rows(a, a, cu).view(16, 16), a.T @ a)


def test_many_sequences(integers: Maker, device: torch.device) -> None:
    count = 70_000  # more than a CUDA grid's y or z dimension holds
    a, b = integers(count, 2), integers(count, 3)
    out = khatri_rao_rows(a, b, torch.arange(count + 1, device=device))
    assert torch.equal(out, (b[:, :, None] * a[:, None, :]).flatten(1))


def test_error_at_most_twice_torchs(
    dtype: torch.dtype, device: torch.device, product_error: Callable, accumulator: Callable
) -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(2000, 40, device=device).to(dtype) for _ in range(2))
    ours = khatri_rao_rows(a, b, boundaries([2000], device)).view(40, 40)
    theirs = b.to(accumulator(dtype)).T @ a.to(accumulator(dtype))
    assert product_error(ours, b, a) <= 2 * product_error(theirs, b, a)


def test_two_runs_agree_bit_for_bit(device: torch.device) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2000, 50, device=device), torch.randn(2000, 70, device=device)
    cu = boundaries([500] * 4, device)
    assert torch.equal(khatri_rao_rows(a, b, cu), khatri_rao_rows(a, b, cu))


def test_threads_do_not_change_the_result() -> None:
    torch.manual_seed(0)
    a, cu = torch.randn(4096, 64), torch.arange(0, 4097, 256)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(khatri_rao_rows(a, a, cu))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


ONES, CU = torch.ones(4, 3), torch.tensor([0, 4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(4), ONES, CU), r"a must be \(T, r_a\), got \(4,\)"),
        ((ONES, torch.ones(5, 2), CU), r"b must be \(T, r_b\) with T = 4 .* got \(5, 2\)"),
        ((ONES, torch.ones(4), CU), r"b must be \(T, r_b\)"),
        ((ONES, ONES.double(), CU), r"b must be float32 to match a, got float64; convert it"),
        ((ONES.int(), ONES.int(), CU), r"a must be float32, .* got int32; convert it"),
        ((ONES.cfloat(), ONES.cfloat(), CU), r"a must be float32"),
        ((ONES, ONES, CU.float()), r"cu_seqlens must be int64 or int32, got float32"),
        ((ONES, ONES, torch.ones(2, 2).long()), r"cu_seqlens must be \(S \+ 1,\).* got \(2, 2\)"),
        ((ONES, ONES, torch.ones(0).long()), r"cu_seqlens must be \(S \+ 1,\).* got \(0,\)"),
        ((ONES, ONES, CU, torch.ones(3)), r"weight must be \(T,\) = \(4,\).* got \(3,\)"),
        ((ONES, ONES, CU, torch.ones(4).bool()), r"weight must be float32 .* got bool; convert"),
        ((ONES, ONES, CU, torch.ones(4).double()), r"weight must be float32 .* got float64"),
        ((ONES.T.contiguous().T, ONES, CU), r"a must have adjacent elements .*stride 4"),
        ((ONES, ONES, torch.zeros(4).long()[::2]), r"cu_seqlens must have adjacent elements"),
        ((ONES, ONES, CU, torch.ones(8)[::2]), r"weight must have adjacent elements"),
    ],
)
def test_refusals_name_the_argument(arguments: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match="^khatri_rao_rows: " + message):
        khatri_rao_rows(*arguments)


def test_not_a_tensor() -> None:
    with pytest.raises(TypeError, match=r"b must be a torch\.Tensor, got ndarray"):
        khatri_rao_rows(ONES, ONES.numpy(), CU)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_devices_must_agree(device: torch.device) -> None:
    a, cu = torch.ones(4, 3, device=device), torch.tensor([0, 4], device=device)
    with pytest.raises(ValueError, match=r"b must be on the device of a \(cuda:0\), got cpu"):
        khatri_rao_rows(a, a.cpu(), cu)
    with pytest.raises(ValueError, match="cu_seqlens must be on the device of a"):
        khatri_rao_rows(a, a, cu.cpu())
    with pytest.raises(ValueError, match="weight must be on the device of a"):
        khatri_rao_rows(a, a, cu, torch.ones(4))
