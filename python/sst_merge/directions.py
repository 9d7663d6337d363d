r"""Directions of the safety patch by gain per cost: the pencils, solved.

The pencil is A v = λ B v, A = F_harm, B = F_benign + γI, both Fishers shrunk towards their diagonal,
F ← (1−s)F + s·diag F, and one γ = ε·Σ tr F_benign / Σ n over *all* modules: only then is λ comparable between modules.
With VᵀBV = I a patch φ has coordinates c = VᵀBφ, gain Σ λ_i c_i² and cost Σ c_i². There is a pencil for every module
("exact", "diagonal"), or one over the coordinates of all modules side by side ("gram"): A = JᵀJ/N has rank N at most,
so that an N × N problem gives all its directions of λ > 0, whatever n is. F_harm is not shrunk there: it would not be
of low rank any more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sst_kernels import Diagonal, EigenResult, Gram, LowRankPlusDiagonal, Pencil, Status, solve
from sst_kernels.result import REMEDIES

from .distributed import spread
from .settings import SstParameters
from .sums import FisherSums, Statistics

ALL_MODULES = "all modules"
ELEMENTS_AT_ONCE = 1 << 25  # of one side of the stacked pencils: 256 MB in float64


@dataclass(frozen=True)
class Directions:
    """Solution of one pencil, with the patch in its coordinates; all float64.

    Attributes:
        names: The modules whose coordinates follow one another: one, or with "gram" all.
        values: (m,), λ descending; m = n, or with "gram" the number of λ > 0.
        vectors: (n, m), V with VᵀBV = I.
        coefficients: (m,), c = VᵀBφ of the patch.
        gain_full: φᵀAφ of the whole patch.
        cost_full: φᵀBφ of the whole patch.
        gradient: (m,), b = Vᵀḡ: first-order change of log p(refusal) along v_i.
        ray_held: (m,), vᵀA_h v / vᵀB_h v with the held-out Fishers (not shrunk, B_h damped by the same γ).
        damping_share: (m,), γ vᵀv / vᵀBv: near 1, benign data said nothing about the direction.
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
    status: str


def shared_damping(benign: FisherSums, names: list[str], epsilon: float) -> float:
    """γ = ε·Σ tr F_benign / Σ n over the modules named."""
    diagonals = [benign.diagonal_of(name) for name in names]
    return epsilon * sum(float(d.sum()) for d in diagonals) / sum(len(d) for d in diagonals)


def find_directions(
    statistics: Statistics, patch: Mapping[str, Tensor], settings: SstParameters
) -> tuple[dict[str, Directions], float]:
    """Every pencil's eigenpairs: all of them, or with "gram" those of λ > 0.

    Args:
        statistics: Fishers of every module in `patch`.
        patch: Module name -> core of τ, (r_out, r_in).
        settings: Representation, shrinkage and damping are used.

    Returns:
        Module name (or `ALL_MODULES`) -> directions, and γ.

    Raises:
        ValueError: A pencil could not be solved; names the module and the remedy.
    """
    names = list(patch)
    gamma = shared_damping(statistics.benign, names, settings.damping)
    if not gamma > 0:
        raise ValueError("F_benign is zero: the benign data bear no gradient; check calibration.benign")
    phi = {name: patch[name].flatten() for name in names}
    if settings.fisher == "gram":
        return {ALL_MODULES: _across_modules(statistics, phi, settings, gamma)}, gamma

    def solved(own: list[str]) -> dict[str, Directions]:
        return _module_by_module(statistics, {name: phi[name] for name in own}, settings, gamma)

    return spread({name: float(len(vector)) ** 3 for name, vector in phi.items()}, solved), gamma


