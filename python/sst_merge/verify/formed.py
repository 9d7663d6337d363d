r"""The two matrices of a run's pencil, formed: the definition of `pencils` and `shrinkage`, written down a second time.

A = (1−s)F_harm + s·T and B = (1−s)F_benign + s·T + γI, F = Σ_t w_t F_t over tasks, each Fisher in the form that the run
asks for. Up to `FORMED_UP_TO` coordinates nothing is left out for speed: a module's Fisher is a matrix, modules side by
side are a block diagonal, and rows across modules ("gram") are multiplied out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sst_kernels.operators import Operator

from ..directions import Directions
from ..mixture import Mixture, Statistics, tasks_in
from ..settings import KINDS, FisherForm, SstParameters
from ..shrinkage import intensity, targets
from ..sums import FisherSums
from .checks import Check
from .solved import EPS

_Product = Callable[[Tensor, Tensor], Tensor]

FORMED_UP_TO = 4096
"""Order up to which matrices are formed."""
_ALTERNATION = 1e-12
_BY_NORMS = "4p(n)ε‖F‖²/‖F−T‖²: a difference of sums of squares"
_BY_SVD = "(10⁻¹² + 4p(n)ε)/(1−ρ), ρ = (σ₂/σ₁)²: the merge alternates until a step changes 10⁻¹³"


@dataclass(frozen=True)
class Side:
    """RᵀR + blockdiag(D): A or B.

    Attributes:
        rows: R, (N, n); N is 0 where nothing goes across modules.
        blocks: D of each module, (n_i, n_i), or its diagonal (n_i,); or None for zeros.
    """

    rows: Tensor
    blocks: list[Tensor] | None

    def dense(self) -> Tensor:
        """The matrix, (n, n)."""
        product = self.rows.mT @ self.rows
        return product if self.blocks is None else product + torch.block_diag(*map(_matrix, self.blocks))

    def __matmul__(self, x: Tensor) -> Tensor:
        """Product with (n, m)."""
        y = self.rows.mT @ (self.rows @ x)
        return y if self.blocks is None else y + self._by_block(x, lambda d, part: d @ part, lambda d, part: d * part)

    def solve_blocks(self, x: Tensor) -> Tensor:
        """D⁻¹x for (n, m)."""
        return self._by_block(x, torch.linalg.solve, lambda d, part: part / d)

    def _by_block(self, x: Tensor, matrix: _Product, diagonal: _Product) -> Tensor:
        """A product with D, given those with a matrix and with a diagonal (n_i, 1)."""
        parts = x.split([len(block) for block in self.blocks])
        pairs = zip(self.blocks, parts, strict=True)
        return torch.cat([diagonal(d[:, None], part) if d.ndim == 1 else matrix(d, part) for d, part in pairs])


def _matrix(block: Tensor) -> Tensor:
    """A block as a matrix."""
    return block.diag() if block.ndim == 1 else block


def _plus(x: Tensor, y: Tensor) -> Tensor:
    """The sum of two blocks; of a matrix and a diagonal, a matrix."""
    return x + y if x.ndim == y.ndim else _matrix(x) + _matrix(y)


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
        A, B, and checks of what they are shrunk towards and by; None where a module alone is too large to be formed, or
        all together are and A is not one of rows alone.
    """
    cores = {name: patch[name] for name in d.names}
    given = [(getattr(statistics, kind), parameters.form(kind)) for kind in KINDS]
    if not all(_can_be_formed(sums, cores, form) for sums, form in given) or not (
        sum(tau.numel() for tau in cores.values()) <= FORMED_UP_TO or _is_rows_alone(*given[0], cores)
    ):
        return None
    (a, first), (b, second) = (_side(sums, cores, form, s) for (sums, form), s in zip(given, d.shrinkage, strict=True))
    damped = [gamma * torch.ones_like(tau, dtype=torch.float64).flatten() for tau in cores.values()]
    blocks = damped if b.blocks is None else [_plus(*pair) for pair in zip(b.blocks, damped, strict=True)]
    return a, Side(b.rows, blocks), first + second


def _in_rows(sums: FisherSums | Mixture, cores: Mapping[str, Tensor], form: FisherForm) -> bool:
    """Whether F is one of rows: across modules, or of a single module too large for a matrix."""
    if form.representation == "gram":
        return True
    alone = len(cores) == 1 and form.representation == "exact" and all(map(sums.row_count, cores))
    return alone and sum(tau.numel() for tau in cores.values()) > FORMED_UP_TO


def _is_rows_alone(sums: FisherSums | Mixture, form: FisherForm, cores: Mapping[str, Tensor]) -> bool:
    """Whether the matrix is RᵀR."""
    return form.shrinkage == 0 and _in_rows(sums, cores, form)


