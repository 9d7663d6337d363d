"""Checks of what callers pass to operators; each message names argument, expected, given, remedy."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .operators import Operator

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def check_entries(owner: str, name: str, entries: Tensor) -> None:
    """Check that an argument is a strided tensor of a supported dtype.

    Args:
        owner: whose argument it is, for the message.
        name: its name.
        entries: the argument.

    Raises:
        TypeError: if it is not.
    """
    if not isinstance(entries, Tensor):
        raise TypeError(f"{owner}: {name} must be a torch.Tensor, got {type(entries).__name__}")
    if entries.layout != torch.strided:
        raise TypeError(
            f"{owner}: {name} must be strided, got {entries.layout}; convert with .to_dense(), or give its product "
            "as a FunctionOperator"
        )
    if entries.dtype not in DTYPES:
        raise TypeError(
            f"{owner}: {name} must be float32, float64, complex64 or complex128, got "
            f"{entries.dtype}; convert with .float() or .double() (factorisations need the digits)"
        )


def check_matrix(owner: str, name: str, x: Tensor) -> None:
    """Check that the tensor x is of a supported dtype and square in its last two dimensions.

    Raises:
        ValueError: if it is not square.
    """
    check_entries(owner, name, x)
    if x.dim() < 2 or x.shape[-1] != x.shape[-2]:
        raise ValueError(f"{owner}: {name} must be square, (..., n, n), got {tuple(x.shape)}")


def check_batches(owner: str, first: tuple[str, Sequence[int], Sequence[int]], second: tuple) -> None:
    """Check that two batch shapes broadcast.

    Args:
        owner: whose arguments they are, for the message.
        first: name, shape and batch shape of one.
        second: name, shape and batch shape of the other.

    Raises:
        ValueError: if they do not.
    """
    if first[2] == second[2]:
        return
    try:
        torch.broadcast_shapes(first[2], second[2])
    except RuntimeError:
        raise ValueError(
            f"{owner}: batch dimensions of {first[0]} and {second[0]} must broadcast, got "
            f"{tuple(first[1])} and {tuple(second[1])}"
        ) from None


def promoted(x: Tensor) -> Tensor:
    """Integers and booleans as float64, as scipy does; all else as it is."""
    return x if x.is_floating_point() or x.is_complex() else x.double()


def as_scale(
    owner: str, name: str, value: Tensor | float, dtype: torch.dtype, device: torch.device, batch: Sequence[int]
) -> Tensor:
    """A number or real tensor (...,) as a tensor of an operator's precision and device.

    Args:
        owner: whose argument it is, for the message.
        name: its name.
        value: the number or tensor.
        dtype: of the operator.
        device: of the operator.
        batch: batch shape of the operator, that it must broadcast against.

    Returns:
        Real tensor (...,).

    Raises:
        TypeError: if it is neither, or complex.
        ValueError: if the shapes do not broadcast or the devices differ.
    """
    real = dtype.to_real()
    if isinstance(value, bool) or not isinstance(value, Tensor | Real):
        raise TypeError(f"{owner}: {name} must be a number or a real torch.Tensor, got {type(value).__name__}")
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=real, device=device)
    if value.is_complex():
        raise TypeError(f"{owner}: {name} must be real, got {value.dtype}")
    if value.device != device and value.dim() > 0:
        raise ValueError(f"{owner}: {name} must be on the operator's device {device}, got {value.device}")
    check_batches(owner, (name, tuple(value.shape), value.shape), ("operator", tuple(batch), batch))
    return value.to(device, real)


def check_parts(owner: str, *parts: tuple[str, Tensor | Operator, int]) -> None:
    """Check that named tensors or operators share dtype and device, and that their batches broadcast.

    Args:
        owner: whose arguments they are, for the message.
        *parts: name, tensor or operator, and how many of its last dimensions are not batch dimensions.

    Raises:
        TypeError: if the dtypes differ.
        ValueError: if the devices differ, or the batch shapes do not broadcast.
    """
    (first, x, inner), *others = parts
    batch = x.shape[:-inner]
    for name, y, y_inner in others:
        if x.dtype != y.dtype:
            raise TypeError(
                f"{owner}: {first} and {name} must have one dtype, got {x.dtype} and {y.dtype}; "
                "convert one of them with .to(dtype)"
            )
        if x.device != y.device:
            raise ValueError(
                f"{owner}: {first} and {name} must be on one device, got {x.device} and {y.device}; "
                "move one of them with .to(device)"
            )
        check_batches(owner, (first, x.shape, batch), (name, y.shape, y.shape[:-y_inner]))
        batch = torch.broadcast_shapes(batch, y.shape[:-y_inner])
