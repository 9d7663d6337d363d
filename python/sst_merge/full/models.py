"""Three full checkpoints of one architecture: θ_0, θ_u and θ_s, matched tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from ..base import is_quantised, load_skeleton, local_folder, weight_map
from ..settings import ROLES, Config
from ..vocabulary import check_tokenizers, read_tokenizers
from .tensors import FLOATS, Place, Slab, TensorFiles, places_of

BASE, UTILITY, SAFETY = OWNERS = ("base", *ROLES)

_OF_LITTLE_WEIGHT = {  # keys of config.json that say nothing of what the weights mean
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "tie_word_embeddings",
}


@dataclass(frozen=True)
class Checkpoint:
    """One of the three.

    Attributes:
        owner: "base", "utility" or "safety".
        folder: Where it lies.
        places: Tensor -> place, in the order of the files. Names are those of the files without the prefix of the
            model's class: one may have it and another not.
        metadata: File -> its header's metadata.
        is_tied: Whether input and output embeddings are one tensor.
        second: Where a tied embedding is stored once more, if it is.
    """

    owner: str
    folder: Path
    places: dict[str, Place]
    metadata: dict[Path, dict[str, str]]
    is_tied: bool
    second: Place | None


class Models:
    """The three checkpoints, and what of them is merged.

    A name is merged if all three store it as floating point of 16 bits at least, and it is no buffer of the model's
    class. Whatever else the utility model stores is copied. Input and output embeddings count as one tensor where all
    three tie them; where one does not, both are merged, and stored, each for itself.

    Args:
        config: The checked configuration.

    Attributes:
        skeleton: The base model's class on the meta device.
        names: What is merged, in the order of the utility model's files.
        copied: What the utility model stores besides.
        embeddings: Names of the input and the output embedding, or None where there is no such pair.
        unties: Whether the output stores an output embedding that the utility model ties.
        remarks: What the user should know.

    Raises:
        ValueError: A model is damaged, quantised, or does not fit the others; names the tensors, and the remedy.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.remarks = config, []
        self.skeleton = load_skeleton(config)
        if config.quantization or is_quantised(self.skeleton):
            raise ValueError(
                "full checkpoints are merged in their original precision, and the base is quantised; name the models "
                "as they were before, without `quantization`"
            )
        self.embeddings = _embeddings(self.skeleton)
        folders = {BASE: local_folder(config), **{role: Path(getattr(config, role).model) for role in ROLES}}
        self.of = {owner: self._read(owner, folder) for owner, folder in folders.items()}
        self._check_names()
        self._check_shapes()
        self._check_configs()
        tokenizers, remarks = read_tokenizers(
            config.base_model,
            {role: getattr(config, role).model for role in ROLES},
            trust_remote_code=config.trust_remote_code,
            local_files_only=not config.download,
        )
        self.tokenizers = tokenizers
        self.remarks += remarks if tokenizers else []
        if tokenizers:
            self.remarks += check_tokenizers(tokenizers, next(iter(tokenizers)))
        self.files = {owner: TensorFiles(checkpoint.places) for owner, checkpoint in self.of.items()}

    def _read(self, owner: str, folder: Path) -> Checkpoint:
        """One checkpoint: its tensors, with tied embeddings under one name."""
        prefix = f"{self.skeleton.base_model_prefix}."
        places, metadata = {}, {}
        try:
            shards = weight_map(folder)
            for shard in sorted(set(shards.values())):
                found, metadata[folder / shard] = places_of(folder / shard)
                places |= {place.key.removeprefix(prefix): place for place in found if shards.get(place.key) == shard}
            if lacking := shards.keys() - {place.key for place in places.values()}:
                raise ValueError(f"the index names tensors that its files lack: {_some(lacking)}")
            tied = AutoConfig.from_pretrained(folder, trust_remote_code=self.config.trust_remote_code)
        except (OSError, ValueError) as error:
            raise ValueError(f"{owner}: {str(error).removeprefix('base_model: ')}") from None
        return Checkpoint(
            owner, folder, places, metadata, *self._unite(places, tied.get_text_config().tie_word_embeddings)
        )

    def _unite(self, places: dict[str, Place], says_tied: bool) -> tuple[bool, Place | None]:
        """Whether the embeddings are one tensor, which then has the input embedding's name alone; its second place."""
        if self.embeddings is None or not says_tied:
            return False, None
        ours, head = self.embeddings
        if ours in places and head in places:
            is_tied = _equal_bytes(places, ours, head)  # otherwise transformers does not tie them
            return is_tied, places.pop(head) if is_tied else None
        if head in places:
            places[ours] = places.pop(head)
        return True, None

    def _check_names(self) -> None:
        """What is merged and what is copied; ValueError if a model lacks a tensor."""
        utility = self.of[UTILITY].places
        buffers = {name for name, _ in self.skeleton.named_buffers()}
        buffers |= {name.removeprefix(f"{self.skeleton.base_model_prefix}.") for name in buffers}
        merged = {
            owner: {name for name, place in c.places.items() if name not in buffers and place.dtype in FLOATS}
            for owner, c in self.of.items()
        }
        short = {name for name, place in utility.items() if place.dtype.startswith("F8") or place.dtype == "F4"}
        if short:
            raise ValueError(
                f"utility: {_some(short)} are stored in {utility[min(short)].dtype}, which nothing can be added to; "
                "give the model in its original precision"
            )
        tied = [c for c in self.of.values() if c.is_tied]
        if 0 < len(tied) < len(OWNERS):
            ours, head = self.embeddings
            for c in tied:
                c.places[head] = c.second or replace(c.places[ours], key=self._head_key())
                merged[c.owner].add(head)
        union = set().union(*merged.values())
        for owner, names in merged.items():
            if lacking := union - names:
                others = [other for other in OWNERS if merged[other] >= lacking]
                raise ValueError(
                    f"{owner}: {self.of[owner].folder} lacks {_some(lacking)}, which "
                    f"{' and '.join(others) or 'the others'} "
                    "have (or stores it in no floating-point dtype); name three checkpoints of one architecture"
                )
        ordered = sorted(utility.items(), key=lambda item: (item[1].file, item[1].offset))
        self.names = tuple(name for name, _ in ordered if name in union)
        self.copied = tuple(name for name, _ in ordered if name not in union)
        self.unties = len(tied) < len(OWNERS) and self.of[UTILITY].is_tied
        if self.unties:
            self.remarks.append(
                f"{self.embeddings[1]} is stored for itself, and tie_word_embeddings is false: not all three tie it"
            )

    def _head_key(self) -> str:
        """The output embedding's name, as the model's class has it."""
        end = self.skeleton.get_output_embeddings()
        return next(f"{name}.weight" for name, module in self.skeleton.named_modules() if module is end)

    def _check_shapes(self) -> None:
        """ValueError if a tensor has different shapes."""
        first = [name for name in self.embeddings or () if name in self.names]
        for name in (*first, *self.names):
            shapes = {owner: c.places[name].shape for owner, c in self.of.items()}
            if len(set(shapes.values())) == 1:
                continue
            given = ", ".join(f"{' × '.join(map(str, shape))} in {owner}" for owner, shape in shapes.items())
            if self.embeddings is not None and name in self.embeddings:
                sizes = ", ".join(f"{shape[0]} in {owner}" for owner, shape in shapes.items())
                raise ValueError(
                    f"vocabulary: {name} has a row for every token: {sizes}; rows stand for other tokens or for none. "
                    "Bring the models to one tokenizer and one size first: where tokens were only added at the end, "
                    "model.resize_token_embeddings(N) with the largest N, then save_pretrained; otherwise train on the "
                    "base's own tokenizer"
                )
            raise ValueError(f"{name} is {given}; name three checkpoints of one architecture and size")

    def _check_configs(self) -> None:
        """A remark for every key of config.json that says the models compute differently."""
        trees = {
            owner: json.loads((c.folder / "config.json").read_text(encoding="utf-8")) for owner, c in self.of.items()
        }
        for key in sorted(set().union(*trees.values()) - _OF_LITTLE_WEIGHT):
            values = {owner: tree.get(key) for owner, tree in trees.items()}
            if any(value != values[UTILITY] for value in values.values()):
                said = ", ".join(f"{value!r} in {owner}" for owner, value in values.items())
                self.remarks.append(f"config.json: {key} is {said}; the output has the utility model's")

    @cached_property
    def dtype(self) -> torch.dtype:
        """In which the merge is computed: float32, or float64 if a merged tensor is stored so."""
        doubles = (c.places[name].dtype == "F64" for c in self.of.values() for name in self.names)
        return torch.float64 if any(doubles) else torch.float32

    def check_finite(self, slab: Slab) -> None:
        """Look for weights that are no numbers.

        Args:
            slab: Where to look.

        Raises:
            ValueError: There are some; names model and tensor.
        """
        for owner in OWNERS:
            if not torch.isfinite(self.files[owner].read(slab)).all():
                raise ValueError(
                    f"{owner}: {slab.name} holds NaN or infinite weights: the training diverged, or the file is "
                    "damaged; give a sound model"
                )

    def needed(self, owners: Iterable[str]) -> tuple[str, ...]:
        """What must be read for some of the three: θ_0 too, where a weight is not 1."""
        wanted = set(owners)
        if any(getattr(self.config, owner).weight != 1.0 for owner in wanted - {BASE}):
            wanted.add(BASE)
        return tuple(sorted(wanted))

    def weighted(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """θ_0, θ_u and θ_s as the configuration weighs them, θ_0 + w(θ − θ_0), in `dtype`.

        Args:
            stored: Owner -> what `files[owner]` reads, for all that are `needed`.

        Returns:
            The same owners.
        """
        wide = {owner: values.to(self.dtype) for owner, values in stored.items()}
        for owner in wide.keys() - {BASE}:
            weight = getattr(self.config, owner).weight
            if weight != 1.0:
                wide[owner] = torch.lerp(wide[BASE], wide[owner], weight)
        return wide


def _embeddings(model: nn.Module) -> tuple[str, str] | None:
    """Names of the weights of input and output embedding, without the class's prefix."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    if any(end is None or id(end) not in names for end in ends):
        return None
    return tuple(names[id(end)].removeprefix(f"{model.base_model_prefix}.") for end in ends)


def _equal_bytes(places: Mapping[str, Place], first: str, second: str) -> bool:
    """Whether two tensors are stored as the same bytes."""
    one, other = places[first], places[second]
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    files, step = TensorFiles(places), 1 << 24
    return all(
        files.read_bytes(first, i, min(i + step, one.nbytes)) == files.read_bytes(second, i, min(i + step, one.nbytes))
        for i in range(0, one.nbytes, step)
    )


def _some(names: Any) -> str:
    """The first three of some names."""
    first = sorted(names)
    return ", ".join(first[:3]) + (f" and {len(first) - 3} more" if len(first) > 3 else "")
