"""One replicate of a comparison: a pair of models with data and a seed, on which every variant is merged and measured.

Either the same models under several seeds, or several pairs of models (the demo's worlds).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from ..baselines import interpolation, task_arithmetic
from ..fingerprint import fingerprint
from ..held_out import Merged, measure
from ..method_settings import AVERAGES
from ..methods import METHODS, Plan
from ..problem import Problem
from ..settings import Config, FisherParameters
from ..tune import tune
from .config import settings_of
from .evaluators import Evaluator
from .journal import Journal, code_fingerprint, file_digest
from .outcome import Outcome
from .step import quadratics
from .subject import exact_update, merged_model
from .user_code import PythonFunction, source_of
from .variants import Variant

BYTES_AT_ONCE = 1 << 30
"""Of dense updates at several strengths; at least one strength is held."""


@dataclass(frozen=True)
class Replicate:
    """A pair of models, data and evaluators.

    Attributes:
        name: Of its folder and in the report.
        config: Merge configuration whose method is sst: its parameters say with which Fishers steps are judged.
        evaluators: Name -> evaluator.
        seed: Sets the seed of every method (labels sampled, entries dropped, sequences held out) and the halves of the
            prompts.
    """

    name: str
    config: Config
    evaluators: Mapping[str, Evaluator]
    seed: int = 0


def _alone(core: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Problem], Plan]:
    """A model that is no merge, from (Δ_u, Δ_s)."""
    return lambda problem: Plan(lambda name, _: core(*problem.cores(name)), True, lambda u, s, _: core(u, s))


REFERENCES: dict[str, Callable[[Problem], Plan]] = {
    "base alone": _alone(lambda u, s: 0 * u),
    "utility alone": _alone(lambda u, s: interpolation(u, s, 0.0)),
    "safety alone": _alone(lambda u, s: interpolation(u, s, 1.0)),
    "both, whole": _alone(lambda u, s: task_arithmetic(u, s, 1.0)),
}
"""Models that are measured beside the merges; "utility alone" is every frontier's left end."""


