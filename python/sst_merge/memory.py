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
    gradients = _gradients(problem)
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
        "Fisher sums": _width(problem) * entries,
        "directions": solved,
        "cores": 7 * 8 * sum(n),
    }


def _gradients(problem: Problem) -> dict[str, list[int]]:
    """Keys "harm" and "benign" -> how many gradients are summed over in each part."""
    parameters = problem.config.parameters
    points = len(parameters.weighted_points[0])
    return {
        kind: [
            points * (parameters.samples if kind == "benign" else 1) * len(part)
            for task in tasks
            for part in (task.found, task.held)
        ]
        for kind, tasks in problem.tasks.items()
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


def plan_memory(
    problem: Problem, bases: Mapping[str, CoreBasis], representations: tuple[str, str], coordinates: str
) -> int:
    """Print the estimate; the number of groups of modules whose statistics are collected one after another.

    Sums are kept until they are used where all fit. Otherwise those of a part that is done are left in the folder of
    statistics, whose files the CPU maps as they are needed, and modules are collected in the fewest groups, each by its
    own passes over the data, that fit beside the model.

    Args:
        problem: The merge problem.
        bases: Modules whose Fishers are collected.
        representations: Of the Fishers of harmful and of benign data; see `sums.FisherSums`.
        coordinates: "core", "weight" or "factor"; only in the first is anything solved.

    Returns:
        Groups, as `partition` makes them by numbers of coordinates; 0 where everything fits at once.

    Raises:
        ValueError: Not even one module at a time fits in what is available or in `memory`; says what would help.
    """
    config = problem.config
    estimate = estimate_memory(problem, bases, representations, coordinates)
    total, limit = sum(estimate.values()), min(available_memory(config.device), config.memory_bytes)
    limit = min(distributed.gather_objects(limit))  # every process makes the same groups
    parts = ", ".join(f"{use} {_size(size)}" for use, size in estimate.items())
    where = f"{_size(limit)} {'available' if limit < config.memory_bytes else 'allowed'} on {config.device}"
    _say(f"memory: about {_size(total)} of {where} ({parts})")
    if total <= limit:
        return 0
    names, rows = list(bases), {kind: max(counts) for kind, counts in _gradients(problem).items()}
    kept = dict(zip(KINDS, representations, strict=True))
    sizes = {
        name: _width(problem) * max(_entries(kept[kind], [basis.core_shape], rows[kind]) for kind in KINDS)
        for name, basis in bases.items()
    }
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
        "Fisher sums": "use `fisher: kfac` or `diagonal`, or adapters of lower rank",
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
