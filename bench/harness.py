"""Timing, floors and provenance for the benchmarks: one harness, one file per question.

A benchmark checks its result first, then times the op and its peer interleaved, so that a change of
clock or load meets both, and reports medians, the ratio to the peer and the ratio to the floor: the
larger of bytes over measured copy bandwidth and flops over measured matrix-product rate (above 100% where
the data stay in caches).
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy
import torch

import sst_kernels

Candidate = Callable[[], object]

# OpenBLAS's idle threads spin for tens of milliseconds after a call, at the expense of torch's in the next.
PAUSE = 0.1


@dataclass(frozen=True)
class Row:
    """One measured case; times in seconds, work in bytes and flops."""

    case: str
    ours: float
    peer: float
    floor: float

    @property
    def speedup(self) -> float:
        """How many times faster than the peer."""
        return self.peer / self.ours

    @property
    def of_floor(self) -> float:
        """Share of the speed that the machine's own limits allow."""
        return self.floor / self.ours


def parser(description: str) -> argparse.ArgumentParser:
    """The options every benchmark takes, for those that add their own.

    Args:
        description: The benchmark's docstring.

    Returns:
        A parser of `device` (torch.device), `repeats` (timed calls of each candidate) and `out` (Path or None).
    """
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options.add_argument("--repeats", type=int, default=30)
    options.add_argument("--out", type=Path, help="write the figures, with provenance, to this JSON file")
    return options


def arguments(description: str) -> argparse.Namespace:
    """The parsed options of `parser`."""
    return parser(description).parse_args()


def interleaved(
    candidates: Sequence[Candidate], repeats: int, device: torch.device, *, warmups: int = 3, pause: float = 0
) -> list[float]:
    """Median seconds of each candidate, their calls taking turns.

    Args:
        candidates: Calls to time.
        repeats: Timed calls of each.
        device: Where they run; on CUDA each call is timed by events on the device.
        warmups: Calls of each beforehand.
        pause: Seconds before each call, shorter ones being called once more before they are timed; `PAUSE` where the
            candidates have thread pools of their own.

    Returns:
        The medians, in the candidates' order.
    """
    for call in candidates:
        for _ in range(warmups):
            call()
    timer = _time_cuda if device.type == "cuda" else _time_host
    times: list[list[float]] = [[] for _ in candidates]
    for _ in range(repeats):
        for call, collected in zip(candidates, times, strict=True):
            time.sleep(pause)
            if pause and collected and collected[-1] < pause:
                call()  # wakes the threads, and the caches
            collected.append(timer(call))
    return [statistics.median(collected) for collected in times]


def _time_host(call: Candidate) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _time_cuda(call: Candidate) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


@dataclass(frozen=True)
class Limits:
    """What this machine can do at best, as measured: bytes and flops a second."""

    bandwidth: float
    rate: float

    def floor(self, bytes_moved: float, flops: float) -> float:
        """Seconds below which no implementation gets."""
        return max(bytes_moved / self.bandwidth, flops / self.rate)


def limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measures copy bandwidth (bytes read plus written) and the rate of a large matrix product.

    Args:
        device: Where.
        dtype: Element type of the matrix product.

    Returns:
        The two rates; data are larger than caches. On the CPU the better of torch's and numpy's product counts: the
        libraries behind them favour different makers' processors.
    """
    megabytes, n = (2048, 8192) if device.type == "cuda" else (256, 2048)
    source = torch.ones(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    x = torch.randn(n, n, device=device).to(dtype)
    products = [lambda: x @ x]
    if device.type == "cpu" and dtype in (torch.float32, torch.float64):
        y = x.numpy()
        products.append(lambda: y @ y)
    copy, *times = interleaved([lambda: target.copy_(source), *products], 5, device)
    return Limits(2 * source.numel() / copy, 2 * n**3 / min(times))


def provenance(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, threads, commit and date of a measurement.

    Args:
        device: The device measured on.

    Returns:
        JSON values.
    """
    root = Path(__file__).parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    )
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "build": sst_kernels.build_info(),
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def report(question: str, rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Prints the rows as a table and writes them, with provenance, to `options.out` if given.

    Args:
        question: What the benchmark asks: the first line of its docstring.
        rows: The measured cases; numbers that a subclass of Row adds become further columns.
        options: From `arguments`.
    """
    added = [f.name for f in fields(rows[0])[len(fields(Row)) :]] if rows else []
    columns = ["case", "ours", "peer", "speedup", "of floor", *(name.replace("_", " ") for name in added)]
    print(f"{question}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        times = f"{row.ours * 1e6:.1f} µs | {row.peer * 1e6:.1f} µs"
        rest = "".join(f" {getattr(row, name):.2g} |" for name in added)
        print(f"| {row.case} | {times} | {row.speedup:.2f}× | {row.of_floor:.0%} |{rest}")
    if options.out:
        figures = [{**asdict(row), "speedup": row.speedup, "of_floor": row.of_floor} for row in rows]
        content = {"question": question, "rows": figures, "provenance": provenance(options.device)}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(content, indent=1) + "\n")
