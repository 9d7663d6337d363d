"""Names of the files that a part of the statistics lies in while it is not, or not to be, one file.

A part collected in groups of modules stays in as many files, `harm.group0of3.safetensors`, …; what several processes
have summed of a part, or of a group, lies in `harm.rank0of2.safetensors`, … until all of it is there.
"""

from __future__ import annotations

import re
from pathlib import Path

_GROUP = "group{i}of{count}"
_SHARE = "rank{rank}of{world}"

PIECES = (f"*.{_GROUP.format(i='*', count='*')}.safetensors", f"*.{_SHARE.format(rank='*', world='*')}.safetensors")
"""Patterns of such files."""


def pieces(part: str, count: int) -> list[str]:
    """What the sums of the groups of a part are called; the part itself where there is one group."""
    return [part] if count == 1 else [f"{part}.{_GROUP.format(i=i, count=count)}" for i in range(count)]


def begun_pieces(folder: Path, part: str) -> list[str]:
    """The names of all groups of a part that was begun in groups; none where it has a file of its own."""
    if (folder / f"{part}.safetensors").is_file():
        return []
    group = re.compile(re.escape(part) + r"\.group\d+of(\d+)\.(rank\d+of\d+\.)?safetensors")
    found = next(filter(None, (group.fullmatch(file.name) for file in folder.glob(f"{part}.group*"))), None)
    return [] if found is None else pieces(part, int(found[1]))


def share(part: str, rank: int, world: int) -> str:
    """What one process' share of a part is called."""
    return f"{part}.{_SHARE.format(rank=rank, world=world)}"


def shares(folder: Path, part: str) -> list[str]:
    """The names of the shares of a part that are there."""
    return sorted(file.stem for file in folder.glob(f"{part}.{_SHARE.format(rank='*', world='*')}.safetensors"))


def drop_shares(folder: Path, part: str) -> None:
    """Remove them: they are in the part's file now."""
    for name in shares(folder, part):
        (folder / f"{name}.safetensors").unlink()
