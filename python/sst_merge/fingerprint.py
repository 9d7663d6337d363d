"""What statistics are of: hashes of models and data, and every setting that changes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .adapters import Adapter
from .base import local_folder, weight_map
from .data import TokenSequence
from .mixture import part_name
from .settings import KINDS, FisherParameters

if TYPE_CHECKING:
    from .problem import Problem

_FORMAT = 2
_BLOCK = 1 << 22  # bytes read at once
_DIGITS = 16  # of the hash of a sequence: 64 bits


def fingerprint(problem: Problem, parameters: FisherParameters) -> dict[str, Any]:
    """The fingerprint of a collection.

    Args:
        problem: Models, and data if it has any.
        parameters: Patch, points, samples, seed, and which Fishers in which coordinates.

    Returns:
        Nested mappings of JSON values.

    Cost: reads the base model's weights once.
    """
    config = problem.config
    coordinates, kept = parameters.collected
    tree = {
        "format": _FORMAT,
        "normalisation": "sequence",
        "representation": kept[0] if kept[0] == kept[1] else dict(zip(KINDS, kept, strict=True)),
        "coordinates": coordinates,
        "models": _models(problem),
        "dtype": problem.dtype_name,
        "quantization": config.quantization,
        "patch": parameters.patch,
        "points": [list(pair) for pair in zip(*parameters.weighted_points, strict=True)],
        "samples": parameters.samples,
        "seed": parameters.seed,
    }
    calibration = config.calibration
    if calibration is not None:
        tree["batches"] = {"batch_size": calibration.batch_size, "packing": calibration.packing}
        tree["data"] = {
            part_name(f"{kind}{held}", task.name): [_hash_sequence(s) for s in part]
            for kind, tasks in problem.tasks.items()
            for task in tasks
            for held, part in (("", task.found), ("_held", task.held))
        }
    return tree


def hash_prompts(problem: Problem, role: str, prompts: Sequence[TokenSequence]) -> str:
    """What the answers to prompts depend on: model, prompts, and how long an answer may be.

    Args:
        problem: The models.
        role: Who answers.
        prompts: Tokenised.

    Returns:
        Hexadecimal digits.
    """
    config = problem.config
    said = [_models(problem)["base"], _hash_adapter(getattr(problem, role)), problem.dtype_name, config.quantization]
    said += [config.calibration.max_new_tokens, [_hash_sequence(s, weighted=False) for s in prompts]]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:_DIGITS]


def hash_cores(*groups: Mapping[str, Tensor]) -> str:
    """Hash of cores, bit by bit.

    Args:
        groups: Module name -> core.

    Returns:
        Hexadecimal digits.
    """
    digest = hashlib.sha256()
    for cores in groups:
        for name, core in cores.items():
            digest.update(f"{name} {tuple(core.shape)} {core.dtype}\n".encode())
            digest.update(_bytes(core))
    return digest.hexdigest()[:_DIGITS]


def _models(problem: Problem) -> dict[str, str]:
    """Hashes of base and adapters."""
    return {
        "base": _hash_files(_weights_of_base(problem)),
        "utility": _hash_adapter(problem.utility),
        "safety": _hash_adapter(problem.safety),
    }


def _weights_of_base(problem: Problem) -> list[Path]:
    """Configuration and weights of the base model."""
    folder = local_folder(problem.config)
    return [folder / name for name in ("config.json", *set(weight_map(folder).values()))]


def _hash_files(files: Iterable[Path]) -> str:
    """SHA-256 of contents."""
    return _hash_known(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)))


@lru_cache(maxsize=8)
def _hash_known(files: tuple[tuple[Path, int, int], ...]) -> str:
    """`_hash_files` of files as they are at a time: a base is read once."""
    digest = hashlib.sha256()
    for path, size, _ in files:
        digest.update(f"{size}\n".encode())
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def _hash_adapter(adapter: Adapter) -> str:
    """SHA-256 of what an adapter changes: its files may say the same in other words on another machine."""
    digest = hashlib.sha256()
    tensors = {**{f"{name} up": u.up for name, u in adapter.updates.items()}, **adapter.biases, **adapter.saved}
    tensors |= {f"{name} down": u.down for name, u in adapter.updates.items()}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor's entries."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _hash_sequence(sequence: TokenSequence, weighted: bool = True) -> str:
    """Hash of a sequence's tokens, targets and weight, if that is not 1."""
    weight = [sequence.weight] if weighted and sequence.weight != 1 else []
    said = json.dumps([sequence.input_ids, sequence.is_target, *weight])
    return hashlib.sha256(said.encode()).hexdigest()[:_DIGITS]
