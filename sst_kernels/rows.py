"""The rows of a layer that computes y_t = W x_t: x_t of its inputs, δ_t of its output gradients.

A convolution is such a layer: x_t is the patch under output position t, in the order of `weight.flatten(1)`, and y_t
that position's channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


def unwrapped(module: nn.Module) -> nn.Module:
    """The layer inside adapters: `base_layer`, followed to its end."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def convolution_fault(layer: nn.Module) -> str | None:
    """Why a convolution is no linear map of zero-padded patches; None if it is one."""
    if layer.groups != 1:
        return "grouped convolution"
    if layer.padding_mode != "zeros":
        return f"padding_mode={layer.padding_mode!r}"
    return None


def fault(module: nn.Module) -> str | None:
    """Why a layer does not compute y_t = W x_t for the rows of `input_rows`; None if it does, as far as is known."""
    layer = unwrapped(module)
    if isinstance(layer, CONVOLUTIONS):
        return convolution_fault(layer)
    own_forward = isinstance(layer, nn.Embedding) and type(layer).forward is not nn.Embedding.forward
    if own_forward and not hasattr(layer, "embed_scale"):  # the look-up times that scale
        return f"{type(layer).__name__} computes something else than a look-up"
    return None


def input_rows(module: nn.Module, x: Tensor, q_in: Tensor | None = None) -> Tensor:
    """The rows x_t, or x_t Q_in.

    Args:
        module: A linear, embedding or convolution layer.
        x: Its input.
        q_in: (d_in, r) in the dtype of the layer's output, or None.

    Returns:
        (..., d_in) or (..., r): the leading dimensions are those of the tokens; (N, positions, …) for a convolution.
        Without q_in, an embedding's rows are its indices, (...).
    """
    layer = unwrapped(module)
    if isinstance(layer, nn.Embedding):
        return x if q_in is None else F.embedding(x, q_in) * getattr(layer, "embed_scale", 1.0)
    if isinstance(layer, CONVOLUTIONS):
        x = _patches(layer, x)
    return x if q_in is None else x.to(q_in.dtype) @ q_in


def leading(module: nn.Module, x: Tensor) -> torch.Size:
    """The leading dimensions of the rows of an input that is no image."""
    return x.shape if isinstance(unwrapped(module), nn.Embedding) else x.shape[:-1]


def _patches(layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """(N, positions, C·kh·kw): one row for each place the kernel is laid on; a line is an image of height 1."""
    x = F.pad(x if x.dim() == layer.weight.dim() else x.unsqueeze(0), layer._reversed_padding_repeated_twice)
    if isinstance(layer, nn.Conv2d):
        return F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride).mT
    sizes = ((1, *size) for size in (layer.kernel_size, layer.dilation, layer.stride))
    kernel_size, dilation, stride = sizes
    return F.unfold(x.unsqueeze(2), kernel_size, dilation, 0, stride).mT


def grad_rows(module: nn.Module, delta: Tensor) -> Tensor:
    """The rows δ_t, (..., d_out), of the gradient of the layer's output; leading dimensions as in `input_rows`."""
    layer = unwrapped(module)
    if isinstance(layer, CONVOLUTIONS):
        return (delta if delta.dim() == layer.weight.dim() else delta.unsqueeze(0)).flatten(2).mT
    return delta


def output_of(module: nn.Module, rows: Tensor, like: Tensor) -> Tensor:
    """Rows y_t, (..., d_out), in the shape of the layer's output `like`: what `grad_rows` undoes."""
    return rows.mT.reshape(like.shape) if isinstance(unwrapped(module), CONVOLUTIONS) else rows
