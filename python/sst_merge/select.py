r"""Directions of the safety patch by gain per cost, and filters over them.

Per module the pencil is A v = λ B v, A = F_harm, B = F_benign + γI, both Fishers shrunk towards their diagonal,
F ← (1−s)F + s·diag F, and one γ = ε·Σ tr F_benign / Σ n over *all* modules: only then is λ comparable between modules.
With VᵀBV = I a patch φ has coordinates c = VᵀBφ, gain Σ λ_i c_i² and cost Σ c_i²; a filter keeps Σ f_i c_i v_i.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sst_kernels import Diagonal, EigenResult, Pencil, Status, solve
from sst_kernels.result import REMEDIES

from .fisher import FisherSums, Statistics
from .settings import SstParameters

_ELEMENTS_AT_ONCE = 1 << 25  # of one side of the stacked pencils: 256 MB in float64


@dataclass(frozen=True)
class Directions:
    """Solution of one module's pencil, with the patch in its coordinates; all float64.

    Attributes:
        values: (n,), λ descending.
        vectors: (n, n), V with VᵀBV = I.
        coefficients: (n,), c = VᵀBφ.
        ray_held: (n,), vᵀA_h v / vᵀB_h v with the held-out Fishers (not shrunk, B_h damped by the same γ).
        damping_share: (n,), γ vᵀv / vᵀBv: near 1, benign data said nothing about the direction.
        slope: (n,), ḡᵀv_i c_i: first-order change of log p(refusal) from keeping direction i.
        status: Names of the solver's status bits (`sst_kernels.Status`).
    """

    values: Tensor
    vectors: Tensor
    coefficients: Tensor
    ray_held: Tensor
    damping_share: Tensor
    slope: Tensor
    status: str


def shared_damping(benign: FisherSums, names: list[str], epsilon: float) -> float:
    """γ = ε·Σ tr F_benign / Σ n over the modules named."""
    diagonals = [benign.diagonal_of(name) for name in names]
    return epsilon * sum(float(d.sum()) for d in diagonals) / sum(len(d) for d in diagonals)


def _shrunk(sums: FisherSums, name: str, settings: SstParameters) -> Tensor:
    """(1−s)F + s·diag F, (n, n); only the diagonal, (n,), where the representation is diagonal."""
    diagonal = sums.diagonal_of(name)
    if settings.fisher == "diagonal":
        return diagonal
    s = settings.shrinkage
    return (1 - s) * sums.fisher(name) + s * torch.diag(diagonal)


def _quadratic(fisher: Tensor, vectors: Tensor) -> Tensor:
    """vᵀFv for every column v, F given whole or as its diagonal."""
    product = fisher @ vectors if fisher.ndim == 2 else fisher.unsqueeze(1) * vectors
    return (vectors * product).sum(0)


def _batches_of_equal_n(statistics: Statistics, names: list[str]) -> Iterator[list[str]]:
    """Names grouped by n, each group small enough to be stacked."""
    groups: defaultdict[int, list[str]] = defaultdict(list)
    for name in names:
        groups[len(statistics.gradient[name])].append(name)
    for n, members in groups.items():
        size = max(1, _ELEMENTS_AT_ONCE // (n * n))
        for start in range(0, len(members), size):
            yield members[start : start + size]


def find_directions(
    statistics: Statistics, patch: Mapping[str, Tensor], settings: SstParameters
) -> tuple[dict[str, Directions], float]:
    """All eigenpairs of every module's pencil.

    Args:
        statistics: Fishers of every module in `patch`.
        patch: Module name -> core of τ, (r_out, r_in).
        settings: Representation, shrinkage and damping are used.

    Returns:
        Module name -> directions, and γ.

    Raises:
        ValueError: A pencil could not be solved; names the module and the remedy.
    """
    names = list(patch)
    gamma = shared_damping(statistics.benign, names, settings.damping)
    found: dict[str, Directions] = {}
    for group in _batches_of_equal_n(statistics, names):
        a = torch.stack([_shrunk(statistics.harm, name, settings) for name in group])
        b = torch.stack([_shrunk(statistics.benign, name, settings) for name in group])
        if settings.fisher == "diagonal":
            b = b + gamma
            result = solve(Pencil(Diagonal(a), Diagonal(b)), b.shape[-1])
        else:
            b = b + gamma * torch.eye(b.shape[-1], dtype=b.dtype, device=b.device)
            result = solve(Pencil(a, b), b.shape[-1])
        for i, name in enumerate(group):
            status = _check_solved(name, result, i)
            pairs = result.values[i], result.vectors[i]
            found[name] = _directions(statistics, name, patch[name].flatten(), (b[i], gamma), pairs, status)
    return {name: found[name] for name in names}, gamma


def _check_solved(name: str, result: EigenResult, i: int) -> str:
    """The names of the i-th pencil's status bits; ValueError if it has no solution."""
    status = Status(int(result.status[i]))
    if not result.values[i].isfinite().all():
        reasons = "; ".join(text for bit, text in REMEDIES.items() if bit in status)
        raise ValueError(
            f"the pencil of module {name!r} could not be solved: {reasons}. A is F_harm, B is F_benign + γI: raise "
            "`damping`, or give more benign examples"
        )
    return ", ".join(bit.name for bit in Status if bit in status)


