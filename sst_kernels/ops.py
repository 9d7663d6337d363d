"""The compiled ops: typed wrappers, and what torch must know of them beyond their kernels.

An op lives in three places: its kernel and argument checks in ``csrc``, its slow float64 meaning in
`reference.py`, and here. Importing this module registers, for each op, a fake implementation (shape
and dtype only, for ``torch.compile`` and meta tensors) and an autograd kernel that refuses inputs
which require a gradient: without it, gradients through the op would be silently zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _C  # noqa: F401  (registers torch.ops.sst_kernels)

_library = torch.library.Library("sst_kernels", "FRAGMENT")


def khatri_rao_rows(a: Tensor, b: Tensor, cu_seqlens: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum of outer products over each sequence: out[s] = vec(Σ_{t∈s} w_t b_t a_tᵀ), vec row-major.

    With a the input of a linear layer and b the gradient of its output, out[s] is sequence s's
    gradient of the layer's weight (r_b, r_a), flattened as ``weight.reshape(-1)`` is.

    Args:
        a: (T, r_a) float32, float64, bfloat16 or float16; any row stride, adjacent elements.
        b: (T, r_b), dtype and device of a.
        cu_seqlens: (S + 1,) int32 or int64 on a's device; sequence s is the tokens
            cu_seqlens[s] … cu_seqlens[s + 1] - 1. Not read back to the host. Offsets are clamped
            into [0, T]; a decreasing pair means an empty sequence, whose row is 0.
        weight: (T,) in the dtype of the result, or None for ones. A token of weight 0 is not read:
            it may hold NaN. A boolean mask is passed as ``mask.to(torch.float32)``.

    Returns:
        (S, r_b · r_a) float32, or float64 for float64 data. Bit-identical between runs.

    Raises:
        TypeError: An argument is not a tensor.

    Shapes, dtypes, devices and strides that do not fit raise ValueError naming the argument.
    Cost: 2 T r_a r_b flops; reads a and b, writes the result.
    """
    _require_tensors("khatri_rao_rows", a=a, b=b, cu_seqlens=cu_seqlens, weight=weight)
    return torch.ops.sst_kernels.khatri_rao_rows.default(a, b, cu_seqlens, weight)


def syrk_accumulate_(
    S: Tensor,
    X: Tensor,
    weight: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    *,
    precision: str = "ieee",
    deterministic: bool = True,
) -> None:
    """Lower triangle of S ← β S + α Xᵀ diag(w) X, in place, batched over leading dimensions.

    Args:
        S: (…, d, d) float32 (float64 for float64 X), rows of adjacent elements, no shared memory
            with X or weight. Only its lower triangle, diagonal included, is read or written.
        X: (…, T, d) float32, float64, bfloat16 or float16; S's leading dimensions, any row stride,
            adjacent elements.
        weight: (…, T) in S's dtype, or None for ones. A row of weight 0 is not read: it may hold
            NaN. A boolean mask is passed as ``mask.to(S.dtype)``.
        alpha: Factor of the new part.
        beta: Factor of the old part; 0 overwrites S whatever it holds, NaN included.
        precision: For float32 X, the least precise arithmetic that will do: "ieee" (float32),
            "tf32" or "bf16x3". The kernels compute in float32 in every case.
        deterministic: Whether two runs must agree bit for bit. The kernels always do.

    Raises:
        TypeError: S, X or weight is not a tensor.

    Shapes, dtypes, devices, strides and overlaps that do not fit raise ValueError naming the
    argument, before anything is written. Cost: T d (d + 1) flops for each member of the batch.
    """
    _require_tensors("syrk_accumulate_", S=S, X=X, weight=weight)
    torch.ops.sst_kernels.syrk_accumulate_.default(
        S, X, weight, alpha, beta, precision=precision, deterministic=deterministic
    )


def _require_tensors(op: str, **arguments: Tensor | None) -> None:
    for name, value in arguments.items():
        if not isinstance(value, Tensor) and not (value is None and name == "weight"):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")


@torch.library.register_fake("sst_kernels::khatri_rao_rows", lib=_library)
def _(a: Tensor, b: Tensor, cu_seqlens: Tensor, weight: Tensor | None = None) -> Tensor:
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    return a.new_empty((cu_seqlens.shape[0] - 1, b.shape[1] * a.shape[1]), dtype=dtype)


@torch.library.register_fake("sst_kernels::syrk_accumulate_", lib=_library)
def _(S: Tensor, X: Tensor, *args: Any, **kwargs: Any) -> None:
    return None


def _refuse_gradients(name: str) -> None:
    """Registers an autograd kernel that raises if an input requires a gradient, else passes on."""
    op = getattr(torch.ops.sst_kernels, name).default
    written = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None]

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            argument = next(
                argument.name
                for argument, value in zip(op._schema.arguments, args, strict=False)
                if isinstance(value, Tensor) and value.requires_grad
            )
            raise ValueError(
                f"{name}: {argument} requires a gradient, but the op is not differentiable; "
                f"pass {argument}.detach() or call it under torch.no_grad()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            out = op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)
        for i in written:
            torch.autograd.graph.increment_version(args[i])
        return out

    _library.impl(name, kernel, "Autograd", with_keyset=True)


_refuse_gradients("khatri_rao_rows")
_refuse_gradients("syrk_accumulate_")
