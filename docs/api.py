"""The API reference from docstrings, with every warning an error: `python docs/api.py build/docs`."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path

import pdoc

import sst_merge

PAGES = [
    "sst_kernels",
    *(f"sst_kernels.{name}" for name in ("collect", "labels", "layers", "reference")),
    *(f"sst_kernels.integrations.{name}" for name in ("transformers", "lightning", "kronfluence")),
    "sst_merge",
    *(f"sst_merge.{name}" for name in ("settings", "method_settings", "config", "adapters", "coordinates", "data")),
    *(f"sst_merge.{name}" for name in ("fisher", "sums", "shrinkage", "pencils", "directions", "select", "tune")),
    *(f"sst_merge.{name}" for name in ("held_out", "methods", "baselines", "merging")),
    *(f"sst_merge.{name}" for name in ("store", "report", "rendering", "checkpoint", "cli")),
]


def write(folder: Path) -> None:
    """A page for each of `PAGES`, an index and a search.

    Args:
        folder: Made if it is not there; other files in it stay.
    """
    for name in PAGES:
        importlib.import_module(name)
    for name in sst_merge.__all__:  # which it imports on first use, and pdoc does not see
        setattr(sst_merge, name, getattr(sst_merge, name))
    pdoc.render.configure(docformat="google", footer_text="sst-merge")
    warnings.simplefilter("error")
    pdoc.pdoc(*PAGES, output_directory=folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
