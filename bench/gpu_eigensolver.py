"""Batches of pencils on a GPU: `solve` against cuSOLVER and torch.

    python bench/gpu_eigensolver.py [--only ROW ...] [--quick] [--repeats 3] [--out FILE.json]

Power-law covariances, B damped by 1e-3 of its mean eigenvalue, float32. Peers, from the libraries that torch itself
uses: cuSOLVER's sygvdx, looped (k largest pairs); Cholesky and congruence by torch, then cuSOLVER's XsyevBatched (all
pairs), or torch.linalg.eigh. Rows, and the least speedup over the best of cuSOLVER's two ways and over torch:
  many         224 pencils, n = 1024, k = 32: 8 and 50
  large        32 pencils, n = 4096, k = 32: 5 and 30
  small32/64   1000 pencils, n = 32 and 64, all pairs: 2 and 5
Floor as in `eigensolver.py`. Without a GPU nothing is measured.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
from scipy.linalg import hadamard
from torch import Tensor

from cusolver import CuSolver
from eigen_pencils import Comparison, Pairs, by_reduction, floor
from harness import interleaved, limits, parser, report
from sst_kernels import Pencil, solve

CASES = {  # pencils, n, k; bars over cuSOLVER and torch
    "many": (224, 1024, 32, 8, 50),
    "large": (32, 4096, 32, 5, 30),
    "small32": (1000, 32, 32, 2, 5),
    "small64": (1000, 64, 64, 2, 5),
}


def kfac_batch(count: int, n: int, device: torch.device) -> Pairs:
    """Covariances Q diag(1/i) Qᵀ with Q = S H T H P, n a power of 2.

    H is Hadamard's matrix over √n, S and T are random signs, P is a random permutation.

    Args:
        count: Number of pencils.
        n: Order.
        device: Where they are built, in float64.

    Returns:
        A and B (count, n, n), float32.
    """
    generator = torch.Generator().manual_seed(0)
    mix = torch.from_numpy(hadamard(n) / n**0.5).to(device)
    power = 1 / torch.arange(1, n + 1, dtype=torch.float64, device=device)
    matrices = torch.empty(2, count, n, n, device=device)
    for matrix in matrices.flatten(0, 1):
        signs = (torch.randint(2, (2, n), generator=generator) * 2.0 - 1).to(device, torch.float64)
        q = (signs[0][:, None] * mix) @ (signs[1][:, None] * mix)
        full = q * power[torch.randperm(n, generator=generator).to(device)] @ q.T
        matrix.copy_((full + full.T) / 2)
    matrices[1].diagonal(dim1=-2, dim2=-1).add_(1e-3 * power.mean().item())
    return matrices[0], matrices[1]


def peers(a: Tensor, b: Tensor, k: int) -> dict[str, Callable[[], Pairs]]:
    """The peers by name, each of which has run once; those that cannot run are printed."""
    found: dict[str, Callable[[], Pairs]] = {"torch": partial(by_reduction, torch.linalg.eigh, a, b, k)}
    if a.device.type != "cuda":
        return found
    try:
        library = CuSolver()
    except (OSError, RuntimeError, AttributeError) as failure:
        print(f"cuSOLVER: not measured: {failure}")
        return found
    for name, call in {
        "sygvdx looped": partial(library.sygvdx, a, b, k),
        "XsyevBatched": partial(by_reduction, library.xsyev_batched, a, b, k),
    }.items():
        try:
            call()
            torch.cuda.synchronize()
            found[name] = call
        except (RuntimeError, AttributeError) as failure:
            print(f"{name}: not measured: {failure}")
    return found


def worst_error(a: Tensor, b: Tensor, values: Tensor, vectors: Tensor) -> float:
    """Largest backward error, in float64, one pencil at a time."""
    pencils = zip(a, b, values, vectors, strict=True)
    return max(
        Pencil(x.double(), y.double()).backward_errors(w.double(), v.double()).max().item() for x, y, w, v in pencils
    )


def measure(name: str, options: Namespace) -> list[Comparison]:
    """Checks and times one batch with all its peers."""
    count, n, k, cusolver_bar, torch_bar = CASES[name]
    if options.quick:
        count, n, k = min(count, 8), min(n, 128), min(k, 16)
    a, b = kfac_batch(count, n, options.device)
    ours = partial(solve, Pencil(a, b), k)
    result = ours()
    if not result.converged.all():
        raise RuntimeError("; ".join(result.explain()))
    calls = peers(a, b, k)
    errors = []
    for peer, call in calls.items():
        values, vectors = call()
        apart = ((values - result.values).abs().amax(-1) / values[:, 0]).max().item()
        if not apart < 1e-4:
            raise RuntimeError(f"{name}: eigenvalues of {peer} differ by {apart:.1e} of the largest")
        errors.append(worst_error(a, b, values, vectors))
    error = worst_error(a, b, result.values, result.vectors)
    times = interleaved([ours, *calls.values()], options.repeats, options.device, warmups=1)
    lower = floor(limits(options.device, torch.float32), result, a.element_size())
    return [
        Comparison(
            f"{count} × n={n} k={k} ({result.method}) / {peer}",
            times[0],
            time,
            lower,
            torch_bar if peer == "torch" else cusolver_bar,
            error,
            peer_error,
            result.counts.iterations,
        )
        for peer, time, peer_error in zip(calls, times[1:], errors, strict=True)
    ]


def main() -> None:
    """Runs the rows asked for, all by default."""
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    options.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    options.set_defaults(repeats=3, device=torch.device("cuda"))
    options = options.parse_args()
    if options.device.type == "cuda" and not torch.cuda.is_available():
        print("not measured: no CUDA device")
        return
    report(__doc__.splitlines()[0], [row for name in options.only for row in measure(name, options)], options)


if __name__ == "__main__":
    main()
