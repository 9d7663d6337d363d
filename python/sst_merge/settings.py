"""Settings of a merge, every default in one place; `config` reads them from YAML and checks them."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any

import yaml

ROLES = ("utility", "safety")


@dataclass(frozen=True)
class AlphaParameters:
    """Parameters of every method.

    Attributes:
        alpha: Strength(s) of the safety patch.
    """

    alpha: float | tuple[float, ...] = 1.0


@dataclass(frozen=True)
class TiesParameters(AlphaParameters):
    """TIES; α is its scale λ.

    Attributes:
        density: Share of entries each task keeps.
    """

    density: float = 0.2


@dataclass(frozen=True)
class DareParameters(AlphaParameters):
    """DARE.

    Attributes:
        drop: Probability of dropping an entry.
        seed: Of the masks.
    """

    drop: float = 0.5
    seed: int = 0


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
    def collected(self) -> tuple[str, str]:
        """Coordinates ("core" or "weight") and representation ("exact", "gram" or "diagonal") of the Fishers."""
        return "core", "exact"

    @property
    def weighted_points(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """T of the points where Fishers are taken, and their normalised weights."""
        if self.where == "local":
            return (0.0,), (1.0,)
        weights = {t: 1.0 if self.point_weights == "uniform" else 1.0 - t for t in self.points}
        weights = {t: w for t, w in weights.items() if w}
        return tuple(weights), tuple(w / sum(weights.values()) for w in weights.values())


@dataclass(frozen=True)
class SstParameters(FisherParameters):
    """SST in core coordinates; see `select`.

    Attributes:
        fisher: "exact" or "diagonal", a pencil a module; or "gram", one pencil over all modules.
        shrinkage: s in [0, 1], towards the diagonal; with "gram" of F_benign alone.
        damping: ε > 0, in units of the mean diagonal of F_benign.
        select: "top_k", "soft", "dof", "budget" or "signed".
        k: Count (integer) or share (float in (0, 1]) of directions that top_k keeps.
        scope: Of top_k and dof: "module", k in every module; or "global", k over all modules by one ranking.
        mu: μ > 0 of soft and dof; the median λ when null.
        rho: ρ > 0 of budget and signed, nats per sequence: what the merged patch may cost, ½φᵀBφ.
    """

    fisher: str = "exact"
    shrinkage: float = 0.0
    damping: float = 1.0
    select: str = "top_k"
    k: int | float = 0.05
    scope: str = "module"
    mu: float | None = None
    rho: float | None = None

    @property
    def collected(self) -> tuple[str, str]:
        """Core coordinates, and the representation that `fisher` names."""
        return "core", self.fisher


@dataclass(frozen=True)
class DiagonalFisherParameters(FisherParameters):
    """What every method of diagonal Fishers takes.

    Attributes:
        coordinates: "weight", of ΔW; or "core".
    """

    coordinates: str = "weight"

    @property
    def collected(self) -> tuple[str, str]:
        """Diagonals in the coordinates asked for."""
        return self.coordinates, "diagonal"


@dataclass(frozen=True)
class DiagonalSstParameters(DiagonalFisherParameters):
    """Diagonal SST with the authors' masks.

    Attributes:
        mask: "hard" keeps the top share of r = f_harm/(f_benign + ε); "soft" weights by r/max r.
        share: Share of coordinates a hard mask keeps, per tensor.
        epsilon: ε, in units of the mean of f_benign over all modules.
    """

    mask: str = "hard"
    share: float = 0.25
    epsilon: float = 0.1


@dataclass(frozen=True)
class DataFreeParameters(AlphaParameters):
    """SST-V and SST-M: masks from the weights alone.

    Attributes:
        patch: "additive", Δ_u + α m⊙Δ_s; or "interpolate", Δ_u + α m⊙(Δ_s − Δ_u).
        mask: "hard" keeps the top share of r; "soft" weights by r/max r.
        share: Share of entries a hard mask keeps, per tensor.
        epsilon: ε, in units of the mean over all modules of what it is added to: Δ_u² (SST-V), |θ_u| (SST-M).
    """

    patch: str = "additive"
    mask: str = "hard"
    share: float = 0.25
    epsilon: float = 0.1


@dataclass(frozen=True)
class SingleFisherParameters(FisherParameters):
    """Single-Fisher projection, (I − QQᵀ)Δ_u + αQQᵀΔ_s.

    Attributes:
        patch: Where the path of F_harm ends: "interpolate" at θ_s, and every module is reached; "additive" at
            θ_0 + Δ_u + Δ_s, and modules that Δ_s does not change are left as they are.
        k: Count (integer) or share (float in (0, 1]) of F_harm's eigenvectors in Q, per module; at most its rank.
    """

    patch: str = "interpolate"
    k: int | float = 0.05


@dataclass(frozen=True)
class TsvParameters(AlphaParameters):
    """TSV-Merge; α scales the merged update, as in the source.

    Attributes:
        share: Share of each update's singular triples kept where both adapters change a tensor: 1/T for T = 2 tasks.
    """

    share: float = 0.5


@dataclass(frozen=True)
class SubspaceBoostingParameters(AlphaParameters):
    """Subspace boosting of Δ_u + Δ_s; α scales the boosted update, as in the source.

    Attributes:
        beta: β in [0, 1]: singular values below the one at which this share of their sum is reached are raised to it.
    """

    beta: float = 0.01


@dataclass(frozen=True)
class FisherAveragingParameters(DiagonalFisherParameters):
    """Fisher averaging; α is the safety model's coefficient, 1 − α the utility model's.

    Attributes:
        alpha: α in [0, 1].
        patch: Where the path of the Fishers ends: "interpolate" at θ_s; "additive" at θ_0 + Δ_u + Δ_s.
        points: t of the points, 0 at θ_u; each Fisher is the mean over them.
        epsilon: Entries of a Fisher below ε times its mean over all modules are raised to that.
    """

    alpha: float | tuple[float, ...] = 0.5
    patch: str = "interpolate"
    points: tuple[float, ...] = (0.0, 1.0)
    epsilon: float = 1e-6


METHOD_PARAMETERS: dict[str, type[AlphaParameters]] = {
    "sst": SstParameters,
    "task_arithmetic": AlphaParameters,
    "interpolation": AlphaParameters,
    "ties": TiesParameters,
    "dare": DareParameters,
    "diagonal_sst": DiagonalSstParameters,
    "sst_v": DataFreeParameters,
    "sst_m": DataFreeParameters,
    "single_fisher": SingleFisherParameters,
    "tsv": TsvParameters,
    "subspace_boosting": SubspaceBoostingParameters,
    "fisher_averaging": FisherAveragingParameters,
}

AVERAGES = ("interpolation", "fisher_averaging")
"""Methods whose α is a share, at most 1."""


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
class Calibration:
    """Calibration data.

    Attributes:
        harm: JSONL of forbidden prompts with refusals.
        benign: JSONL of prompts with answers that should not change.
        max_length: Longer sequences are cut.
        batch_size: Sequences a forward pass; rows, when they are packed.
        held_out: Share kept apart to judge directions by.
        packing: Several sequences share a row of max_length tokens; they do not see each other.
        max_new_tokens: Longest answer that is generated for a prompt without one.
        tokenizer: Whose tokenizer and chat template are used: "base", or a role whose adapter's folder has one.
    """

    harm: str
    benign: str
    max_length: int = 512
    batch_size: int = 8
    held_out: float = 0.25
    packing: bool = False
    max_new_tokens: int = 64
    tokenizer: str = "base"


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
        merge_method: A key of `METHOD_PARAMETERS`.
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
