"""Merge language-model adapters by Fisher curvature (SST: Safety Subspace Task-Merge)."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Adapter": "adapters",
    "LowRank": "adapters",
    "Config": "settings",
    "MergeResult": "merging",
    "apply_sst": "apply",
    "inspect_adapter": "adapters",
    "load_config": "config",
    "merge": "merging",
    "read_adapter": "adapters",
    "write_adapter": "adapters",
}
"""Public names and the submodules that hold them, imported on first use: a quick command line."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import the submodule that holds `name`."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    """Public names, imported or not."""
    return [*globals(), *__all__]
