from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sst_kernels import reference, syrk_accumulate_

Maker = Callable[..., Tensor]
NAN = float("nan")


def check(S: Tensor, X: Tensor, *args: Tensor | float | None, **kwargs: float) -> None:
    """Runs the op and compares S, whole, with the reference; S's upper triangle holds NaN."""
    S.masked_fill_(torch.ones_like(S).triu(1).bool(), NAN)
    expected = reference.syrk_accumulate_(S, X, *args, **kwargs)
    assert syrk_accumulate_(S, X, *args, **kwargs) is None
    assert torch.equal(S.double().cpu().nan_to_num(nan=1e30), expected.nan_to_num(nan=1e30))


@pytest.mark.sanitize
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("batch", "tokens", "d"),
    [
        ((), 9, 1),
        ((), 5, 16),
        ((), 300, 33),
        ((), 3, 130),
        ((3,), 17, 5),
        ((2, 3), 40, 35),
        ((300,), 2, 3),
    ],
)
def test_exact_on_integers(
    batch: tuple[int, ...],
    tokens: int,
    d: int,
    weighted: bool,
    dtype: torch.dtype,
    integers: Maker,
    accumulator: Callable[[torch.dtype], torch.dtype],
) -> None:
    S = integers(*batch, d, d, dtype=accumulator(dtype))
    X = integers(*batch, tokens, d, dtype=dtype)
    weight = integers(*batch, tokens, dtype=accumulator(dtype)) if weighted else None
    check(S, X, weight, alpha=2.0, beta=-3.0)
    check(S, X, weight)


@pytest.mark.sanitize
def test_beta_zero_overwrites_garbage(integers: Maker, device: torch.device) -> None:
    check(torch.full((40, 40), NAN, device=device), integers(50, 40), alpha=0.5, beta=0.0)
    check(torch.full((2, 9, 9), float("inf"), device=device), integers(2, 0, 9), beta=0.0)


@pytest.mark.sanitize
def test_zero_weight_rows_are_not_read(
    dtype: torch.dtype, integers: Maker, device: torch.device, accumulator: Callable
) -> None:
    X = integers(2, 60, 35, dtype=dtype)
    weight = (torch.arange(120, device=device) % 3 != 0).view(2, 60).to(accumulator(dtype))
    X.masked_fill_((weight == 0)[..., None], NAN)
    S = integers(2, 35, 35, dtype=accumulator(dtype))
    check(S, X, weight)
    assert S.isnan().sum() == 2 * 35 * 34 / 2


def test_nan_in_x_reaches_its_row_and_column_only(integers: Maker) -> None:
    X, S = integers(9, 20), integers(20, 20)
    X[4, 7] = NAN
    syrk_accumulate_(S, X)
    expected = torch.zeros(20, 20, dtype=torch.bool, device=S.device)
    expected[7, :], expected[:, 7] = True, True
    assert torch.equal(S.isnan(), expected.tril())


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("batch", "tokens", "d"), [((), 0, 4), ((), 5, 0), ((0,), 5, 4), ((2, 0), 0, 0), ((3,), 0, 33)]
)
def test_empty(batch: tuple[int, ...], tokens: int, d: int, integers: Maker) -> None:
    check(integers(*batch, d, d), integers(*batch, tokens, d), beta=2.0)


@pytest.mark.sanitize
def test_strides(integers: Maker) -> None:
    wide = integers(4, 90, 200)
    check(integers(4, 200, 200)[:, :37, 50:87], wide[:, ::3, 11:48])  # padded rows
    check(integers(7, 4, 11).transpose(0, 1)[:, :, 2:9], wide[:, :50, :7])  # interleaved members
    check(integers(4, 33, 33), integers(1, 20, 33).expand(4, 20, 33))  # one X for all
    check(integers(9, 9), integers(1, 9).expand(6, 9), integers(1, 6).expand(3, 6)[1])


def test_misaligned_pointers(integers: Maker) -> None:
    check(integers(1 + 16 * 16)[1:].view(16, 16), integers(1 + 16 * 33)[1:].view(33, 16))


def test_large_batch(integers: Maker) -> None:
    count = 70_000  # more than a CUDA grid's y or z dimension holds
    X, S = integers(count, 2, 2), integers(count, 2, 2)
    expected = S + torch.tril(X.mT @ X)
    syrk_accumulate_(S, X)
    assert torch.equal(S, expected)


def test_order_of_tokens_and_splits_do_not_matter_for_integers(integers: Maker) -> None:
    X = integers(700, 20)
    whole, permuted, split = (X.new_zeros(20, 20) for _ in range(3))
    syrk_accumulate_(whole, X)
    syrk_accumulate_(permuted, X[torch.randperm(700, device=X.device)])
    for part in X.split(123):
        syrk_accumulate_(split, part)
    assert torch.equal(whole, permuted)
    assert torch.equal(whole, split)


