"""The merged checkpoint of one strength: the utility model's files, shards and dtypes, with other numbers in them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from ..base import INDEX_NAME
from ..checkpoint import copy_beside, write_model_config
from ..vocabulary import has_tokenizer
from .models import BASE, UTILITY, Models
from .tensors import Place
from .writer import Entry, ShardWriter

_CHUNK = 1 << 24  # bytes copied at once


class Output:
    """A checkpoint that is being written; a context manager that makes its files, and flushes them to disk at the end.

    Args:
        models: What is merged.
        folder: Existing and empty of weights; files are added.
        names: What will be written; every other tensor is copied from the utility model.
    """

    def __init__(self, models: Models, folder: Path, names: Iterable[str]) -> None:
        self.models, self.folder, self._names = models, folder, set(names)
        utility = models.of[UTILITY]
        self._places: dict[str, list[Place]] = {name: [place] for name, place in utility.places.items()}
        if utility.second is not None and not models.unties:
            self._places[models.embeddings[0]].append(utility.second)
        self._shards: dict[Path, ShardWriter] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Output:
        utility, base = self.models.of[UTILITY], self.models.of[BASE]
        if not has_tokenizer(utility.folder) and has_tokenizer(base.folder):
            copy_beside(base.folder, self.folder)
        copy_beside(utility.folder, self.folder)
        write_model_config(utility.folder, self.folder, untied=self.models.unties)
        self._write_index()
        entries: dict[Path, list[Place]] = defaultdict(list)
        for places in self._places.values():
            for place in places:
                entries[place.file].append(place)
        with ExitStack() as stack:
            for file, places in entries.items():
                places.sort(key=lambda place: place.offset)
                writer = ShardWriter(
                    self.folder / file.name, [Entry.like(p) for p in places], utility.metadata[file] or {"format": "pt"}
                )
                self._shards[file] = stack.enter_context(writer)
            for name in self._places.keys() - self._names:
                self._copy(name)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.__exit__(*exc)

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Elements `start` onward of a tensor, wherever it is stored; OSError as `ShardWriter.write`."""
        for place in self._places[name]:
            self._shards[place.file].write(place.key, start, values)

    def _copy(self, name: str) -> None:
        """A tensor as the utility model stores it."""
        place, files = self.models.of[UTILITY].places[name], self.models.files[UTILITY]
        for start in range(0, place.nbytes, _CHUNK):
            data = files.read_bytes(name, start, min(start + _CHUNK, place.nbytes))
            for target in self._places[name]:
                self._shards[target.file].write_bytes(target.key, start, data)

    def _write_index(self) -> None:
        """The index of the shards, if the utility model has one, with what untying adds."""
        source = self.models.of[UTILITY].folder / INDEX_NAME
        if not source.is_file():
            return
        index = json.loads(source.read_text(encoding="utf-8"))
        for place in (place for places in self._places.values() for place in places):
            if place.key not in index["weight_map"]:
                index["weight_map"][place.key] = place.file.name
                if "total_size" in index.get("metadata", {}):
                    index["metadata"]["total_size"] += place.nbytes
        (self.folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
