"""A whole merge of full checkpoints: three folders in, a checkpoint for every strength and a report out."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..atomic import replace_dir
from ..rendering import write_report
from ..settings import Config, FisherParameters
from .collect import collect_diagonals
from .collect_factors import collect_factors
from .elementwise import Change, Elementwise
from .fingerprint import fingerprint
from .fishers import DiagonalFishers
from .kronecker import KroneckerSst, check_run, load_factors
from .models import UTILITY, Models
from .output import Output
from .report import build_full_report
from .tensors import FLOATS


@dataclass(frozen=True)
class FullMergeResult:
    """What a merge of full checkpoints did.

    Attributes:
        models: The three checkpoints.
        report: The numbers of the report, as in report.json.
        path: The output folder.
    """

    models: Models
    report: dict[str, Any]
    path: Path


@dataclass
class Tally:
    """Sums over the entries of a tensor.

    Attributes:
        patch: ‖τ‖².
        filtered: ‖φ‖².
        kept: Σ m.
        lost: Per strength, ‖round(θ) − θ‖².
    """

    patch: float = 0.0
    filtered: float = 0.0
    kept: float = 0.0
    lost: list[float] = field(default_factory=list)


def merge_full(config: Config, out: str | Path, *, overwrite: bool = False) -> FullMergeResult:
    """θ = θ_u + α·Filter(τ), written in the utility model's own files, shards and dtypes, for every α.

    Args:
        config: The checked configuration; both models are folders of full checkpoints.
        out: Output folder: checkpoint and report; with several α the checkpoints are in subfolders `alpha-…`. Nothing
            is left there unless everything succeeded.
        overwrite: Replace an earlier output.

    Returns:
        The result.

    Raises:
        ValueError: Anything the user can mend, with the remedy.
        OSError: The disk is full, …; nothing is left behind.

    Cost: every model is read once, and each Fisher once with `scope: module`, three times with `scope: global`; every
    strength is written once. Memory: some slabs of `tensors.SLAB` entries, and the ratios of a small tensor.
    """
    with replace_dir(out, overwrite=overwrite) as folder:
        started = time.perf_counter()
        models = Models(config)
        _check_room(models, folder, len(config.alphas))
        if config.calibration is not None and isinstance(config.parameters, FisherParameters):
            models.remarks += _collect(models)
        fishers, method = _method(models)
        subfolders = [folder if len(config.alphas) == 1 else folder / f"alpha-{alpha!r}" for alpha in config.alphas]
        tallies = _write(models, method, config.alphas, subfolders)
        strengths = [
            {
                "alpha": alpha,
                "worst_rounding_error": _worst_loss(tallies, i, alpha),
                "checkpoint": subfolder.relative_to(folder).as_posix(),
            }
            for i, (alpha, subfolder) in enumerate(zip(config.alphas, subfolders, strict=True))
        ]
        report = build_full_report(models, method, tallies, strengths, fishers)
        report["seconds"] = round(time.perf_counter() - started, 1)
        write_report(folder, report, config)
    return FullMergeResult(models, report, Path(out))


def collect_full(config: Config) -> None:
    """Gather the Fishers of full checkpoints into `config.fisher_dir`, without merging; see `collect`.

    Args:
        config: The checked configuration, with calibration data.

    Raises:
        ValueError: Anything the user can mend, with the remedy.
    """
    if config.calibration is None:
        raise ValueError("calibration: its files `harm` and `benign` are needed to collect Fishers")
    _collect(Models(config))


def _collect(models: Models) -> list[str]:
    """The Fishers that the method asks for, into the configuration's folder; what was measured."""
    gather = collect_factors if models.config.merge_method == "sst" else collect_diagonals
    return gather(models, models.config.fisher_dir)


def _method(models: Models) -> tuple[DiagonalFishers | None, Elementwise | KroneckerSst]:
    """The configuration's method, with its Fishers read."""
    config = models.config
    if config.merge_method == "sst":
        check_run(config.fisher_dir, fingerprint(models, config.parameters))
        return None, KroneckerSst(models, config, load_factors(config.fisher_dir))
    fishers = None
    if isinstance(config.parameters, FisherParameters):
        fishers = DiagonalFishers(models, config.fisher_dir, fingerprint(models, config.parameters))
    return fishers, Elementwise(models, config, fishers)


def _write(
    models: Models, method: Elementwise | KroneckerSst, alphas: tuple[float, ...], folders: list[Path]
) -> dict[str, Tally]:
    """Every strength's checkpoint; sums over the entries of every tensor."""
    tallies = {name: Tally(lost=[0.0] * len(alphas)) for name in method.names}
    total = sum(models.of[UTILITY].places[name].numel for name in method.names)
    with ExitStack() as stack:
        outputs = []
        for folder in folders:
            folder.mkdir(exist_ok=True)
            outputs.append(stack.enter_context(Output(models, folder, method.names)))
        bar = stack.enter_context(tqdm(total=total, desc="merge", unit="entry", unit_scale=True, leave=False))
        for change in method.changes():
            if not math.isfinite(float(change.utility.sum() + change.patch.sum())):
                models.check_finite(change.slab)
            tally = tallies[change.slab.name]
            tally.patch += _square(change.patch)
            tally.filtered += _square(change.filtered)
            tally.kept += change.kept
            for i, (alpha, output) in enumerate(zip(alphas, outputs, strict=True)):
                tally.lost[i] += _write_change(models, change, alpha, output)
            bar.update(change.slab.stop - change.slab.start)
    if not any(tally.patch for tally in tallies.values()):
        raise ValueError("the patch is zero: the safety model changes nothing; name another")
    return tallies


def _write_change(models: Models, change: Change, alpha: float, output: Output) -> float:
    """θ_u + αφ, rounded once and written; ‖round(θ) − θ‖²."""
    place = models.of[UTILITY].places[change.slab.name]
    exact = torch.add(change.utility, change.filtered, alpha=alpha)
    rounded = exact.to(FLOATS[place.dtype])
    if not math.isfinite(float(rounded.sum(dtype=exact.dtype))):
        raise ValueError(f"{place.key} overflows {place.dtype} at alpha {alpha:g}; lower alpha, or give a wider model")
    output.write(change.slab.name, change.slab.start, rounded)
    return 0.0 if rounded.dtype == exact.dtype else _square(rounded.to(exact.dtype) - exact)


def _square(values: Tensor) -> float:
    """‖x‖²."""
    return float(torch.dot(values, values))


def _worst_loss(tallies: Mapping[str, Tally], strength: int, alpha: float) -> float:
    """The largest ‖round(θ) − θ‖ / ‖αφ‖ of any tensor: what the stored dtype loses of the change."""
    sizes = ((tally.lost[strength], alpha**2 * tally.filtered) for tally in tallies.values())
    return max((math.sqrt(lost / size) for lost, size in sizes if size), default=0.0)


def _check_room(models: Models, folder: Path, strengths: int) -> None:
    """OSError before anything is written, where the disk has no room for it."""
    places = models.of[UTILITY].places.values()
    needed = strengths * sum(place.nbytes for place in places)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"output folder: {needed / 1e9:.3g} GB are needed for {strengths} checkpoint(s), and {free / 1e9:.3g} GB "
            "are free; make room, name another folder, or give fewer alpha"
        )
