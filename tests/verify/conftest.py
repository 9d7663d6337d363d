"""The tiny models, adapters and data of tests/merge."""

from __future__ import annotations

from conftest import base_dir, llama_dir, make_adapter, setup  # of tests/merge, by pytest's pythonpath

__all__ = ["base_dir", "llama_dir", "make_adapter", "setup"]
