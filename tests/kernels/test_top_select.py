from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sst_kernels import TopSelect, digit_histogram_, reference, threshold_mask_, top_mask

INF, NAN = float("inf"), float("nan")
SPECIAL = [0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, -NAN, 5e-324, 1e-45, -1e-45, 65504.0, -6e-8, 1.0000001, 3e38]
WIDE = [torch.float32, torch.float64]


def counts_on(device: torch.device, fill: int = 0) -> Tensor:
    return torch.full((65536,), fill, dtype=torch.int64, device=device)


def by_sorting(values: Tensor, count: int) -> Tensor:
    """The mask by a stable sort, which puts equal values in the order of their positions."""
    order = values.flatten().double().cpu().argsort(descending=True, stable=True)[:count]
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[order] = True
    return mask.reshape(values.shape)


@pytest.fixture
def special(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Values of every kind, and random ones of every magnitude."""
    torch.manual_seed(0)
    scales = 10 ** (torch.rand(300).double() * 60 - 30)
    return torch.cat([torch.tensor(SPECIAL).double(), torch.randn(300).double() * scales]).to(dtype).to(device)


@pytest.mark.sanitize
def test_histograms_equal_the_reference(special: Tensor, device: torch.device) -> None:
    prefix = 0
    for digit in range(4 if special.dtype == torch.float64 else 2):
        counts = counts_on(device, fill=7)
        expected = reference.digit_histogram_(counts, special, prefix, digit)
        digit_histogram_(counts, special, prefix, digit)
        assert torch.equal(counts.cpu(), expected)
        if digit == 0:
            assert counts[-1] - 7 == special.isnan().sum()
        prefix = prefix << 16 | int((expected - 7).argmax())


def test_keys_order_all_values(dtype: torch.dtype) -> None:
    values = [v for v in torch.tensor(SPECIAL).to(dtype).double().tolist() if v == v]
    bits = 64 if dtype == torch.float64 else 32
    for a in values:
        for b in values:
            assert (reference.sort_key(a, bits) < reference.sort_key(b, bits)) == (a < b)


@pytest.mark.sanitize
@pytest.mark.parametrize("ties", [0, 3, 40, 10**6])
def test_masks_equal_the_reference(ties: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(1)
    values = torch.randint(-3, 4, (3, 37)).to(device, dtype)
    values[0, 0] = NAN
    left = torch.tensor([ties], device=device)
    for threshold in (1.0, -0.0, 9.0, -INF):
        expected, rest = reference.threshold_mask_(left, values, threshold)
        assert torch.equal(threshold_mask_(left, values, threshold).cpu(), expected)
        assert left.item() == rest


# One unit of the CPU's histogram is 65536 values, one of the mask 8192; beyond them threads take several.
@pytest.mark.parametrize("n", [1, 63, 8193, 65537, 1_000_003])
@pytest.mark.parametrize("kind", ["normal", "few", "equal"])
def test_large_masks_equal_a_stable_sort(n: int, kind: str, device: torch.device) -> None:
    torch.manual_seed(2)
    values = {"normal": torch.randn(n), "few": torch.randint(-2, 3, (n,)).float(), "equal": torch.full((n,), -0.0)}[
        kind
    ]
    values = values.to(device)
    threads = torch.get_num_threads()
    try:
        for torch_threads in (1, 3):
            torch.set_num_threads(torch_threads)
            for count in {1, (n + 2) // 3, n}:
                assert torch.equal(top_mask(values, count).cpu(), by_sorting(values, count))
    finally:
        torch.set_num_threads(threads)


def test_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(3)
    values = torch.randn(50, 70).to(device, dtype)
    values[3, :5] = values[0, 0]
    count = int((values > values[0, 0]).sum()) + 3  # ends among equal values
    assert torch.equal(top_mask(values, count).cpu(), by_sorting(values, count))


def test_infinities_and_zeros_are_values(device: torch.device) -> None:
    values = torch.tensor([-INF, -0.0, 0.0, INF, INF, -1.0], device=device)
    assert top_mask(values, 1).tolist() == [False, False, False, True, False, False]
    assert top_mask(values, 3).tolist() == [False, True, False, True, True, False]
    assert top_mask(values, 6).all()


def run(top: TopSelect, tensors: list[Tensor]) -> list[Tensor]:
    while not top.done:
        for i, values in enumerate(tensors):
            top.observe(values, f"tensor {i}")
        top.next_pass()
    return [top.mask(values) for values in tensors]


@pytest.mark.parametrize("wide", WIDE)
def test_a_stream_is_one_long_tensor(wide: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(4)
    tensors = [torch.randint(0, 5, shape).to(device, wide) for shape in [(3,), (40, 50), (0,), (7, 1, 3), ()]]
    whole = torch.cat([values.flatten() for values in tensors])
    for count in (1, 300, 777, whole.numel()):
        top = TopSelect(whole.numel(), count)
        masks = run(top, tensors)
        expected = by_sorting(whole, count)
        assert torch.equal(torch.cat([mask.flatten() for mask in masks]).cpu(), expected)
        assert [mask.shape for mask in masks] == [values.shape for values in tensors]
        assert top.threshold == whole.cpu()[expected].min()
        assert top.ties == (whole.cpu()[expected] == top.threshold).sum()


def test_half_types_mix_with_float32(device: torch.device) -> None:
    tensors = [torch.tensor(x, device=device) for x in ([1.0, 2.5], [2.5, 0.5], [2.5, 3.0])]
    tensors = [x.to(dtype) for x, dtype in zip(tensors, (torch.bfloat16, torch.float32, torch.float16), strict=True)]
    masks = run(TopSelect(6, 3), tensors)
    assert [mask.tolist() for mask in masks] == [[False, True], [True, False], [False, True]]


def test_strides_are_made_contiguous(device: torch.device) -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 2.0]], device=device).T  # rows 1 3 and 2 2
    assert top_mask(values, 2).tolist() == [[False, True], [True, False]]


def test_nan_is_refused_by_name() -> None:
    top = TopSelect(4, 1)
    top.observe(torch.ones(2), "layers.0.weight")
    with pytest.raises(
        ValueError, match=r"^TopSelect.observe: 'layers.1.weight' holds 1 NaN among its 2 values.*nan_to"
    ):
        top.observe(torch.tensor([NAN, 1.0]), "layers.1.weight")
    with pytest.raises(ValueError, match="NaN"):
        top_mask(torch.tensor([-NAN]), 1)


def test_misuse_is_refused() -> None:
    for total, count in ((3, 0), (3, 4), (0, 0)):
        with pytest.raises(ValueError, match=f"count must be from 1 to total = {total}, got {count}"):
            TopSelect(total, count)
    top = TopSelect(3, 1)
    with pytest.raises(ValueError, match=r"mask: the threshold is not known yet"):
        top.mask(torch.ones(3))
    with pytest.raises(ValueError, match="must show total = 3 values, got 0"):
        top.next_pass()
    top.observe(torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="shows 4 values, more than total = 3"):
        top.observe(torch.ones(1), "again")
    top = TopSelect(3, 1)
    top.observe(torch.tensor([1.0, 2.0, 3.0]))
    top.next_pass()
    with pytest.raises(ValueError, match=r"'other' is torch.float64, others were of 32 bits"):
        top.observe(torch.ones(3).double(), "other")
    top.observe(torch.ones(3))
    with pytest.raises(ValueError, match="other values than the one before"):
        top.next_pass()


F32 = torch.zeros(3)


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        (digit_histogram_, (torch.zeros(8).long(), F32), r"counts must be \(65536,\), got \(8,\)"),
        (digit_histogram_, (torch.zeros(65536), F32), r"counts must be int64"),
        (digit_histogram_, (torch.zeros(65536).long(), F32.long()), r"values must be float32, .* got int64"),
        (digit_histogram_, (torch.zeros(65536).long(), torch.ones(4)[::2]), r"values \(2,\) must be contiguous"),
        (digit_histogram_, (torch.zeros(65536).long(), F32, 0, 2), r"digit must be one of 0 to 1 for float32, got 2"),
        (digit_histogram_, (torch.zeros(65536).long(), F32, 1, 0), r"prefix must be the 0 first digits"),
        (threshold_mask_, (torch.zeros(()).long(), F32, 0.0), r"ties must be \(1,\), got \(\)"),
        (threshold_mask_, (torch.zeros(1).long(), F32, NAN), r"threshold must be a number, got NaN"),
        (threshold_mask_, (torch.zeros(1).long(), F32, 0.1), r"threshold must be a number of float32.*got 0.1"),
    ],
)
def test_refusals(op: Callable, arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{op.__name__}: .*{message}"):
        op(*arguments)


def test_registration(device: torch.device) -> None:
    ops, values = torch.ops.sst_kernels, torch.randn(20, device=device)
    torch.library.opcheck(ops.digit_histogram_.default, (counts_on(device), values, 0, 0))
    torch.library.opcheck(ops.threshold_mask_.default, (torch.tensor([1], device=device), values, 0.0))
    values.requires_grad_()
    with pytest.raises(ValueError, match="digit_histogram_: values requires a gradient"):
        digit_histogram_(counts_on(device), values)
    with pytest.raises(ValueError, match="threshold_mask_: values requires a gradient"):
        threshold_mask_(torch.tensor([1], device=device), values, 0.0)
    assert top_mask(values, 20).all()  # a mask has no gradient
