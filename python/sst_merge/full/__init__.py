"""Merges of full checkpoints, streamed: fully fine-tuned models without adapters, tensor by tensor."""

from __future__ import annotations

from .checks import are_full
from .merging import FullMergeResult, collect_full, merge_full

__all__ = ["FullMergeResult", "are_full", "collect_full", "merge_full"]
