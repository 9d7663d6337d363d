"""Memory of a collection, estimated before it starts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import psutil
import torch
from tqdm import tqdm

from sst_kernels.collect import CoreBasis

from . import distributed
from .base import model_bytes
from .directions import ELEMENTS_AT_ONCE
from .packing import make_rows

if TYPE_CHECKING:
    from .problem import Problem

_WORKSPACE = 8 * 6  # bytes an entry: pencils, factors and vectors in float64


def estimate_memory(
    problem: Problem, bases: Mapping[str, CoreBasis], representation: str, coordinates: str
) -> dict[str, int]:
    """Bytes by use: model, activations, Fisher sums, directions.

    Args:
        problem: The merge problem.
        bases: Modules whose Fishers are collected.
        representation: "exact", "gram" or "diagonal".
        coordinates: "core" or "weight"; in the latter nothing is solved.

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
    gradients = _gradients(problem)
    entries = sum(_entries(representation, n, count) for count in gradients)
    squares = sum(gradients) * sum(n) if representation == "gram" else sum(i * i for i in n)
    stacked = squares if representation == "gram" else min(max(ELEMENTS_AT_ONCE, max(n) ** 2), squares)
    solved = 0 if coordinates == "weight" else 8 * squares + _WORKSPACE * stacked
    return {
        "model": 0 if problem.live else model_bytes(problem.config, problem.skeleton, dtype),
        "activations": tokens * (17 * width * text.num_hidden_layers * text.hidden_size + 12 * text.vocab_size),
        "gradient rows": sequences * max(n) * 4,
        "Fisher sums": _width(problem) * entries,
        "directions": solved,
        "cores": 7 * 8 * sum(n),
    }


def _gradients(problem: Problem) -> list[int]:
    """How many gradients are summed over in each part."""
    parameters = problem.config.parameters
    points = len(parameters.weighted_points[0])
    return [
        points * (parameters.samples if kind == "benign" else 1) * len(part)
        for kind, parts in problem.calibration.items()
        for part in parts
    ]


def _entries(representation: str, n: Sequence[int], rows: int) -> int:
    """Numbers that the sums of `rows` gradients hold, for modules of n coordinates."""
    if representation == "diagonal":
        return sum(n)
    return rows * sum(n) if representation == "gram" else sum(i * min(i, rows) for i in n)


def available_memory(device: str) -> int:
    """Bytes that can be taken on a device now."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def plan_memory(problem: Problem, bases: Mapping[str, CoreBasis], representation: str, coordinates: str) -> int:
    """Print the estimate; the number of groups of modules whose statistics are collected one after another.

    Sums are kept until they are used where all fit. Otherwise those of a part that is done are left in the folder of
    statistics, whose files the CPU maps as they are needed, and modules are collected in the fewest groups, each by its
    own passes over the data, that fit beside the model.

    Args:
        problem: The merge problem.
        bases: Modules whose Fishers are collected.
        representation: "exact", "gram" or "diagonal".
        coordinates: "core" or "weight"; in the latter nothing is solved.

    Returns:
        Groups, as `partition` makes them by numbers of coordinates; 0 where everything fits at once.

    Raises:
        ValueError: Not even one module at a time fits in what is available or in `memory`; says what would help.
    """
    config = problem.config
    estimate = estimate_memory(problem, bases, representation, coordinates)
    total, limit = sum(estimate.values()), min(available_memory(config.device), config.memory_bytes)
    parts = ", ".join(f"{use} {_size(size)}" for use, size in estimate.items())
    where = f"{_size(limit)} {'available' if limit < config.memory_bytes else 'allowed'} on {config.device}"
    _say(f"memory: about {_size(total)} of {where} ({parts})")
    if total <= limit:
        return 0
    width, most, names = _width(problem), max(_gradients(problem)), list(bases)
    sizes = {name: width * _entries(representation, [basis.n], most) for name, basis in bases.items()}
    estimate |= {"Fisher sums": 0}
    on_device = 0 if torch.device(config.device).type == "cpu" else total - sum(estimate.values())
    collecting = {use: size for use, size in estimate.items() if use != "directions"}
    solving = {use: size for use, size in estimate.items() if use not in ("activations", "gradient rows")}
    solving["Fisher sums"] = on_device
    for count in range(1, len(names) + 1):
        groups = partition({name: basis.n for name, basis in bases.items()}, count)
        collecting["Fisher sums"] = max(sum(sizes[name] for name in group) for group in groups)
        needed = max(collecting, solving, key=lambda phase: sum(phase.values()))
        if config.fisher_dir is not None and sum(needed.values()) <= limit:
            _say(f"memory: {len(names)} modules in {count} groups, each by its own passes: {count} times the work")
            return count
    raise ValueError(_advice(needed, limit, config.fisher_dir is None))


def partition(sizes: Mapping[str, int], count: int) -> tuple[tuple[str, ...], ...]:
    """Consecutive groups of about equal size.

    Args:
        sizes: Name -> size.
        count: How many groups, at most as many as names.

    Returns:
        The names, in their order; no group is empty.
    """
    names, groups = list(sizes), []
    for left in range(count, 0, -1):
        rest, size, take = sum(sizes[name] for name in names), 0, 0
        while take < len(names) - left + 1 and (take == 0 or size + sizes[names[take]] / 2 <= rest / left):
            size += sizes[names[take]]
            take += 1
        if left == 1:
            take = len(names)
        groups.append(tuple(names[:take]))
        names = names[take:]
    return tuple(groups)


def _advice(needed: Mapping[str, int], limit: float, no_folder: bool) -> str:
    """What does not fit, and what would help."""
    largest = max(needed, key=needed.get)
    advice = {
        "model": "load it in a smaller dtype (--dtype bfloat16) or on a device with more memory",
        "activations": "lower calibration.batch_size or calibration.max_length",
        "gradient rows": "lower calibration.batch_size, or use core coordinates",
        "Fisher sums": "use `fisher: diagonal`, or adapters of lower rank",
        "directions": "use adapters of lower rank",
        "cores": "use core coordinates",
    }[largest]
    if no_folder:
        advice += "; with a folder of statistics (fisher_dir) sums could be collected in groups of modules"
    total = sum(needed.values())
    return f"memory: {_size(total)} are needed, {_size(limit)} are there; {largest}: {advice}"


def _width(problem: Problem) -> int:
    """Bytes of a number of the sums."""
    return 8 if problem.dtype_name == "float64" else 4


def _say(text: str) -> None:
    """A line for the user, from one process."""
    if distributed.first():
        tqdm.write(text, file=sys.stderr)


def _size(size: float) -> str:
    """Bytes in a unit that suits."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
