"""What statistics of full checkpoints are of: models and every setting that changes them.

A model's hash covers names, dtypes, shapes, and of every tensor some blocks of bytes, evenly spaced: reading billions
of weights to compare two files would cost as much as merging them. Two models that differ in no block, as after an edit
of single entries, have the same hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from ..data import TokenSequence
from ..settings import FisherParameters
from .models import OWNERS, UTILITY, Models

_BLOCKS = 16  # of a tensor
_BYTES = 4096  # of a block


def fingerprint(models: Models, parameters: FisherParameters) -> dict[str, Any]:
    """The fingerprint of diagonal Fishers of full checkpoints.

    Args:
        models: The three checkpoints; `local` Fishers are of the utility model alone.
        parameters: Patch, points, samples and seed.

    Returns:
        Nested mappings of JSON values.
    """
    config, is_local = models.config, parameters.where == "local"
    tree = {
        "models": {owner: hash_model(models, owner) for owner in ((UTILITY,) if is_local else OWNERS)},
        "weights": [config.utility.weight] if is_local else [config.utility.weight, config.safety.weight],
        "points": [list(pair) for pair in zip(*parameters.weighted_points, strict=True)],
    }
    return tree if is_local else {**tree, "patch": parameters.patch}


def hash_model(models: Models, owner: str) -> str:
    """Hexadecimal digits of a model's hash.

    Args:
        models: The three checkpoints.
        owner: "base", "utility" or "safety".

    Returns:
        SHA-256, its first half.
    """
    digest, places, files = hashlib.sha256(), models.of[owner].places, models.files[owner]
    for name in sorted(models.names):
        place = places[name]
        digest.update(f"{name} {place.dtype} {place.shape}\n".encode())
        last = max(place.nbytes - _BYTES, 0)
        for start in sorted({last * i // (_BLOCKS - 1) for i in range(_BLOCKS)}):
            digest.update(files.read_bytes(name, start, min(start + _BYTES, place.nbytes)))
    return digest.hexdigest()[:32]


def hash_sequences(sequences: Sequence[TokenSequence]) -> str:
    """Hexadecimal digits of the hash of sequences' tokens, targets and weights, in order."""
    said = json.dumps([[s.input_ids, s.is_target, s.weight] for s in sequences])
    return hashlib.sha256(said.encode()).hexdigest()[:32]
