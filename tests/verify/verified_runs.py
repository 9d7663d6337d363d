"""Runs to be verified, and what was found."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from sst_merge.cli import main

QUICK = ["--alphas", "0.0625", "0.125", "0.25", "0.5", "--challengers", "4"]


def merged(setup, tmp_path: Path, method: str = "sst", **parameters) -> Path:
    """A finished run."""
    return merged_by(setup.config(method, **parameters), tmp_path)


def merged_by(config: dict, tmp_path: Path) -> Path:
    """A finished run of a configuration."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["merge", str(path), "--out", str(tmp_path / "run")]) == 0
    return tmp_path / "run"


def theory(run: Path) -> dict:
    return json.loads((run.parent / f"{run.name}.verify/theory.json").read_text())


def broken(tree: dict) -> set[str]:
    return {row["claim"] for row in tree["claims"] if row["passed"] is False}
