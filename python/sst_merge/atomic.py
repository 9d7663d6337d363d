"""Output that appears whole or not at all: written beside its place, then renamed into it."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

OUTPUT_MARK = "sst_config.yaml"
"""A folder that holds this file is a merge's output; `overwrite` replaces no other kind."""


def check_output_dir(target: str | Path, *, overwrite: bool = False, mark: str = OUTPUT_MARK) -> Path:
    """The real path of a folder that may be written: new or empty, or with `overwrite` an output.

    Call it before long work, so that the answer does not come after it.

    Args:
        target: The folder to write.
        overwrite: Whether a folder that holds `mark` may be replaced.
        mark: Name of a file that every output of this kind holds.

    Returns:
        `target`, absolute, symbolic links resolved.

    Raises:
        ValueError: The path is a file, or a folder that must not be replaced.
    """
    target = Path(os.path.realpath(target))
    if not target.exists():
        return target
    if not target.is_dir():
        raise ValueError(f"output folder: {target} is a file; name a folder that is new or empty")
    if not any(target.iterdir()):
        return target
    if not overwrite:
        raise ValueError(
            f"output folder: {target} exists and is not empty; "
            "pass --overwrite (overwrite=True) to replace it, or name another"
        )
    if not (target / mark).exists():
        raise ValueError(
            f"output folder: {target} holds no {mark}, so it is not an earlier output and is not replaced; "
            "remove it yourself, or name another"
        )
    return target


@contextmanager
def replace_dir(target: str | Path, *, overwrite: bool = False, mark: str = OUTPUT_MARK) -> Iterator[Path]:
    """Give an empty folder beside `target` that takes its place when the block ends well.

    After any exception, KeyboardInterrupt included, `target` is as it was before. An old folder is
    moved aside only when the new one is complete, and removed only when the new one is in place.

    Args:
        target: The folder to write; parents are made.
        overwrite: As for `check_output_dir`.
        mark: As for `check_output_dir`.

    Yields:
        The folder to fill, on the same file system as `target`.

    Raises:
        ValueError: As for `check_output_dir`, on entry and again before the replacement.
    """
    target = check_output_dir(target, overwrite=overwrite, mark=mark)
    made = [parent for parent in target.parents if not parent.exists()]  # innermost first
    _remove_left(target)
    token = f"{os.getpid()}-{secrets.token_hex(4)}"
    fresh = target.with_name(f".{target.name}.{token}.new")
    aside = target.with_name(f".{target.name}.{token}.old")
    try:
        _make(fresh, target)
        yield fresh
        check_output_dir(target, overwrite=overwrite, mark=mark)
        if target.exists():
            target.rename(aside)
        fresh.rename(target)
    finally:
        if aside.exists() and not target.exists():  # stopped between the two renames
            aside.rename(target)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)
        if not target.exists():
            _remove_empty(made)


def _make(fresh: Path, target: Path) -> None:
    """Make the folder beside the target; OSError in words where that cannot be."""
    try:
        fresh.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
    except OSError as error:
        raise OSError(f"output folder: {target} cannot be written ({error.strerror}); name another") from None


def _remove_left(target: Path) -> None:
    """Remove what killed processes left beside a target; the names hold their numbers."""
    for left in target.parent.glob(f".{target.name}.*-*.new"):
        process = left.name.rsplit(".", 2)[1].partition("-")[0]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            shutil.rmtree(left, ignore_errors=True)


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, innermost first, as far as they are empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # somebody else's file lies in it
            return


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Give a name beside `path` for a file that takes its place, flushed to disk, when the block ends well.

    Args:
        path: The file; an existing one is replaced, its folder must exist.

    Yields:
        The name of the file to write, in the same folder.
    """
    path = Path(os.path.realpath(path))
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        yield fresh
        with open(fresh, "rb+") as file:
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Replace a file by `text` in UTF-8, whole or not at all.

    Args:
        path: The file; an existing one is replaced, its folder must exist.
        text: The whole content.
    """
    with replace_file(path) as fresh:
        fresh.write_bytes(text.encode())


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file.

    Args:
        path: The file.
        tensors: Contiguous, none sharing memory with another.
        metadata: Of the file's header.

    Raises:
        OSError: It could not be written: the disk is full, or the folder gone.
    """
    try:
        path.touch()
        mode = path.stat().st_mode  # as the user's umask has it; the library's files are their owner's alone
        save_file(dict(tensors), path, metadata=dict(metadata))
        path.chmod(mode)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written ({error}); make room, or name another folder") from None
