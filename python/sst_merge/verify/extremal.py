"""T1 to T3: no direction, and no k directions together, buy more gain per cost than the pencil's first."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .checks import Check
from .solved import REASON, Solved, normal

SHIFT = 1e-8
"""λ₁ is certified to be at most this share too small."""
_PERTURBED = (1e-1, 1e-3, 1e-6)
_POWER_STEPS = 20


def most_gain(s: Solved, rng: torch.Generator, count: int) -> list[Check]:
    """T1, max{vᵀAv : vᵀBv ≤ ρ} = ρλ₁.

    Args:
        s: The pencil and its pairs.
        rng: Of the challengers.
        count: Challengers of each kind: Gaussian, isotropic in the metric B, v₁ perturbed, and a quarter as many that
            power iterations with B⁻¹A make as strong as they can be.

    Returns:
        Three checks: no challenger wins, v₁ attains λ₁, and a Cholesky factor of (1 + σ)λ₁B − A exists, which no
        direction at all escapes.

    Cost: O(n² · count) flops, and n³/3 for the factor.
    """
    best = max(float(s.ray(v).max()) for v in _challengers(s, rng, count))
    first = float(s.values[0])
    attained = float(s.ray(s.vectors[:, :1])[0])
    shift = max(SHIFT, 2 * s.delta)
    return [
        Check("T1", s.name, "Ray(v) ≤ λ₁ for challengers v", (first - best) / s.scale, s.tolerance, REASON),
        Check("T1", s.name, "Ray(v₁) = λ₁", -abs(attained - first) / s.scale, s.tolerance, REASON),
        Check(
            "T1",
            s.name,
            "(1+σ)λ₁B − A = LLᵀ, σ = max(10⁻⁸, 2δ)",
            _least_pivot((1 + shift) * first * s.b - s.a, first * s.b),
            0.0,
            "none: the factor exists or it does not; the margin is its least pivot over that of λ₁B",
        ),
    ]


def _challengers(s: Solved, rng: torch.Generator, count: int) -> Iterator[Tensor]:
    """Blocks of columns v."""
    yield normal(rng, s.n, count)
    isotropic = s.whitened(normal(rng, s.n, count))
    yield isotropic
    for t in _PERTURBED:
        yield s.vectors[:, :1] + t * s.whitened(normal(rng, s.n, count)) / s.n**0.5
    x = isotropic[:, : max(1, count // 4)]
    for _ in range(_POWER_STEPS):
        x = torch.cholesky_solve(s.a @ x, s.factor)
        length = s.squared(x).sqrt()
        x = torch.where(length > 0, x / length, isotropic[:, : x.shape[1]])  # A = 0 takes every direction to zero
    yield x


def _least_pivot(matrix: Tensor, metric: Tensor) -> float:
    """Least l_jj² / metric_jj of a Cholesky factor; −1 where there is none."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) or not factor.isfinite().all():
        return -1.0
    return float((factor.diagonal() ** 2 / metric.diagonal()).min())


def subspaces(s: Solved, rng: torch.Generator, count: int) -> list[Check]:
    """T2 (Ky Fan), max{tr WᵀAW : WᵀBW = I_k} = Σ_{i≤k} λ_i; T3 (Courant–Fischer), max_S min_{v∈S} Ray(v) = λ_k.

    Args:
        s: The pencil and its pairs.
        rng: Of the challengers.
        count: An eighth as many of each kind, for every k of `Solved.ranks`: random k-dimensional spaces, the first k
            vectors perturbed, and random spaces after subspace iterations.

    Returns:
        For every k, that no space wins and that the first k vectors attain both.

    Cost: O(n²k · count) flops for every k.
    """
    checks = []
    for k in s.ranks():
        total, last = float(s.values[:k].sum()), float(s.values[k - 1])
        spectra = [_restricted(s, w) for w in _spaces(s, rng, k, max(2, count // 8))]
        own = _restricted(s, s.vectors[:, :k])
        trace, least = max(float(e.sum()) for e in spectra), max(float(e[0]) for e in spectra)
        for claim, statement, excess, scale in (
            ("T2", "tr WᵀAW ≤ Σ_{i≤k} λ_i for W with WᵀBW = I_k", total - trace, k * s.scale),
            ("T2", "tr V_kᵀAV_k = Σ_{i≤k} λ_i", -abs(float(own.sum()) - total), k * s.scale),
            ("T3", "min_{v∈S} Ray(v) ≤ λ_k for k-dimensional S", last - least, s.scale),
            ("T3", "min_{v∈span V_k} Ray(v) = λ_k", -abs(float(own[0]) - last), s.scale),
        ):
            checks.append(Check(claim, f"{s.name}, k = {k}", statement, excess / scale, s.tolerance, REASON))
    return checks


def _spaces(s: Solved, rng: torch.Generator, k: int, count: int) -> Iterator[Tensor]:
    """B-orthonormal W, (n, k)."""
    first = s.factor.mT @ s.vectors[:, :k]
    for _ in range(count):
        yield s.feasible(normal(rng, s.n, k))
        for t in _PERTURBED:
            yield s.feasible(first + t * normal(rng, s.n, k) / s.n**0.5)
    w = s.feasible(normal(rng, s.n, k))
    for _ in range(_POWER_STEPS):
        image = s.factor.mT @ torch.cholesky_solve(s.a @ w, s.factor)
        w = s.feasible(image if image.any() else s.factor.mT @ w)
    yield w


def _restricted(s: Solved, w: Tensor) -> Tensor:
    """Eigenvalues of WᵀAW, ascending."""
    inner = w.mT @ (s.a @ w)
    return torch.linalg.eigvalsh((inner + inner.mT) / 2)
