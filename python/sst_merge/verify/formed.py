r"""The two matrices of a run's pencil, formed: the definition of `pencils` and `shrinkage`, written down a second time.

A = (1−s)F_harm + s·T and B = (1−s)F_benign + s·T + γI, F = Σ_t w_t F_t over tasks, each Fisher in the form that the run
asks for. Nothing of a matrix is left out for speed: a module's Fisher is dense, modules side by side are a block
diagonal, and rows across modules ("gram") are multiplied out where the order allows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..directions import Directions
from ..mixture import Mixture, tasks_in
from ..settings import KINDS, FisherForm, SstParameters
from ..shrinkage import intensity, targets
from ..sums import FisherSums, Statistics
from .checks import Check
from .solved import EPS

FORMED_UP_TO = 4096
"""Order up to which matrices are formed."""
_ALTERNATION = 1e-12
_BY_NORMS = "4p(n)ε‖F‖²/‖F−T‖²: a difference of sums of squares"
_BY_SVD = "10⁻¹²/(1−ρ) + 4p(n)ε, ρ = (σ₂/σ₁)²: the merge alternates until a step changes 10⁻¹³"


@dataclass(frozen=True)
class Side:
    """RᵀR + blockdiag(D): A or B.

    Attributes:
        rows: R, (N, n); N is 0 where nothing goes across modules.
        blocks: D of each module, (n_i, n_i); or None for zeros.
    """

    rows: Tensor
    blocks: list[Tensor] | None

    def dense(self) -> Tensor:
        """The matrix, (n, n)."""
        product = self.rows.mT @ self.rows
        return product if self.blocks is None else product + torch.block_diag(*self.blocks)

    def __matmul__(self, x: Tensor) -> Tensor:
        """Product with (n, m)."""
        y = self.rows.mT @ (self.rows @ x)
        if self.blocks is None:
            return y
        parts = x.split([len(block) for block in self.blocks])
        return y + torch.cat([block @ part for block, part in zip(self.blocks, parts, strict=True)])

    def solve_blocks(self, x: Tensor) -> Tensor:
        """D⁻¹x for (n, m)."""
        parts = x.split([len(block) for block in self.blocks])
        return torch.cat([torch.linalg.solve(block, part) for block, part in zip(self.blocks, parts, strict=True)])


def damping(statistics: Statistics, patch: Mapping[str, Tensor], parameters: SstParameters) -> float:
    """γ = ε Σ tr F_benign / Σ n over all modules, F_benign as it stands in the pencil but not shrunk."""
    form, tasks = parameters.form("benign"), tasks_in(statistics.benign).values()
    trace = sum(
        w * float(own.operator(name, form.representation).diagonal().sum()) for own, w in tasks for name in patch
    )
    return parameters.damping * trace / sum(tau.numel() for tau in patch.values())


def sides(
    statistics: Statistics, d: Directions, patch: Mapping[str, Tensor], parameters: SstParameters, gamma: float
) -> tuple[Side, Side, list[Check]] | None:
    """A and B of a pencil.

    Args:
        statistics: Fishers of the modules.
        d: The pencil's directions: its modules, and the intensities that a formula gave.
        patch: Module name -> core of τ, for its shape.
        parameters: Of the run.
        gamma: γ.

    Returns:
        A, B, and checks of what they are shrunk towards and by; None where a module alone is too large to be formed.
    """
    cores = {name: patch[name] for name in d.names}
    if max(tau.numel() for tau in cores.values()) > FORMED_UP_TO:
        return None
    (a, first), (b, second) = (
        _side(getattr(statistics, kind), cores, parameters.form(kind), s)
        for kind, s in zip(KINDS, d.shrinkage, strict=True)
    )
    zeros = [tau.new_zeros(tau.numel(), tau.numel(), dtype=torch.float64) for tau in cores.values()]
    blocks = [block + gamma * torch.eye(len(block)).to(block) for block in b.blocks or zeros]
    return a, Side(b.rows, blocks), first + second


def _side(
    sums: FisherSums | Mixture, cores: Mapping[str, Tensor], form: FisherForm, found: float
) -> tuple[Side, list[Check]]:
    """(1−s)F + s·T of a pencil's modules, s the configuration's or the formula's; `found` is what the merge says."""
    tasks, names = tasks_in(sums).values(), list(cores)
    fishers = {n: sum(w * own.operator(n, form.representation).to_dense() for own, w in tasks) for n in names}
    across = form.representation == "gram"
    rows = next(iter(fishers.values())).new_zeros(0, sum(map(len, fishers.values())))
    if across:
        rows = torch.cat([(w / own.count) ** 0.5 * own.joint_rows(names) for own, w in tasks])
    aims, checks = {}, []
    for name, tau in cores.items() if form.shrinkage != 0 else ():
        (aims[name],) = targets([sums.operator(name, form.representation)], [tuple(tau.shape)], form.target)
        checks.append(_nearest(name, fishers[name], aims[name].to_dense(), form.target, tuple(tau.shape)))
    shares = dict.fromkeys(names, form.shrinkage)
    if form.shrinkage == "ledoit_wolf":
        for group in [names] if across else [[name] for name in names]:
            shares |= dict.fromkeys(group, intensity(sums, form, {name: aims[name] for name in group}))
            if form.target == "diagonal":
                whole = rows.mT @ rows if across else fishers[group[0]]
                checks.append(_by_formula(_label(group), whole, _variance(sums, group), shares[group[0]]))
    off = abs(sum(shares.values()) / len(names) - found)  # of several blocks the merge says the mean
    checks.append(Check("pencil", _label(names), "s asked for = s used", -off, 4 * EPS, "4ε: rounding of a mean"))
    shrunk = [shares[name] * aims[name].to_dense() for name in names] if aims else None
    if across:
        return Side((1 - shares[names[0]]) ** 0.5 * rows, shrunk), checks
    kept = [(1 - shares[name]) * fishers[name] for name in names]
    return Side(rows, kept if shrunk is None else [f + t for f, t in zip(kept, shrunk, strict=True)]), checks


