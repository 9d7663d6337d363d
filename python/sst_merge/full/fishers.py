"""Diagonal Fishers of a full checkpoint on disk: harm.safetensors and benign.safetensors in a folder, checked.

Tensors are named as the checkpoint's parameters and hold the mean over sequences of squared gradients. The metadata
`sst_merge` is JSON: normalisation, count (of sequences), sum (of all entries), and the fingerprint of what was
measured. Files made elsewhere may lack it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .models import Models
from .tensors import FLOATS, Place, Slab, TensorFiles, places_of

KINDS = ("harm", "benign")
METADATA_KEY = "sst_merge"
FINGERPRINT_NAME = "fisher.json"  # of Kronecker factors, beside them
NORMALISATION = "sequence"

_COLLECT = "collect them again: sst-merge fisher CONFIG --out DIR"


def fisher_file(folder: str | Path, kind: str) -> Path:
    """Where the Fisher of a kind lies in a folder."""
    return Path(folder, f"{kind}.safetensors")


@dataclass(frozen=True)
class FisherFile:
    """A diagonal Fisher on disk, checked.

    Attributes:
        tensors: Its tensors, by the names of what is merged.
        count: Number of sequences, where the file says so.
        total: Σ of all entries, where the file says so and holds no others.
        is_signed: Whether the file says what it is of.
    """

    tensors: TensorFiles
    count: float | None = None
    total: float | None = None
    is_signed: bool = True


def check_fishers(models: Models, file: Path, fingerprint: Mapping[str, Any]) -> FisherFile:
    """A diagonal Fisher of all tensors that are merged.

    Args:
        models: What is merged.
        file: A safetensors file.
        fingerprint: What it is to be of; keys that the file does not mention are not compared.

    Returns:
        The file.

    Raises:
        ValueError: It is missing, damaged, or of another model, normalisation or data; with the remedy.
    """
    if not file.is_file():
        raise ValueError(f"Fisher folder: {file} does not exist; {_COLLECT}")
    places, metadata = places_of(file)
    tensors = TensorFiles(_matched(models, places, file, metadata))
    if METADATA_KEY not in metadata:
        return FisherFile(tensors, is_signed=False)
    try:
        said = dict(json.loads(metadata[METADATA_KEY]))
    except (TypeError, ValueError):
        raise ValueError(f"Fisher folder: {file} has damaged metadata; {_COLLECT}") from None
    if said.get("normalisation", NORMALISATION) != NORMALISATION:
        raise ValueError(
            f"Fisher folder: {file} is a mean per {said['normalisation']}, and both must be per {NORMALISATION}; "
            f"{_COLLECT}"
        )
    count, total = said.get("count"), said.get("sum")
    if count is not None and not count > 0:
        raise ValueError(f"Fisher folder: {file} is a mean over {count} sequences; {_COLLECT}")
    refuse_other_run(file, said.get("fingerprint", {}), fingerprint)
    covers_more = len(places) > len(models.names)  # then its sum is of other entries too
    return FisherFile(tensors, count, None if covers_more or not isinstance(total, float) else total)


class DiagonalFishers:
    """Diagonals of F_harm and F_benign of all tensors that are merged.

    Args:
        models: What is merged.
        folder: With both files.
        fingerprint: As for `check_fishers`.

    Attributes:
        counts: Kind -> number of sequences, where the file says so.
        sums: Kind -> Σ of all entries, where the file says so.
        remarks: What could not be checked.

    Raises:
        ValueError: As for `check_fishers`.
    """

    def __init__(self, models: Models, folder: str | Path, fingerprint: Mapping[str, Any]) -> None:
        found = {kind: check_fishers(models, fisher_file(folder, kind), fingerprint) for kind in KINDS}
        self._files = {kind: file.tensors for kind, file in found.items()}
        self.counts = {kind: file.count for kind, file in found.items() if file.count is not None}
        self.sums = {kind: file.total for kind, file in found.items() if file.total is not None}
        self.remarks = [
            f"{kind}.safetensors does not say what it is of: whether it belongs to these models was not checked"
            for kind, file in found.items()
            if not file.is_signed
        ]

    def stored(self, kind: str, slab: Slab) -> Tensor:
        """A slab of a diagonal as it is stored, 1-D."""
        return self._files[kind].read(slab)


def checked(kind: str, name: str, values: Tensor) -> Tensor:
    """Entries of a diagonal Fisher in float32.

    Args:
        kind: "harm" or "benign".
        name: The tensor's.
        values: As they are stored.

    Returns:
        The entries.

    Raises:
        ValueError: One is negative, infinite or NaN; names the tensor.
    """
    values = values.float()
    low, high = (float(x) for x in values.aminmax())
    if not (low >= 0 and high < math.inf):  # NaN is neither
        raise ValueError(
            f"Fisher folder: {kind} of {name} holds entries that are negative, infinite or NaN, and a mean of squares "
            f"does not; {_COLLECT}, with --dtype float32 if the model overflows"
        )
    return values


def _matched(models: Models, places: list[Place], file: Path, metadata: Mapping[str, str]) -> dict[str, Place]:
    """Name -> place, with the prefix of the model's class or without; ValueError for what is missing or misshapen."""
    if "sst_kernels.factors" in metadata:
        raise ValueError(
            f"Fisher folder: {file} holds Kronecker factors; they are for merge_method: sst with fisher: kfac"
        )
    prefix = f"{models.skeleton.base_model_prefix}."
    found = {place.key.removeprefix(prefix): place for place in places}
    wanted = models.of["utility"].places
    missing = [name for name in models.names if name not in found]
    if missing:
        raise ValueError(
            f"Fisher folder: {file} lacks {len(missing)} of {len(models.names)} tensors, first {missing[0]!r}; tensors "
            f"are named as the checkpoint's; {_COLLECT}"
        )
    for name in models.names:
        if found[name].shape != wanted[name].shape or found[name].dtype not in FLOATS:
            raise ValueError(
                f"Fisher folder: {file} has {name} as {found[name].dtype} {found[name].shape}, the model's is "
                f"{wanted[name].shape}; {_COLLECT}"
            )
    return {name: found[name] for name in models.names}


def refuse_other_run(file: Path, said: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Compare fingerprints, as far as both speak of the same.

    Args:
        file: That is spoken of.
        said: Its fingerprint.
        wanted: What it is to be of.

    Raises:
        ValueError: They differ; names the differences.
    """
    if differing := _differences(said, wanted):
        raise ValueError(f"Fisher folder: {file} is of another run: {'; '.join(differing)}; {_COLLECT}")


def _differences(said: Mapping[str, Any], wanted: Mapping[str, Any], path: str = "") -> list[str]:
    """Keys that both have with different values."""
    found = []
    for key in said.keys() & wanted.keys():
        name = f"{path}{key}"
        if isinstance(said[key], dict) and isinstance(wanted[key], dict):
            found += _differences(said[key], wanted[key], f"{name}.")
        elif said[key] != wanted[key]:
            found.append(f"{name} is {_short(said[key])} there and {_short(wanted[key])} here")
    return sorted(found)


def _short(value: Any) -> str:
    """A value in at most some forty characters."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
