"""Accumulating a Kronecker factor: syrk_accumulate_ against what computes it elsewhere.

    python bench/syrk.py [--device cuda] [--repeats 30] [--out FILE.json]

Peers, on the same data: S.addmm_(X.T, X), the whole square, on X.float() where X is bfloat16; on the CPU also BLAS
ssyrk (OpenBLAS, through scipy), the lower triangle; on CUDA, for bfloat16, torch.mm(X.T, X, out_dtype=torch.float32).
d columns, T tokens: T d (d + 1) flops for the lower triangle; bytes T d · size + 4 d (d + 1) (S read and written).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from scipy.linalg.blas import ssyrk
from torch import Tensor

from harness import Limits, Row, arguments, interleaved, limits, report
from sst_kernels import syrk_accumulate_

SMALL = [(16, 65536), (32, 65536), (64, 65536)]
CPU_CASES = [*SMALL, (512, 4096), (2048, 8192), (4096, 4096)]
CUDA_CASES = [*SMALL, (128, 65536), (512, 4096), (4096, 4096), (4096, 65536)]
BLAS_CASES = [(2048, 8192), (4096, 4096)]


def by_addmm(S: Tensor, X: Tensor) -> Callable[[], object]:
    """The same update of the whole square."""

    def call() -> None:
        wide = X.to(S.dtype)
        S.addmm_(wide.T, wide)

    return call


def by_mm(S: Tensor, X: Tensor) -> Callable[[], object]:
    """The product on tensor cores, without the accumulation."""
    return lambda: torch.mm(X.T, X, out_dtype=torch.float32)


def by_ssyrk(S: Tensor, X: Tensor) -> Callable[[], object]:
    """The lower triangle in Fortran's order, in place."""
    columns, square = X.numpy().T, S.numpy().T  # both in Fortran's order
    return lambda: ssyrk(1.0, columns, beta=1.0, c=square, lower=1, overwrite_c=1)


PEERS = {"addmm_": by_addmm, "mm": by_mm, "ssyrk": by_ssyrk}


def measure(
    case: tuple[int, int], dtype: torch.dtype, peer: str, repeats: int, machine: Limits, device: torch.device
) -> Row:
    """Checks and times one case."""
    d, tokens = case
    X = torch.randn(tokens, d, device=device).to(dtype)
    S, square = (torch.zeros(d, d, device=device) for _ in range(2))
    syrk_accumulate_(S, X)
    exact = (X.double().T @ X.double()).tril()
    torch.testing.assert_close(S.double(), exact, rtol=1e-4, atol=1e-4 * tokens**0.5)
    times = interleaved([partial(syrk_accumulate_, S, X), PEERS[peer](square, X)], repeats, device)
    moved = X.numel() * X.element_size() + 4 * d * (d + 1)
    floor = machine.floor(moved, tokens * d * (d + 1))
    return Row(f"d={d} T={tokens} {str(dtype).removeprefix('torch.')} / {peer}", *times, floor)


def main() -> None:
    """Runs all cases."""
    options = arguments(__doc__)
    cuda = options.device.type == "cuda"
    cases = [
        (case, dtype, "mm" if cuda and dtype == torch.bfloat16 else "addmm_")
        for dtype in (torch.float32, torch.bfloat16)
        for case in (CUDA_CASES if cuda else CPU_CASES)
    ]
    cases += [] if cuda else [(case, torch.float32, "ssyrk") for case in BLAS_CASES]
    machines = {dtype: limits(options.device, dtype if cuda else torch.float32) for dtype in {c[1] for c in cases}}
    rows = [measure(case, dtype, peer, options.repeats, machines[dtype], options.device) for case, dtype, peer in cases]
    report(__doc__.splitlines()[0], rows, options)


if __name__ == "__main__":
    main()
