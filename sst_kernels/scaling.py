"""Powers of two that keep norms and products in range, and norms from products alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .operators import Operator

_POWER_STEPS = 5  # of power_norm
_POWER_COLUMNS = 4  # start vectors of power_norm, of which one at least sees the largest eigenvalue


def scale_by_power(x: Tensor, exponent: Tensor) -> Tensor:
    """2ᵉ x for integer e, in two halves: 2ᵉ alone may overflow where the result does not.

    Args:
        x: any floating or complex tensor.
        exponent: integer tensor that broadcasts against x.

    Returns:
        Scaled copy of x.
    """
    half = exponent.div(2, rounding_mode="floor")
    real = x.real.dtype
    return x * torch.exp2(half.to(real)) * torch.exp2((exponent - half).to(real))


def peak(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Largest magnitude over `dims`, the last ones: NaN if any entry is NaN, 0 if there is none."""
    if 0 in x.shape[-len(dims) :]:
        return torch.zeros(x.shape[: -len(dims)], dtype=x.dtype.to_real(), device=x.device)
    return x.abs().amax(dims)


def even_exponent(peak: Tensor) -> Tensor:
    """Smallest even e with peak <= 2ᵉ, up to rounding; 0 where peak is 0 or not finite."""
    exponent = torch.frexp(peak.detach().nan_to_num(0.0, 0.0)).exponent
    return exponent + exponent % 2


def joint_exponent(exponents: Sequence[Tensor], absent: Sequence[Tensor]) -> Tensor:
    """Largest of some exponents, of those alone whose part is not zero; 0 where all are.

    Args:
        exponents: one integer tensor (...,) a part.
        absent: one bool tensor (...,) a part: whether it is zero.

    Returns:
        int32 (...,), all broadcast.
    """
    lowest = torch.iinfo(torch.int32).min
    parts = [torch.where(gone, lowest, e) for e, gone in zip(exponents, absent, strict=True)]
    top = torch.stack(torch.broadcast_tensors(*parts)).amax(0)
    return torch.where(top == lowest, 0, top)


def start_block(operator: Operator, columns: int) -> Tensor:
    """Normally distributed (n, columns), always the same; the global generator is left alone."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(operator.n, columns, generator=generator, dtype=torch.float64)
    return block.to(operator.device, operator.dtype)


def power_norm(operator: Operator) -> Tensor:
    """‖A‖₂ from below by products alone: power steps on a few columns.

    Args:
        operator: A, of which A @ X stays in range for unit columns X.

    Returns:
        Estimate (...,), real; NaN where A holds NaN. 20 products with one column each.
    """
    x = start_block(operator, _POWER_COLUMNS).expand(*operator.batch_shape, -1, -1)
    norm = torch.linalg.vector_norm(x, dim=-2, keepdim=True)
    for _ in range(_POWER_STEPS):
        x = operator @ (x / norm.clamp_min(torch.finfo(operator.dtype).tiny))
        norm = torch.linalg.vector_norm(x, dim=-2, keepdim=True)
    return norm.amax((-2, -1))
