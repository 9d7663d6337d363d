r"""The pencils A v = λ B v, A = F_harm, B = F_benign + γI, in whatever form either Fisher has, and their solution.

Up to `ALL_PAIRS_UP_TO` coordinates a module's pencil is solved for all its n pairs, in batches of equal n: diagonal
pencils by their quotients, others as matrices. Beyond, where an exact F_harm has n/2 rows at most and the selection
keeps no more, and over all modules at once ("gram" on either side), A and B are never formed. They are

    A = J_hᵀJ_h + D_h,   B = J_bᵀJ_b + D_b,

rows (of "gram", or of a large module) beside blocks, one a module (of every other form, of shrinkage, of damping). With
D_b = LLᵀ block by block (Cholesky, or the eigenbasis of a Kronecker product with its damping) the pencil is solved in
the coordinates Lᵀv, where B is the identity and a product of few rows:

- D_h = 0: A has rank N at most, and an N × N problem gives every direction with λ > 0, whatever n is;
- else all pairs of a small pencil, and of a larger one as many as there are harmful sequences, by iteration.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sst_kernels import (
    EKFAC,
    Damped,
    Dense,
    Diagonal,
    EigenResult,
    FunctionOperator,
    Gram,
    Kronecker,
    LowRankPlusDiagonal,
    Pencil,
    Status,
    solve,
)
from sst_kernels.operators import Operator
from sst_kernels.preconditioners import diagonalized
from sst_kernels.result import REMEDIES
from sst_kernels.simplify import simplified

from .mixture import Mixture, Statistics
from .settings import KINDS, FisherForm, SstParameters
from .shrinkage import intensity, shrunk, targets
from .sums import FisherSums

ALL_MODULES = "all modules"
ALL_PAIRS_UP_TO = 4096  # coordinates
ELEMENTS_AT_ONCE = 1 << 25  # of one side of the stacked pencils: 256 MB in float64


@dataclass(frozen=True)
class SolvedPencil:
    """One pencil's eigenpairs, and its products with the patch; all float64.

    Attributes:
        label: The module's name, or `ALL_MODULES`.
        names: The modules whose coordinates follow one another.
        values: (m,), λ descending.
        vectors: (n, m), V with VᵀBV = I.
        a_phi: Aφ of the patch, (n,).
        b_phi: Bφ, (n,).
        shrinkage: s of F_harm and of F_benign.
        status: Names of the solver's status bits (`sst_kernels.Status`).
    """

    label: str
    names: tuple[str, ...]
    values: Tensor
    vectors: Tensor
    a_phi: Tensor
    b_phi: Tensor
    shrinkage: tuple[float, float]
    status: str


def solve_pencils(
    statistics: Statistics, patch: Mapping[str, Tensor], settings: SstParameters, gamma: float
) -> Iterator[SolvedPencil]:
    """The pencil of every module, or the one of all of them.

    Args:
        statistics: Fishers of every module in `patch`.
        patch: Module name -> core of τ, (r_out, r_in).
        settings: The form of each Fisher is used.
        gamma: γ.

    Yields:
        Solutions, large modules last.

    Raises:
        ValueError: One could not be solved; names the module and the remedy.
    """
    forms = settings.form("harm"), settings.form("benign")
    if any(form.representation == "gram" for form in forms):
        yield _solve_unformed(ALL_MODULES, statistics, patch, forms, gamma)
        return
    unformed = unformed_modules(statistics, patch, settings)
    small = {name: tau for name, tau in patch.items() if name not in unformed}
    for group in _batches_of_equal_n(small):
        yield from _solve_batch(statistics, {name: patch[name] for name in group}, forms, gamma)
    for name, tau in patch.items():
        if name in unformed:
            yield _solve_unformed(name, statistics, {name: tau}, forms, gamma)


def unformed_modules(statistics: Statistics, patch: Mapping[str, Tensor], settings: SstParameters) -> frozenset[str]:
    """Modules whose own pencils are not formed: large ones, and those of which no more is kept than their rows give.

    Args:
        statistics: Fishers of every module in `patch`.
        patch: Module name -> core of τ.
        settings: The form of each Fisher, and the selection, are used.

    Returns:
        Their names.
    """
    harm, closed = settings.form("harm"), all(settings.form(kind).representation == "diagonal" for kind in KINDS)
    few = harm.representation == "exact" and harm.shrinkage == 0
    return frozenset(
        name
        for name, tau in patch.items()
        if not closed
        and (
            tau.numel() > ALL_PAIRS_UP_TO
            or (few and _are_enough(statistics.harm.row_count(name), tau.numel(), settings))
        )
    )


def _are_enough(rows: int, n: int, settings: SstParameters) -> bool:
    """Whether the directions of so few rows, all with λ > 0, cost less and are all that the selection can keep."""
    wanted = n  # budget and signed go on where nothing is gained
    if settings.select in ("soft", "dof"):
        wanted = 0
    elif settings.select == "top_k":
        wanted = round(settings.k * n) if isinstance(settings.k, float) else settings.k
    return 0 < 2 * rows <= n and wanted <= rows


def _batches_of_equal_n(patch: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names grouped by n, each group small enough to be stacked."""
    groups: defaultdict[int, list[str]] = defaultdict(list)
    for name, tau in patch.items():
        groups[tau.numel()].append(name)
    for n, members in groups.items():
        size = max(1, ELEMENTS_AT_ONCE // (n * n))
        for start in range(0, len(members), size):
            yield members[start : start + size]


def _solve_batch(
    statistics: Statistics, patch: Mapping[str, Tensor], forms: tuple[FisherForm, FisherForm], gamma: float
) -> Iterator[SolvedPencil]:
    """All pairs of modules of one n."""
    a, a_phi, s_harm = _stacked(statistics.harm, patch, forms[0], 0.0)
    b, b_phi, s_benign = _stacked(statistics.benign, patch, forms[1], gamma)
    result = solve(Pencil(a, b), a.n)
    for i, name in enumerate(patch):
        status = _check_solved(name, result, i)
        intensities = s_harm[i], s_benign[i]
        yield SolvedPencil(name, (name,), result.values[i], result.vectors[i], a_phi[i], b_phi[i], intensities, status)


def _stacked(
    sums: FisherSums | Mixture, patch: Mapping[str, Tensor], form: FisherForm, gamma: float
) -> tuple[Operator, list[Tensor], list[float]]:
    """F + γI of modules of one n in one operator, Diagonal or Dense; its products with the patch, and every s."""
    operators, products, intensities = [], [], []
    for name, tau in patch.items():
        operator, s = _module_fisher(sums, name, form, tuple(tau.shape))
        phi = tau.reshape(-1, 1)
        operators.append(operator)
        products.append((operator @ phi + gamma * phi)[:, 0])
        intensities.append(s)
    if all(isinstance(operator, Diagonal) for operator in operators):
        return Diagonal(torch.stack([operator.entries for operator in operators]) + gamma), products, intensities
    matrices = torch.stack([_matrix(operator) for operator in operators])
    matrices.diagonal(dim1=-2, dim2=-1).add_(gamma)
    return Dense(matrices), products, intensities


def _module_fisher(
    sums: FisherSums | Mixture, name: str, form: FisherForm, shape: tuple[int, int]
) -> tuple[Operator, float]:
    """(1−s)F + s·T of one module, and s."""
    operator = sums.operator(name, form.representation)
    if form.shrinkage == 0:
        return operator, 0.0
    (aim,) = targets([operator], [shape], form.target)
    s = intensity(sums, form, {name: aim})
    return shrunk(operator, aim, s), s


def _matrix(operator: Operator) -> Tensor:
    """A matrix whose lower triangle is right."""
    return operator.matrix if isinstance(operator, Dense) else operator.to_dense()


def named(label: str) -> str:
    """A pencil in a message."""
    return label if label == ALL_MODULES else f"module {label!r}"


def _check_solved(label: str, result: EigenResult, i: int | tuple[()]) -> str:
    """The names of the i-th pencil's status bits; ValueError if it has no solution."""
    status = Status(int(result.status[i]))
    if not result.values[i].isfinite().all():
        reasons = "; ".join(text for bit, text in REMEDIES.items() if bit in status)
        raise ValueError(
            f"the pencil of {named(label)} could not be solved: {reasons}. A is F_harm, B is F_benign + γI: raise "
            "`damping`, or give more benign examples"
        )
    return ", ".join(bit.name for bit in Status if bit in status)


@dataclass(frozen=True)
class _Unformed:
    """JᵀJ + blockdiag(D).

    Attributes:
        rows: J, (N, n), or None.
        blocks: D of each module, or None.
        shrinkage: s that is in it.
    """

    rows: Tensor | None
    blocks: list[Operator] | None
    shrinkage: float

    def __matmul__(self, x: Tensor) -> Tensor:
        """Product with (n, m)."""
        y = torch.zeros_like(x) if self.rows is None else self.rows.mT @ (self.rows @ x)
        if self.blocks is None:
            return y
        parts = x.split([block.n for block in self.blocks])
        return y + torch.cat([block @ part for block, part in zip(self.blocks, parts, strict=True)])


def _solve_unformed(
    label: str,
    statistics: Statistics,
    patch: Mapping[str, Tensor],
    forms: tuple[FisherForm, FisherForm],
    gamma: float,
) -> SolvedPencil:
    """The pencil of all modules named, by rows and blocks."""
    a, b = (
        _unformed(sums, patch, form) for sums, form in zip((statistics.harm, statistics.benign), forms, strict=True)
    )
    blocks = b.blocks or [Diagonal(torch.zeros_like(tau).flatten()) for tau in patch.values()]
    b = _Unformed(b.rows, [simplified(Damped(block, gamma)) for block in blocks], b.shrinkage)
    into = _Whitening(b.blocks)
    n = sum(block.n for block in b.blocks)
    k = min(n, math.ceil(statistics.harm.sequences)) if n > ALL_PAIRS_UP_TO else n
    if a.blocks is None:
        k = min(a.rows.shape)
    result = solve(Pencil(into.seen(a), into.metric(b)), k)
    status = _check_solved(label, result, ())
    values = result.values
    if a.blocks is None:
        values = values[values > n * torch.finfo(values.dtype).eps * values[:1]]
    vectors = into.back(result.vectors[:, : len(values)])
    phi = torch.cat([tau.flatten() for tau in patch.values()])[:, None]
    products = (a @ phi)[:, 0], (b @ phi)[:, 0]
    return SolvedPencil(label, tuple(patch), values, vectors, *products, (a.shrinkage, b.shrinkage), status)


def _unformed(sums: FisherSums | Mixture, patch: Mapping[str, Tensor], form: FisherForm) -> _Unformed:
    """(1−s)F + s·T of several modules: rows where they are kept for all together or for the one, else blocks."""
    names, shapes = list(patch), [tuple(tau.shape) for tau in patch.values()]
    together = form.representation == "gram" or (len(names) == 1 and form.representation == "exact")
    if not together or not all(map(sums.row_count, names)):
        parts = [_module_fisher(sums, name, form, shape) for name, shape in zip(names, shapes, strict=True)]
        return _Unformed(None, [operator for operator, _ in parts], sum(s for _, s in parts) / len(parts))
    rows = sums.joint_rows(names) / math.sqrt(sums.count)
    if form.shrinkage == 0:
        return _Unformed(rows, None, 0.0)
    aims = targets([sums.operator(name, form.representation) for name in names], shapes, form.target)
    s = intensity(sums, form, dict(zip(names, aims, strict=True)))
    if s in (0.0, 1.0):
        return _Unformed(None, aims, s) if s else _Unformed(rows, None, s)
    zero = [Diagonal(torch.zeros_like(aim.diagonal())) for aim in aims]
    return _Unformed(math.sqrt(1 - s) * rows, [shrunk(*pair, s) for pair in zip(zero, aims, strict=True)], s)


class _Whitening:
    """The coordinates y = Lᵀv in which D = LLᵀ, block by block, is the identity.

    Args:
        blocks: D of each module, simplified and positive definite; where one is not, everything becomes NaN.
    """

    def __init__(self, blocks: Sequence[Operator]) -> None:
        self._sizes = [block.n for block in blocks]
        self._roots = [_inverse_root(block) for block in blocks]
        self._like = blocks[0].diagonal()

    def forth(self, x: Tensor) -> Tensor:
        """L⁻¹ x for x (n, m)."""
        return torch.cat([root(part) for (root, _), part in zip(self._roots, x.split(self._sizes), strict=True)])

    def back(self, y: Tensor) -> Tensor:
        """L⁻ᵀ y for y (n, m)."""
        return torch.cat([root(part) for (_, root), part in zip(self._roots, y.split(self._sizes), strict=True)])

    def seen(self, a: _Unformed) -> Operator:
        """L⁻¹ A L⁻ᵀ: Gram where A has rows alone."""
        if a.blocks is None:
            return Gram(self.forth(a.rows.mT).mT, 1.0)
        n = sum(self._sizes)
        return FunctionOperator(
            lambda y: self.forth(a @ self.back(y)), (n, n), dtype=self._like.dtype, device=self._like.device
        )

    def metric(self, b: _Unformed) -> Operator:
        """L⁻¹ (D + JᵀJ) L⁻ᵀ = I + (L⁻¹Jᵀ)(L⁻¹Jᵀ)ᵀ."""
        ones = self._like.new_ones(sum(self._sizes))
        return Diagonal(ones) if b.rows is None else LowRankPlusDiagonal(self.forth(b.rows.mT), ones)


def _inverse_root(block: Operator) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """X ↦ L⁻¹x and y ↦ L⁻ᵀy of D = LLᵀ."""
    if isinstance(block, Damped) and isinstance(block.operator, Kronecker):
        block, _ = diagonalized(block.operator, block.damping)
    if isinstance(block, Diagonal | EKFAC):
        entries = block.entries.rsqrt()  # NaN where D is not positive
        root = (
            Diagonal(entries)
            if isinstance(block, Diagonal)
            else EKFAC(block.left_vectors, block.right_vectors, entries)
        )
        return root.__matmul__, root.__matmul__
    factor, info = torch.linalg.cholesky_ex(block.to_dense())
    if info:
        factor = torch.full_like(factor, torch.nan)
    return (
        lambda x: torch.linalg.solve_triangular(factor, x, upper=False),
        lambda y: torch.linalg.solve_triangular(factor.mT, y, upper=True),
    )