def _can_be_formed(sums: FisherSums | Mixture, cores: Mapping[str, Tensor], form: FisherForm) -> bool:
    """Whether every block is small, or a diagonal."""
    if max(tau.numel() for tau in cores.values()) <= FORMED_UP_TO:
        return True
    towards_diagonal = form.shrinkage == 0 or form.target == "diagonal"
    return towards_diagonal and (form.representation == "diagonal" or _in_rows(sums, cores, form))


def _side(
    sums: FisherSums | Mixture, cores: Mapping[str, Tensor], form: FisherForm, found: float
) -> tuple[Side, list[Check]]:
    """(1−s)F + s·T of a pencil's modules, s the configuration's or the formula's; `found` is what the merge says."""
    names, tasks, in_rows = list(cores), tasks_in(sums).values(), _in_rows(sums, cores, form)
    rows = next(iter(cores.values())).new_zeros(0, sum(tau.numel() for tau in cores.values()), dtype=torch.float64)
    if in_rows:
        rows = torch.cat([(w / own.count) ** 0.5 * own.joint_rows(names) for own, w in tasks])
    groups, aims, checks = [names] if in_rows else [[name] for name in names], {}, []
    for name, tau in cores.items() if form.shrinkage != 0 else ():
        (aims[name],) = targets([sums.operator(name, form.representation)], [tuple(tau.shape)], form.target)
        checks.append(_nearest(sums, name, form, _block(aims[name], form.target), tuple(tau.shape)))
    shares = dict.fromkeys(names, form.shrinkage)
    if form.shrinkage == "ledoit_wolf":
        for group in groups:
            shares |= dict.fromkeys(group, intensity(sums, form, {name: aims[name] for name in group}))
            if form.target == "diagonal" and rows.shape[1] <= FORMED_UP_TO:
                whole = rows.mT @ rows if in_rows else _fisher(sums, group[0], form)
                checks.append(_by_formula(_label(group), whole, _variance(sums, group), shares[group[0]]))
    off = abs(sum(shares.values()) / len(names) - found)  # of several blocks the merge says the mean
    checks.append(Check("pencil", _label(names), "s asked for = s used", -off, 4 * EPS, "4ε: rounding of a mean"))
    shrunk = [shares[name] * _block(aims[name], form.target) for name in names] if aims else None
    if in_rows:
        return Side((1 - shares[names[0]]) ** 0.5 * rows, shrunk), checks
    kept = [(1 - shares[name]) * _fisher(sums, name, form) for name in names]
    return Side(rows, kept if shrunk is None else [_plus(*pair) for pair in zip(kept, shrunk, strict=True)]), checks


def _fisher(sums: FisherSums | Mixture, name: str, form: FisherForm) -> Tensor:
    """F = Σ_t w_t F_t of a module as a block."""
    tasks = tasks_in(sums).values()
    return sum(w * _block(own.operator(name, form.representation), form.representation) for own, w in tasks)


def _block(operator: Operator, kind: str) -> Tensor:
    """The diagonal of what is "diagonal", else the matrix."""
    return operator.diagonal() if kind == "diagonal" else operator.to_dense()


def _label(names: Sequence[str]) -> str:
    """Modules in a check."""
    return names[0] if len(names) == 1 else f"{len(names)} modules"


def _nearest(sums: FisherSums | Mixture, name: str, form: FisherForm, aim: Tensor, shape: tuple[int, int]) -> Check:
    """T, as the merge has it, against the diagonal or the leading singular pair of the rearranged F."""
    rounding = 4 * max(len(aim), 16) * EPS
    if form.target == "diagonal":
        tasks = tasks_in(sums).values()
        expected = sum(w * own.operator(name, form.representation).diagonal() for own, w in tasks)
        off = float((aim - expected).norm() / expected.norm().clamp(min=1e-300))
        return Check("pencil", name, "T = diag F", -off, rounding, "4p(n)ε: rounding")
    fisher = _matrix(_fisher(sums, name, form)).reshape(*shape, *shape)
    u, sigma, v = torch.linalg.svd(fisher.transpose(1, 2).reshape(shape[0] ** 2, shape[1] ** 2), full_matrices=False)
    best = sigma[0] * torch.kron(u[:, 0].reshape(shape[0], -1), v[0].reshape(shape[1], -1))
    rate = float(sigma[1] / sigma[0]) ** 2 if len(sigma) > 1 and sigma[0] > 0 else 0.0
    off = float((aim - best).norm() / sigma[0].clamp(min=1e-300))
    tolerance = (_ALTERNATION + rounding) / max(1 - rate, EPS)
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
