"""Memory of a collection, estimated before it starts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import psutil
import torch
from tqdm import tqdm

from sst_kernels.collect import CoreBasis

from .base import model_bytes
from .packing import make_rows
from .pencils import ALL_PAIRS_UP_TO, ELEMENTS_AT_ONCE
from .settings import KINDS

if TYPE_CHECKING:
    from .problem import Problem

_WORKSPACE = 8 * 6  # bytes an entry: pencils, factors and vectors in float64


def estimate_memory(
    problem: Problem, bases: Mapping[str, CoreBasis], representations: tuple[str, str], coordinates: str
) -> dict[str, int]:
    """Bytes by use: model, activations, Fisher sums, directions.

    Args:
        problem: The merge problem.
        bases: Modules whose Fishers are collected.
        representations: Of the Fishers of harmful and of benign data; see `sums.FisherSums`.
        coordinates: "core", "weight" or "factor"; only in the first is anything solved.

    Returns:
        Use -> bytes. Activations are a rule of thumb: 17 numbers a token, layer and hidden unit, as Korthikanti et
        al. (2022) count them, and three copies of the logits in float32.
    """
    text = problem.model_config
    width = {"float64": 8, "float32": 4}.get(problem.dtype_name, 2)
    dtype = getattr(torch, problem.dtype_name)
    calibration = problem.config.calibration
    row_length = calibration.max_length if calibration.packing else None
    rows = [row for parts in problem.calibration.values() for part in parts for row in make_rows(part, row_length)]
    tokens = max(sum(len(s.input_ids) for s in row) for row in rows) * calibration.batch_size
    sequences = max(len(row) for row in rows) * calibration.batch_size
    n = [basis.n for basis in bases.values()]
    points, samples = len(problem.config.parameters.weighted_points[0]), problem.config.parameters.samples
    gradients = {
        kind: [points * (samples if kind == "benign" else 1) * len(part) for t in tasks for part in (t.found, t.held)]
        for kind, tasks in problem.tasks.items()
    }
    shapes = [basis.core_shape for basis in bases.values()]
    kept = dict(zip(KINDS, representations, strict=True))
    entries = sum(_entries(kept[kind], shapes, count) for kind, counts in gradients.items() for count in counts)
    pairs = [i * (i if i <= ALL_PAIRS_UP_TO else min(i, gradients["harm"][0])) for i in n]
    squares = sum(pairs)
    stacked = min(max(ELEMENTS_AT_ONCE, max(pairs)), squares)
    if "gram" in representations:
        blocks = 0 if representations[0] == representations[1] else sum(i * i for i in n)
        squares = stacked = sum(map(sum, gradients.values())) * sum(n) + blocks
    solved = 0 if coordinates != "core" else 8 * squares + _WORKSPACE * stacked
    return {
        "model": 0 if problem.live else model_bytes(problem.config, problem.skeleton, dtype),
        "activations": tokens * (17 * width * text.num_hidden_layers * text.hidden_size + 12 * text.vocab_size),
        "gradient rows": sequences * max(n) * 4,
        "Fisher sums": max(4, width) * entries,
        "directions": solved,
        "cores": 7 * 8 * sum(n),
    }


def _entries(representation: str, shapes: Sequence[tuple[int, int]], rows: int) -> int:
    """Numbers that the sums of `rows` gradients hold, for modules of these cores; of Kronecker factors a triangle."""
    n = [out * into for out, into in shapes]
    factors = sum(out * (out + 1) // 2 + into * (into + 1) // 2 for out, into in shapes)
    if representation == "diagonal":
        return sum(n)
    if representation.startswith("kfac"):
        return factors
    return 2 * factors + (rows * sum(n) if representation == "gram" else sum(i * min(i, rows) for i in n))


def available_memory(device: str) -> int:
    """Bytes that can be taken on a device now."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def check_memory(
    problem: Problem, bases: Mapping[str, CoreBasis], representations: tuple[str, str], coordinates: str
) -> None:
    """Print the estimate; refuse a collection that cannot fit.

    Args:
        problem: The merge problem.
        bases: Modules whose Fishers are collected.
        representations: Of the Fishers of harmful and of benign data; see `sums.FisherSums`.
        coordinates: "core", "weight" or "factor"; only in the first is anything solved.

    Raises:
        ValueError: The estimate is over what is available.
    """
    estimate = estimate_memory(problem, bases, representations, coordinates)
    total, available = sum(estimate.values()), available_memory(problem.config.device)
    parts = ", ".join(f"{use} {_size(size)}" for use, size in estimate.items())
    where = f"{_size(available)} available on {problem.config.device}"
    tqdm.write(f"memory: about {_size(total)} of {where} ({parts})", file=sys.stderr)
    if total > available:
        largest = max(estimate, key=estimate.get)
        advice = {
            "model": "load it in a smaller dtype (--dtype bfloat16) or on a device with more memory",
            "activations": "lower calibration.batch_size or calibration.max_length",
            "gradient rows": "lower calibration.batch_size, or use core coordinates",
            "Fisher sums": "use `fisher: kfac` or `diagonal`, or adapters of lower rank",
            "directions": "use adapters of lower rank",
            "cores": "use core coordinates",
        }[largest]
        raise ValueError(f"memory: {_size(total)} are needed, {_size(available)} are available; {largest}: {advice}")


def _size(size: int) -> str:
    """Bytes in a unit that suits."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
