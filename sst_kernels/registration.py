"""How ops written in Python join torch: derivative rules that torch.func sees, batching rules, warnings.

`torch.library.register_autograd` refuses torch.func transforms, so `differentiable` registers an
autograd kernel that, as torch's own do, records one level of differentiation and passes on.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled

library = torch.library.Library("sst_kernels", "FRAGMENT")
_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


def define(
    schema: str,
    *,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Sequence[Tensor | None]],
    jvp: Callable[..., Any],
    ranks: Sequence[int],
) -> Any:
    """Registers an op of positional arguments, tensors first, whose batch dimensions broadcast.

    Args:
        schema: name and signature.
        kernel: what it computes, on every device.
        fake: shapes and dtypes of the same.
        backward: (inputs, outputs, cotangents) -> cotangents of the tensors; None for zero.
        jvp: (inputs, outputs, tangents) -> tangents of the outputs; None for integers.
        ranks: dimensions of each tensor argument behind its batch dimensions.

    Returns:
        The op.
    """
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, _as_op(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"sst_kernels::{name}", fake, lib=library)
    op = getattr(torch.ops.sst_kernels, name).default
    _differentiable(op, backward, jvp)

    def batched(info: Any, in_dims: tuple[int | None, ...], *args: Any, **options: Any) -> tuple[Any, Any]:
        tensors = _batch_in_front(args[: len(ranks)], in_dims, ranks)
        out = op(*tensors, *args[len(ranks) :], **options)
        return out, tuple(0 for _ in out) if isinstance(out, tuple) else 0

    torch.library.register_vmap(f"sst_kernels::{name}", batched, lib=library)
    return op


def _as_op(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel as torch wants one: without recorded gradients, its outputs fresh and contiguous."""
    # torch.compile may call it where lazy conjugates are out of force, and it would read wrong numbers

    def wrapped(*args: Any, **options: Any) -> Any:
        with torch._C._PreserveDispatchKeyGuard(), torch.no_grad():
            for key in (torch._C.DispatchKey.Conjugate, torch._C.DispatchKey.Negative):
                torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
            out = kernel(*args, **options)
            fresh = [x.clone(memory_format=torch.contiguous_format) for x in (out if isinstance(out, tuple) else [out])]
            return tuple(fresh) if isinstance(out, tuple) else fresh[0]

    return wrapped


def _differentiable(op: Any, backward: Callable[..., Any], jvp: Callable[..., Any]) -> None:
    """Registers derivatives of `op` in forward and in reverse mode."""

    def saved(ctx: Any) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
        tensors = iter(ctx.saved_tensors)
        inputs = tuple(next(tensors) if is_tensor else value for is_tensor, value in ctx.inputs)
        return inputs, tuple(tensors)

    class Rule(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(keyset: Any, modes: tuple[bool, bool], options: dict, *args: Any) -> Any:
            # the modes that this level's caller set, for the levels below
            with (
                torch._C._AutoDispatchBelowAutograd(),
                torch.set_grad_enabled(modes[0]),
                _set_fwd_grad_enabled(modes[1]),
            ):
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **options)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            ctx.inputs = [(isinstance(x, Tensor), None if isinstance(x, Tensor) else x) for x in inputs[3:]]
            tensors = [*(x for x in inputs[3:] if isinstance(x, Tensor)), *outputs]
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)
            ctx.mark_non_differentiable(*(x for x in outputs if not (x.is_floating_point() or x.is_complex())))
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            inputs, outputs = saved(ctx)
            found = tuple(backward(inputs, outputs, grads))
            return (None,) * 3 + found + (None,) * (len(inputs) - len(found))

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
            return jvp(*saved(ctx), tangents[3:])

    def kernel(keyset: Any, *args: Any, **options: Any) -> Any:
        args, options = torch._library.utils.fill_defaults(op._schema, args, options)
        with enable_single_level_autograd_function():
            return Rule.apply(keyset, (torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()), options, *args)

    library.impl(op, kernel, "Autograd", with_keyset=True)


def _batch_in_front(
    tensors: Sequence[Tensor | None], dims: Sequence[int | None], ranks: Sequence[int]
) -> list[Tensor | None]:
    """Tensors with the mapped dimension first, so that their other batch dimensions still broadcast."""
    lengths = [
        0 if x is None else x.dim() - (dim is not None) - rank
        for x, dim, rank in zip(tensors, dims, ranks, strict=False)
    ]
    moved = []
    for x, dim, length in zip(tensors, dims, lengths, strict=False):
        if x is not None and dim is not None:
            x = x.movedim(dim, 0)
            x = x[(slice(None), *(None,) * (max(lengths) - length))]
        moved.append(x)
    return moved


def warn(message: str) -> None:
    """RuntimeWarning at the line outside torch and this package that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, RuntimeWarning, stacklevel=level)
