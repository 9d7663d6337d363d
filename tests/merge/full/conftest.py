"""Tiny full checkpoints: a base, and two models made of it by noise on every weight."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from trio import Trio, perturbed


@pytest.fixture
def make_trio(tmp_path: Path) -> Callable[..., Trio]:
    """Make three models from a base, sharded in files of the sizes given, and random Fishers."""

    def make(base: Path, dtype: torch.dtype = torch.float32, shards: tuple[str, str] = ("20KB", "1GB")) -> Trio:
        root = tmp_path / "trio"
        root.mkdir()
        shutil.copytree(base, root / "base")
        utility, safety = (
            perturbed(base, root / name, seed, dtype, shard)
            for seed, (name, shard) in enumerate(zip(("utility", "safety"), shards, strict=True), start=1)
        )
        trio = Trio(root, root / "base", utility, safety, root / "fisher")
        generator = torch.Generator().manual_seed(7)
        diagonals = [
            {
                name: torch.randn(t.shape, generator=generator).square() * 10 ** (i - 1)
                for i, (name, t) in enumerate(sorted(trio.tensors("utility").items()))
                for i in [i % 3]
            }
            for _ in range(2)
        ]
        trio.save_fishers(*diagonals)
        return trio

    return make


@pytest.fixture
def trio(make_trio: Callable[..., Trio], base_dir: Path) -> Trio:
    """On the tiny Llama: the utility model in shards, the safety model in one file."""
    return make_trio(base_dir)
