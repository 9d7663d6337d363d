"""Pencils whose spectrum is known before they are solved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sst_kernels import Pencil, solve

from .checks import Check
from .solved import REASON, Solved, normal


@dataclass(frozen=True)
class Planted:
    """A pencil and all its eigenvalues.

    Attributes:
        name: What it is.
        a: A ⪰ 0, (n, n), float64.
        b: B ≻ 0, (n, n), float64.
        values: (n,), λ descending, by construction.
    """

    name: str
    a: Tensor
    b: Tensor
    values: Tensor

    def solved(self, rng: torch.Generator) -> Solved:
        """The pencil with the pairs that `solve` finds, and a random patch."""
        result = solve(Pencil(self.a, self.b), len(self.a))
        return Solved(self.name, self.a, self.b, result.values, result.vectors, normal(rng, len(self.a)))


def spectrum(planted: Planted, s: Solved) -> Check:
    """The planted eigenvalues against those that were found."""
    off = float(((planted.values - s.values) / s.values[0]).abs().max())
    return Check("planted", s.name, "λ found = λ planted", -off, s.tolerance, REASON)


def pencils(rng: torch.Generator) -> Iterator[Planted]:
    """Known spectra, from n = 2 to 300.

    Args:
        rng: Of bases, rows and eigenvalues.

    Yields:
        Pencils.
    """
    two = torch.tensor([2.0, 1.0], dtype=torch.float64).diag(), torch.tensor([4.0, 0.1], dtype=torch.float64).diag()
    yield Planted("2-D, n = 2", *two, torch.tensor([10.0, 0.5], dtype=torch.float64))
    yield _diagonal(50, rng)
    power = 1 / torch.arange(1.0, 301, dtype=torch.float64)
    yield planted("power law, n = 300", power, 1e4, rng)
    yield planted("spread, n = 100, κ(B) = 10¹⁰", torch.linspace(2, 1, 100, dtype=torch.float64), 1e10, rng)
    clusters = 2.0 ** -(torch.arange(96, dtype=torch.float64) // 4)
    noise = 1 + 1e-9 * torch.rand(96, generator=rng, dtype=torch.float64)
    yield planted("clusters of 4, n = 96", (clusters * noise).sort(descending=True).values, 1e3, rng)
    yield planted("each λ four times, λ_k = λ_{k+1}, n = 96", clusters, 1e3, rng)
    low = torch.cat([torch.linspace(3, 1, 20, dtype=torch.float64), torch.zeros(180, dtype=torch.float64)])
    yield planted("A of rank 20, n = 200", low, 1e4, rng)
    yield planted("all λ equal, n = 33", torch.ones(33, dtype=torch.float64), 1e2, rng)
    for exponent in (-140, 140):
        one = planted("", power[:40], 1e3, rng)
        name = f"A times 10^{exponent}, B times 10^{-exponent}, n = 40"
        yield Planted(name, one.a * 10.0**exponent, one.b * 10.0**-exponent, one.values * 10.0 ** (2 * exponent))
    yield _kronecker(rng)
    yield _gram(240, 30, 50, 0.1, rng)


def planted(name: str, values: Tensor, condition: float, rng: torch.Generator) -> Planted:
    """These λ: A = C diag(λ) Cᵀ and B = C Cᵀ, C = Q₁ D Q₂ᵀ with random orthogonal Q and D from 1 to κ(B)^(−½).

    Args:
        name: Of the pencil.
        values: λ, descending.
        condition: κ(B).
        rng: Of Q₁ and Q₂.

    Returns:
        The pencil.
    """
    n = len(values)
    left, right = (torch.linalg.qr(normal(rng, n, n)).Q for _ in range(2))
    c = left * torch.logspace(0, -0.5 * torch.tensor(condition).log10(), n, dtype=torch.float64) @ right.mT
    return Planted(name, _symmetric(c * values @ c.mT), _symmetric(c @ c.mT), values)


def _symmetric(x: Tensor) -> Tensor:
    """(X + Xᵀ)/2."""
    return (x + x.mT) / 2


def _diagonal(n: int, rng: torch.Generator) -> Planted:
    """Both diagonal: λ = a_i / b_i."""
    a, b = (torch.rand(n, generator=rng, dtype=torch.float64) + 0.01 for _ in range(2))
    return Planted(f"diagonal, n = {n}", a.diag(), b.diag(), (a / b).sort(descending=True).values)


def _kronecker(rng: torch.Generator) -> Planted:
    """(A₁⊗A₂) v = λ (B₁⊗B₂) v: λ = α_i β_j, v = u_i ⊗ w_j."""
    left = planted("", torch.linspace(2, 0.1, 12, dtype=torch.float64), 30, rng)
    right = planted("", 1 / torch.arange(1.0, 16, dtype=torch.float64), 30, rng)
    values = torch.outer(left.values, right.values).flatten().sort(descending=True).values
    a, b = _symmetric(torch.kron(left.a, right.a)), _symmetric(torch.kron(left.b, right.b))
    return Planted("Kronecker, n = 12·15", a, b, values)


def _gram(n: int, gains: int, costs: int, gamma: float, rng: torch.Generator) -> Planted:
    """A = JᵀJ/N, B = KᵀK/M + γI: the nonzero λ are those of [JJᵀ − JKᵀ(MγI + KKᵀ)⁻¹KJᵀ] / (γN)."""
    j, k = normal(rng, gains, n), normal(rng, costs, n)
    eye = torch.eye(costs, dtype=torch.float64)
    inner = torch.linalg.solve(costs * gamma * eye + k @ k.mT, k @ j.mT)
    nonzero = torch.linalg.eigvalsh(_symmetric(j @ j.mT - j @ k.mT @ inner)).flip(0) / (gamma * gains)
    values = torch.cat([nonzero, nonzero.new_zeros(n - gains)])
    b = k.mT @ k / costs + gamma * torch.eye(n, dtype=torch.float64)
    return Planted(f"Gram of {gains} and {costs} rows, n = {n}", j.mT @ j / gains, b, values)
