"""Measured rows, kept as they are made: a file of JSON lines for each replicate and variant, found again by its key."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import sst_kernels

from .outcome import Outcome


class Journal:
    """The rows of one variant on one replicate; what an earlier run had measured is there already.

    Args:
        folder: Where the files lie; made at the first row.
        key: What the rows depend on: nested mappings of JSON values.

    Attributes:
        rows: α -> row.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:24]
        self.path = folder / f"{digest}.jsonl"
        self.rows: dict[float, dict[str, Any]] = {}
        if self.path.is_file():
            text = self.path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]  # a killed run may have left half a line
            if whole != text:
                self.path.write_text(whole, encoding="utf-8")
            for line in whole.splitlines():
                row = json.loads(line)
                row["outcomes"] = {name: Outcome.from_json(o) for name, o in row["outcomes"].items()}
                self.rows[row["alpha"]] = row

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row, on disk before it returns.

        Args:
            row: JSON values, with "alpha" and with "outcomes", name -> `Outcome`.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        record = {**row, "outcomes": {name: outcome.as_json() for name, outcome in row["outcomes"].items()}}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows[row["alpha"]] = row


@lru_cache(maxsize=1)
def code_fingerprint() -> str:
    """Hash of every Python file of both packages, and torch's version."""
    digest = hashlib.sha256(torch.__version__.encode())
    for package in (Path(__file__).parents[1], Path(sst_kernels.__file__).parent):
        for path in sorted(package.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def file_digest(path: str | Path) -> str:
    """Hash of a file's content."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
