"""`sst-merge verify`: every claim of the theory sheet against the pencils of a run and against planted ones."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..atomic import OUTPUT_MARK, replace_dir
from ..config import load_config
from ..directions import Directions, find_directions
from ..fingerprint import fingerprint
from ..methods import sst_plan
from ..pencils import named
from ..problem import Problem
from ..rendering import render_markdown
from ..select import filtered_cores
from ..settings import Config, SstParameters
from ..store import FINGERPRINT_NAME, FisherFolder
from . import certificates, extremal, filters, pencils, planted
from .checks import Check, failures, summarise
from .counterexample import counterexample
from .figures import figures
from .formed import FORMED_UP_TO, damping
from .order import order
from .quadratic import holds, sweep
from .solved import Solved
from .theory import sections

THEORY = "theory.json"
ALPHAS = tuple(2.0**e for e in range(-6, 2))
THOROUGH = 32
"""Pencils of a run that the dearer claims are tried on, evenly spaced; the others are tried on all."""


@dataclass(frozen=True)
class Settings:
    """What is tried.

    Attributes:
        alphas: Strengths of the sweep, two or more, each above 0.
        seed: Of challengers and drawn labels.
        challengers: Of each kind, for each claim and pencil.
    """

    alphas: tuple[float, ...] = ALPHAS
    seed: int = 0
    challengers: int = 64

    def __post_init__(self) -> None:
        """Refuse what cannot be tried."""
        if len(set(self.alphas)) < 2 or not all(0 < alpha < math.inf for alpha in self.alphas):
            raise ValueError(f"alphas: expected two or more different numbers above 0, got {list(self.alphas)}")
        if self.challengers < 1:
            raise ValueError(f"challengers: expected at least 1, got {self.challengers}")
        object.__setattr__(self, "alphas", tuple(sorted(set(self.alphas))))


def verify(
    run: str | Path | None = None,
    *,
    out: str | Path | None = None,
    fisher_dir: str | Path | None = None,
    settings: Settings | None = None,
) -> tuple[dict[str, Any], Path]:
    """Check the theory, and write theory.md with its figures and theory.json.

    Args:
        run: Output folder of `sst-merge merge` by the method sst; None checks planted pencils only.
        out: Folder to write, by default `<run>.verify`, or `planted.verify`; an earlier one is replaced.
        fisher_dir: Folder of the run's statistics, if they are no longer where the run left them. Nothing is collected.
        settings: What is tried.

    Returns:
        The content of theory.json, whose `passed` is False where a claim is broken; and the folder written.

    Raises:
        ValueError: The folder is no run of sst, its statistics are missing or are of other models or data.

    Cost: for a pencil of order n some hundred n³ flops; with calibration data, about 50 forward passes over the
    held-out sequences.
    """
    settings = settings or Settings()
    target = Path(out) if out is not None else Path(f"{os.path.abspath(run)}.verify" if run else "planted.verify")
    loaded = None if run is None else _load(Path(run), fisher_dir)
    with replace_dir(target, overwrite=True, mark=THEORY) as folder:
        rng = torch.Generator().manual_seed(settings.seed)
        numbers, checks = counterexample()
        tree: dict[str, Any] = {"sweep": [], "order": [], "holds": {}, "notes": [], "pencils": 0}
        checks += _planted(tree, rng, settings)
        if loaded is not None:
            checks += _of_run(tree, *loaded, rng, settings)
        theory = {
            "passed": all(check.passed for check in checks),
            "run": None if run is None else str(run),
            "seed": settings.seed,
            "challengers": settings.challengers,
            **tree,
            "counterexample": numbers,
            "claims": summarise(checks),
            "failures": failures(checks),
        }
        _write(folder, theory)
    return theory, target


def _load(run: Path, fisher_dir: str | Path | None) -> tuple[Config, dict[str, Any]]:
    """The configuration and the report of a run of sst whose statistics are there."""
    for name in (OUTPUT_MARK, "report.json"):
        if not (run / name).is_file():
            raise ValueError(f"verify: {run} holds no {name}; name a folder that `sst-merge merge --out` wrote")
    config = load_config(run / OUTPUT_MARK, fisher_dir=fisher_dir)
    if not isinstance(config.parameters, SstParameters):
        raise ValueError(
            f"verify: {run} was merged by {config.merge_method}, which solves no pencil; verify a run of merge_method "
            "sst, or name no run to check planted pencils"
        )
    if config.fisher_dir is None or not (Path(config.fisher_dir) / FINGERPRINT_NAME).is_file():
        raise ValueError(
            f"verify: the run's statistics are not in {config.fisher_dir}; name their folder (--fisher), or collect "
            f"them again: sst-merge fisher {run / OUTPUT_MARK} --out {config.fisher_dir}"
        )
    return config, json.loads((run / "report.json").read_text(encoding="utf-8"))


def _planted(tree: dict[str, Any], rng: torch.Generator, settings: Settings) -> list[Check]:
    """Every claim on every planted pencil."""
    checks = []
    for one in tqdm(list(planted.pencils(rng)), desc="planted pencils", leave=False):
        found = one.solved(rng)
        checks.append(planted.spectrum(one, found))
        checks += _claims(found.normalised(), tree, rng, settings.challengers, thorough=True)
        tree["pencils"] += 1
    return checks


def _claims(s: Solved, tree: dict[str, Any], rng: torch.Generator, count: int, thorough: bool) -> list[Check]:
    """The claims about one pencil; where A ⪰ 0 or B ≻ 0 fails, the others say nothing."""
    checks = certificates.assumptions(s)
    if failures(checks):
        return checks
    checks += [
        *certificates.pairs(s),
        *extremal.most_gain(s, rng, count),
        *filters.knapsack(s.name, s.values, s.coefficients, rng, count),
    ]
    if thorough:
        agreed, notes = certificates.agreement(s)
        tree["notes"] += notes
        checks += [
            *certificates.inertia(s),
            *agreed,
            *extremal.subspaces(s, rng, count),
            *filters.projection(s, rng, count),
            *filters.ridge(s, rng, count),
        ]
    return checks


def _of_run(
    tree: dict[str, Any], config: Config, report: Mapping[str, Any], rng: torch.Generator, settings: Settings
) -> list[Check]:
    """The claims about a run's pencils, and what its quadratic model predicts."""
    problem, parameters = Problem(config), config.parameters
    folder = FisherFolder(config.fisher_dir, fingerprint(problem, parameters), config.device)
    if not folder.complete:
        raise ValueError(
            f"verify: the run's statistics in {config.fisher_dir} are not complete; finish them: sst-merge fisher "
            f"CONFIG --out {config.fisher_dir}"
        )
    curvature = problem.curvature(parameters)
    directions, gamma = find_directions(curvature.statistics, curvature.patch, parameters)
    plan = sst_plan(curvature, directions, gamma, parameters)
    alpha = config.alphas[-1]
    kept = plan.kept(alpha)
    labels = list(directions)
    thorough = set(labels[:: math.ceil(len(labels) / THOROUGH)])
    if len(thorough) < len(labels):
        tree["notes"].append(
            f"T2, T3, T4, T6, inertia and other solvers were tried on {len(thorough)} of {len(labels)} pencils, evenly "
            "spaced; all else on all"
        )
    own_gamma = damping(curvature.statistics, curvature.patch, parameters)
    checks = pencils.shared(report, directions, own_gamma, sum(tau.numel() for tau in curvature.patch.values()))
    unformed = []
    for label in tqdm(labels, desc="pencils of the run", leave=False):
        d = directions[label]
        s, made = pencils.solved(curvature.statistics, d, curvature.patch, parameters, own_gamma)
        checks += made + pencils.recorded(report, label, d, s)
        if s is None:
            unformed.append(label)
            continue
        checks += _claims(s, tree, rng, settings.challengers, label in thorough)
        if parameters.select != "signed":  # no filter of the patch
            checks += filters.of_run(s, d.coefficients, kept[label])
        tree["pencils"] += 1
    tree["notes"] += _left_out(unformed, parameters)
    checks += _all_modules(directions, rng, settings.challengers)
    if config.calibration is None:
        tree["notes"].append("the run has no calibration data: nothing was measured on the model")
        return checks
    return checks + _on_the_model(tree, problem, curvature, directions, (kept, alpha), rng, settings)


