"""What statistics are of: hashes of models and data, and every setting that changes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import cached_file

from .adapters import Adapter
from .data import read_examples
from .settings import FisherParameters

if TYPE_CHECKING:
    from .problem import Problem

_FORMAT = 1
_BLOCK = 1 << 22  # bytes read at once
_BATCHES = ("batch_size", "packing")  # of `Calibration`: no statistic depends on them, beyond rounding
_FILES = ("harm", "benign")  # of `Calibration`: hashed


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
    coordinates, representation = parameters.collected
    tree = {
        "format": _FORMAT,
        "normalisation": "sequence",
        "representation": representation,
        "coordinates": coordinates,
        "models": {
            "base": _hash_files(_weights_of_base(problem)),
            "utility": _hash_adapter(problem.utility),
            "safety": _hash_adapter(problem.safety),
        },
        "dtype": problem.dtype_name,
        "quantization": config.quantization,
        "patch": parameters.patch,
        "points": [list(pair) for pair in zip(*parameters.weighted_points, strict=True)],
        "samples": parameters.samples,
        "seed": parameters.seed,
    }
    calibration = config.calibration
    if calibration is not None:
        settings = asdict(calibration)
        tree["tokenizer"] = _hash_tokenizer(problem.tokenizer)
        tree["data"] = {kind: [_hash_examples(kind, settings.pop(kind))] for kind in _FILES}
        tree["batches"] = {key: settings.pop(key) for key in _BATCHES}
        tree["calibration"] = settings
    return tree


def _weights_of_base(problem: Problem) -> list[Path]:
    """Configuration and weights of the base model."""
    config = problem.config
    file = cached_file(config.base_model, "config.json", local_files_only=not config.download)
    return [Path(file), *Path(file).parent.glob("*.safetensors")]


def _hash_files(files: Iterable[Path]) -> str:
    """SHA-256 of contents."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.stat().st_size}\n".encode())
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
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _hash_examples(kind: str, path: str) -> str:
    """SHA-256 of the examples in a calibration file, however they are spaced."""
    try:
        examples = read_examples(path)
    except ValueError as error:
        raise ValueError(f"calibration.{kind} ({path}): {error}") from None
    said = [(e.messages, e.pieces, e.tokens) for e in examples]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _hash_tokenizer(tokenizer: Any) -> str:
    """SHA-256 of vocabulary, special tokens and chat template."""
    described = [sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(described, default=str).encode()).hexdigest()
