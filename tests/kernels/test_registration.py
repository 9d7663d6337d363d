"""What torch must know of the ops: fake tensors, autograd, compile, mutation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sst_kernels import grouped_syrk_accumulate_, khatri_rao_rows, kron_accumulate_, symmetrize_, syrk_accumulate_

OPS = torch.ops.sst_kernels


@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck(weighted: bool, dtype: torch.dtype, device: torch.device, accumulator: Callable) -> None:
    torch.manual_seed(0)
    wide = accumulator(dtype)
    a, b = (torch.randn(12, r, device=device).to(dtype) for r in (5, 3))
    weight = torch.rand(12, device=device).to(wide) if weighted else None
    cu = torch.tensor([0, 4, 12], device=device)
    A, G, F = (torch.zeros(n, n, device=device, dtype=wide) for n in (5, 3, 15))
    P = torch.zeros(15, device=device, dtype=wide)
    counts = torch.zeros(2, device=device, dtype=torch.float64)
    some = None if weight is None else [weight, weight]
    for op, arguments in [
        (OPS.khatri_rao_rows, (a, b, cu, weight)),
        (OPS.syrk_accumulate_, (A, a, weight, 0.5, 2.0)),
        (OPS.syrk_accumulate_, (P, a, weight)),
        (OPS.grouped_syrk_accumulate_, ([A, G], [a, b], some, 0.5, 2.0)),
        (OPS.kron_accumulate_, (A, G, counts, a, b, weight, 0.5, 2.0)),
        (OPS.khatri_rao_syrk_accumulate_, (F, a, b, cu, weight, 0.5, 2.0)),
        (OPS.symmetrize_, (A,)),
        (OPS.pack_lower, (A,)),
        (OPS.unpack_lower, (P,)),
    ]:
        torch.library.opcheck(op.default, arguments)


def step(S: Tensor, a: Tensor, b: Tensor, cu: Tensor) -> Tensor:
    syrk_accumulate_(S, a * 2, alpha=0.5)
    G, counts = S.new_zeros(3, 3), S.new_zeros(2, dtype=torch.float64)
    kron_accumulate_(S, G, counts, a, b)
    grouped_syrk_accumulate_([S, G], [a, b], alpha=3.0)
    symmetrize_(S)
    return khatri_rao_rows(a, b, cu) + S.sum() + G.sum() + counts.sum()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic: bool, device: torch.device) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(10, 4, device=device), torch.randn(10, 3, device=device)
    cu = torch.tensor([0, 7, 10], device=device)
    eager, compiled = (torch.zeros(4, 4, device=device) for _ in range(2))
    expected = step(eager, a, b, cu)
    torch._dynamo.reset()
    fast = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    torch.testing.assert_close(fast(compiled, a, b, cu), expected)
    torch.testing.assert_close(compiled, eager)


def test_meta_tensors() -> None:
    with torch.device("meta"):
        a, b, cu = torch.ones(9, 4, dtype=torch.bfloat16), torch.ones(9, 3), torch.ones(6).long()
        out = khatri_rao_rows(a, b.bfloat16(), cu)
        assert (out.shape, out.dtype, out.device.type) == ((5, 12), torch.float32, "meta")
        assert khatri_rao_rows(b.double(), b.double(), cu).dtype == torch.float64
        syrk_accumulate_(torch.zeros(4, 4), a)


@pytest.mark.parametrize("name", ["a", "b", "weight"])
def test_khatri_rao_refuses_gradients(name: str, device: torch.device) -> None:
    arguments = {
        "a": torch.ones(4, 3, device=device),
        "b": torch.ones(4, 2, device=device),
        "cu_seqlens": torch.tensor([0, 4], device=device),
        "weight": torch.ones(4, device=device),
    }
    arguments[name].requires_grad_()
    with pytest.raises(ValueError, match=rf"khatri_rao_rows: {name} requires a gradient"):
        khatri_rao_rows(**arguments)
    with torch.no_grad():
        assert not khatri_rao_rows(**arguments).requires_grad


def test_meta_and_real_tensors_do_not_mix() -> None:
    S, X = torch.zeros(3, 3), torch.ones(4, 3)
    with pytest.raises(ValueError, match="all tensors must be on one device, got cpu and meta"):
        grouped_syrk_accumulate_([S], [X.to("meta")])


def test_lists_refuse_gradients(device: torch.device) -> None:
    S, X = torch.zeros(3, 3, device=device), torch.ones(4, 3, device=device)
    with pytest.raises(ValueError, match="grouped_syrk_accumulate_: X requires a gradient"):
        grouped_syrk_accumulate_([S, S.clone()], [X, X.clone().requires_grad_()])
    assert not S.any()


def test_syrk_refuses_gradients(device: torch.device) -> None:
    S, X = torch.zeros(3, 3, device=device), torch.ones(4, 3, device=device, requires_grad=True)
    with pytest.raises(ValueError, match=r"X requires a gradient.*pass X\.detach\(\)"):
        syrk_accumulate_(S, X)
    assert not S.any()
    syrk_accumulate_(S, X.detach())
    assert S[2, 0] == 4


def test_functional_gradients_are_refused(device: torch.device) -> None:
    cu = torch.tensor([0, 4], device=device)
    x = torch.ones(4, 3, device=device)
    with pytest.raises(ValueError, match="a requires a gradient"):
        torch.func.grad(lambda a: khatri_rao_rows(a, x, cu).sum())(x)


def test_in_place_update_is_seen_by_autograd(device: torch.device) -> None:
    S, X = torch.ones(3, 3, device=device), torch.ones(4, 3, device=device)
    x = torch.ones(3, 3, device=device, requires_grad=True)
    y = (x * S).sum()  # saves S
    grouped_syrk_accumulate_([S], [X])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_inference_mode(device: torch.device) -> None:
    with torch.inference_mode():
        S, X = torch.zeros(3, 3, device=device), torch.ones(4, 3, device=device)
        syrk_accumulate_(S, X)
    assert S[2, 0] == 4
