r"""Directions of the safety patch by gain per cost: the pencils, solved.

The pencil is A v = λ B v, A = F_harm, B = F_benign + γI, each Fisher in a form of its own (exact, K-FAC, EK-FAC,
diagonal) and shrunk if asked for (`shrinkage`), with one γ = ε·Σ tr F_benign / Σ n over *all* modules: only then is λ
comparable between modules. With VᵀBV = I a patch φ has coordinates c = VᵀBφ, gain Σ λ_i c_i² and cost Σ c_i². There is
a pencil for every module, or with "gram" on either side one over the coordinates of all modules side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .distributed import spread
from .mixture import Mixture, Statistics
from .pencils import ALL_MODULES, SolvedPencil, solve_pencils
from .settings import KINDS, SstParameters
from .sums import FisherSums


@dataclass(frozen=True)
class Directions:
    """Solution of one pencil, with the patch in its coordinates; all float64.

    Attributes:
        names: The modules whose coordinates follow one another: one, or with "gram" all.
        values: (m,), λ descending; m = n, or fewer: the leading ones, where A is of low rank all of λ > 0 (`pencils`).
        vectors: (n, m), V with VᵀBV = I.
        coefficients: (m,), c = VᵀBφ of the patch.
        gain_full: φᵀAφ of the whole patch.
        cost_full: φᵀBφ of the whole patch.
        gradient: (m,), b = Vᵀḡ: first-order change of log p(refusal) along v_i.
        ray_held: (m,), vᵀA_h v / vᵀB_h v with the held-out Fishers (not shrunk, B_h damped by the same γ).
        damping_share: (m,), γ vᵀv / vᵀBv: near 1, benign data said nothing about the direction.
        shrinkage: s of F_harm and of F_benign.
        status: Names of the solver's status bits (`sst_kernels.Status`).
    """

    names: tuple[str, ...]
    values: Tensor
    vectors: Tensor
    coefficients: Tensor
    gain_full: float
    cost_full: float
    gradient: Tensor
    ray_held: Tensor
    damping_share: Tensor
    shrinkage: tuple[float, float]
    status: str


def shared_damping(benign: FisherSums | Mixture, names: list[str], epsilon: float) -> float:
    """γ = ε·Σ tr F_benign / Σ n over the modules named."""
    diagonals = [benign.diagonal_of(name) for name in names]
    return epsilon * sum(float(d.sum()) for d in diagonals) / sum(len(d) for d in diagonals)


def find_directions(
    statistics: Statistics, patch: Mapping[str, Tensor], settings: SstParameters
) -> tuple[dict[str, Directions], float]:
    """Every pencil's eigenpairs: all of them, or of pencils that are not formed those of largest λ (`pencils`).

    Args:
        statistics: Fishers of every module in `patch`.
        patch: Module name -> core of τ, (r_out, r_in).
        settings: Form of either Fisher, and damping, are used.

    Returns:
        Module name (or `ALL_MODULES`) -> directions, and γ.

    Raises:
        ValueError: A pencil could not be solved; names the module and the remedy.
    """
    names = list(patch)
    kept = settings.form("benign").collected  # of EK-FAC: it has the trace of the exact Fisher
    traces = (float(statistics.benign.operator(name, kept).trace()) for name in names)
    gamma = settings.damping * sum(traces) / sum(tau.numel() for tau in patch.values())
    if not gamma > 0:
        raise ValueError("F_benign is zero: the benign data bear no gradient; check calibration.benign")

    def solved(keys: Sequence[str]) -> dict[str, Directions]:
        own = patch if keys == [ALL_MODULES] else {name: patch[name] for name in keys}
        found = {}
        for pencil in solve_pencils(statistics, own, settings, gamma):
            phi = torch.cat([patch[name].flatten() for name in pencil.names])
            found[pencil.label] = _directions(statistics, pencil, phi, gamma)
        return {key: found[key] for key in keys}

    if any(settings.form(kind).representation == "gram" for kind in KINDS):
        return solved([ALL_MODULES]), gamma
    costs = {name: float(tau.numel()) ** 3 for name, tau in patch.items()}
    return spread(costs, solved, patch[names[0]].device), gamma


def _directions(statistics: Statistics, solved: SolvedPencil, phi: Tensor, gamma: float) -> Directions:
    """Diagnostics of one pencil's eigenpairs."""
    names, vectors = solved.names, solved.vectors
    damping = gamma * vectors.square().sum(0)  # vᵀBv = 1
    held = statistics.benign_held.quadratic(names, vectors) + damping
    return Directions(
        names,
        solved.values,
        vectors,
        coefficients=vectors.mT @ solved.b_phi,
        gain_full=float(phi @ solved.a_phi),
        cost_full=float(phi @ solved.b_phi),
        gradient=vectors.mT @ torch.cat([statistics.gradient(name) for name in names]),
        ray_held=statistics.harm_held.quadratic(names, vectors) / held,
        damping_share=damping,
        shrinkage=solved.shrinkage,
        status=solved.status,
    )
