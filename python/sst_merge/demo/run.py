"""The whole demo: train, merge by every method over a sweep of strengths, measure, report.

In the output folder, for every seed: `models/`, the calibration files and `config.yaml` that a user would write,
`merged/`, the adapter and the report of `sst-merge merge` on it, `frontier.json` and `frontier.png`; and over all
seeds `demo.md` and `demo.json`. Models and measurements are reused by a later run with the same text, settings
and code.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import AutoTokenizer

import sst_kernels

from .. import atomic
from ..merging import merge
from ..rendering import markdown_table
from .evaluate import evaluate
from .frontier import ALPHAS, RUNS, TUNED, Measured, draw_frontier, measure_alone, summarise, sweep, tuned
from .train import DemoModels, train_models
from .world import World, make_world, write_jsonl


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
    tables = []
    for seed in range(seeds):
        alone, rows = _one_seed(out / f"seed{seed}", seed)
        tables.append(summarise(alone) + summarise(rows))
    text = _report(tables)
    atomic.write_text(out / "demo.json", json.dumps(tables, indent=1) + "\n")
    atomic.write_text(out / "demo.md", text)
    print(text)
    print(f"wrote {out / 'demo.md'}; for each seed: merged/report.html, frontier.png")


def _one_seed(folder: Path, seed: int) -> tuple[list[Measured], list[Measured]]:
    """Everything for one seed: rows of the models alone, and of the merges."""
    folder.mkdir(parents=True, exist_ok=True)
    world = make_world(seed)
    started = time.perf_counter()
    models = train_models(world, folder / "models", seed)
    print(f"seed {seed}: models ready after {time.perf_counter() - started:.0f} s", flush=True)
    config = write_config(folder, models, world)
    merge(config, out=folder / "merged", overwrite=True)
    alone, rows = _measured(folder, models, world, config)
    draw_frontier(str(folder / "frontier.png"), rows, alone)
    print(f"seed {seed}: merged and measured after {time.perf_counter() - started:.0f} s", flush=True)
    return alone, rows


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


def _measured(
    folder: Path, models: DemoModels, world: World, config: dict[str, Any]
) -> tuple[list[Measured], list[Measured]]:
    """Every model's scores; from `frontier.json` if models, settings and code are those it was made with."""
    path = folder / "frontier.json"
    fingerprint = _fingerprint(models)
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["fingerprint"] == fingerprint:
            return [Measured(**row) for row in known["alone"]], [Measured(**row) for row in known["rows"]]
    tokenizer = AutoTokenizer.from_pretrained(models.base_path)

    def measure(model: nn.Module) -> dict[str, float]:
        return evaluate(model, tokenizer, world).as_row()

    alone, rows = measure_alone(config, measure), sweep(config, measure) + tuned(config, measure)
    tree = {"fingerprint": fingerprint, "alone": [asdict(r) for r in alone], "rows": [asdict(r) for r in rows]}
    atomic.write_text(path, json.dumps(tree, indent=1) + "\n")
    return alone, rows


def _fingerprint(models: DemoModels) -> str:
    """Hash of the models, the sweep, and every Python file of both packages."""
    digest = hashlib.sha256(json.dumps([RUNS, ALPHAS, TUNED, torch.__version__]).encode())
    packages = [Path(__file__).parents[1], Path(sst_kernels.__file__).parent]
    sources = sorted(path for package in packages for path in package.rglob("*.py"))
    weights = [next(folder.glob("*.safetensors")) for folder in asdict(models).values()]
    for path in [*sources, *weights]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _report(tables: Sequence[list[dict[str, Any]]]) -> str:
    """One row a method; over several seeds the mean and, behind ±, the standard deviation."""
    rows = [
        {"method": same[0]["method"]}
        | {key: _over_seeds([row[key] for row in same]) for key in same[0] if key != "method"}
        for same in zip(*tables, strict=True)
    ]
    head = (
        f"# Demo: {len(tables)} seed{'s' * (len(tables) > 1)}\n\n"
        "Held-out shares. Per method the strength with the best score (geometric mean of refusal, 1 − over-refusal and "
        "both utilities), and the most utility among strengths that refuse 90% of forbidden requests (in brackets: in "
        'how many seeds there is one, if not in all). Methods named "tuned" have one strength, chosen like their other '
        "settings on held-out calibration data; all others take their best on the prompts they are measured on.\n\n"
    )
    return head + "\n".join(markdown_table(rows)) + "\n"


def _over_seeds(values: Sequence[float | None]) -> str:
    """Mean ± standard deviation of those that exist."""
    known = [value for value in values if value is not None]
    if not known:
        return "none"
    text = f"{statistics.mean(known):.2f}"
    if len(known) > 1:
        text += f" ± {statistics.stdev(known):.2f}"
    return text if len(known) == len(values) else f"{text} ({len(known)})"
