"""`--tune`: ε, shrinkage, k (or μ, or ρ) and α, chosen on the held-out sequences by one rule.

The rule: of all candidates, take the one with the least

    J = −E log p_merged(refusal) + E KL(p_ft ‖ p_merged),

nats per sequence, the first mean over held-out harmful prompts with their refusals, the second over held-out benign
sequences: answer as the safety data say where they speak, and as the utility model does elsewhere. Both are measured on
the merged model itself, not predicted. The search goes through the parameters one after another, every strength α with
each value, keeps the best so far, and ends with a round that changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

from .directions import find_directions
from .held_out import HeldOut, Merged, measure
from .methods import Plan, sst_plan
from .problem import Problem
from .settings import SstParameters

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

    Cost: about 20 to 50 settings; each solves the pencils if ε or shrinkage is new, and takes len(ALPHAS) forward
    passes over the held-out sequences.
    """
    with tqdm(desc="tune", unit="setting", leave=False) as bar:
        search = _Search(problem, parameters.alpha if isinstance(parameters.alpha, tuple) else ALPHAS, bar)
        best = search.best(parameters)
        for _ in range(_ROUNDS):
            before = best
            for name in (SIZES[best.select], "damping", "shrinkage"):
                tried = [search.best(replace(best, **{name: value})) for value in search.grid(best, name)]
                best = min([best, *tried], key=search.loss)
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
        """The merge by these settings; pencils are solved anew only for another ε or shrinkage."""
        key = settings.fisher, settings.damping, settings.shrinkage
        if self._solved[0] != key:
            curvature = self.problem.curvature(settings)
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
            tried = list({"k": _SHARES, "damping": _DAMPING, "shrinkage": _SHRINKAGE}[name])
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


def _row(settings: SstParameters, result: HeldOut) -> dict[str, Any]:
    """A candidate in the report."""
    tuned = {name: asdict(settings)[name] for name in ("damping", "shrinkage", SIZES[settings.select], "alpha")}
    return {**tuned, "objective": result.kl - result.refusal, "kl": result.kl, "refusal_loss": -result.refusal}
