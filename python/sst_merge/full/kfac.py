r"""SST of one linear layer's whole weight W (d_out, d_in), with Kronecker-factored Fishers; vec is row-major.

The pencil is A v = λ B v with A = G_h⊗A_h and B = G_b⊗A_b + γI: the damping is exact, not spread over the factors
(Martens and Grosse 2015, section 6.3), so that one γ holds for all layers. (P⊗Q) vec(C) = vec(P C Qᵀ), and nothing of
the size of A is formed: with G_b = U diag(d) Uᵀ and A_b = V diag(e) Vᵀ, B is diagonal in the basis U⊗V, with entries
d_i e_j + γ.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sst_kernels import Damped, Kronecker, Pencil, Status, solve
from sst_kernels.result import REMEDIES

TOLERANCE = 1e-8
"""Relative residual at which the conjugate gradients stop."""

ITERATIONS = 500
"""At most so many of them."""


@dataclass(frozen=True)
class Filtered:
    """What is kept of a layer's patch.

    Attributes:
        update: φ, (d_out, d_in), float64.
        gain: φᵀAφ.
        cost: φᵀBφ.
        status: What the solver says of its result.
        converged: Whether it says that the result is right.
        values: λ of the directions that are kept, descending; None with `soft`.
    """

    update: Tensor
    gain: float
    cost: float
    status: str
    converged: bool
    values: Tensor | None = None


@dataclass(frozen=True)
class LayerPencil:
    """A = G_h⊗A_h and B = G_b⊗A_b + γI of a layer; float64.

    Attributes:
        harm: (G_h, A_h), (d_out, d_out) and (d_in, d_in), symmetric, positive semidefinite.
        benign: (G_b, A_b), likewise.
        gamma: γ > 0.
    """

    harm: tuple[Tensor, Tensor]
    benign: tuple[Tensor, Tensor]
    gamma: float

    def gain(self, update: Tensor) -> float:
        """φᵀAφ of φ (d_out, d_in)."""
        g, a = self.harm
        return float((update * (g @ update @ a)).sum())

    def cost(self, update: Tensor) -> float:
        """φᵀBφ of φ (d_out, d_in)."""
        g, a = self.benign
        return float((update * (g @ update @ a)).sum() + self.gamma * update.square().sum())

    def top(self, patch: Tensor, k: int) -> Filtered:
        """P_kτ = V_k V_kᵀ Bτ, V_k the eigenvectors of the k largest λ (T4).

        Args:
            patch: τ, (d_out, d_in), float64.
            k: At most d_out·d_in.

        Returns:
            What is kept.

        Raises:
            ValueError: There is no solution; with the remedy.

        Memory: k + some dozens of vectors of the layer's size.
        """
        result = solve(Pencil(Kronecker(*self.harm), Damped(Kronecker(*self.benign), self.gamma)), k)
        status = Status(int(result.status))
        if not result.values.isfinite().all():
            reasons = "; ".join(text for bit, text in REMEDIES.items() if bit in status)
            raise ValueError(f"could not be solved: {reasons}. Raise `damping`, or give more benign examples")
        g, a = self.benign
        image = g @ patch @ a + self.gamma * patch
        coefficients = result.vectors.mT @ image.flatten()
        return Filtered(
            (result.vectors @ coefficients).reshape(patch.shape),
            float((result.values * coefficients.square()).sum()),
            float(coefficients.square().sum()),
            ", ".join(bit.name for bit in Status if bit in status),
            Status.CONVERGED in status,
            result.values,
        )

    def soft(self, patch: Tensor, mu: float) -> Filtered:
        """φ = (A + μB)⁻¹Aτ, which minimises (φ−τ)ᵀA(φ−τ) + μφᵀBφ (T6), by preconditioned conjugate gradients.

        With φ = B^(-1/2) y it is (S + μI) y = S B^(1/2) τ, S = B^(-1/2) A B^(-1/2). The preconditioner is the inverse
        of Ŝ + μI with γ spread over the factors of B, where Ŝ is a Kronecker product.

        Args:
            patch: τ, (d_out, d_in), float64.
            mu: μ > 0.

        Returns:
            What is kept. Its status is "CONVERGED" where ‖residual‖ ≤ `TOLERANCE`·‖right side‖, in the norm of y.

        Cost: an iteration is 8 products of a factor with a matrix of the layer's size, 8(d_out + d_in)·d_out·d_in
        flops. Memory: eight matrices of the layer's size.
        """
        u, v, scale = self._basis
        g, a = u.mT @ self.harm[0] @ u, v.mT @ self.harm[1] @ v

        def apply(y: Tensor) -> Tensor:
            return scale * (g @ (scale * y) @ a) + mu * y

        right = scale * (g @ (u.mT @ patch @ v) @ a)
        y, residual = _conjugate_gradients(apply, self._preconditioner(g, a, mu), right)
        update = u @ (scale * y) @ v.mT
        converged = residual <= TOLERANCE
        status = "CONVERGED" if converged else f"MAX_ITERATIONS, relative residual {residual:.1e}"
        return Filtered(update, self.gain(update), self.cost(update), status, converged)

    @cached_property
    def _basis(self) -> tuple[Tensor, Tensor, Tensor]:
        """U, V, and (d_i e_j + γ)^(-1/2)."""
        (d, u), (e, v) = (torch.linalg.eigh(factor) for factor in self.benign)
        return u, v, (torch.outer(d.clamp(min=0), e.clamp(min=0)) + self.gamma).rsqrt()

    def _preconditioner(self, g: Tensor, a: Tensor, mu: float) -> object:
        """R -> (Ĝ⊗Â + μI)⁻¹R, Ĝ = (D + π√γ I)^(-1/2) G (…)^(-1/2), Â = (E + √γ/π I)^(-1/2) A (…)^(-1/2)."""
        u, v, _ = self._basis
        d, e = ((x.mT @ f @ x).diagonal().clamp(min=0) for x, f in zip((u, v), self.benign, strict=True))
        ratio = float((d.mean() / e.mean()).sqrt()) if d.any() and e.any() else 1.0
        root = self.gamma**0.5
        left, right = (d + ratio * root).rsqrt(), (e + root / ratio).rsqrt()
        alpha, p = torch.linalg.eigh(left[:, None] * g * left)
        beta, q = torch.linalg.eigh(right[:, None] * a * right)
        weight = 1 / (torch.outer(alpha.clamp(min=0), beta.clamp(min=0)) + mu)
        return lambda r: p @ (weight * (p.mT @ r @ q)) @ q.mT


def _conjugate_gradients(apply, precondition, right: Tensor) -> tuple[Tensor, float]:
    """X with apply(X) = right, and ‖right − apply(X)‖/‖right‖ as it is computed anew at the end."""
    x, size = torch.zeros_like(right), float(right.norm())
    if not size:
        return x, 0.0
    r = right.clone()
    p = z = precondition(r)
    rz = (r * z).sum()
    for _ in range(ITERATIONS):
        q = apply(p)
        step = rz / (p * q).sum()
        x, r = x + step * p, r - step * q
        if float(r.norm()) <= 0.5 * TOLERANCE * size:
            break
        z = precondition(r)
        before, rz = rz, (r * z).sum()
        p = z + (rz / before) * p
    return x, float((right - apply(x)).norm()) / size
