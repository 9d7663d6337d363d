"""Large pencils in seconds, and how solvers are compared on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from scipy.fft import dct
from torch import Tensor

from harness import Limits, Row
from sst_kernels import EigenResult, Pencil

Pairs = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Comparison(Row):
    """A row, the speedup asked for, the largest backward errors, and our iterations (0: a direct method)."""

    bar: float
    error: float
    peer_error: float
    iterations: float


def kfac_like(n: int, dtype: DTypeLike, *, damping: float = 1e-3, seed: int = 0) -> tuple[NDArray, NDArray]:
    """Power-law covariances A = P diag(1/i) Pᵀ and B = Q diag(1/i) Qᵀ, B damped by a share of its mean eigenvalue.

    P and Q are independent products of random signs, orthonormal cosine transforms and permutations, twice: truly
    dense, without the 4n³/3 flops of a QR factorisation.

    Args:
        n: Order.
        dtype: Of the result; built in float64.
        damping: The share.
        seed: Of the signs and permutations.

    Returns:
        A and B, (n, n), exactly symmetric; about 8n² log n flops each.
    """
    rng = np.random.default_rng((n, seed))
    power = 1 / np.arange(1.0, n + 1)
    a, b = (_rotated(power, rng) for _ in range(2))
    b[np.diag_indices(n)] += damping * power.mean()
    return a.astype(dtype, copy=False), b.astype(dtype, copy=False)


def _rotated(values: NDArray, rng: np.random.Generator) -> NDArray:
    """Q diag(values) Qᵀ with a random orthogonal Q, symmetric."""
    n = len(values)
    steps = [(rng.choice([-1.0, 1.0], n), rng.permutation(n)) for _ in range(2)]
    x = np.diag(values)
    for _ in range(2):  # Q D, then Q (Q D)ᵀ
        for signs, order in steps:
            x = dct(signs[:, None] * x, axis=0, norm="ortho", overwrite_x=True, workers=-1)[order]
        x = x.T
    return (x + x.T) / 2


def backward_error(a: NDArray, b: NDArray, w: NDArray, v: NDArray) -> float:
    """Largest ‖Av − λBv‖ / ((‖A‖ + |λ|‖B‖)‖v‖) over the pairs, in float64 for every solver alike.

    Returns:
        The error, NaN if a pair is not finite.
    """
    matrices, pairs = ((torch.from_numpy(np.array(x, dtype=np.float64)) for x in two) for two in ((a, b), (w, v)))
    return Pencil(*matrices).backward_errors(*pairs).max().item()


def by_reduction(eigh: Callable[[Tensor], Pairs], a: Tensor, b: Tensor, k: int) -> Pairs:
    """The k largest pairs by B = LLᵀ, C = L⁻¹AL⁻ᵀ and a batched eigensolver for C."""
    factor = torch.linalg.cholesky(b)
    half = torch.linalg.solve_triangular(factor, a, upper=False)
    c = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    values, y = eigh(c)  # which reads one triangle
    vectors = torch.linalg.solve_triangular(factor.mT, y[..., -k:], upper=True)
    return values[..., -k:].flip(-1), vectors.flip(-1)


def floor(machine: Limits, result: EigenResult, size: int) -> float:
    """Seconds that the iterations (or the direct method) cannot do without, for entries of so many bytes."""
    n, pencils = result.vectors.shape[-2], result.status.numel()
    steps = result.counts.iterations
    triangle = n * (n + 1) / 2
    if steps:
        return pencils * machine.floor(steps * triangle * (2 * size + 4), n**3 / 3)
    return pencils * machine.floor(0, 14 * n**3 / 3)
