"""Products of a symmetric matrix with a thin block: symm_thin, reading the lower triangle, against matrix products.

    python bench/symm_thin.py [--device cuda] [--repeats 30] [--out FILE.json]

Peers, on the same data, with the full symmetric matrix: the better of `A @ T` (T row-major) and `(T.mT @ A).mT` (T
column-major), in full float32 (no TF32). Ours takes the block column-major, as the eigensolver holds it. "pair" is
symm_thin_pair against two products. N members of n × n, m columns: 2 N n² m flops; bytes: half of A, and X and Y.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from harness import Limits, Row, arguments, interleaved, limits, report
from sst_kernels import symm_thin, symm_thin_pair

COLUMNS = [1, 4, 8, 16, 24, 32, 64]
CPU_SHAPES = [(1, 4096, COLUMNS), (1, 2048, [8, 16, 32]), (1, 1024, [8, 16, 32]), (64, 256, [8, 16]), (256, 32, [8])]
CUDA_SHAPES = [(224, 1024, COLUMNS), (32, 4096, COLUMNS), (1, 8192, [8, 16, 32]), (1000, 64, [8])]

Case = tuple[int, int, int]


def measure(case: Case, dtype: torch.dtype, pair: bool, repeats: int, machine: Limits, device: torch.device) -> Row:
    """Checks and times one case."""
    members, n, m = case
    A = torch.randn(members, n, n, device=device, dtype=dtype)
    A = A.tril() + A.tril(-1).mT
    X = torch.randn(members, m, n, device=device, dtype=dtype).mT
    T = X.contiguous()
    exact = A.double() @ X.double()
    tolerance = 4 * n**0.5 * torch.finfo(dtype).eps * exact.abs().max().item()
    ours: Callable[[], object]
    if pair:
        ours = partial(symm_thin_pair, A, A.clone(), X)
        for Y in symm_thin_pair(A, A, X):
            torch.testing.assert_close(Y.double(), exact, rtol=0, atol=tolerance)
    else:
        ours = partial(symm_thin, A, X)
        torch.testing.assert_close(symm_thin(A, X).double(), exact, rtol=0, atol=tolerance)
    peers = [partial(torch.bmm, A, T), lambda: torch.bmm(X.mT, A).mT]
    if members == 1:
        peers = [partial(torch.mm, A[0], T[0]), lambda: torch.mm(X[0].mT, A[0]).mT]
    our_time, *times = interleaved([ours, *peers], repeats, device)
    count = 1 + pair
    moved = members * (count * n * (n + 1) // 2 + (1 + count) * n * m) * A.element_size()
    floor = machine.floor(moved, 2 * count * members * n * n * m)
    name = f"{members} × n={n} m={m} {str(dtype).removeprefix('torch.')}" + (" pair" if pair else "")
    return Row(name, our_time, count * min(times), floor)


def main() -> None:
    """Runs all cases."""
    options = arguments(__doc__)
    torch.backends.cuda.matmul.allow_tf32 = False
    cuda = options.device.type == "cuda"
    rows = []
    for dtype in (torch.float32, torch.float64):
        machine = limits(options.device, dtype)
        for members, n, columns in CUDA_SHAPES if cuda else CPU_SHAPES:
            for m in columns:
                for pair in (False, True) if m == 8 else (False,):
                    rows.append(measure((members, n, m), dtype, pair, options.repeats, machine, options.device))
    report(__doc__.splitlines()[0], rows, options)


if __name__ == "__main__":
    main()
