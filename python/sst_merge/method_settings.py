"""Settings of every merge method, by the method's name; SST's own are in `settings`."""

from __future__ import annotations

from dataclasses import dataclass

from .settings import AlphaParameters, FisherParameters, SstParameters


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
class DellaParameters(AlphaParameters):
    """DELLA; α is its scale λ.

    Attributes:
        drop: Mean probability of dropping an entry.
        window: Largest probability in a row less the smallest; drop ± window/2 lies in [0, 1).
        seed: Of the masks.
    """

    drop: float = 0.3
    window: float = 0.14
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what are no probabilities."""
        if not (self.drop - self.window / 2 >= 0 and self.drop + self.window / 2 < 1):
            raise ValueError(
                f"window: drop ± window/2 must lie in [0, 1), got {self.drop:g} ± {self.window / 2:g}; narrow the "
                "window, or move drop"
            )


@dataclass(frozen=True)
class DiagonalFisherParameters(FisherParameters):
    """What every method of diagonal Fishers takes.

    Attributes:
        coordinates: "weight", of ΔW; or "core".
    """

    coordinates: str = "weight"

    def __post_init__(self) -> None:
        """Refuse factors, but of one update whose entries are masked."""
        if self.coordinates == "factor" and not (isinstance(self, DiagonalSstParameters) and self.patch == "additive"):
            raise ValueError(
                "coordinates: factor is for merge_method diagonal_sst with patch: additive, since factors are "
                "coordinates of one adapter's update and not of a difference; use weight or core"
            )

    @property
    def collected(self) -> tuple[str, tuple[str, str]]:
        """Diagonals in the coordinates asked for."""
        return self.coordinates, ("diagonal", "diagonal")


@dataclass(frozen=True)
class DiagonalSstParameters(DiagonalFisherParameters):
    """Diagonal SST with the authors' masks.

    Attributes:
        coordinates: "weight", of ΔW; "core"; or "factor", the safety adapter's lora_A and lora_B as its authors take
            them, where the merge depends on how the factors are scaled, and only the additive patch has a meaning.
        mask: "hard" keeps the top share of r = f_harm/(f_benign + ε); "soft" weights by r/max r.
        share: Share of coordinates a hard mask keeps.
        scope: "module", ranking and maximum in every tensor; or "global", over all at once
            (full checkpoints only).
        epsilon: ε, in units of the mean of f_benign over all modules.
    """

    coordinates: str = "weight"
    mask: str = "hard"
    share: float = 0.25
    scope: str = "module"
    epsilon: float = 0.1


@dataclass(frozen=True)
class DataFreeParameters(AlphaParameters):
    """SST-V and SST-M: masks from the weights alone.

    Attributes:
        patch: "additive", Δ_u + α m⊙Δ_s; or "interpolate", Δ_u + α m⊙(Δ_s − Δ_u).
        mask: "hard" keeps the top share of r; "soft" weights by r/max r.
        share: Share of entries a hard mask keeps.
        scope: "module", ranking and maximum in every tensor; or "global", over all at once
            (full checkpoints only).
        epsilon: ε, in units of the mean over all modules of what it is added to: Δ_u² (SST-V), |θ_u| (SST-M).
    """

    patch: str = "additive"
    mask: str = "hard"
    share: float = 0.25
    scope: str = "module"
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
class IsotropicParameters(AlphaParameters):
    """Isotropic merging; α scales the merged update, as in the source.

    Attributes:
        common: Share of the directions that Δ_u + Δ_s gives, in [0, 1]; the others are the two adapters' own. 1 is
            Iso-C, below it is Iso-CTS.
    """

    common: float = 0.8


@dataclass(frozen=True)
class KnotsParameters(AlphaParameters):
    """KnOTS-TIES; α is the scale λ of TIES.

    Attributes:
        density: Share of the entries of ΣV_tᵀ each task keeps.
    """

    density: float = 1.0


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


@dataclass(frozen=True)
class GradientMatchingParameters(DiagonalFisherParameters):
    """Uncertainty-based gradient matching; α is the safety model's coefficient, the utility model's is 1.

    Attributes:
        patch: Where the path of the Fishers ends: "interpolate" at θ_s; "additive" at θ_0 + Δ_u + Δ_s.
        points: t of the points, 0 at θ_u; each Fisher is the mean over them.
        epsilon: The prior's curvature δ, in units of the mean of F_benign over all modules.
    """

    patch: str = "interpolate"
    points: tuple[float, ...] = (0.0, 1.0)
    epsilon: float = 1.0


@dataclass(frozen=True)
class RegMeanParameters(AlphaParameters):
    """RegMean; α is the safety model's coefficient, 1 − α the utility model's. Needs `calibration`.

    Attributes:
        alpha: α in [0, 1].
        reduction: a in [0, 1], multiplies the off-diagonal entries of the Gram matrices.
        epsilon: Added to their diagonals, in units of the mean of each.
    """

    alpha: float | tuple[float, ...] = 0.5
    reduction: float = 0.9
    epsilon: float = 1e-6


@dataclass(frozen=True)
class SafeLoraParameters(AlphaParameters):
    """SafeLoRA with V = Δ_s in the place of aligned less unaligned weights; αΔ_s is added to the projected Δ_u.

    Attributes:
        threshold: τ in [0, 1]: modules with cos(Δ_u, CΔ_u) < τ are unsafe.
        projector: "fast", C = VVᵀ/‖V‖_F, or "exact", the orthogonal projector on V's columns.
    """

    threshold: float = 0.35
    projector: str = "fast"


@dataclass(frozen=True)
class SafeMergeParameters(SafeLoraParameters):
    """SafeMERGE: unsafe modules are interpolated, the others keep Δ_u.

    Attributes:
        alpha: α in [0, 1], the safety adapter's share in unsafe modules.
    """

    alpha: float | tuple[float, ...] = 0.2


METHOD_PARAMETERS: dict[str, type[AlphaParameters]] = {
    "sst": SstParameters,
    "task_arithmetic": AlphaParameters,
    "interpolation": AlphaParameters,
    "ties": TiesParameters,
    "dare": DareParameters,
    "della": DellaParameters,
    "diagonal_sst": DiagonalSstParameters,
    "sst_v": DataFreeParameters,
    "sst_m": DataFreeParameters,
    "single_fisher": SingleFisherParameters,
    "tsv": TsvParameters,
    "isotropic": IsotropicParameters,
    "knots": KnotsParameters,
    "subspace_boosting": SubspaceBoostingParameters,
    "fisher_averaging": FisherAveragingParameters,
    "gradient_matching": GradientMatchingParameters,
    "regmean": RegMeanParameters,
    "safe_lora": SafeLoraParameters,
    "safe_merge": SafeMergeParameters,
}

AVERAGES = ("interpolation", "fisher_averaging", "regmean", "safe_merge")
"""Methods whose α is a share, at most 1."""
