"""PEFT LoRA adapters in and out, as low-rank updates of the base model."""

from .check import check_compatible, check_fits
from .inspect import inspect_adapter, render_inspection
from .lowrank import RANK_TOLERANCE, LowRank, factor
from .read import Adapter, read_adapter
from .write import write_adapter, write_files

__all__ = [
    "RANK_TOLERANCE",
    "Adapter",
    "LowRank",
    "check_compatible",
    "check_fits",
    "factor",
    "inspect_adapter",
    "read_adapter",
    "render_inspection",
    "write_adapter",
    "write_files",
]
