"""`--tune`: ε, shrinkage, k (or μ, or ρ) and α, chosen on the held-out sequences by one rule.

The rule: of all candidates, take the one with the least

    J = −E log p_merged(refusal) + E KL(p_ft ‖ p_merged),

nats per sequence, the first mean over held-out harmful prompts with their refusals, the second over held-out benign
sequences: answer as the safety data say where they speak, and as the utility model does elsewhere. Both are measured on
the merged model itself, not predicted. The search goes through the parameters one after another, every strength α with
each value, keeps the best so far, and ends with a round that changes nothing. Shrinkage has three turns: one intensity
for both Fishers (and the formula's), then each Fisher's own, one step of the grid up or down, then the other target.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

from .directions import find_directions
from .held_out import HeldOut, Merged, measure
from .methods import Plan, sst_plan
from .pencils import unformed_modules
from .problem import Problem
from .settings import KINDS, SstParameters

ALPHAS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
SIZES = {"top_k": "k", "soft": "mu", "dof": "mu", "budget": "rho", "signed": "rho"}
"""Rule of selection -> the parameter that says how much is kept."""

_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_MULTIPLES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # of the median λ
_COSTS = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0)  # of half the whole patch's cost
_DAMPING = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_SHRINKAGE = (0.0, 0.1, 0.3, 0.6, 1.0)
_ROUNDS = 3


@dataclass(frozen=True)
class Tuning:
    """What the search found.

    Attributes:
        parameters: The settings given, with the best values in place.
        candidates: Per setting and α: its parameters, "objective", "kl" and "refusal_loss" (nats per sequence).
        chosen: The best of them.
    """

    parameters: SstParameters
    candidates: list[dict[str, Any]]
    chosen: dict[str, Any]

    def as_report(self) -> dict[str, Any]:
        """JSON-ready."""
        rule = "least J = −E log p(refusal) + E KL(p_ft ‖ p_merged), nats per held-out sequence"
        return {"rule": rule, "chosen": self.chosen, "candidates": self.candidates}


def tune(problem: Problem, parameters: SstParameters) -> Tuning:
    """Search for the least J.

    Args:
        problem: Model, adapters and data.
        parameters: Where the search begins; the rule of selection, points, patch and scope stay as they are. Its alpha,
            if it is a list, are the strengths tried instead of `ALPHAS`.

    Returns:
        What was found.

    Cost: about 25 to 60 settings; each solves the pencils if ε or shrinkage is new, and takes len(ALPHAS) forward
    passes over the held-out sequences.
    """
    with tqdm(desc="tune", unit="setting", leave=False) as bar:
        search = _Search(problem, parameters.alpha if isinstance(parameters.alpha, tuple) else ALPHAS, bar)
        best = search.best(parameters)
        for _ in range(_ROUNDS):
            before = best
            for name in (SIZES[best.select], "damping"):
                tried = [search.best(replace(best, **{name: value})) for value in search.grid(best, name)]
                best = min([best, *tried], key=search.loss)
            for turn in (_same_intensities, _own_intensities, _other_target):
                best = min([best, *(search.best(candidate) for candidate in turn(best))], key=search.loss)
            if best == before:
                break
    return Tuning(best, list(search.rows.values()), search.rows[repr(best)])


class _Search:
    """Candidates measured so far.

    Attributes:
        rows: Settings in words (1 and 1.0 are not the same k), α included -> row of the report.
    """

    def __init__(self, problem: Problem, alphas: tuple[float, ...], bar: tqdm) -> None:
        self.problem, self.alphas, self._bar = problem, alphas, bar
        self.rows: dict[str, dict[str, Any]] = {}
        self._solved: tuple[Any, Any] = (None, None)

    def loss(self, settings: SstParameters) -> float:
        """J of a candidate that was measured; infinite where it is not finite."""
        objective = self.rows[repr(settings)]["objective"]
        return objective if math.isfinite(objective) else math.inf

    def plan(self, settings: SstParameters) -> Plan:
        """The merge by these settings; pencils are solved anew only for another ε or form of a Fisher."""
        curvature = self.problem.curvature(settings)
        unformed = unformed_modules(curvature.statistics, curvature.patch, settings)  # a larger k may need all pairs
        key = settings.form("harm"), settings.form("benign"), settings.damping, unformed
        if self._solved[0] != key:
            self._solved = key, (curvature, *find_directions(curvature.statistics, curvature.patch, settings))
        return sst_plan(*self._solved[1], settings)

    def grid(self, settings: SstParameters, name: str) -> list[Any]:
        """Values to try of one parameter, the present one among them."""
        directions = self.plan(settings).directions.values()
        if name == "mu":
            values = torch.cat([d.values for d in directions])
            positive = values[values > len(values) * torch.finfo(values.dtype).eps * values.max()]
            tried = [float(f"{m * float(positive.median()):.3g}") for m in _MULTIPLES]
        elif name == "rho":
            whole = 0.5 * sum(d.cost_full for d in directions)
            tried = [float(f"{share * whole:.3g}") for share in _COSTS]
        else:
            tried = list({"k": _SHARES, "damping": _DAMPING}[name])
        present = getattr(settings, name)
        return tried if present is None or present in tried else [*tried, present]

    def best(self, settings: SstParameters) -> SstParameters:
        """The settings with their best α, every strength measured."""
        family = [replace(settings, alpha=alpha) for alpha in self.alphas]
        if repr(family[0]) not in self.rows:
            merged = [self._merged(candidate) for candidate in family]
            for candidate, result in zip(family, measure(self.problem, merged), strict=True):
                self.rows[repr(candidate)] = _row(candidate, result)
            self._bar.update()
        return min(family, key=self.loss)

    def _merged(self, settings: SstParameters) -> Merged:
        """The model as it would be written."""
        plan, problem = self.plan(settings), self.problem
        rank, alpha = problem.config.output.rank, settings.alpha
        updates = {name: plan.low_rank(problem, name, alpha, rank)[0] for name in problem.names}
        return Merged(updates, plan.merged_biases(problem, alpha))


def _shrinkable(settings: SstParameters) -> list[str]:
    """The Fishers that shrinkage changes; F_harm of "gram" keeps its rows, whose N × N problem a search can afford."""
    forms = {kind: settings.form(kind) for kind in KINDS}
    own = {"diagonal": "diagonal", "kronecker": "kfac"}
    return [
        kind
        for kind, form in forms.items()
        if form.representation.partition("_")[0] != own[form.target] and (kind, form.representation) != ("harm", "gram")
    ]


def _with_intensities(settings: SstParameters, values: Mapping[str, float | str]) -> SstParameters:
    """The settings with these intensities; written as one where both Fishers have the same."""
    both = {kind: values.get(kind, settings.form(kind).shrinkage) for kind in KINDS}
    return replace(settings, shrinkage=both["harm"] if both["harm"] == both["benign"] else both)


def _same_intensities(settings: SstParameters) -> list[SstParameters]:
    """One intensity for all Fishers that shrink: the grid, and the formula where it knows them."""
    kinds = _shrinkable(settings)
    values: list[float | str] = list(_SHRINKAGE) if kinds else []
    if kinds and all(settings.form(kind).representation in ("exact", "gram") for kind in kinds):
        values.append("ledoit_wolf")
    return [_with_intensities(settings, dict.fromkeys(kinds, value)) for value in values]


def _own_intensities(settings: SstParameters) -> list[SstParameters]:
    """Another intensity for one of two Fishers: the next on the grid, either way."""
    kinds = _shrinkable(settings)
    tried = []
    for kind in kinds if len(kinds) > 1 else ():
        present = settings.form(kind).shrinkage
        if not isinstance(present, str):
            near = [s for s in _SHRINKAGE if s < present][-1:] + [s for s in _SHRINKAGE if s > present][:1]
            tried += [_with_intensities(settings, {kind: s}) for s in near]
    return tried


def _other_target(settings: SstParameters) -> list[SstParameters]:
    """The other target for both, where something is shrunk."""
    if not any(settings.form(kind).shrinkage for kind in _shrinkable(settings)):
        return []
    others = [target for target in ("diagonal", "kronecker") if target != settings.shrinkage_target]
    return [replace(settings, shrinkage_target=target) for target in others]


def _row(settings: SstParameters, result: HeldOut) -> dict[str, Any]:
    """A candidate in the report."""
    forms = {kind: settings.form(kind) for kind in KINDS}
    tuned = {name: getattr(settings, name) for name in (SIZES[settings.select], "damping", "alpha")}
    tuned |= {f"shrinkage_{kind}": form.shrinkage for kind, form in forms.items()}
    tuned |= {f"target_{kind}": form.target for kind, form in forms.items()}
    return {**tuned, "objective": result.kl - result.refusal, "kl": result.kl, "refusal_loss": -result.refusal}
