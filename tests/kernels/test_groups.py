"""Ops made of several products: grouped_syrk_accumulate_, kron_accumulate_, khatri_rao_syrk_accumulate_."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sst_kernels import (
    grouped_syrk_accumulate_,
    khatri_rao_syrk_accumulate_,
    kron_accumulate_,
    pack_lower,
    reference,
)

Maker = Callable[..., Tensor]
NAN = float("nan")
SHAPES = [((), 9, 1), ((), 300, 33), ((2,), 40, 35), ((), 0, 5), ((), 2100, 16), ((30,), 2, 3), ((), 140, 270)]


def poison(S: Tensor) -> Tensor:
    return S.masked_fill_(torch.ones_like(S).triu(1).bool(), NAN)


def same(got: Tensor, expected: Tensor) -> bool:
    return torch.equal(got.double().cpu().nan_to_num(nan=1e30), expected.nan_to_num(nan=1e30))


@pytest.mark.sanitize
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_ragged_group_is_exact_on_integers(
    packed: bool, weighted: bool, dtype: torch.dtype, integers: Maker, accumulator: Callable
) -> None:
    wide = accumulator(dtype)
    X = [integers(*batch, tokens, d, dtype=dtype) for batch, tokens, d in SHAPES]
    weights = [integers(*batch, tokens, dtype=wide) for batch, tokens, _ in SHAPES] if weighted else None
    S = [poison(integers(*batch, d, d, dtype=wide)) for batch, _, d in SHAPES]
    if packed:
        S = [pack_lower(s) for s in S]
    expected = [
        reference.syrk_accumulate_(s, x, None if weights is None else weights[i], 2.0, -3.0)
        for i, (s, x) in enumerate(zip(S, X, strict=True))
    ]
    grouped_syrk_accumulate_(S, X, weights, alpha=2.0, beta=-3.0)
    assert all(map(same, S, expected))


@pytest.mark.parametrize("weighted", [False, True])
def test_wide_products_of_several_steps_are_exact_on_integers(
    weighted: bool, integers: Maker, device: torch.device
) -> None:
    """The CPU takes 7680 tokens of these two a step: the first product has two steps, the second one."""
    X = [integers(tokens, 257) for tokens in (7800, 300)]
    weights = [integers(len(x)) for x in X] if weighted else None
    if weights:  # whole blocks of tokens that are not read: the first ones, and all
        for x, w, last in zip(X, weights, (300, 300), strict=True):
            w[:last], x[:last] = 0, NAN
    S = [poison(integers(257, 257)) for _ in X]
    expected = []
    for i, (s, x) in enumerate(zip(S, X, strict=True)):
        rows = x.double().nan_to_num(nan=0)
        part = rows.T @ (rows if weights is None else rows * weights[i].double()[:, None])
        expected.append(torch.where(s.isnan(), s.double(), -3 * s + 2 * part).cpu())
    grouped_syrk_accumulate_(S, X, weights, alpha=2.0, beta=-3.0)
    assert all(map(same, S, expected))


def test_empty_group() -> None:
    assert grouped_syrk_accumulate_([], []) is None
    with pytest.raises(ValueError, match=r"X must have one tensor for each of S's 0, got 1"):
        grouped_syrk_accumulate_([], [torch.ones(2, 2)])


def test_group_is_bit_identical_between_runs_and_threads(device: torch.device) -> None:
    torch.manual_seed(0)
    X = [torch.randn(tokens, d, device=device) for tokens, d in [(6000, 20), (900, 300), (50, 33)]]
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        S = [torch.zeros(x.shape[1], x.shape[1], device=device) for x in X]
        grouped_syrk_accumulate_(S, X)
        results.append(S)
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_error_of_long_sums_at_most_twice_torchs(
    dtype: torch.dtype, device: torch.device, product_error: Callable, accumulator: Callable
) -> None:
    torch.manual_seed(0)
    X = [torch.randn(tokens, d, device=device).to(dtype) for tokens, d in [(20000, 16), (200, 270)]]
    S = [x.new_zeros(x.shape[1], x.shape[1], dtype=accumulator(dtype)) for x in X]
    weights = [torch.rand(len(x), device=device).to(accumulator(dtype)) for x in X]
    for w in (None, weights):
        grouped_syrk_accumulate_(S, X, w, beta=0.0)
        for i, (s, x) in enumerate(zip(S, X, strict=True)):
            wide = x.to(s.dtype)
            p = wide if w is None else wide.double() * w[i].double()[:, None]
            theirs = (wide if w is None else wide * w[i][:, None]).T @ wide
            assert product_error(s + s.tril(-1).T, p, x) <= 2 * product_error(theirs, p, x)


@pytest.mark.sanitize
@pytest.mark.parametrize("mask", ["none", "bool", "weights"])
@pytest.mark.parametrize("packed", [False, True])
def test_kron_is_exact_on_integers(
    mask: str, packed: bool, dtype: torch.dtype, integers: Maker, accumulator: Callable, device: torch.device
) -> None:
    wide = accumulator(dtype)
    x, delta = integers(4, 30, 21, dtype=dtype), integers(4, 30, 35, dtype=dtype)
    w = {"none": None, "bool": integers(4, 30) > 0, "weights": integers(4, 30, dtype=wide)}[mask]
    if w is not None:
        x.masked_fill_((w == 0)[..., None], NAN)
        delta.masked_fill_((w == 0)[..., None], NAN)
    factors = [poison(integers(d, d, dtype=wide)) for d in (21, 35)]
    if packed:
        factors = [pack_lower(s) for s in factors]
    counts = torch.tensor([3.0, 5.0], dtype=torch.float64, device=device)
    for alpha, beta in [(1.0, 1.0), (0.25, -2.0), (2.0, 0.0)]:
        expected = reference.kron_accumulate_((*factors, counts), x, delta, w, alpha, beta)
        kron_accumulate_(*factors, counts, x, delta, w, alpha, beta)
        assert all(map(same, (*factors, counts), expected))


def test_kron_beta_zero_overwrites_garbage(integers: Maker, device: torch.device) -> None:
    A, G = torch.full((3, 3), NAN, device=device), torch.full((2, 2), NAN, device=device)
    counts = torch.full((2,), NAN, dtype=torch.float64, device=device)
    x, delta = integers(7, 3), integers(7, 2)
    kron_accumulate_(A, G, counts, x, delta, beta=0.0)
    assert torch.equal(A.tril().nan_to_num(nan=9), (x.T @ x).tril())
    assert torch.equal(G.tril().nan_to_num(nan=9), (delta.T @ delta).tril())
    assert counts.tolist() == [7, 7]


def test_kron_shared_input_leaves_the_input_factor(integers: Maker, device: torch.device) -> None:
    A, G, counts = integers(3, 3), integers(2, 2), torch.zeros(2, dtype=torch.float64, device=device)
    x, delta, before = integers(7, 3), integers(7, 2), A.clone()
    expected = reference.kron_accumulate_((A, G, counts), x, delta)
    kron_accumulate_(A, G, counts, x, delta, shared_input=True)
    assert torch.equal(A, before)
    assert same(G, expected[1]) and same(counts, expected[2])


@pytest.mark.parametrize("weights", [False, True])
def test_kron_takes_strided_tokens(weights: bool, integers: Maker, device: torch.device) -> None:
    x, delta = integers(5, 12, 40)[:, ::2, 3:20], integers(5, 6, 9)
    mask = integers(6, 5).T if weights else (integers(6, 5) > 0).T
    factors = (integers(17, 17), integers(9, 9), torch.zeros(2, dtype=torch.float64, device=device))
    expected = reference.kron_accumulate_(factors, x, delta, mask)
    kron_accumulate_(*factors, x, delta, mask)
    assert all(map(same, factors, expected))


@pytest.mark.sanitize
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("r", [(3, 2), (7, 5), (16, 16)])
def test_khatri_rao_syrk_is_exact_on_integers(
    r: tuple[int, int], packed: bool, weighted: bool, dtype: torch.dtype, integers: Maker, accumulator: Callable
) -> None:
    wide, n = accumulator(dtype), r[0] * r[1]
    a, b = integers(60, r[0], dtype=dtype).clamp(-1, 1), integers(60, r[1], dtype=dtype).clamp(-1, 1)
    weight = integers(60, dtype=wide) if weighted else None
    cu = torch.tensor([0, 1, 1, 7, 30, 29, 60], device=a.device)
    F = poison(integers(n, n, dtype=wide))
    if packed:
        F = pack_lower(F)
    for alpha, beta in [(1.0, 1.0), (2.0, -1.0)]:
        expected = reference.khatri_rao_syrk_accumulate_(F, a, b, cu, weight, alpha, beta)
        khatri_rao_syrk_accumulate_(F, a, b, cu, weight, alpha, beta)
        assert same(F, expected)


def test_khatri_rao_syrk_with_more_sequences_than_a_chunk(integers: Maker, device: torch.device) -> None:
    r, tokens = 72, 700  # rows of 72² columns: 256 sequences a chunk
    a, b = integers(tokens, r).clamp(-1, 1), integers(tokens, r).clamp(-1, 1)
    F = torch.zeros(r * r, r * r, device=device)
    khatri_rao_syrk_accumulate_(F, a, b, torch.arange(tokens + 1, device=device).int(), beta=0.0)
    g = (b[:, :, None] * a[:, None, :]).flatten(1)
    assert torch.equal(F.tril(), (g.T @ g).tril())


def test_khatri_rao_syrk_of_no_sequences_scales(integers: Maker, device: torch.device) -> None:
    F = integers(6, 6)
    expected = 2 * F.tril() + F.triu(1)
    empty = torch.zeros(1, dtype=torch.int64, device=device)
    khatri_rao_syrk_accumulate_(F, integers(4, 3), integers(4, 2), empty, beta=2.0)
    assert torch.equal(F, expected)


S3, X3 = torch.zeros(3, 3), torch.ones(5, 3)
COUNTS = torch.zeros(2, dtype=torch.float64)
BUFFER, WIDE = torch.zeros(100), torch.zeros(20, dtype=torch.float64)
SQUARES = [BUFFER[i * 9 : i * 9 + 9].view(3, 3) for i in range(3)]


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        (grouped_syrk_accumulate_, ([S3], [X3, X3]), r"X must have one tensor for each of S's 1, got 2"),
        (grouped_syrk_accumulate_, ([S3], [X3], []), r"weights must have one tensor for each of S's 1, got 0"),
        (grouped_syrk_accumulate_, ([S3, torch.zeros(2, 2)], [X3, X3]), r"S\[1\] must be \(d, d\) = \(3, 3\)"),
        (grouped_syrk_accumulate_, ([S3, S3.double()], [X3, X3.double()]), r"X\[1\] must be float32 to match X\[0\]"),
        (grouped_syrk_accumulate_, ([S3, S3], [X3, X3]), r"S\[[01]\] is written in place .* with S\[[01]\]"),
        (grouped_syrk_accumulate_, (SQUARES[:2], [X3, BUFFER[15:30].view(5, 3)]), r"S\[1\] .* with X\[1\]"),
        (kron_accumulate_, (S3, torch.zeros(2, 2), COUNTS, X3, X3), r"grad_factor must be \(d, d\) = \(3, 3\)"),
        (kron_accumulate_, (torch.zeros(5), S3, COUNTS, X3, X3), r"input_factor must be .* = 6 elements"),
        (kron_accumulate_, (S3, SQUARES[0], COUNTS, X3, X3[:4]), r"delta must have x's leading dimensions"),
        (kron_accumulate_, (S3, SQUARES[0], COUNTS, X3, X3.double()), r"delta must be float32 to match x"),
        (kron_accumulate_, (S3, SQUARES[0], COUNTS.float(), X3, X3), r"counts must be float64 whatever"),
        (kron_accumulate_, (S3, SQUARES[0], torch.zeros(3), X3, X3), r"counts must be \(2,\), got \(3,\)"),
        (kron_accumulate_, (S3, SQUARES[0], COUNTS, X3, X3, torch.ones(4)), r"mask must have x's leading dimensions"),
        (kron_accumulate_, (S3, SQUARES[0], COUNTS, X3, X3, torch.ones(5).int()), r"mask must be float32 or bool"),
        (kron_accumulate_, (S3, S3, COUNTS, X3, X3), r"(input|grad)_factor is written in place"),
        (kron_accumulate_, (WIDE[:9].view(3, 3), S3.double(), WIDE[8:10], X3.double(), X3.double()), r"counts .* with"),
        (
            kron_accumulate_,
            (S3.double(), S3.double(), WIDE[:2], WIDE[:15].view(5, 3), X3.double()),
            r"counts .* with x",
        ),
        (kron_accumulate_, (S3, SQUARES[0], COUNTS, X3[0], X3[0]), r"x must be \(…, T, d\)"),
        (khatri_rao_syrk_accumulate_, (S3, X3, X3, torch.tensor([0, 5])), r"F must be \(d, d\) = \(9, 9\) to match g"),
        (khatri_rao_syrk_accumulate_, (torch.zeros(9, 9), X3, X3[:4], torch.tensor([0, 5])), r"b must be \(T, r_b\)"),
        (
            khatri_rao_syrk_accumulate_,
            (BUFFER[:81].view(9, 9), BUFFER[80:95].view(5, 3), X3, torch.tensor([0, 5])),
            r"F is written in place and must not share memory with a",
        ),
    ],
)
def test_refusals_name_the_argument_and_write_nothing(op: Callable, arguments: tuple, message: str) -> None:
    tensors = [t for a in arguments for t in (a if isinstance(a, list) else [a])]
    before = [t.clone() for t in tensors]
    with pytest.raises(ValueError, match=rf"^{op.__name__}: .*{message}"):
        op(*arguments, beta=0.0)
    assert all(itertools.starmap(torch.equal, zip(tensors, before, strict=True)))


def test_an_input_factor_that_is_left_alone_is_checked_all_the_same() -> None:
    G, counts = S3.clone(), COUNTS.clone()
    for A, message in ((torch.zeros(2, 2), r"input_factor must be \(d, d\) = \(3, 3\)"), (G, "must not share memory")):
        with pytest.raises(ValueError, match=message):
            kron_accumulate_(A, G, counts, X3, X3, shared_input=True)
    assert torch.equal(G, S3) and torch.equal(counts, COUNTS)


def test_not_a_tensor_names_its_place() -> None:
    with pytest.raises(TypeError, match="S must be a list of tensors, got Tensor"):
        grouped_syrk_accumulate_(torch.zeros(2, 3, 3), torch.zeros(2, 5, 3))
    with pytest.raises(TypeError, match=r"X\[1\] must be a torch\.Tensor, got int"):
        grouped_syrk_accumulate_([S3, S3], [X3, 1])
