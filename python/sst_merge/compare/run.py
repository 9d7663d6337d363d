"""The whole comparison: every variant on every replicate, summed up, drawn, and written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from ..atomic import OUTPUT_MARK, check_output_dir, replace_dir
from ..settings import Config
from .config import CompareSettings, load_compare
from .replicate import REFERENCES, Bench, Replicate, each_row
from .report import write_comparison
from .summary import Summary, summarise
from .verdict import short_sweeps


def compare(
    config: str | Path | Mapping[str, Any], out: str | Path, *, overwrite: bool = False, **overrides: Any
) -> Summary:
    """Merge by every variant, strength and seed; measure each merged model; write the comparison.

    Args:
        config: YAML file or mapping, a merge configuration with a section `compare`.
        out: Output folder. Rows and Fishers are kept in `<out>.work`, where an interrupted run goes on.
        overwrite: Replace an earlier output.
        overrides: Top-level keys that replace the configuration's, such as `device` and `dtype`.

    Returns:
        The numbers.

    Raises:
        ValueError: Anything that the user can mend, with the remedy.

    Cost: per seed one collection for each distinct set of Fishers; per variant one solve and one pass of gradients over
    the held-out sequences; per strength the evaluators.
    """
    settings_of_merge, settings = load_compare(config, **overrides)
    replicates = [
        Replicate(f"seed{seed}", settings_of_merge, settings.evaluators, seed) for seed in range(settings.seeds)
    ]
    return run_compare(replicates, settings, out, overwrite=overwrite, shared_prompts=True)


def run_compare(
    replicates: Sequence[Replicate],
    settings: CompareSettings,
    out: str | Path,
    *,
    overwrite: bool = False,
    shared_prompts: bool = False,
) -> Summary:
    """The comparison on given replicates.

    Args:
        replicates: Pairs of models with data and evaluators; their names differ.
        settings: Variants, strengths, confidence and axes.
        out: As for `compare`.
        overwrite: As for `compare`.
        shared_prompts: The replicates are seeds on the same models and prompts, whose spread says nothing of the choice
            of prompts: a bootstrap over prompts is added to it.

    Returns:
        The numbers.

    Raises:
        ValueError: As for `compare`.
    """
    check_output_dir(out, overwrite=overwrite)
    work = Path(f"{os.path.abspath(out)}.work")
    references: dict[str, list[Any]] = {name: [] for name in REFERENCES}
    rows: dict[str, list[Any]] = {label: [] for label in settings.methods}
    remarks: dict[str, None] = {}
    total = len(replicates) * (len(references) + len(rows))
    with tqdm(total=total, desc="compare", unit="variant") as bar:
        for replicate in replicates:
            bench = Bench(replicate, work)
            for label, found in each_row(bench, settings.methods, settings.alphas):
                (references if label in references else rows)[label].append(found[0] if label in references else found)
                bar.set_postfix_str(f"{replicate.name}, {label}")
                bar.update()
            remarks |= dict.fromkeys(bench.problem.remarks)
    seeds = {replicate.name: replicate.seed for replicate in replicates}
    summary = summarise(rows, references, seeds, (settings.axes, settings.confidence, shared_prompts))
    configs = {replicate.name: yaml.safe_load(replicate.config.to_yaml()) for replicate in replicates}
    with replace_dir(out, overwrite=overwrite) as folder:
        write_comparison(folder, summary, settings, configs, [*short_sweeps(summary), *remarks])
        (folder / OUTPUT_MARK).write_text(_resolved(replicates[0].config, settings), encoding="utf-8")
    return summary


def _resolved(config: Config, settings: CompareSettings) -> str:
    """The configuration with every default filled in, in the form that `load_compare` reads."""
    tree = yaml.safe_load(replace(config, fisher_dir=None).to_yaml())
    section = json.loads(json.dumps(settings.as_tree()))  # tuples as lists
    return yaml.safe_dump({**tree, "compare": section}, sort_keys=False)