def _module_by_module(
    statistics: Statistics, phi: Mapping[str, Tensor], settings: SstParameters, gamma: float
) -> dict[str, Directions]:
    """The pencil of every module, in batches of equal n."""
    found: dict[str, Directions] = {}
    for group in _batches_of_equal_n(phi):
        a = torch.stack([_shrunk(statistics.harm, name, settings) for name in group])
        b = torch.stack([_shrunk(statistics.benign, name, settings) for name in group])
        if settings.fisher == "diagonal":
            b = b + gamma
            result = solve(Pencil(Diagonal(a), Diagonal(b)), b.shape[-1])
        else:
            b = b + gamma * torch.eye(b.shape[-1], dtype=b.dtype, device=b.device)
            result = solve(Pencil(a, b), b.shape[-1])
        for i, name in enumerate(group):
            status = _check_solved(f"module {name!r}", result, i)
            pairs = result.values[i], result.vectors[i]
            b_phi = b[i] @ phi[name] if b[i].ndim == 2 else b[i] * phi[name]
            found[name] = _directions(statistics, (name,), phi[name], b_phi, pairs, (gamma, status))
    return found


def _across_modules(
    statistics: Statistics, phi: Mapping[str, Tensor], settings: SstParameters, gamma: float
) -> Directions:
    """The pencil over all modules at once, by the N × N route."""
    names = tuple(phi)
    s, harm, benign = settings.shrinkage, statistics.harm, statistics.benign
    j_harm, j_benign = harm.joint_rows(names), benign.joint_rows(names)
    entries = gamma + s * torch.cat([benign.diagonal_of(name) for name in names])
    b = LowRankPlusDiagonal(j_benign.mT * ((1 - s) / benign.count) ** 0.5, entries)
    a = Gram(j_harm, harm.count)
    result = solve(Pencil(a, b), min(j_harm.shape))
    status = _check_solved(ALL_MODULES, result, ())
    above = int((result.values > len(entries) * torch.finfo(torch.float64).eps * result.values[:1]).sum())
    pairs = result.values[:above], result.vectors[:, :above]
    whole = torch.cat(list(phi.values()))
    return _directions(statistics, names, whole, (b @ whole[:, None])[:, 0], pairs, (gamma, status))


def _shrunk(sums: FisherSums, name: str, settings: SstParameters) -> Tensor:
    """(1−s)F + s·diag F, (n, n); only the diagonal, (n,), where the representation is diagonal."""
    diagonal = sums.diagonal_of(name)
    if settings.fisher == "diagonal":
        return diagonal
    s = settings.shrinkage
    return (1 - s) * sums.fisher(name) + s * torch.diag(diagonal)


def _batches_of_equal_n(phi: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names grouped by n, each group small enough to be stacked."""
    groups: defaultdict[int, list[str]] = defaultdict(list)
    for name, patch in phi.items():
        groups[len(patch)].append(name)
    for n, members in groups.items():
        size = max(1, ELEMENTS_AT_ONCE // (n * n))
        for start in range(0, len(members), size):
            yield members[start : start + size]


def _check_solved(where: str, result: EigenResult, i: int | tuple[()]) -> str:
    """The names of the i-th pencil's status bits; ValueError if it has no solution."""
    status = Status(int(result.status[i]))
    if not result.values[i].isfinite().all():
        reasons = "; ".join(text for bit, text in REMEDIES.items() if bit in status)
        raise ValueError(
            f"the pencil of {where} could not be solved: {reasons}. A is F_harm, B is F_benign + γI: raise "
            "`damping`, or give more benign examples"
        )
    return ", ".join(bit.name for bit in Status if bit in status)


def _directions(
    statistics: Statistics,
    names: tuple[str, ...],
    phi: Tensor,
    b_phi: Tensor,
    pairs: tuple[Tensor, Tensor],
    solved: tuple[float, str],
) -> Directions:
    """Diagnostics of one pencil's eigenpairs (λ, V), given φ, Bφ, γ and the status."""
    (values, vectors), (gamma, status) = pairs, solved
    coefficients = vectors.mT @ b_phi
    damping = gamma * vectors.square().sum(0)  # vᵀBv = 1
    held = statistics.benign_held.quadratic(names, vectors) + damping
    return Directions(
        names,
        values,
        vectors,
        coefficients,
        gain_full=float((values * coefficients.square()).sum()),
        cost_full=float(phi @ b_phi),
        gradient=vectors.mT @ torch.cat([statistics.gradient(name) for name in names]),
        ray_held=statistics.harm_held.quadratic(names, vectors) / held,
        damping_share=damping,
        status=status,
    )