def _directions(
    statistics: Statistics,
    name: str,
    phi: Tensor,
    metric: tuple[Tensor, float],
    pairs: tuple[Tensor, Tensor],
    status: str,
) -> Directions:
    """Diagnostics of one module's eigenpairs."""
    (b, gamma), (values, vectors) = metric, pairs
    b_phi = b @ phi if b.ndim == 2 else b * phi
    coefficients = vectors.mT @ b_phi
    norms = vectors.square().sum(0)
    held = _quadratic(statistics.harm_held.fisher(name), vectors)
    held = held / (_quadratic(statistics.benign_held.fisher(name), vectors) + gamma * norms)
    share = gamma * norms / _quadratic(b, vectors)
    slope = (vectors.mT @ statistics.gradient[name]) * coefficients
    return Directions(values, vectors, coefficients, held, share, slope, status)


def filter_factors(directions: Mapping[str, Directions], settings: SstParameters) -> dict[str, Tensor]:
    """f_i ∈ [0, 1] of every direction.

    Args:
        directions: From `find_directions`.
        settings: Rule, k, scope and μ are used.

    Returns:
        Module name -> (n,).

    Raises:
        ValueError: k is larger than the number of directions.
    """
    values = {name: d.values for name, d in directions.items()}
    if settings.select == "soft":
        mu = _median_gain(values) if settings.mu is None else settings.mu
        return {name: v.clamp(min=0) / (v.clamp(min=0) + mu) for name, v in values.items()}
    if settings.scope == "module":
        counts = {name: _count(settings.k, len(v), f"module {name!r}") for name, v in values.items()}
    else:
        counts = _global_counts(values, settings.k)
    return {name: (torch.arange(len(v), device=v.device) < counts[name]).to(v.dtype) for name, v in values.items()}


def _median_gain(values: Mapping[str, Tensor]) -> float:
    """Median of the λ above rounding: zeros of a low-rank F_harm say nothing about the scale of the others."""
    pooled = torch.cat(list(values.values()))
    positive = pooled[pooled > len(pooled) * torch.finfo(pooled.dtype).eps * pooled.max()]
    if not len(positive):
        raise ValueError("mu: every λ is zero, so there is no median to take; check that the harm data bear gradients")
    return float(positive.median())


def _count(k: int | float, n: int, where: str) -> int:
    """K as a count of n directions; a float is a share."""
    if isinstance(k, float):
        return max(1, round(k * n))
    if k > n:
        raise ValueError(f"k: {where} has n = {n} directions, got k = {k}; use k <= {n}, or a share such as k: 0.25")
    return k


def _global_counts(values: Mapping[str, Tensor], k: int | float) -> dict[str, int]:
    """How many of the k largest λ over all modules fall into each; ties go to the module named first."""
    ranked = torch.cat(list(values.values())).argsort(descending=True, stable=True)
    kept = ranked[: _count(k, len(ranked), "the model")]
    counts, start = {}, 0
    for name, v in values.items():
        counts[name] = int(((kept >= start) & (kept < start + len(v))).sum())
        start += len(v)
    return counts


def apply_filter(directions: Directions, factors: Tensor, core_shape: tuple[int, int]) -> Tensor:
    """Filter(τ) = Σ f_i c_i v_i, as a core (r_out, r_in)."""
    return (directions.vectors @ (factors * directions.coefficients)).reshape(core_shape)
