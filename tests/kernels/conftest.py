from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=FLOATING, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def integers(device: torch.device) -> Callable[..., Tensor]:
    """Maker of small integers: float32 sums of their products are exact, whatever the order."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator).to(device, dtype)

    return make


@pytest.fixture
def accumulator() -> Callable[[torch.dtype], torch.dtype]:
    """The dtype an op accumulates in and returns."""
    return lambda dtype: torch.float64 if dtype == torch.float64 else torch.float32


@pytest.fixture
def product_error() -> Callable[[Tensor, Tensor, Tensor], float]:
    """Largest |C - Pᵀ Q| / (|P|ᵀ |Q|), against the product in extended precision."""

    def error(c: Tensor, p: Tensor, q: Tensor) -> float:
        p, q = (x.double().cpu().numpy().astype(np.longdouble) for x in (p, q))
        difference = np.abs(c.double().cpu().numpy() - p.T @ q)
        return float((difference / (np.abs(p).T @ np.abs(q))).max())

    return error
