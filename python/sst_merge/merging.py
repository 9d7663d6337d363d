"""A whole merge: configuration in, PEFT adapters and a report out."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import distributed
from .adapters import LowRank, write_files
from .atomic import replace_dir
from .calibration import write_generated
from .card import write_cards
from .checkpoint import Checkpoint
from .config import load_config
from .full import FullMergeResult, are_full, collect_full, merge_full
from .held_out import Merged, compare, compare_tasks, measure, warnings_of
from .methods import METHODS, Plan
from .problem import Live, Problem
from .rendering import write_report
from .report import build_report
from .settings import Config, FisherParameters
from .tune import tune


@dataclass(frozen=True)
class MergeResult:
    """What `merge` did.

    Attributes:
        problem: The adapters and bases.
        plan: The solved merge.
        report: The numbers of the report, as in report.json.
        path: The output folder, if one was written.
    """

    problem: Problem
    plan: Plan
    report: dict[str, Any]
    path: Path | None

    def updates(self, alpha: float) -> dict[str, LowRank]:
        """Module name -> merged ΔW at strength α, exact."""
        return {name: self.plan.low_rank(self.problem, name, alpha)[0] for name in self.problem.names}


def merge(
    config: str | Path | Mapping[str, Any] | Config,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    merge_into_base: bool = False,
    live: Live | None = None,
    **overrides: Any,
) -> MergeResult | FullMergeResult:
    """θ = θ_0 + Δ_utility + α·Filter(τ), written as a PEFT adapter, or as a full checkpoint, for every α.

    Args:
        config: YAML file, mapping or `Config`; see `config`.
        out: Output folder: adapter and report; with several α the adapters are in subfolders `alpha-…`. Nothing is
            left there unless everything succeeded. None writes nothing.
        overwrite: Replace an earlier output. Statistics are kept in `fisher_dir`, by default the folder `<out>.fisher`,
            where the next merge finds them and an interrupted one goes on.
        merge_into_base: Write full checkpoints, whatever the configuration says.
        live: Adapters and base in memory, taken instead of the configuration's; `apply_sst` gives them.
        overrides: Top-level keys that replace the configuration's, such as `device` and `dtype`.

    Returns:
        The result.

    Raises:
        ValueError: Anything the user can mend, with the remedy.

    Cost: for the statistics, unless they are there, forward and backward passes over the calibration sequences at each
    point of the path, and at θ_ft over the harmful ones; then 1 + (number of strengths) forward passes over those held
    out. With `steps`, the first for θ_ft and one more collection for each further step of each strength.
    """
    config = load_config(config, **overrides)
    config = replace(config, device=distributed.own_device(config.device))
    if merge_into_base:
        config = replace(config, output=replace(config.output, merge_into_base=True))
    if out is not None:
        _refuse_inputs(Path(out), config)
        if config.fisher_dir is None and isinstance(config.parameters, FisherParameters):
            config = replace(config, fisher_dir=f"{os.path.abspath(out)}.fisher")
    if live is None and are_full(config):
        if out is None:
            raise ValueError("out: a merge of full checkpoints is written as it is computed; name a folder")
        with _out_of_memory():
            return merge_full(config, out, overwrite=overwrite)
    with distributed.together(), _out_of_memory():
        return _merge(config, out if distributed.first() else None, overwrite, live)


def collect(config: str | Path | Mapping[str, Any] | Config, out: str | Path, **overrides: Any) -> Path:
    """Gather the statistics of a configuration into a folder, without merging.

    Args:
        config: As for `merge`; its method must be one that uses Fishers.
        out: The folder. Statistics that are there in part are gone on with.
        overrides: As for `merge`.

    Returns:
        The folder.

    Raises:
        ValueError: Anything the user can mend, with the remedy.
    """
    config = load_config(config, **overrides, fisher_dir=out)
    if not isinstance(config.parameters, FisherParameters):
        raise ValueError(f"merge_method {config.merge_method} uses no Fishers; there is nothing to collect")
    _refuse_inputs(Path(out), replace(config, fisher_dir=None))
    config = replace(config, device=distributed.own_device(config.device))
    with distributed.together(), _out_of_memory():
        if are_full(config):
            collect_full(config)
        else:
            Problem(config).curvature(config.parameters)
    return Path(config.fisher_dir)


@contextmanager
def _out_of_memory() -> Iterator[None]:
    """The device's lack of memory as an error with a remedy."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            "the device ran out of memory; lower calibration.batch_size or max_length, or use --dtype bfloat16: "
            f"{error}"
        ) from error


