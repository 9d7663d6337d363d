r"""What is kept of the safety patch: filters Σ f_i c_i v_i over the directions, by one of five rules.

T4, T5 and T6 are the theorems of `docs/method.md`.

- top_k: f = 1 for the k largest λ of every module, or of all (T4: raises gain per cost).
- dof: the same with k = ⌈N_μ⌉, the degrees of freedom N_μ = Σ λ_i/(λ_i + μ).
- soft: f_i = λ_i/(λ_i + μ), the minimum of (φ−τ)ᵀA(φ−τ) + μ φᵀBφ (T6).
- budget: the most gain whose cost ½α²Σ f_i²c_i² is at most ρ nats: by falling λ over all modules, the last direction in
  part (T5, a fractional knapsack in f²).
- signed: no filter of the patch but the step that maximises ḡᵀφ − ½φᵀAφ with ½φᵀBφ ≤ ρ among the directions, of all
  modules together: coefficients b_i/(λ_i + μ), b = Vᵀḡ, μ ≥ 0 the least that keeps to the budget. α multiplies it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .directions import Directions
from .pencils import ALL_MODULES, named
from .settings import SstParameters

_BISECTIONS = 200
_NOISE = 1e-6  # of the norm of b: gradients are summed in float32


def kept_coefficients(directions: Mapping[str, Directions], settings: SstParameters, alpha: float) -> dict[str, Tensor]:
    """Coefficients s_i of what is kept, Filter(τ) = Σ s_i v_i; s_i = f_i c_i but for `signed`.

    Args:
        directions: From `find_directions`.
        settings: Rule, k, scope, μ and ρ are used.
        alpha: The strength that Filter(τ) is multiplied by, which `budget` takes into account.

    Returns:
        Key of `directions` -> (m,).

    Raises:
        ValueError: k is larger than the number of directions, or there is no λ > 0.
    """
    values = {name: d.values.clamp(min=0) for name, d in directions.items()}
    if settings.select == "signed":
        return _signed(directions, 2 * settings.rho)
    if settings.select == "budget":
        factors = _within(directions, 2 * settings.rho / alpha**2 if alpha else math.inf)
    elif settings.select == "soft":
        mu = _median_gain(values) if settings.mu is None else settings.mu
        factors = {name: v / (v + mu) for name, v in values.items()}
    else:
        counts = _counts(directions, values, settings)
        factors = {name: (torch.arange(len(v), device=v.device) < counts[name]).to(v) for name, v in values.items()}
    return {name: factors[name] * d.coefficients for name, d in directions.items()}


def _counts(
    directions: Mapping[str, Directions], values: Mapping[str, Tensor], settings: SstParameters
) -> dict[str, int]:
    """How many directions top_k and dof keep of each pencil."""
    if settings.select == "dof":
        mu = _median_gain(values) if settings.mu is None else settings.mu
        freedom = {name: float((v / (v + mu)).sum()) for name, v in values.items()}
        if settings.scope == "module":
            return {name: _ceil(f) for name, f in freedom.items()}
        return _global_counts(values, _ceil(sum(freedom.values())))
    # Where only λ > 0 were found the others are directions too, without gain; over all modules at once none is counted.
    sizes = {name: len(d.values if name == ALL_MODULES else d.vectors) for name, d in directions.items()}
    if settings.scope == "module":
        return {name: _count(settings.k, n, named(name)) for name, n in sizes.items()}
    return _global_counts(values, _count(settings.k, sum(sizes.values()), "the model"))


def _ceil(freedom: float) -> int:
    """⌈N_μ⌉, rounding aside."""
    return math.ceil(freedom * (1 - 1e-12))


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


def _ranked(values: Mapping[str, Tensor]) -> Tensor:
    """Order of all λ of all pencils, falling; ties go to the one named first."""
    return torch.cat(list(values.values())).argsort(descending=True, stable=True)


def _global_counts(values: Mapping[str, Tensor], k: int) -> dict[str, int]:
    """How many of the k largest λ over all pencils fall into each."""
    ranked = _ranked(values)
    kept = torch.zeros(len(ranked), dtype=torch.bool, device=ranked.device)
    kept[ranked[:k]] = True
    return {name: int(part.sum()) for name, part in _split(kept, values).items()}


def _split(pooled: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Entries of all pencils, one after another, by pencil."""
    return dict(zip(like, pooled.split([len(v) for v in like.values()]), strict=True))


def _within(directions: Mapping[str, Directions], cost: float) -> dict[str, Tensor]:
    """F by falling λ until Σ f²c² = cost; the direction that would exceed it in part, f² = what is left / c²."""
    values = {name: d.values for name, d in directions.items()}
    costs = torch.cat([d.coefficients.square() for d in directions.values()])
    ranked = _ranked(values)
    ordered = costs[ranked]
    left = cost - (ordered.cumsum(0) - ordered)  # before each direction
    squared = torch.where(ordered > 0, (left / ordered).clamp(0, 1), (left >= 0).to(ordered))
    return _split(torch.empty_like(costs).index_copy_(0, ranked, squared.sqrt()), values)


def _signed(directions: Mapping[str, Directions], cost: float) -> dict[str, Tensor]:
    """s_i = b_i/(λ_i + μ), μ = 0 if Σ s_i² ≤ cost then, else the root of Σ s_i² = cost by bisection in log μ."""
    b = torch.cat([d.gradient for d in directions.values()])
    values = torch.cat([d.values.clamp(min=0) for d in directions.values()])
    if not b.any():
        raise ValueError("select: signed needs the gradient of log p(refusal), and it is zero; check calibration.harm")

    # Where λ and b both are rounding, b/(λ + μ) would spend the budget on what does nothing.
    noise = (values <= len(values) * torch.finfo(values.dtype).eps * values.max()) & (b.abs() <= _NOISE * b.norm())
    b = torch.where(noise, 0.0, b)

    def step(mu: float) -> Tensor:
        return torch.where(b == 0, 0.0, b / (values + mu))

    # Σ s² ≤ Σ b²/μ², so the root is below ‖b‖/√cost; far below it the sum is that of μ = 0 to rounding.
    high = float(torch.linalg.vector_norm(b)) / math.sqrt(cost)
    low = high * 1e-30
    if float(step(low).square().sum()) <= cost:
        return _split(step(low), {name: d.values for name, d in directions.items()})
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if float(step(middle).square().sum()) > cost else (low, middle)
    return _split(step(high), {name: d.values for name, d in directions.items()})


def filtered_cores(
    directions: Mapping[str, Directions], kept: Mapping[str, Tensor], patch: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Filter(τ) = Σ s_i v_i as cores.

    Args:
        directions: From `find_directions`.
        kept: From `kept_coefficients`.
        patch: Module name -> core of τ, for its shape.

    Returns:
        Module name -> (r_out, r_in), float64.
    """
    cores = {}
    for label, d in directions.items():
        parts = (d.vectors @ kept[label]).split([patch[name].numel() for name in d.names])
        cores |= {name: part.reshape(patch[name].shape) for name, part in zip(d.names, parts, strict=True)}
    return cores
