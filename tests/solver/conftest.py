from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from sst_kernels.operators import Operator


@pytest.fixture
def random_pencil() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Maker of (A, B): A Hermitian and indefinite, B positive definite with a given condition."""

    def make(n: int, dtype: type = np.float64, *, cond: float = 100.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng((n, seed))
        x, y = rng.standard_normal((2, n, n))
        if np.issubdtype(dtype, np.complexfloating):
            x, y = (m + 1j * rng.standard_normal((n, n)) for m in (x, y))
        q = np.linalg.qr(y)[0]
        b = (q * np.logspace(0, -np.log10(cond), n)) @ q.conj().T
        hermitian = [(m + m.conj().T) / 2 for m in (x, b)]
        return tuple(m.astype(dtype) for m in hermitian)

    return make


@pytest.fixture
def move(device: torch.device) -> Callable[[Operator], Operator]:
    """Copies an operator to the device of the test."""

    def moved(part: object) -> object:
        if isinstance(part, Operator):
            return replace(part, **{field.name: moved(getattr(part, field.name)) for field in fields(part)})
        if isinstance(part, tuple):
            return tuple(moved(x) for x in part)
        return part.to(device) if isinstance(part, torch.Tensor) else part

    return moved