def test_error_at_most_twice_torchs(
    dtype: torch.dtype, device: torch.device, product_error: Callable, accumulator: Callable
) -> None:
    torch.manual_seed(0)
    X = torch.randn(3000, 50, device=device).to(dtype)
    wide = X.to(accumulator(dtype))
    S = wide.new_zeros(50, 50)
    syrk_accumulate_(S, X)
    ours = S + S.tril(-1).T
    assert product_error(ours, X, X) <= 2 * product_error(wide.T @ wide, X, X)


@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16x3"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_every_precision_is_at_least_float32(precision: str, deterministic: bool, integers: Maker) -> None:
    X, S = integers(50, 20) + 2**-20, integers(20, 20)
    expected = torch.tril(X.double().T @ X.double()) + S.double()
    syrk_accumulate_(S, X, precision=precision, deterministic=deterministic)
    torch.testing.assert_close(S.double().tril(), expected.tril(), rtol=1e-6, atol=1e-4)


def test_threads_and_runs_agree_bit_for_bit(device: torch.device) -> None:
    torch.manual_seed(0)
    X = torch.randn(2, 3000, 70, device=device)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        S = torch.zeros(2, 70, 70, device=device)
        syrk_accumulate_(S, X)
        results.append(S)
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


S3, X3 = torch.zeros(3, 3), torch.ones(5, 3)
BUFFER = torch.zeros(100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (torch.zeros(63, 63), torch.ones(100, 64)),
            r"S must be \(d, d\) = \(64, 64\) to match X "
            r"\(100, 64\), got \(63, 63\); allocate",
        ),
        ((torch.zeros(2, 3, 3), X3), r"S must be \(d, d\)"),
        ((torch.zeros(2, 3, 3), torch.ones(4, 5, 3)), r"S must be \(…, d, d\) .* got \(2, 3, 3\)"),
        ((S3, torch.ones(3)), r"X must be \(…, T, d\), got \(3,\)"),
        ((S3.double(), X3), r"S must be float32 for data of X's dtype, got float64"),
        ((S3, X3.double()), r"S must be float64 for data of X's dtype, got float32"),
        ((S3.bfloat16(), X3.bfloat16()), r"S must be float32 for data of X's dtype, got bfloat16"),
        ((S3, X3.long()), r"X must be float32, float64, bfloat16 or float16, got int64"),
        ((S3, torch.ones(3, 5).T), r"X must have adjacent elements in its last dimension"),
        ((torch.zeros(3, 6)[:, ::2], X3), r"S must have adjacent elements in its last dimension"),
        ((torch.zeros(3).expand(3, 3), X3), r"S \(3, 3\) is written in place, but several"),
        ((torch.zeros(3, 3).expand(2, 3, 3), torch.ones(2, 5, 3)), r"S \(2, 3, 3\) is written in"),
        ((BUFFER[:9].view(3, 3), BUFFER[8:23].view(5, 3)), r"S .* must not share memory with X"),
        ((BUFFER[:9].view(3, 3), X3, BUFFER[4:9]), r"S .* must not share memory with weight"),
        ((S3, X3, torch.ones(3)), r"weight must be \(…, T\).* got \(3,\)"),
        ((S3, X3, torch.ones(1, 5)), r"weight must be \(…, T\).* got \(1, 5\)"),
        ((S3, X3, torch.ones(5).bool()), r"weight must be float32 .* got bool; convert it"),
        ((S3, X3, torch.ones(10)[::2]), r"weight must have adjacent elements"),
        (
            (torch.zeros(2, 2, 3, 3), torch.ones(2, 4, 5, 3)[:, ::2][:, :, :, :].transpose(0, 1)),
            r"the leading dimensions of X .* must be evenly strided",
        ),
    ],
)
def test_refusals_name_the_argument_and_write_nothing(arguments: tuple[Tensor, ...], message: str) -> None:
    before = arguments[0].clone()
    with pytest.raises(ValueError, match="^syrk_accumulate_: .*" + message):
        syrk_accumulate_(*arguments, beta=0.0)
    assert torch.equal(arguments[0], before)


def test_unknown_precision() -> None:
    with pytest.raises(ValueError, match="precision must be 'ieee', 'tf32' or 'bf16x3', got 'fp8'"):
        syrk_accumulate_(S3, X3, precision="fp8")


def test_not_a_tensor() -> None:
    with pytest.raises(TypeError, match=r"X must be a torch\.Tensor, got list"):
        syrk_accumulate_(S3, [[1.0]])
