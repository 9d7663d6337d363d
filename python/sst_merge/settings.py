"""Settings of a merge and of SST, with their defaults; `config` reads them from YAML and checks them."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any

import yaml

ROLES = ("utility", "safety")
KINDS = ("harm", "benign")
"""Of data, and of the Fishers that they give."""


@dataclass(frozen=True)
class AlphaParameters:
    """Parameters of every method.

    Attributes:
        alpha: Strength(s) of the safety patch.
    """

    alpha: float | tuple[float, ...] = 1.0


@dataclass(frozen=True)
class FisherParameters(AlphaParameters):
    """What every method that collects Fishers takes.

    Attributes:
        patch: "additive", τ = Δ_s; or "interpolate", τ = Δ_s − Δ_u.
        where: "local" Fishers at θ_ft, or "path" averages over points towards θ_ft + τ.
        points: t of the path's points.
        point_weights: "uniform", or "linear" for weights proportional to 1 − t.
        samples: Labels sampled per position for the true Fisher.
        seed: Of sampled labels and of the held-out draw.
    """

    patch: str = "additive"
    where: str = "path"
    points: tuple[float, ...] = (0.25, 0.5)
    point_weights: str = "uniform"
    samples: int = 1
    seed: int = 0

    @property
    def collected(self) -> tuple[str, tuple[str, str]]:
        """Coordinates ("core" or "weight"), and what sums keep (`sums.FisherSums`) of harmful and of benign data."""
        return "core", ("exact", "exact")

    @property
    def weighted_points(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """T of the points where Fishers are taken, and their normalised weights."""
        if self.where == "local":
            return (0.0,), (1.0,)
        weights = {t: 1.0 if self.point_weights == "uniform" else 1.0 - t for t in self.points}
        weights = {t: w for t, w in weights.items() if w}
        return tuple(weights), tuple(w / sum(weights.values()) for w in weights.values())


@dataclass(frozen=True)
class FisherForm:
    """How one of the two Fishers stands in the pencil.

    Attributes:
        representation: "exact", "gram", "diagonal", or "kfac" or "ekfac" with "_expand" or "_reduce".
        shrinkage: s in [0, 1], or "ledoit_wolf".
        target: "diagonal" or "kronecker".
    """

    representation: str
    shrinkage: float | str
    target: str

    @property
    def collected(self) -> str:
        """What sums must keep for it: EK-FAC has its eigenvalues from the exact Fisher."""
        return "exact" if self.representation.startswith("ekfac") else self.representation


@dataclass(frozen=True)
class SstParameters(FisherParameters):
    """SST in core coordinates; see `select`.

    Attributes:
        fisher: "exact", "kfac", "ekfac" or "diagonal", a pencil a module; or "gram", curvature across modules. One for
            both Fishers, or {harm: …, benign: …}.
        approximation: Of "kfac" and "ekfac": "expand" (over tokens) or "reduce" (over sequences).
        shrinkage: s in [0, 1], F ← (1−s)F + s·target; or "ledoit_wolf", by formula from the spread of the sequences
            (of "exact" and "gram"). One for both Fishers, or {harm: …, benign: …}.
        shrinkage_target: "diagonal", or "kronecker", the nearest Kronecker product. One, or {harm: …, benign: …}.
        damping: ε > 0, in units of the mean diagonal of F_benign.
        select: "top_k", "soft", "dof", "budget" or "signed".
        k: Count (integer) or share (float in (0, 1]) of a pencil's n directions that top_k keeps; with "gram" a
            share of those with λ > 0.
        scope: Of top_k and dof: "module", k in every module; or "global", k over all modules by one ranking.
        mu: μ > 0 of soft and dof; the median λ when null.
        rho: ρ > 0 of budget and signed, nats per sequence: what the merged patch may cost, ½φᵀBφ.
        steps: n; with more than one, the merge is made in n steps, Fishers taken afresh where each begins: a
            collection for every strength and every step but the first.
    """

    fisher: str | dict = "exact"
    approximation: str = "expand"
    shrinkage: float | str | dict = 0.0
    shrinkage_target: str | dict = "diagonal"
    damping: float = 1.0
    select: str = "top_k"
    k: int | float = 0.2
    scope: str = "module"
    mu: float | None = None
    rho: float | None = None
    steps: int = 1

    def form(self, kind: str) -> FisherForm:
        """How the Fisher of "harm" or "benign" stands in the pencil."""
        given = {name: getattr(self, name) for name in ("fisher", "shrinkage", "shrinkage_target")}
        defaults = {name: type(self).__dataclass_fields__[name].default for name in given}
        own = {n: v.get(kind, defaults[n]) if isinstance(v, dict) else v for n, v in given.items()}
        suffix = f"_{self.approximation}" if own["fisher"] in ("kfac", "ekfac") else ""
        return FisherForm(own["fisher"] + suffix, own["shrinkage"], own["shrinkage_target"])

    @property
    def collected(self) -> tuple[str, tuple[str, str]]:
        """Core coordinates, and what the representations that `fisher` names are made of."""
        return "core", (self.form("harm").collected, self.form("benign").collected)


@dataclass(frozen=True)
class ModelRef:
    """One adapter.

    Attributes:
        model: Its folder.
        weight: Multiplies its ΔW.
    """

    model: str
    weight: float = 1.0


@dataclass(frozen=True)
class TaskRef:
    """One of several sets of calibration data of a kind.

    Attributes:
        data: JSONL.
        weight: w_t > 0 of F = Σ_t w_t F_t, and of what is measured: weights that sum to 1 keep nats per sequence.
        name: Of the task, in the report and in the folder of statistics; the file's without its ending when null.
    """

    data: str
    weight: float = 1.0
    name: str | None = None


@dataclass(frozen=True)
class Calibration:
    """Calibration data.

    Attributes:
        harm: JSONL of forbidden prompts with refusals; or a list of tasks, each {data, weight, name}.
        benign: JSONL of prompts with answers that should not change; or a list of tasks.
        max_length: Longer sequences are cut.
        batch_size: Sequences a forward pass; rows, when they are packed.
        held_out: Share kept apart to judge directions by.
        packing: Several sequences share a row of max_length tokens; they do not see each other.
        max_new_tokens: Longest answer that is generated for a prompt without one.
        tokenizer: Whose tokenizer and chat template are used: "base", or a role whose adapter's folder has one.
    """

    harm: str | tuple[TaskRef, ...]
    benign: str | tuple[TaskRef, ...]
    max_length: int = 512
    batch_size: int = 8
    held_out: float = 0.25
    packing: bool = False
    max_new_tokens: int = 64
    tokenizer: str = "base"

    def tasks(self, kind: str) -> tuple[TaskRef, ...]:
        """The tasks of a kind, "harm" or "benign"; a path alone is one task with the name ""."""
        given = getattr(self, kind)
        return (TaskRef(given, name=""),) if isinstance(given, str) else given

    @property
    def files(self) -> tuple[str, ...]:
        """Every file of data."""
        return tuple(task.data for kind in ("harm", "benign") for task in self.tasks(kind))


@dataclass(frozen=True)
class Output:
    """How the merged adapter is written.

    Attributes:
        rank: Rank of every module; null is exact, as large as it needs to be.
        dtype: Of the stored factors.
        merge_into_base: Write a full checkpoint, the base with the merge added, instead of an adapter; it keeps the
            base's dtypes.
    """

    rank: int | None = None
    dtype: str = "float32"
    merge_into_base: bool = False

    def __post_init__(self) -> None:
        """Refuse a rank of what has none."""
        if self.merge_into_base and self.rank is not None:
            raise ValueError(f"output.rank: a checkpoint of the base has no rank, got {self.rank}; leave it out")


@dataclass(frozen=True)
class Config:
    """A checked configuration, every default filled in.

    Attributes:
        base_model: Folder of the base model, or its name in the local cache.
        utility: The adapter whose ability is to be kept.
        safety: The adapter whose refusals are wanted.
        merge_method: A key of `method_settings.METHOD_PARAMETERS`.
        parameters: Of that method.
        calibration: Data, for the methods that collect Fishers.
        output: How to write.
        dtype: In which the model runs; "auto" is the checkpoint's own.
        quantization: Load the base by bitsandbytes in "8bit" (LLM.int8) or "4bit" (NF4 with double quantisation, as
            QLoRA); null loads it as it is stored, quantised or not.
        device: Torch device of the merge's own computations, and of the model unless `device_map` spreads it.
        device_map: Of the model, by accelerate: "auto", "balanced", "sequential", or {module: device}.
        trust_remote_code: Run code that comes with the base model.
        download: Let the model library reach the network for `base_model`.
        fisher_dir: Folder of statistics: used if they are there, gone on with if they are there in part, else written.
        tune: Choose ε, shrinkage, k or μ, and α on the held-out sequences; see `tune`.
        memory: What the estimate of a process' memory on `device` may come to: 20GiB, 500MB, or bytes; null is what is
            available. Statistics that do not fit are collected in groups of modules, each by its own passes.
    """

    base_model: str
    utility: ModelRef
    safety: ModelRef
    merge_method: str = "sst"
    parameters: Any = field(default_factory=SstParameters)
    calibration: Calibration | None = None
    output: Output = field(default_factory=Output)
    dtype: str = "auto"
    quantization: str | None = None
    device: str = "cpu"
    device_map: str | dict | None = None
    trust_remote_code: bool = False
    download: bool = False
    fisher_dir: str | None = None
    tune: bool = False
    memory: str | int | None = None

    @property
    def memory_bytes(self) -> float:
        """`memory` in bytes, infinite where there is none; ValueError if it is no size."""
        if self.memory is None:
            return math.inf
        found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]i?)?B?\s*", str(self.memory))
        if found is None:
            raise ValueError(f"memory: expected a size such as 20GiB, 500MB or a number of bytes, got {self.memory!r}")
        number, unit = found.groups(default="")
        return float(number) * (1024 if unit.endswith("i") else 1000) ** " KMGT".index(unit[:1] or " ")

    @property
    def alphas(self) -> tuple[float, ...]:
        """Every strength asked for."""
        alpha = self.parameters.alpha
        return alpha if isinstance(alpha, tuple) else (alpha,)

    def to_yaml(self) -> str:
        """The resolved configuration, in the form that `load_config` reads."""
        tree = asdict(self)
        models = [
            {"model": ref["model"], "role": role, "parameters": {"weight": ref["weight"]}}
            for role, ref in ((role, tree.pop(role)) for role in ROLES)
        ]
        tree = {"base_model": tree.pop("base_model"), "models": models, **tree}
        if tree["calibration"] is None:
            del tree["calibration"]
        return yaml.safe_dump(_lists(tree), sort_keys=False)


def _lists(tree: Any) -> Any:
    """Tuples as lists, for YAML."""
    if isinstance(tree, dict):
        return {key: _lists(value) for key, value in tree.items()}
    return [_lists(value) for value in tree] if isinstance(tree, (list, tuple)) else tree
