"""Tensors in safetensors files, read in slabs: no file is mapped, so what is resident is what was asked for."""

from __future__ import annotations

import json
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Stored dtypes that are merged; the others are copied."""

SLAB = 1 << 20
"""Elements read at once: 4 MB of float32, so that a chain of operations stays in the caches."""

_AHEAD = 3  # slabs read before they are wanted
_READERS = 2  # threads; reading releases the interpreter's lock

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where a tensor lies.

    Attributes:
        key: Its name in the file.
        file: The file.
        offset: Of its first byte in the file.
        nbytes: Its size.
        dtype: As safetensors writes it: "F32", "BF16", "I64", …
        shape: Its shape.
    """

    key: str
    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Slab:
    """A run of a tensor's elements, row-major.

    Attributes:
        name: Of the tensor.
        start: First element.
        stop: The one after the last.
    """

    name: str
    start: int
    stop: int


def places_of(file: Path) -> tuple[list[Place], dict[str, str]]:
    """Where every tensor of a file lies, in the file's order, and the file's metadata.

    The library checks the header (sizes, no holes, no overlap); the offsets are read from it.

    Args:
        file: A safetensors file.

    Returns:
        Places by rising offset, and the metadata.

    Raises:
        ValueError: The file is damaged, or no safetensors.
    """
    try:
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or no safetensors file ({error}); fetch or save it again") from None
    with open(file, "rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    metadata = header.pop("__metadata__", None) or {}
    places = [
        Place(key, file, 8 + length + begin, end - begin, entry["dtype"], tuple(entry["shape"]))
        for key, entry in header.items()
        for begin, end in (entry["data_offsets"],)
    ]
    return sorted(places, key=lambda place: (place.offset, place.nbytes)), metadata


class TensorFiles:
    """Tensors by name, wherever they lie.

    Args:
        places: Name -> place.
    """

    def __init__(self, places: Mapping[str, Place]) -> None:
        self.places = dict(places)

    def read(self, slab: Slab) -> Tensor:
        """The elements of a slab, in memory of their own.

        Args:
            slab: Of a tensor whose dtype is one of `FLOATS`.

        Returns:
            1-D, in the stored dtype.

        Raises:
            OSError: The file ends early.
        """
        place = self.places[slab.name]
        values = torch.empty(slab.stop - slab.start, dtype=FLOATS[place.dtype])
        size = values.element_size()
        self._fill(place, slab.start * size, values.view(torch.uint8).numpy())
        return values

    def read_bytes(self, name: str, start: int, stop: int) -> bytearray:
        """Some bytes of a tensor of any dtype.

        Args:
            name: Of the tensor.
            start: First byte.
            stop: The one after the last.

        Returns:
            The bytes.

        Raises:
            OSError: The file ends early.
        """
        buffer = bytearray(stop - start)
        self._fill(self.places[name], start, buffer)
        return buffer

    def _fill(self, place: Place, start: int, buffer: object) -> None:
        """Read from byte `start` of a tensor into a buffer, through a file object of its own: threads read."""
        view = memoryview(buffer).cast("B")
        with FileIO(place.file, "rb") as file:
            file.seek(place.offset + start)
            while len(view):
                count = file.readinto(view)
                if not count:
                    raise OSError(f"{place.file} ends within {place.key}; fetch or save it again")
                view = view[count:]


def slabs(names: Iterable[str], places: Mapping[str, Place], size: int = 0) -> Iterator[Slab]:
    """The slabs of some tensors, one tensor after another; of `SLAB` elements, but for each tensor's last."""
    size = size or SLAB
    for name in names:
        count = places[name].numel
        for start in range(0, count, size):
            yield Slab(name, start, min(start + size, count))


def read_ahead(items: Sequence[Slab], read: Callable[[Slab], T]) -> Iterator[tuple[Slab, T]]:
    """(slab, read(slab)) in order, the next ones being read by threads meanwhile.

    Args:
        items: Slabs.
        read: Called from threads, for several slabs at once.

    Yields:
        Every slab with what was read.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        waiting: deque = deque()
        try:
            for slab in items:
                waiting.append((slab, pool.submit(read, slab)))
                if len(waiting) > _AHEAD:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()
