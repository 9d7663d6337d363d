"""The whole demo: train, merge by every method over a sweep of strengths, measure, report.

In the output folder, for every seed: `models/`, the calibration files and `config.yaml` that a user would write, and
`merged/`, the adapter and the report of `sst-merge merge` on it. In `comparison/` is what `sst-merge compare` writes,
each seed's world a replicate. Models and measurements are reused by a later run with the same text, settings and code.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import yaml

from .. import atomic
from ..compare import CompareSettings, Replicate, run_compare
from ..compare.variants import VARIANTS
from ..compare.verdict import verdict
from ..config import load_config
from ..merging import merge
from .evaluate import AXES, WorldEvaluator
from .train import DemoModels, train_models
from .world import World, make_world, write_jsonl

METHODS = (
    "task arithmetic",
    "interpolation",
    "TIES, density 0.5",
    "DELLA, p 0.3",
    "Iso-C",
    "KnOTS-TIES",
    "gradient matching",
    "SafeMERGE",
    "diagonal SST, weights, hard, path",
    "data-free SST-V, hard",
    "SST exact",
    "SST exact, soft, shrunk 0.5",
    "SST K-FAC",
    "SST exact, tuned",
)
"""One or two of each kind, so that the demo takes minutes; `sst-merge compare` takes all of `compare.variants`."""

SETTINGS = CompareSettings({label: VARIANTS[label] for label in METHODS}, (0.6, 0.8, 1.0, 1.25, 1.6), axes=AXES)


def run_demo(out: str | Path, seeds: int = 1) -> None:
    """Train, merge, measure and report, for seeds 0 to `seeds` − 1.

    Args:
        out: Output folder; made if absent, reused if present.
        seeds: How many worlds.

    Raises:
        ValueError: `seeds` is below 1, or `out` is a file.
    """
    out = Path(out)
    if seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file; name a folder")
    replicates = []
    for seed in range(seeds):
        replicates.append(prepare(out / f"seed{seed}", seed))
        merge(replicates[-1].config, out=out / f"seed{seed}/merged", overwrite=True)
    summary = run_compare(replicates, SETTINGS, out / "comparison", overwrite=True)
    print("\n".join(verdict(summary)))
    print(f"wrote {out / 'comparison'} (read compare.html there); for each seed: merged/report.html")


def prepare(folder: Path, seed: int) -> Replicate:
    """Models and data of a seed, as a replicate of a comparison.

    Args:
        folder: Of this seed; models that are there are not trained again.
        seed: Of world, weights and methods.

    Returns:
        The replicate.
    """
    folder.mkdir(parents=True, exist_ok=True)
    world = make_world(seed)
    started = time.perf_counter()
    models = train_models(world, folder / "models", seed)
    print(f"seed {seed}: models ready after {time.perf_counter() - started:.0f} s", flush=True)
    config = write_config(folder, models, world)
    return Replicate(folder.name, load_config(config), {"world": WorldEvaluator(world)}, seed)


def write_config(folder: Path, models: DemoModels, world: World) -> dict[str, Any]:
    """Calibration files, and the configuration that a user would write by hand.

    Args:
        folder: Where `harm.jsonl`, `benign.jsonl` and `config.yaml` are written.
        models: The base and both adapters.
        world: Its calibration sets are used.

    Returns:
        The configuration.
    """
    write_jsonl(folder / "harm.jsonl", world.calibration_harm)
    write_jsonl(folder / "benign.jsonl", world.calibration_benign)
    config = {
        "base_model": str(models.base_path),
        "models": [
            {"model": str(models.utility_path), "role": "utility"},
            {"model": str(models.safety_path), "role": "safety"},
        ],
        "merge_method": "sst",
        "parameters": {"alpha": 1.0},
        "calibration": {
            "harm": str(folder / "harm.jsonl"),
            "benign": str(folder / "benign.jsonl"),
            "batch_size": 32,
        },
    }
    atomic.write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    return config