def _label(names: Sequence[str]) -> str:
    """Modules in a check."""
    return names[0] if len(names) == 1 else f"{len(names)} modules"


def _nearest(name: str, fisher: Tensor, aim: Tensor, target: str, shape: tuple[int, int]) -> Check:
    """T, as the merge has it, against the diagonal or the leading singular pair of the rearranged F."""
    if target == "diagonal":
        off = float((aim - fisher.diagonal().diag()).norm() / fisher.norm().clamp(min=1e-300))
        return Check("pencil", name, "T = diag F", -off, 4 * max(len(fisher), 16) * EPS, "4p(n)ε: rounding")
    rearranged = fisher.reshape(*shape, *shape).transpose(1, 2).reshape(shape[0] ** 2, shape[1] ** 2)
    u, sigma, v = torch.linalg.svd(rearranged, full_matrices=False)
    best = sigma[0] * torch.kron(u[:, 0].reshape(shape[0], -1), v[0].reshape(shape[1], -1))
    rate = float(sigma[1] / sigma[0]) ** 2 if len(sigma) > 1 and sigma[0] > 0 else 0.0
    tolerance = (_ALTERNATION + 4 * max(len(fisher), 16) * EPS) / max(1 - rate, EPS)
    off = float((aim - best).norm() / sigma[0].clamp(min=1e-300))
    return Check("pencil", name, "T = the leading singular pair of the rearranged F", -off, tolerance, _BY_SVD)


def _variance(sums: FisherSums | Mixture, names: Sequence[str]) -> Tensor:
    """Σ_t w_t² (Σ_ij, Σ_i) Var of task t."""
    return sum(w**2 * own.sampling_variance(names) for own, w in tasks_in(sums).values())


def _by_formula(label: str, fisher: Tensor, variance: Tensor, s: float) -> Check:
    """Σ_{i≠j} Var(F_ij) / Σ_{i≠j} F_ij², clipped to [0, 1] (Schäfer and Strimmer 2005)."""
    distance = float((fisher - fisher.diagonal().diag()).square().sum())
    spread = float(variance[0] - variance[1])
    expected = min(1.0, spread / distance) if distance > 0 else float(spread != 0)
    tolerance = 4 * max(len(fisher), 16) * EPS * (float(fisher.square().sum()) / distance if distance > 0 else 1.0)
    return Check("pencil", label, "s = Ledoit and Wolf's", -abs(s - expected), tolerance, _BY_NORMS)
