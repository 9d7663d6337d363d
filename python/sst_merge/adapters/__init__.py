"""PEFT LoRA adapters in and out, as low-rank updates of the base model."""

from .check import check_compatible, check_fits
from .inspect import inspect_adapter, render_inspection
from .lowrank import RANK_TOLERANCE, LowRank, factor
from .read import Adapter, assemble, read_adapter
from .write import peft_state, write_adapter, write_files

__all__ = [
    "RANK_TOLERANCE",
    "Adapter",
    "LowRank",
    "assemble",
    "check_compatible",
    "check_fits",
    "factor",
    "inspect_adapter",
    "peft_state",
    "read_adapter",
    "render_inspection",
    "write_adapter",
    "write_files",
]