def _merge(config: Config, out: str | Path | None, overwrite: bool, live: Live | None) -> MergeResult:
    """`merge` of a checked configuration."""
    with nullcontext() if out is None else replace_dir(out, overwrite=overwrite) as folder:
        started = time.perf_counter()
        problem = Problem(config, live)
        checkpoint = Checkpoint(problem) if config.output.merge_into_base else None
        tuning = tune(problem, config.parameters) if config.tune else None
        if tuning is not None:
            problem.config = config = replace(config, parameters=tuning.parameters, tune=False)
        plan = METHODS[config.merge_method](problem, config.parameters)
        rows, models = zip(
            *(_one_strength(problem, plan, alpha, folder, checkpoint) for alpha in config.alphas), strict=True
        )
        report = build_report(problem, plan, list(rows))
        if config.calibration is not None:
            measured = measure(problem, models)
            report["held_out"] = compare(report["strengths"], measured)
            if by_task := compare_tasks(report["strengths"], measured):
                report["held_out_tasks"] = by_task
            report["warnings"] += warnings_of(report["held_out"])
        if tuning is not None:
            report["tuning"] = tuning.as_report()
        report["seconds"] = round(time.perf_counter() - started, 1)
        if folder is not None:
            write_report(folder, report, config)
            write_generated(folder, problem)
            write_cards(folder, report, config)
    return MergeResult(problem, plan, report, None if out is None else Path(out))


def _one_strength(
    problem: Problem, plan: Plan, alpha: float, folder: Path | None, checkpoint: Checkpoint | None
) -> tuple[dict[str, Any], Merged | None]:
    """Write the merge at one α; its row of the report, and the model, if it is wanted in factors."""
    biases = plan.merged_biases(problem, alpha)
    if checkpoint is None or folder is None:
        updates, error = _updates(problem, plan, alpha)
        merged = Merged(updates, biases)
        return {**_write_adapter(problem, merged, alpha, folder), "worst_truncation_error": error}, merged
    subfolder = _subfolder(problem, alpha, folder)
    lost = checkpoint.write(subfolder, lambda name: plan.dense(problem, name, alpha), biases)
    row = {"alpha": alpha, "worst_rounding_error": lost, "checkpoint": subfolder.relative_to(folder).as_posix()}
    if problem.config.calibration is None:  # nothing will be measured, and the factors of a dense ΔW are dear
        return row, None
    return row, Merged(_updates(problem, plan, alpha)[0], biases)


def _updates(problem: Problem, plan: Plan, alpha: float) -> tuple[dict[str, LowRank], float]:
    """ΔW of every module at one α, of the rank asked for; the largest relative error of truncation."""
    updates, worst = {}, 0.0
    for name in tqdm(problem.names, desc=f"merge, alpha {alpha:g}", unit="module", leave=False):
        updates[name], error = plan.low_rank(problem, name, alpha, problem.config.output.rank)
        worst = max(worst, error)
    return updates, worst


def _write_adapter(problem: Problem, merged: Merged, alpha: float, folder: Path | None) -> dict[str, Any]:
    """The merged adapter at one α; its size."""
    updates = merged.updates.values()
    strength = {
        "alpha": alpha,
        "largest_rank": max(u.rank for u in updates),
        "parameters": sum(u.up.numel() + u.down.numel() for u in updates),
    }
    if folder is None:
        return strength
    subfolder = _subfolder(problem, alpha, folder)
    write_files(
        subfolder,
        merged.updates,
        sources=(problem.utility, problem.safety),
        biases=merged.biases,
        saved=problem.saved,
        dtype=getattr(torch, problem.config.output.dtype),
    )
    return {**strength, "adapter": subfolder.relative_to(folder).as_posix()}


def _subfolder(problem: Problem, alpha: float, folder: Path) -> Path:
    """Where one of the strengths is written; made."""
    subfolder = folder if len(problem.config.alphas) == 1 else folder / f"alpha-{alpha!r}"
    subfolder.mkdir(exist_ok=True)
    return subfolder


def _refuse_inputs(out: Path, config: Config) -> None:
    """ValueError if the output would replace what is being read, or kept."""
    data = () if config.calibration is None else config.calibration.files
    kept = () if config.fisher_dir is None else (config.fisher_dir,)
    for source in (config.base_model, config.utility.model, config.safety.model, *data, *kept):
        target, read = out.resolve(), Path(source).resolve()
        if target == read or target in read.parents or read in target.parents:
            raise ValueError(f"output folder: {out} holds, or lies in, the input {source}; name another")
