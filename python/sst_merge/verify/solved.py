r"""A pencil with the pairs that are to be checked, and how far rounding may take them.

One bound serves every claim. A backward stable solver's λ̂_i obey

    |λ̂_i − λ_i| ≤ p(n) ε (‖A‖‖B⁻¹‖ + κ(B) λ_i)

(Anderson et al. 1999, LAPACK Users' Guide, 4.10), p a slowly growing function; here p(n) = max(n, 16), ε = 2⁻⁵², and
for all i the bound of λ_1, δ λ_1. The pairs are those of a pencil so near that no Rayleigh quotient of the two differs
by more than δ λ_1, the theorems hold for that pencil exactly, and evaluating a quotient errs by δ λ_1 at most again. A
claim about two quantities therefore has tolerance 4δ, in units of λ_1: known from A and B before any pair is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
REASON = "4δ, δ = p(n)ε(‖A‖‖B⁻¹‖/λ₁ + κ(B)): each of two quantities off by δ (solver) and by δ (evaluation)"
REASON_B = "4p(n)ε κ(B): rounding of Bv and vᵀBv against vᵀBv"


@dataclass(frozen=True)
class Solved:
    """A pencil A v = λ B v, its pairs, and a patch; all float64.

    Attributes:
        name: The module, or what was planted.
        a: A ⪰ 0, (n, n).
        b: B ≻ 0, (n, n).
        values: (m,), λ descending; those beyond m are zero.
        vectors: (n, m), VᵀBV = I.
        phi: (n,), a patch.
        stored_eps: Unit roundoff of what A was summed in.
    """

    name: str
    a: Tensor
    b: Tensor
    values: Tensor
    vectors: Tensor
    phi: Tensor
    stored_eps: float = EPS

    n = property(lambda self: len(self.a))
    m = property(lambda self: len(self.values))

    def normalised(self) -> Solved:
        """The same in units in which A and B are of order 1: powers of two, so that not a bit is lost."""
        a, b = (_exponent(x) // 2 * 2 for x in (self.a, self.b))
        return replace(
            self,
            a=torch.ldexp(self.a, torch.tensor(-a)),
            b=torch.ldexp(self.b, torch.tensor(-b)),
            values=torch.ldexp(self.values, torch.tensor(b - a)),
            vectors=torch.ldexp(self.vectors, torch.tensor(b // 2)),
        )

    @cached_property
    def factor(self) -> Tensor:
        """L of B = LLᵀ; a LinAlgError says that B is not positive definite."""
        return torch.linalg.cholesky(self.b)

    @cached_property
    def norms(self) -> tuple[float, float, float]:
        """‖A‖, ‖B‖ and 1/‖B⁻¹‖, 2-norms."""
        a, b = torch.linalg.eigvalsh(self.a), torch.linalg.eigvalsh(self.b)
        return float(a.abs().max()), float(b[-1]), max(float(b[0]), EPS * float(b[-1]))

    @property
    def p(self) -> int:
        """Value of p at n."""
        return max(self.n, 16)

    @property
    def scale(self) -> float:
        """λ_1, the unit of gain per cost; where the claimed one is not positive, ‖A‖/‖B‖."""
        norm_a, norm_b, _ = self.norms
        first = float(self.values[0])
        return first if first > 0 else norm_a / norm_b or 1.0

    @property
    def delta(self) -> float:
        """δ."""
        norm_a, norm_b, least = self.norms
        return self.p * EPS * (norm_a / least / self.scale + norm_b / least)

    @property
    def tolerance(self) -> float:
        """4δ."""
        return 4 * self.delta

    @property
    def tolerance_b(self) -> float:
        """4p(n)ε κ(B)."""
        _, norm_b, least = self.norms
        return 4 * self.p * EPS * norm_b / least

    @cached_property
    def coefficients(self) -> Tensor:
        """C = VᵀBφ, (m,)."""
        return self.vectors.mT @ (self.b @ self.phi)

    def ranks(self) -> list[int]:
        """The k that claims about the first k are tried at."""
        return sorted({k for k in (1, 2, self.m // 20, self.m // 4) if 1 <= k <= self.m})

    def ray(self, x: Tensor) -> Tensor:
        """xᵀAx / xᵀBx of every column."""
        return (x * (self.a @ x)).sum(0) / self.squared(x)

    def squared(self, x: Tensor) -> Tensor:
        """‖x‖²_B = xᵀBx of every column."""
        return (x * (self.b @ x)).sum(0)

    def feasible(self, y: Tensor) -> Tensor:
        """W = L⁻ᵀQ with Q an orthonormal basis of the columns of Y: WᵀBW = I."""
        return self.whitened(torch.linalg.qr(y).Q)

    def whitened(self, y: Tensor) -> Tensor:
        """L⁻ᵀY: what is isotropic becomes isotropic in the metric B."""
        return torch.linalg.solve_triangular(self.factor.mT, y, upper=True)

    def dual_norm(self, r: Tensor) -> float:
        """‖L⁻¹R‖₂, the largest over columns: the norm in which a residual bounds an error of λ."""
        return float(torch.linalg.solve_triangular(self.factor, r, upper=False).norm(dim=0).max())


def _exponent(x: Tensor) -> int:
    """E of max |x| = f·2ᴱ, ½ ≤ f < 1."""
    return int(torch.frexp(x.abs().max()).exponent)


def normal(rng: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(*shape, generator=rng, dtype=torch.float64)
