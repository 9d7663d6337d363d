"""The tiny models, adapters and data of tests/merge; and pictures, which take seconds, for one test alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from conftest import base_dir, llama_dir, make_adapter, setup  # of tests/merge, by pytest's pythonpath

from sst_merge import heat_map, plots
from sst_merge.picture import Picture
from sst_merge.verify import figures, planted

__all__ = ["base_dir", "llama_dir", "make_adapter", "setup"]

DRAWN = "test_a_run_is_verified_and_left_as_it_was"  # the one test that looks at pictures


@pytest.fixture
def two_planted_and_no_pictures(monkeypatch, request):
    """The planted pencils have tests of their own."""
    if request.node.name != DRAWN:
        monkeypatch.setattr(Picture, "png", lambda picture: b"")
        monkeypatch.setattr(Picture, "svg", lambda picture: "<svg></svg>")
        for module in (plots, heat_map, figures):
            monkeypatch.setattr(module, "picture", lambda *given, **more: Picture(*given[:3], None))
    every = planted.pencils

    def few(rng: torch.Generator) -> Iterator[planted.Planted]:
        yield from islice(every(rng), 2)

    monkeypatch.setattr(planted, "pencils", few)
