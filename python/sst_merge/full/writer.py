"""Safetensors files written slab by slab: the header first, then every tensor's bytes at its place."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .tensors import Place

_ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """A tensor of a file that is to be written.

    Attributes:
        key: Its name.
        dtype: As safetensors writes it.
        shape: Its shape.
        nbytes: Its size.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def like(cls, place: Place, key: str | None = None) -> Entry:
        """An entry of a stored tensor's dtype and shape."""
        return cls(place.key if key is None else key, place.dtype, place.shape, place.nbytes)


class ShardWriter:
    """One safetensors file; a context manager that flushes it to disk at the end.

    Args:
        path: The file; it must not exist.
        entries: Its tensors, in the order in which they will lie.
        metadata: Of its header.

    Raises:
        OSError: It cannot be written, with the remedy.
    """

    def __init__(self, path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> None:
        self.path = path
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for entry in entries:
            header[entry.key] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [end, end + entry.nbytes],
            }
            end += entry.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._start = {key: 8 + len(text) + e["data_offsets"][0] for key, e in header.items() if key[:2] != "__"}
        self._file = FileIO(path, "x")
        self._at(0, struct.pack("<Q", len(text)) + text)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type | None, *exc: object) -> None:
        try:
            if kind is None:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise _in_words(self.path, error) from None
        finally:
            self._file.close()

    def write(self, key: str, start: int, values: Tensor) -> None:
        """Elements `start` onward of a tensor.

        Args:
            key: Of the tensor.
            start: First element.
            values: (m,), contiguous, of the tensor's dtype.

        Raises:
            OSError: The disk is full, …, with the remedy.
        """
        self._at(self._start[key] + start * values.element_size(), values.view(torch.uint8).numpy())

    def write_bytes(self, key: str, start: int, data: bytes | bytearray) -> None:
        """Bytes `start` onward of a tensor; OSError as `write`."""
        self._at(self._start[key] + start, data)

    def _at(self, offset: int, data: Any) -> None:
        """All of the data, at an offset of the file."""
        view = memoryview(data).cast("B")
        try:
            self._file.seek(offset)
            while len(view):
                view = view[self._file.write(view) :]
        except OSError as error:
            raise _in_words(self.path, error) from None


def _in_words(path: Path, error: OSError) -> OSError:
    """The error with a remedy."""
    reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
    return OSError(f"{path.name} could not be written ({reason}); make room, or name another folder")
