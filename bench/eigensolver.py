"""The k largest pairs of a pencil: `solve` against its peers on the CPU, at matched backward error.

    python bench/eigensolver.py [--only ROW ...] [--orders LEAST MOST] [--quick] [--repeats 5] [--out FILE.json]

Pencils: power-law covariances, B damped by 1e-3 of its mean eigenvalue (`eigen_pencils.py`). An iterative peer
(`eigen_peers.py`) runs at the loosest tolerance, by decades, whose backward error reaches `solve`'s own tolerance; the
Cholesky factor of B is in everyone's time. All candidates of a case take turns, a pause between them; medians.
Rows and bars (least speedup):
  scipy        float64, k = 16, n = 2048, 4096, 8192, beside scipy eigh with subset: 2, 4, 8
  peers        float64, k = 16, n = 4096, beside ARPACK, lobpcg, PRIMME: 4
  float32      k = 32, n = 4096, beside scipy eigh with subset in float32: 4
  xitorch      float64, k = 16, n = 1024, beside xitorch's Davidson
  auto         float64, n = 32…8192, k = 1, n/16, n/4, beside the best of scipy (both ways) and method="dense": 0.9
  transformer  float32, the Kronecker factors of a small Llama on two kinds of text, beside a loop of scipy
  kronecker    float32, B = B₁ ⊗ B₂ + γI of factors 4096 and 16 (n = 65536), k = 32: under 60 s, under 2 GB
Floor of an iteration: the lower triangles of A and B and a float32 preconditioner read once, and n³/3 flops for the
preconditioner; of a direct method: 14n³/3 flops, Cholesky, congruence and tridiagonalisation; of the Kronecker pencil,
its products with A.
"""

from __future__ import annotations

import math
import multiprocessing
import resource
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import torch
from numpy.typing import NDArray

from eigen_factors import factor_pencils
from eigen_peers import DIRECT, Pairs, prepare
from eigen_pencils import Comparison, backward_error, floor, kfac_like
from harness import PAUSE, Limits, Row, interleaved, limits, parser, report
from sst_kernels import EigenResult, Pencil, solve


@dataclass(frozen=True)
class Case:
    """A pencil and the peers to solve it with."""

    n: int
    k: int
    peers: tuple[str, ...]
    bar: float
    dtype: type = np.float64
    best: bool = False  # beside the fastest of the peers and the dense path, not beside each


