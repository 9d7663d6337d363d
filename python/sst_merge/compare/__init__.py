"""All methods on the same ΔW and the same held-out data: `sst-merge compare`."""

from .config import CompareSettings, load_compare
from .replicate import Replicate
from .run import compare, run_compare
from .variants import VARIANTS, Variant

__all__ = ["VARIANTS", "CompareSettings", "Replicate", "Variant", "compare", "load_compare", "run_compare"]