class Bench:
    """Measures variants on one replicate; base model, adapters and Fishers are loaded once, when first needed.

    Args:
        replicate: What is measured on.
        work: Folder of rows and Fishers; what is there is not done again.
    """

    def __init__(self, replicate: Replicate, work: Path) -> None:
        self.replicate, self.work = replicate, work / replicate.name
        config = replicate.config
        judge = replace(config.parameters, seed=replicate.seed, alpha=1.0)
        self.problem = Problem(replace(config, parameters=judge, fisher_dir=str((self.work / "answers").absolute())))
        self.judge: FisherParameters = judge
        self._key = {
            "code": code_fingerprint(),
            "data": fingerprint(self.problem, judge),  # reads the calibration data, split by the judge's seed
            "evaluators": {name: _describe(evaluator) for name, evaluator in replicate.evaluators.items()},
        }

    def reference(self, name: str) -> dict[str, Any]:
        """The row of a model alone.

        Args:
            name: A key of `REFERENCES`.

        Returns:
            The row.

        Raises:
            ValueError: An evaluator fails; names the model.
        """
        journal = Journal(self.work, {**self._key, "reference": name})
        if not journal.rows:
            with self._named(name):
                self._measure(journal, REFERENCES[name](self.problem), (1.0,), {"merge_method": None})
        return journal.rows[1.0]

    def rows(self, label: str, variant: Variant, alphas: Sequence[float]) -> list[dict[str, Any]]:
        """A variant at every strength.

        Args:
            label: For error messages.
            variant: Method and parameters.
            alphas: Strengths; averages take those up to 1.

        Returns:
            Rows in the order of the strengths.

        Raises:
            ValueError: The merge or an evaluator fails; names label and α.
        """
        settings = settings_of(variant.merge_method, variant.parameters, label)
        settings = replace(settings, **({"seed": self.replicate.seed} if hasattr(settings, "seed") else {}))
        alphas = tuple(a for a in alphas if a <= 1 or variant.merge_method not in AVERAGES)
        searched = list(alphas) if variant.tune else None
        key = {"method": variant.merge_method, "parameters": asdict(replace(settings, alpha=1.0)), "tune": searched}
        journal = Journal(self.work, {**self._key, **key})
        missing = tuple(alpha for alpha in alphas if alpha not in journal.rows)
        if missing:
            with self._named(label):
                plan, said = self._solve(variant, settings, alphas)
                self._measure(journal, plan, missing, said)
        return [journal.rows[alpha] for alpha in alphas]

    @contextmanager
    def _named(self, label: str) -> Iterator[None]:
        """Errors say where they happened."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.replicate.name}, {label}: {error}") from error

    def _solve(self, variant: Variant, settings: Any, alphas: tuple[float, ...]) -> tuple[Plan, dict[str, Any]]:
        """The plan, and what its rows say of it: the method, and what tuning chose."""
        self._point(variant, settings)
        said = {"merge_method": variant.merge_method}
        if not variant.tune:
            return METHODS[variant.merge_method](self.problem, settings), said
        found = tune(self.problem, replace(settings, alpha=alphas))
        return METHODS[variant.merge_method](self.problem, found.parameters), {**said, "tuned": found.chosen}

    def _point(self, variant: Variant, settings: Any) -> None:
        """Tell the problem which method it serves, and where that method's Fishers are kept."""
        place = None
        if isinstance(settings, FisherParameters):
            said = [settings.collected, settings.patch, settings.weighted_points, settings.samples, settings.seed]
            place = str((self.work / f"fisher-{sha256(json.dumps(said).encode()).hexdigest()[:16]}").absolute())
        self.problem.config = replace(
            self.problem.config, merge_method=variant.merge_method, parameters=settings, fisher_dir=place
        )

    def _measure(self, journal: Journal, solved: Plan, alphas: tuple[float, ...], said: dict[str, Any]) -> None:
        """A row for every strength, into the journal."""
        problem = self.problem
        at_once = len(alphas)
        if not solved.in_core:
            size = 4 * sum(problem.updates(n)[0].shape[0] * problem.updates(n)[0].shape[1] for n in problem.names)
            at_once = max(1, BYTES_AT_ONCE // size)
        for start in range(0, len(alphas), at_once):
            chunk = alphas[start : start + at_once]
            plan = _computed(solved, problem.names, chunk)
            steps = quadratics(problem, plan, chunk, self.judge)
            merged = [
                Merged({n: exact_update(problem, plan, n, a) for n in problem.names}, plan.merged_biases(problem, a))
                for a in chunk
            ]
            held = measure(problem, merged)
            for alpha, step, h in zip(chunk, steps, held, strict=True):
                numbers = {"gain": step.gain, "cost": step.cost, "ratio": step.ratio, "kl": h.kl, "kl_se": h.kl_error}
                numbers |= {"refusal_change": h.refusal_change, "refusal_change_se": h.refusal_error}
                journal.add({"alpha": alpha, **said, **numbers, "outcomes": self._outcomes(plan, alpha)})

    def _outcomes(self, plan: Plan, alpha: float) -> dict[str, Outcome]:
        """What every evaluator says of the merged model."""
        outcomes: dict[str, Outcome] = {}
        with merged_model(self.problem, plan, alpha) as subject:
            for name, evaluator in self.replicate.evaluators.items():
                subject.model.eval()
                measured = evaluator(subject)
                if double := sorted(outcomes.keys() & measured.keys()):
                    raise ValueError(f"evaluator {name}: {double[0]!r} is another evaluator's too; rename one")
                outcomes |= measured
        return outcomes


def _computed(plan: Plan, names: Sequence[str], alphas: Sequence[float]) -> Plan:
    """The plan with its updates at some strengths computed once."""
    updates = {(name, alpha): plan.update(name, alpha) for alpha in alphas for name in names}
    return replace(plan, update=lambda name, alpha: updates[name, alpha])


def each_row(
    bench: Bench, variants: Mapping[str, Variant], alphas: Sequence[float]
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(label, rows) of every reference, then of every variant, as they are measured."""
    for name in REFERENCES:
        yield name, [bench.reference(name)]
    for label, variant in variants.items():
        yield label, bench.rows(label, variant, alphas)


def _describe(evaluator: Evaluator) -> Any:
    """What an evaluator's numbers depend on: its settings, and the content of its files as far as they are known."""
    said = asdict(evaluator) if is_dataclass(evaluator) else repr(evaluator)
    files = [evaluator.data] if hasattr(evaluator, "data") else []
    if isinstance(evaluator, PythonFunction):
        files = [path for path in [source_of(evaluator.function)] if path is not None]
    return [type(evaluator).__name__, said, [file_digest(path) for path in files]]
