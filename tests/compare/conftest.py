"""The tiny models of the merge layer's tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location("tiny_models", Path(__file__).parents[1] / "merge/conftest.py")
_tiny_models = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _tiny_models
_spec.loader.exec_module(_tiny_models)
base_dir, input_ids, llama_dir, load_base, make_adapter, setup = (
    getattr(_tiny_models, name) for name in ("base_dir", "input_ids", "llama_dir", "load_base", "make_adapter", "setup")
)
