"""Accumulating a Kronecker factor: syrk_accumulate_ against torch's addmm_.

    python bench/syrk.py [--device cuda] [--repeats 30] [--out FILE.json]

The peer computes the whole square, S.addmm_(X.T, X), on X.float() where X is bfloat16. d columns, T
tokens: T d (d + 1) flops for the lower triangle; bytes T d · size + 4 d (d + 1) (S read and written).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from harness import Limits, Row, arguments, interleaved, limits, report
from sst_kernels import syrk_accumulate_

CASES = [(16, 65536), (64, 65536), (512, 4096), (2048, 8192), (4096, 4096)]
DTYPES = [torch.float32, torch.bfloat16]


def by_addmm(S: Tensor, X: Tensor) -> Tensor:
    """The same update of the whole square."""
    wide = X.to(S.dtype)
    return S.addmm_(wide.T, wide)


def measure(case: tuple[int, int], dtype: torch.dtype, repeats: int, machine: Limits, device: torch.device) -> Row:
    """Checks and times one case."""
    d, tokens = case
    X = torch.randn(tokens, d, device=device).to(dtype)
    S, square = (torch.zeros(d, d, device=device) for _ in range(2))
    syrk_accumulate_(S, X)
    exact = by_addmm(square.double(), X).tril()
    torch.testing.assert_close(S.double(), exact, rtol=1e-4, atol=1e-4 * tokens**0.5)
    times = interleaved([partial(syrk_accumulate_, S, X), partial(by_addmm, square, X)], repeats, device)
    moved = X.numel() * X.element_size() + 4 * d * (d + 1)
    floor = machine.floor(moved, tokens * d * (d + 1))
    return Row(f"d={d} T={tokens} {str(dtype).removeprefix('torch.')}", *times, floor)


def main() -> None:
    """Runs all cases."""
    options = arguments(__doc__)
    machine = limits(options.device, torch.float32)
    rows = [measure(case, dtype, options.repeats, machine, options.device) for dtype in DTYPES for case in CASES]
    report(__doc__.splitlines()[0], rows, options)


if __name__ == "__main__":
    main()
