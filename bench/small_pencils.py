"""All pairs of many small generalized eigenproblems: fused_eigh, eigh and solve against a loop over pencils.

    python bench/small_pencils.py [--device cuda] [--repeats 30] [--out FILE.json]

A of power-law eigenvalues and B likewise, damped by 1e-3 of the mean, both with random eigenvectors. Peers, on the same
data: on the CPU scipy.linalg.eigh in a loop; on CUDA torch.linalg.cholesky, solve_triangular and eigh, batched. Checked
first: the backward error of every pair against 10 n eps. About 10 n³ flops a pencil for all pairs, counted so for
CUDA's Jacobi too; bytes 3 n² elements (A, B, vectors).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import scipy.linalg
import torch
from torch import Tensor

from eigen_pencils import by_reduction
from harness import PAUSE, Limits, Row, arguments, interleaved, limits, report
from sst_kernels import Pencil, eigh, fused_eigh, fused_eigh_limit, solve

CPU_CASES = [(256, 8), (256, 16), (256, 32), (64, 64), (64, 128), (64, 256)]
CUDA_CASES = [(1000, 16), (1000, 32), (1000, 64), (1000, 96), (1000, 128)]


def covariances(count: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Symmetric positive semidefinite (count, n, n), eigenvalues 1, 1/2, …, 1/n."""
    q = torch.linalg.qr(torch.randn(count, n, n, dtype=torch.float64, device=device))[0]
    x = (q / torch.arange(1, n + 1, device=device)) @ q.mT
    return ((x + x.mT) / 2).to(dtype)


def by_scipy(a: Tensor, b: Tensor) -> Callable[[], object]:
    """One pencil after another."""
    pencils = list(zip(a.numpy(), b.numpy(), strict=True))
    return lambda: [scipy.linalg.eigh(x, y) for x, y in pencils]


def check(a: Tensor, b: Tensor) -> None:
    """Backward errors of `fused_eigh`, in float64."""
    n, eps = a.shape[-1], torch.finfo(a.dtype).eps
    values, vectors, info = fused_eigh(a, b)
    a, b, values, vectors = (x.double() for x in (a, b, values, vectors))
    residual = torch.linalg.vector_norm(a @ vectors - b @ vectors * values[:, None], dim=-2)
    size = torch.linalg.matrix_norm(a, 2)[:, None] + values.abs() * torch.linalg.matrix_norm(b, 2)[:, None]
    worst = (residual / (size * torch.linalg.vector_norm(vectors, dim=-2))).max()
    if info.any() or worst > 10 * n * eps:
        raise RuntimeError(f"fused_eigh: info {info.tolist()}, backward error {worst:.1e}")


def measure(
    case: tuple[int, int], dtype: torch.dtype, repeats: int, machine: Limits, device: torch.device
) -> list[Row]:
    """Checks and times one case: three ways against one peer."""
    count, n = case
    a, b = (covariances(count, n, dtype, device) for _ in range(2))
    b.diagonal(dim1=-2, dim2=-1).add_(1e-3 * b.diagonal(dim1=-2, dim2=-1).mean())
    ways: dict[str, Callable[[], object]] = {"eigh": partial(eigh, a, b), "solve": partial(solve, Pencil(a, b), n)}
    if n <= fused_eigh_limit(a):
        check(a, b)
        ways = {"fused_eigh": partial(fused_eigh, a, b), **ways}
    peer = partial(by_reduction, torch.linalg.eigh, a, b, n) if device.type == "cuda" else by_scipy(a, b)
    *times, peer_time = interleaved([*ways.values(), peer], repeats, device, pause=PAUSE)
    floor = machine.floor(3 * a.numel() * a.element_size(), 10 * count * n**3)
    label = f"{count} × n={n} {str(dtype).removeprefix('torch.')}"
    name = "torch" if device.type == "cuda" else "scipy"
    return [Row(f"{label} {way} / {name}", time, peer_time, floor) for way, time in zip(ways, times, strict=True)]


def main() -> None:
    """Runs all cases."""
    options = arguments(__doc__)
    torch.manual_seed(0)
    cases = CUDA_CASES if options.device.type == "cuda" else CPU_CASES
    rows = []
    for dtype in (torch.float64, torch.float32):
        machine = limits(options.device, dtype)
        for case in cases:
            rows += measure(case, dtype, options.repeats, machine, options.device)
    report(__doc__.splitlines()[0], rows, options)


if __name__ == "__main__":
    main()