SWEEP = [(n, k) for n in (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192) for k in sorted({1, n // 16, n // 4})]
CASES = {
    "scipy": [Case(n, 16, ("scipy subset",), bar) for n, bar in ((2048, 2), (4096, 4), (8192, 8))],
    "peers": [Case(4096, 16, ("ARPACK", "lobpcg", "PRIMME"), 4)],
    "float32": [Case(4096, 32, ("scipy subset",), 4, np.float32)],
    "xitorch": [Case(1024, 16, ("xitorch",), 1)],
    "auto": [Case(n, k, tuple(DIRECT), 0.9, best=True) for n, k in SWEEP],
}


def ours(a: NDArray, b: NDArray, k: int, method: str = "auto") -> EigenResult:
    """`solve` on numpy's arrays, without a copy."""
    return solve(Pencil(torch.from_numpy(a), torch.from_numpy(b)), k, method=method)


def arrays(result: EigenResult) -> Pairs:
    """Values and vectors as numpy's arrays."""
    return result.values.numpy(), result.vectors.numpy()


@cache
def measured_limits(dtype: torch.dtype) -> Limits:
    """This CPU's, measured once."""
    return limits(torch.device("cpu"), dtype)


def check(label: str, result: EigenResult, others: Sequence[Pairs], eps: float) -> None:
    """Raises unless `solve` converged and all agree on the eigenvalues."""
    if not result.converged.all():
        raise RuntimeError(f"{label}: {'; '.join(result.explain())}")
    for w, _ in others:
        apart = np.abs(w - result.values.numpy()).max() / np.abs(w).max()
        if not apart < 100 * w.shape[-1] ** 0.5 * result.vectors.shape[-2] * eps:
            raise RuntimeError(f"{label}: eigenvalues differ by {apart:.1e} of the largest")


def measure(case: Case, options: Namespace) -> list[Row]:
    """Checks and times one pencil with all its peers."""
    eps = np.finfo(case.dtype).eps
    a, b = kfac_like(case.n, case.dtype)
    label = f"{np.dtype(case.dtype).name} n={case.n} k={case.k}"
    prepared = [prepare(name, a, b, case.k, 4 * case.n**0.5 * eps) for name in case.peers]
    for call, name in prepared:
        if call is None:
            print(f"{label}: {name}", flush=True)
    calls = {name: call for call, name in prepared if call is not None}
    if case.best:
        calls["dense path"] = lambda: arrays(ours(a, b, case.k, "dense"))
    if not calls:
        return []
    result = ours(a, b, case.k)
    found = [call() for call in calls.values()]
    check(label, result, found, eps)
    errors = [backward_error(a, b, *pairs) for pairs in (arrays(result), *found)]
    repeats = options.repeats * (1 if case.n >= 1024 else 6)
    candidates = [partial(ours, a, b, case.k), *calls.values()]
    times = interleaved(candidates, repeats, options.device, warmups=1, pause=PAUSE)
    machine = measured_limits(torch.from_numpy(a).dtype)
    rows = [
        Comparison(
            f"{label} ({result.method}) / {name}",
            times[0],
            peer_time,
            floor(machine, result, a.itemsize),
            case.bar,
            errors[0],
            error,
            result.counts.iterations,
        )
        for name, peer_time, error in zip(calls, times[1:], errors[1:], strict=True)
    ]
    return [min(rows, key=lambda row: row.peer)] if case.best else rows


def transformer(options: Namespace) -> list[Row]:
    """Batches of pencils from one model's factors, beside a loop of scipy's better way."""
    rows = []
    for name, (a, b) in factor_pencils(64 if options.quick else 256).items():
        n, k = a.shape[-1], 16
        calls = {peer: partial(_loop, DIRECT[peer], a, b, k) for peer in DIRECT}
        result = ours(a, b, k)
        found = [call() for call in calls.values()]
        check(name, result, found, np.finfo(a.dtype).eps)
        solved = (arrays(result), *found)
        errors = [max(backward_error(*one) for one in zip(a, b, *pairs, strict=True)) for pairs in solved]
        candidates = [partial(ours, a, b, k), *calls.values()]
        times = interleaved(candidates, options.repeats, options.device, warmups=1, pause=PAUSE)
        best = min(range(1, len(times)), key=times.__getitem__)
        label = f"{name}: {len(a)} × n={n} k={k} ({result.method}) / {list(calls)[best - 1]}, looped"
        lower = floor(measured_limits(torch.float32), result, a.itemsize)
        rows.append(
            Comparison(label, times[0], times[best], lower, 1, errors[0], errors[best], result.counts.iterations)
        )
    return rows


def _loop(peer: Callable[..., Pairs], a: NDArray, b: NDArray, k: int) -> Pairs:
    """The peer on one pencil after the other."""
    w, v = zip(*(peer(*one, k, 0.0) for one in zip(a, b, strict=True)), strict=True)
    return np.stack(w), np.stack(v)


def kronecker(options: Namespace) -> list[Row]:
    """Time and peak memory of exact damping at model scale, in a process of its own."""
    sizes = (256, 16) if options.quick else (4096, 16)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seconds, before, peak, result, tolerance = pool.apply(_kronecker, sizes)
    label = (
        f"A₁ ⊗ A₂, B₁ ⊗ B₂ + γI, n = {sizes[0]} · {sizes[1]}, k=32 ({result.method}): peak {peak / 1e9:.2f} GB, "
        f"{before / 1e9:.2f} GB of it before the solve / the bar of 60 s and 2 GB"
    )
    flops = 2 * sum(sizes) * math.prod(sizes) * result.counts.a_products
    lower = measured_limits(torch.float32).floor(0, flops)
    error = result.backward_errors.max().item()
    return [Comparison(label, seconds, 60.0, lower, 1, error, tolerance, result.counts.iterations)]


def _kronecker(left: int, right: int) -> tuple[float, int, int, EigenResult, float]:
    """Solves it once: seconds, peak bytes before and after, the result without its vectors, its tolerance."""
    from sst_kernels import Damped, Kronecker

    pairs = [[torch.from_numpy(x) for x in kfac_like(n, np.float32, damping=0.0)] for n in (left, right)]
    a, b = (Kronecker(*factors) for factors in zip(*pairs, strict=True))
    pencil = Pencil(a, Damped(b, 1e-3 * b.trace().item() / b.n))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    result = solve(pencil, 32)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if not result.converged.all():
        raise RuntimeError("; ".join(result.explain()))
    return seconds, before, peak, replace(result, vectors=result.vectors[:0]), pencil.tolerance


def shrunk(case: Case) -> Case:
    """The case at a sixteenth of its order, to see that the script runs."""
    return replace(case, n=max(32, case.n // 16), k=max(1, min(case.k, case.n // 64)))


def main() -> None:
    """Runs the rows asked for, all by default."""
    options = parser(__doc__)
    names = [*CASES, "transformer", "kronecker"]
    options.add_argument("--only", nargs="+", choices=names, default=names)
    options.add_argument("--orders", type=int, nargs=2, default=(1, 8192), help="leave out pencils of other orders")
    options.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    options.set_defaults(repeats=5)
    options = options.parse_args()
    rows: list[Row] = []
    for name in options.only:
        if name not in CASES:
            rows += transformer(options) if name == "transformer" else kronecker(options)
            continue
        cases = list(dict.fromkeys(map(shrunk, CASES[name]))) if options.quick else CASES[name]
        for case in cases:
            if not options.orders[0] <= case.n <= options.orders[1]:
                print(f"{name} n={case.n} k={case.k}: not measured: not within --orders {options.orders}")
                continue
            rows += measure(case, options)
    report(__doc__.splitlines()[0], rows, options)


if __name__ == "__main__":
    main()
