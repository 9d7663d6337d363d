"""Folders of statistics added up: sequences of the same task join its sums, other tasks are put beside it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from . import atomic
from .mixture import KINDS, part_name
from .store import ANSWERS_NAME, PATCH_NAME, FisherFolder, read_fingerprint, tasks_of

_KINDS = ("harm", "benign")


def add_folders(parts: Sequence[str | Path], out: str | Path) -> None:
    """Sums over the sequences and tasks of several complete collections, as a new folder.

    A kind of data that is the same in all of them, such as one set of refusals beside several utility tasks, is taken
    once.

    Args:
        parts: Two folders or more, collected by equal models and settings from different data.
        out: The folder to write; it appears whole or not at all.

    Raises:
        ValueError: A part is incomplete, or of other models, settings or normalisation, or has data of another.
    """
    folders = [Path(part) for part in parts]
    if len(folders) < 2:
        raise ValueError(f"fisher --add: expected two folders or more, got {len(folders)}")
    if Path(out).exists():
        raise ValueError(f"fisher --add: {out} exists already; name a new folder for the sum")
    fingerprints = [read_fingerprint(folder) for folder in folders]
    sources = _sources(folders, fingerprints)
    patch = load_file(folders[0] / PATCH_NAME) if (folders[0] / PATCH_NAME).is_file() else {}
    opened = [
        FisherFolder(path, {**fingerprints[0], "data": known["data"]}, patch=patch)
        for path, known in zip(folders, fingerprints, strict=True)
    ]
    for folder in opened:
        if not folder.complete:
            raise ValueError(f"fisher --add: {folder.path} is not complete; finish it with `sst-merge fisher`")
    data: dict[str, list[str]] = {}
    for i, known in enumerate(fingerprints):
        for part, sequences in known["data"].items():
            if i in sources[part.partition("-")[0].removesuffix("_held")]:
                data[part] = data.get(part, []) + sequences
    with atomic.replace_dir(out) as fresh:
        written = FisherFolder(fresh, {**fingerprints[0], "data": data}, patch=patch)
        for field, kind in KINDS.items():
            for task in written.tasks[kind]:
                _add_part(
                    written, part_name(field, task), [opened[i] for i in sources[kind] if task in opened[i].tasks[kind]]
                )
        for file in (file for folder in folders for file in folder.glob(ANSWERS_NAME.format(kind="*", digest="*"))):
            shutil.copyfile(file, fresh / file.name)


def _add_part(written: FisherFolder, part: str, folders: Sequence[FisherFolder]) -> None:
    """One part's sum over the folders that have it."""
    sums = folders[0].load(part).sums
    for other in folders[1:]:
        sums = sums.merged(other.load(part).sums)
    written.save(part, sums)


def _sources(folders: Sequence[Path], fingerprints: Sequence[Mapping[str, Any]]) -> dict[str, range]:
    """Kind -> which of the folders are added up for it; ValueError if their data do not add up."""
    for kind in _KINDS:
        _refuse_names_beside_none(kind, folders, [tasks_of(known)[kind] for known in fingerprints])
    given = {kind: [_data_of(kind, known) for known in fingerprints] for kind in _KINDS}
    alike = [kind for kind, data in given.items() if all(other == data[0] for other in data)]
    once = alike if len(alike) < len(_KINDS) else []
    for kind in (kind for kind in _KINDS if kind not in once):
        _refuse_overlap(kind, [{s for part in data.values() for s in part} for data in given[kind]])
    return {kind: range(1 if kind in once else len(folders)) for kind in _KINDS}


def _refuse_names_beside_none(kind: str, folders: Sequence[Path], tasks: Sequence[tuple[str, ...]]) -> None:
    """ValueError if tasks of a kind have names in some folders, and its one task has none in another."""
    named = [names != ("",) for names in tasks]
    if any(named) and not all(named):
        raise ValueError(
            f"fisher --add: the tasks of {kind} have names in {folders[named.index(True)]}, and its one task has none "
            f"in {folders[named.index(False)]}; collect that again with calibration.{kind} as a list of tasks"
        )


def _data_of(kind: str, fingerprint: Mapping[str, Any]) -> dict[str, list[str]]:
    """Parts of a kind -> hashes of their sequences."""
    return {
        part: sequences
        for part, sequences in fingerprint["data"].items()
        if part.partition("-")[0] in (kind, f"{kind}_held")
    }


def _refuse_overlap(kind: str, parts: Sequence[set[str]]) -> None:
    """ValueError if two collections hold the same sequence."""
    for first, second in combinations(parts, 2):
        if common := first & second:
            raise ValueError(
                f"fisher --add: {len(common)} sequences of {kind} are in two of the folders, and would count twice"
            )