def _left_out(unformed: Sequence[str], parameters: SstParameters) -> list[str]:
    """What was not checked of a run, if anything."""
    notes = []
    if unformed:
        notes.append(
            f"{len(unformed)} pencils, first that of {named(unformed[0])}, have more than {FORMED_UP_TO} coordinates "
            "and no smaller space that holds all their gain: they were not formed, and of their directions only the "
            "record, and T5 over what was found, were checked"
        )
    if parameters.steps > 1:
        notes.append(
            f"the run took {parameters.steps} steps: pencils, filter and predictions are those of the first; the later "
            "ones were not checked"
        )
    return notes


def _all_modules(directions: Mapping[str, Directions], rng: torch.Generator, count: int) -> list[Check]:
    """T5 over the directions of all pencils, which compete for one budget."""
    values, coefficients = (
        torch.cat([getattr(d, key) for d in directions.values()]).cpu() for key in ("values", "coefficients")
    )
    at = values.argsort(descending=True, stable=True)
    return filters.knapsack("all pencils together", values[at], coefficients[at], rng, count)


def _on_the_model(
    tree: dict[str, Any],
    problem: Problem,
    curvature: Any,
    directions: Mapping[str, Directions],
    kept: tuple[Mapping[str, Tensor], float],
    rng: torch.Generator,
    settings: Settings,
) -> list[Check]:
    """The sweep over α, and steps of equal cost."""
    phi = filtered_cores(directions, kept[0], curvature.patch)
    if not any(core.any() for core in phi.values()):
        tree["notes"].append("the run keeps nothing of its patch: nothing was measured on the model")
        return []
    rows, checks, notes = sweep(problem, curvature, directions, phi, settings.alphas, settings.seed)
    tree["notes"] += notes
    ranges = {key: holds(rows, key) for key in ("predicted_kl", "predicted_kl_at_ft")}
    reached = ranges["predicted_kl"] or ranges["predicted_kl_at_ft"]
    strengths = dict.fromkeys([settings.alphas[0], settings.alphas[-1] if reached is None else reached[1]])
    tree |= {"alpha": kept[1], "sweep": rows, "holds": ranges}
    tree["order"] = [order(problem, curvature, directions, kept[0], alpha, rng) for alpha in strengths]
    return checks


def _write(folder: Path, theory: Mapping[str, Any]) -> None:
    """theory.md, its figures and theory.json, into an empty folder."""
    pictures = figures(theory)
    for picture in pictures:
        (folder / f"{picture.name}.png").write_bytes(picture.png())
    page = render_markdown("The theory, checked", sections(theory, pictures))
    (folder / "theory.md").write_text(page, encoding="utf-8")
    (folder / THEORY).write_text(json.dumps(_finite(theory), indent=1) + "\n", encoding="utf-8")


def _finite(tree: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(tree, Mapping):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
