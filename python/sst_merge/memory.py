"""Memory of a collection, estimated before it starts."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import psutil
import torch
from tqdm import tqdm

from sst_kernels.collect import CoreBasis

if TYPE_CHECKING:
    from .problem import Problem

_SUMS = 4  # harm and benign, found and held out
_SOLVER_WORKSPACE = 8 * (1 << 25) * 6  # stacked pencils, factors and vectors in float64


def estimate_memory(problem: Problem, bases: Mapping[str, CoreBasis], diagonal: bool) -> dict[str, int]:
    """Bytes by use: model, activations, Fisher sums, directions.

    Args:
        problem: The merge problem.
        bases: Modules whose Fishers are collected.
        diagonal: Only diagonals are kept.

    Returns:
        Use -> bytes. Activations are a rule of thumb: 34 numbers a token, layer and hidden unit, as Korthikanti et
        al. (2022) count them, and three copies of the logits in float32.
    """
    text = problem.model_config
    width = {"float64": 8, "float32": 4}.get(problem.dtype_name, 2)
    calibration = problem.config.calibration
    longest = max(len(s.input_ids) for parts in problem.calibration.values() for part in parts for s in part)
    tokens = min(calibration.max_length, longest) * calibration.batch_size
    n = [basis.n for basis in bases.values()]
    entries = sum(n) if diagonal else sum(i * i for i in n)
    vectors = sum(i * i for i in n) if not diagonal else 0
    workspace = 0 if diagonal else min(_SOLVER_WORKSPACE, 8 * 6 * entries)
    return {
        "model": problem.parameter_count * width,
        "activations": tokens * (17 * width * text.num_hidden_layers * text.hidden_size + 12 * text.vocab_size),
        "gradient rows": calibration.batch_size * max(n) * 4,
        "Fisher sums": _SUMS * 4 * entries,
        "directions": 8 * vectors + workspace,
    }


def available_memory(device: str) -> int:
    """Bytes that can be taken on a device now."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def check_memory(problem: Problem, bases: Mapping[str, CoreBasis], diagonal: bool) -> None:
    """Print the estimate; refuse a collection that cannot fit.

    Args:
        problem: The merge problem.
        bases: Modules whose Fishers are collected.
        diagonal: Only diagonals are kept.

    Raises:
        ValueError: The estimate is over what is available.
    """
    estimate = estimate_memory(problem, bases, diagonal)
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
            "Fisher sums": "use `fisher: diagonal`, or adapters of lower rank",
            "directions": "use `fisher: diagonal`, or adapters of lower rank",
        }[largest]
        raise ValueError(f"memory: {_size(total)} are needed, {_size(available)} are available; {largest}: {advice}")


def _size(size: int) -> str:
    """Bytes in a unit that suits."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
