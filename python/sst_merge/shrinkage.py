r"""Shrinkage of a Fisher, F ← (1−s)F + s·T, towards its diagonal or its nearest Kronecker product.

Few sequences in many dimensions make noisy eigenvectors; T has fewer numbers to be noisy in. Both targets are the point
of their set that is nearest to F in Frobenius norm, so that ⟨F − T, T⟩ = 0 and ‖F − T‖² = ‖F‖² − ‖T‖².

The intensity by formula is that of Ledoit and Wolf (2004): E‖(1−s)F + sT − 𝔽‖² over samples of sequences is least at

    s* = Σ_ij [Var(F_ij) − Cov(F_ij, T_ij)] / E‖F − T‖²,

with every moment replaced by its estimate and s* clipped to [0, 1]. For T = diag F the covariances are the variances of
the diagonal, which drop out: the sums run over i ≠ j (Schäfer and Strimmer 2005, target D). The nearest Kronecker
product follows F, to first order, in the tangent space of such products at T, so that its covariances are the variance
of F within it. Which share of all variance that is, is not kept; it is taken as that of normal gradients,
Cov(F_ij, F_kl) ∝ F_ik F_jl + F_il F_jk. Samples are sequences (`FisherSums.sampling_variance`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sst_kernels import EKFAC, Diagonal, Gram, Kronecker, Scaled, Sum
from sst_kernels.operators import Operator, kronecker_product
from sst_kernels.simplify import simplified

from .mixture import Mixture
from .settings import FisherForm
from .sums import FisherSums, squared_norms

Contraction = Callable[[Tensor], Tensor]

_TOLERANCE = 1e-13  # change of a factor's direction at which the alternation ends
_ALTERNATIONS = 500


def targets(operators: Sequence[Operator], shapes: Sequence[tuple[int, int]], target: str) -> list[Operator]:
    """T of every module.

    Args:
        operators: F of every module.
        shapes: (r_out, r_in) of their cores.
        target: "diagonal" or "kronecker".

    Returns:
        Diagonal; or Kronecker, within a structure that holds it (Diagonal, EKFAC) that structure.
    """
    if target == "diagonal":
        return [Diagonal(operator.diagonal()) for operator in operators]
    return [nearest_kronecker(operator, shape) for operator, shape in zip(operators, shapes, strict=True)]


def nearest_kronecker(operator: Operator, shape: tuple[int, int]) -> Operator:
    r"""The P ⊗ Q of least ‖F − P ⊗ Q‖_F: the leading singular pair of the rearranged F (Van Loan and Pitsianis 1993).

    With R[(i,k), (j,l)] = F[(i,j), (k,l)], P ⊗ Q becomes vec(P) vec(Q)ᵀ, and R vec(Q) = vec(tr₂[(I ⊗ Q) F]). That map
    and its transpose take positive semidefinite matrices to such, hence so does RᵀR; power iteration with it from
    Q = I therefore stays in that cone, and ends in its leading eigenvector, which lies in the cone too and is not
    orthogonal to I, its trace being positive (Krein and Rutman 1948). So P and Q are positive semidefinite with F.

    Args:
        operator: F ⪰ 0, of order r_out·r_in, vec row-major.
        shape: (r_out, r_in), the orders of P and Q.

    Returns:
        The product: Kronecker; of a Diagonal, a Diagonal; of an EKFAC, an EKFAC in the same basis.

    Cost: n² flops a step from a matrix, N·n·(r_out + r_in) from N rows; a few dozen steps.
    """
    if isinstance(operator, Kronecker):
        return operator
    if isinstance(operator, Diagonal | EKFAC):  # vec(P) and vec(Q) have no entry off the diagonal of that basis
        entries = operator.entries.reshape(shape)
        left, sigma, right = torch.linalg.svd(entries, full_matrices=False)
        product = (sigma[0] * left[:, 0].abs()).outer(right[0].abs())
        if isinstance(operator, Diagonal):
            return Diagonal(product.flatten())
        return EKFAC(operator.left_vectors, operator.right_vectors, product)
    forward, backward = _contractions(operator, shape)
    q = torch.eye(shape[1], dtype=operator.dtype, device=operator.device)
    q = q / q.norm()
    for _ in range(_ALTERNATIONS):
        p = forward(q)
        if not p.norm() > 0:
            return Kronecker(p, q)
        p = p / p.norm()
        new = backward(p)
        sigma = new.norm()
        moved, q = (new / sigma - q).norm(), new / sigma
        if moved <= _TOLERANCE:
            break
    return Kronecker(sigma * p, q)


def _contractions(operator: Operator, shape: tuple[int, int]) -> tuple[Contraction, Contraction]:
    """Q ↦ tr₂[(I ⊗ Q) F] and P ↦ tr₁[(P ⊗ I) F]."""
    if isinstance(operator, Gram):
        cores = operator.rows.unflatten(-1, shape) / operator.count.sqrt()
        return (
            lambda q: torch.tensordot(cores @ q, cores, ([0, 2], [0, 2])),
            lambda p: torch.tensordot(p @ cores, cores, ([0, 1], [0, 1])),
        )
    dense = operator.to_dense().reshape(*shape, *shape)
    rearranged = dense.transpose(1, 2).reshape(shape[0] ** 2, shape[1] ** 2)
    return (
        lambda q: (rearranged @ q.flatten()).reshape(shape[0], shape[0]),
        lambda p: (p.flatten() @ rearranged).reshape(shape[1], shape[1]),
    )


def intensity(sums: FisherSums | Mixture, form: FisherForm, aims: Mapping[str, Operator]) -> float:
    """s: the number given, or by the formula above.

    Args:
        sums: Of the Fisher.
        form: Its intensity and target.
        aims: T of each module that is part of this Fisher: of one, or with "gram" of any number.

    Returns:
        In [0, 1]; 1 from a single sequence.
    """
    if form.shrinkage != "ledoit_wolf":
        return form.shrinkage
    names = list(aims)
    variance, norm = sums.sampling_variance(names), squared_norms(sums, names)
    if form.target == "diagonal":
        spread, distance = float(variance[0] - variance[1]), float(norm[0] - norm[1])
    else:
        following = (
            _share_followed(sums.fisher(name), aim) * sums.sampling_variance([name])[0] for name, aim in aims.items()
        )
        spread = float(variance[0] - sum(following))
        distance = float(norm[0]) - sum(float(_squared_norm(aim)) for aim in aims.values())
    return min(1.0, spread / distance) if distance > 0 and math.isfinite(spread) else float(spread != 0)


def _share_followed(fisher: Tensor, aim: Kronecker) -> Tensor:
    r"""Variance of F in the tangent space of P ⊗ Q, as a share of all of it, for g ~ N(0, F).

    With P and Q of norm 1 the projection of a deviation E has ‖tr₂[(I⊗Q)E]‖² + ‖tr₁[(P⊗I)E]‖² − tr[(P⊗Q)E]² as its
    squared norm; the mean of each follows from Cov(F_ij, F_kl) ∝ F_ik F_jl + F_il F_jk, that of ‖E‖² is (tr F)² + ‖F‖².

    Args:
        fisher: F, (n, n).
        aim: P ⊗ Q.

    Returns:
        In [0, 1].
    """
    p, q = (factor.to_dense() for factor in (aim.left, aim.right))
    p, q = p / p.norm(), q / q.norm()
    blocks = fisher.reshape(len(p), len(q), len(p), len(q)).permute(0, 2, 1, 3)  # (i, k) -> (r_in, r_in)
    total = _contracted(blocks, q) + _contracted(blocks.permute(2, 3, 0, 1), p)
    product = kronecker_product(p, q, fisher)
    total = total - 2 * (product * product.mT).sum()
    return total / (fisher.trace().square() + fisher.square().sum())


def _contracted(blocks: Tensor, q: Tensor) -> Tensor:
    """Σ_ik tr(B_ii Q B_kk Q) + tr(B_ik Q B_ik Q)."""
    mean = blocks.diagonal(dim1=0, dim2=1).sum(-1) @ q
    turned = blocks @ q
    return (mean * mean.mT).sum() + (turned * turned.mT).sum()


def _squared_norm(product: Kronecker) -> Tensor:
    """‖P ⊗ Q‖²."""
    return (product.left.to_dense().norm() * product.right.to_dense().norm()).square()


def shrunk(operator: Operator, aim: Operator, s: float) -> Operator:
    """(1−s)F + s·T, with as much structure as is left.

    Args:
        operator: F.
        aim: T.
        s: In [0, 1].

    Returns:
        F itself for s = 0, T for s = 1.
    """
    if s in (0.0, 1.0):
        return aim if s else operator
    if isinstance(operator, EKFAC) and isinstance(aim, EKFAC):  # of one basis
        return EKFAC(operator.left_vectors, operator.right_vectors, (1 - s) * operator.entries + s * aim.entries)
    return simplified(Sum([Scaled(operator, 1 - s), Scaled(aim, s)]))
