r"""What a collection gathers: per-sequence gradients g of every module, as sums and counts, so that parts add up.

F = (1/N) Σ_s g_s g_sᵀ with g_s = Σ_{t∈s} δ̂_t ⊗ x̂_t (vec row-major), N the count of sequences. Beside it stand the sums
of its Kronecker approximation F ≈ grad_factor ⊗ input_factor (Martens and Grosse 2015; Eschenhagen et al. 2023):

- *expand* drops the products of different tokens and takes the mean of what is left as a product of means,
  F ≈ (1/N) Σ_t (δ̂_t δ̂_tᵀ) ⊗ (x̂_t x̂_tᵀ) ≈ (T/N) (S_G/T) ⊗ (S_A/T), S_G = Σ_t δ̂_t δ̂_tᵀ, S_A = Σ_t x̂_t x̂_tᵀ;
- *reduce* takes x̂_t as constant over a sequence, g_s ≈ (Σ_t δ̂_t) ⊗ (mean_t x̂_t), and has the same formula with
  sequences for tokens.

T counts the tokens (sequences) that bear gradient in that module, δ̂_t ≠ 0, and S_A sums over them: padding, tokens
after the last that bears loss and, in a last layer, those that predict nothing are not among them. So what is appended
to a sequence without being part of its loss changes nothing, as with F itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sst_kernels import EKFAC, Dense, Diagonal, Gram, Kronecker, syrk_accumulate_, unpack_lower
from sst_kernels.collect import TokenGradients
from sst_kernels.layer_factors import LayerFactors, LayerSpec
from sst_kernels.operators import Operator, kronecker_product

if TYPE_CHECKING:
    from .mixture import Mixture

APPROXIMATIONS = ("expand", "reduce")


@dataclass
class FisherSums:
    """Σ w g gᵀ and Σ w g over sequences, per module, with their count.

    "exact" keeps the matrix Σ w g gᵀ (n, n) of a module, or the rows √w g (N, n) themselves where there will be fewer
    of them than n: the same numbers in less memory. "gram" keeps the rows of every module, from which curvature
    across modules can be had. "diagonal" keeps Σ w g² (n,), "kfac_expand" and "kfac_reduce" the Kronecker factors,
    and "gradient" nothing but Σ w g. "exact" and "gram" keep both kinds of factors too, r_out² + r_in² numbers each.

    Attributes:
        representation: "exact", "gram", "diagonal", "kfac_expand", "kfac_reduce" or "gradient".
        capacity: N, how many rows a module will get; None where that is not known (then "exact" keeps matrices).
        second: Module name -> (n, n), only its lower triangle is meaningful; or (n,).
        fourth: Module name of a matrix in `second` -> (2,), float64: Σ w ‖g‖⁴ and Σ w Σ_i g_i⁴.
        rows: Module name -> (N, n); those beyond `filled` are still to come.
        weights: Module name -> (N,), w ω of each row.
        filled: Module name -> how many of its rows are there.
        first: Module name -> (n,), Σ w g.
        factors: "expand" or "reduce" -> module name -> w S_A, w S_G and w T.
        count: Σ w ω over sequences; ω is the importance of an example, 1 unless its data say otherwise.
        sequences: Σ w.
        squares: Σ w ω².
    """

    representation: str
    capacity: int | None = None
    second: dict[str, Tensor] = field(default_factory=dict)
    fourth: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    filled: dict[str, int] = field(default_factory=dict)
    first: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, dict[str, LayerFactors]] = field(default_factory=dict)
    count: float = 0.0
    sequences: float = 0.0
    squares: float = 0.0

    @property
    def effective(self) -> float:
        """Effective number of sequences, (Σ wω)² / Σ wω² where Σ w over points is 1 (Kish 1965)."""
        return self.count**2 / self.squares

    def add_count(self, weight: float, importance: Tensor) -> None:
        """Count sequences, in place.

        Args:
            weight: w of the point where their gradients are taken.
            importance: (S,), ω of each.
        """
        self.count += weight * float(importance.sum())
        self.sequences += weight * len(importance)
        self.squares += weight * float(importance.square().sum())

    @property
    def counts(self) -> tuple[float, float, float]:
        """`count`, `sequences` and `squares`."""
        return self.count, self.sequences, self.squares

    def take_counts(self, counts: Sequence[float]) -> None:
        """Set `count`, `sequences` and `squares`."""
        self.count, self.sequences, self.squares = counts

    def take(self, name: str, gradients: TokenGradients, weight: float, importance: Tensor | None = None) -> None:
        """Σ ← Σ + w (what one backward pass shows of a module, each sequence ω times), in place.

        Args:
            name: Module name.
            gradients: Its tokens; rows are made of them only where they are summed.
            weight: w.
            importance: (S,), ω of each sequence; None for ones.
        """
        if self.representation in ("exact", "gram", "diagonal"):
            rows = gradients.rows()
            self.add(name, rows, weight, None if importance is None else importance.to(rows))
        else:
            total = gradients.total(importance)
            self.first.setdefault(name, torch.zeros_like(total)).add_(total, alpha=weight)
        for kind in self.approximations:
            rows, share = gradients.expanded if kind == "expand" else gradients.reduced, importance
            if importance is not None and kind == "expand":
                share = gradients.by_token(importance)
            known = self.factors.setdefault(kind, {})
            if name not in known:
                spec = LayerSpec("linear", rows.x.shape[1], rows.delta.shape[1])
                known[name] = LayerFactors.zeros(spec, self.first[name].dtype, gradients.device)
            scale = weight * rows.weight if share is None else weight * rows.weight * share.to(rows.weight)
            known[name].accumulate_(replace(rows, weight=scale))

    @property
    def approximations(self) -> tuple[str, ...]:
        """Which Kronecker factors are kept."""
        if self.representation in ("exact", "gram"):
            return APPROXIMATIONS
        kind, _, approximation = self.representation.partition("_")
        return (approximation,) if kind == "kfac" else ()

    def add(self, name: str, rows: Tensor, weight: float, importance: Tensor | None = None) -> None:
        """Σ ← Σ + w Σ_s ω_s g_s g_sᵀ for the rows g_s of one module, in place.

        Args:
            name: Module name.
            rows: (S, n), float32 or float64.
            weight: w.
            importance: (S,), ω of each row, dtype and device of the rows; None for ones.
        """
        if name not in self.first:
            self._start(name, rows)
        self.first[name].add_(rows.sum(0) if importance is None else importance @ rows, alpha=weight)
        if name not in self.rows and self.representation == "exact":
            syrk_accumulate_(self.second[name], rows, importance, alpha=weight)
            self.fourth[name] += weight * _fourth_powers(rows.square(), importance)
            return
        rows = rows if importance is None else importance.sqrt()[:, None] * rows
        if name in self.rows:
            start = self.filled[name]
            self.filled[name] = start + len(rows)
            self.rows[name][start : self.filled[name]] = math.sqrt(weight) * rows
            self.weights[name][start : self.filled[name]] = weight if importance is None else weight * importance
        elif self.representation == "diagonal":
            self.second[name].add_(rows.square().sum(0), alpha=weight)

    def _start(self, name: str, like: Tensor) -> None:
        """Zeros for one module."""
        n = like.shape[1]
        self.first[name] = like.new_zeros(n)
        if self.keeps_rows(n):
            self.rows[name], self.filled[name] = like.new_zeros(self.capacity, n), 0
            self.weights[name] = like.new_zeros(self.capacity)
        elif self.representation != "gradient":
            self.second[name] = like.new_zeros(n if self.representation == "diagonal" else (n, n))
            if self.representation == "exact":
                self.fourth[name] = like.new_zeros(2, dtype=torch.float64)

    def keeps_rows(self, n: int) -> bool:
        """Whether a module of n coordinates keeps its rows."""
        few = self.capacity is not None and self.capacity < n
        return self.representation == "gram" or (self.representation == "exact" and few)

    def operator(self, name: str, representation: str) -> Operator:
        """F of a module in some representation, float64.

        Args:
            name: Module name.
            representation: What can be had of what is kept: "diagonal", "exact" (or "gram": the same, a module alone),
                "kfac_expand", "kfac_reduce", and from "exact" and "gram" also "ekfac_expand" and "ekfac_reduce",
                diag(UᵀFU) in the eigenbasis U of the Kronecker factors (George et al. 2018), exactly.

        Returns:
            Diagonal; Gram of fewer rows than n, or Dense; Kronecker; EKFAC. (n, n), vec row-major.
        """
        if representation == "diagonal":
            return Diagonal(self.diagonal_of(name))
        kind, _, approximation = representation.partition("_")
        if kind in ("exact", "gram"):
            if name in self.rows:
                return Gram(self.rows[name].double(), self.count)
            return Dense(self.second[name].double() / self.count)
        sums = self.factors[approximation][name]
        grad_factor = unpack_lower(sums.grad_factor.double()) / self.count
        input_factor = unpack_lower(sums.input_factor.double()) / sums.counts[0].clamp_min(torch.finfo().tiny)
        if kind == "kfac":
            return Kronecker(grad_factor, input_factor)
        u, w = (torch.linalg.eigh(factor).eigenvectors for factor in (grad_factor, input_factor))
        return EKFAC(u, w, self._second_moments(name, u, w))

    def _second_moments(self, name: str, u: Tensor, w: Tensor) -> Tensor:
        """D_ij = (u_i ⊗ w_j)ᵀ F (u_i ⊗ w_j), (r_out, r_in), float64."""
        shape = u.shape[1], w.shape[1]
        if name in self.rows:
            cores = self.rows[name].double().unflatten(1, shape)
            return (u.mT @ cores @ w).square().sum(0) / self.count
        image = kronecker_product(u.mT, w.mT, self.fisher(name))
        return (image * torch.kron(u, w).mT).sum(1).clamp_min(0).unflatten(0, shape)

    @property
    def own(self) -> str:
        """The representation that says most of what is kept."""
        return "exact" if self.representation == "gram" else self.representation

    def fisher(self, name: str) -> Tensor:
        """F = Σ w g gᵀ / Σ w, (n, n), or its diagonal (n,); of K-FAC sums their Kronecker product; float64."""
        if self.representation == "diagonal":
            return self.diagonal_of(name)
        return self.operator(name, self.own).to_dense()

    def diagonal_of(self, name: str) -> Tensor:
        """Diag F, (n,), float64."""
        if name in self.rows:
            return self.rows[name].double().square().sum(0) / self.count
        if name not in self.second:
            return self.operator(name, self.own).diagonal()
        second = self.second[name].double() / self.count
        return second if second.ndim == 1 else second.diagonal()

    def mean_gradient(self, name: str) -> Tensor:
        """ḡ = Σ w g / Σ w, (n,), float64."""
        return self.first[name].double() / self.count

    def joint_rows(self, names: Sequence[str]) -> Tensor:
        """J of several modules side by side, JᵀJ = count·F: (N, Σ n), float64."""
        return torch.cat([self.rows[name].double() for name in names], dim=1)

    def quadratic(self, names: Sequence[str], vectors: Tensor) -> Tensor:
        """vᵀFv for every column v, curvature between modules included where it is kept ("gram").

        Args:
            names: The modules whose coordinates, one after another, the rows of `vectors` are.
            vectors: (Σ n, m), float64.

        Returns:
            (m,), float64.
        """
        parts = dict(zip(names, vectors.split([len(self.first[name]) for name in names]), strict=True))
        images = {name: self.rows[name].double() @ part for name, part in parts.items() if name in self.rows}
        if self.representation == "gram":
            return sum(images.values()).square().sum(0) / self.count
        total = sum((image.square().sum(0) / self.count for image in images.values()), vectors.new_zeros(()))
        for name in (name for name in parts if name not in images):
            fisher = self.operator(name, self.own)
            metric = fisher.to_dense() if isinstance(fisher, Dense) else fisher
            total = total + (parts[name] * (metric @ parts[name])).sum(0)
        return total

    def sampling_variance(self, names: Sequence[str]) -> Tensor:
        r"""Σ_ij Var(F_ij) and Σ_i Var(F_ii) of the mean over sequences, estimated: (E‖g‖⁴ − ‖F‖²) / (N − 1).

        N is the effective number of sequences. Rows that one sequence has at several points, or for several samples,
        count as if they were equal: Var is then an upper bound (‖Σ_p w_p g_p g_pᵀ‖² ≤ Σ_p w_p ‖g_p‖⁴, Jensen).

        Args:
            names: Modules whose coordinates follow one another: one of "exact" sums, or of "gram" any number.

        Returns:
            (2,), float64; infinite for a single sequence.
        """
        second = squared_norms(self, names)
        if self.effective <= 1:
            return torch.full_like(second, math.inf)
        return (self._fourth_of(names) / self.count - second).clamp_min(0) / (self.effective - 1)

    def row_count(self, name: str) -> int:
        """How many rows of a module are kept; 0 where its matrix or less is."""
        return len(self.rows.get(name, ()))

    def merged(self, other: FisherSums) -> FisherSums:
        """The sums over the sequences of both; neither is changed.

        Args:
            other: Of the same representation and modules.

        Returns:
            New sums. Where "exact" now has as many rows as coordinates, they become a matrix.

        Raises:
            ValueError: Representations or modules differ.
        """
        if (self.representation, self.first.keys()) != (other.representation, other.first.keys()):
            raise ValueError(
                f"Fisher sums of {self.representation!r} over {len(self.first)} modules and of "
                f"{other.representation!r} over {len(other.first)} do not add up; collect both alike"
            )
        capacity = None if None in (self.capacity, other.capacity) else self.capacity + other.capacity
        total = FisherSums(self.representation, capacity)
        total.take_counts([mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)])
        for name in self.first:
            total.first[name] = self.first[name] + other.first[name]
            if name in self.rows and name in other.rows and total.keeps_rows(len(total.first[name])):
                for kept in ("rows", "weights"):
                    parts = [getattr(sums, kept)[name][: sums.filled[name]] for sums in (self, other)]
                    getattr(total, kept)[name] = torch.cat(parts)
                total.filled[name] = len(total.rows[name])
            elif name in self.second or name in self.rows:
                total.second[name] = self._second_of(name) + other._second_of(name)
                if total.representation == "exact":
                    total.fourth[name] = self._fourth_of([name]) + other._fourth_of([name])
        for kind, modules in self.factors.items():
            total.factors[kind] = {}
            for name, sums in modules.items():
                parts = {part: tensor.clone() for part, tensor in sums.tensors().items()}
                total.factors[kind][name] = LayerFactors(**parts)
                total.factors[kind][name].add_(other.factors[kind][name])
        return total

    def _second_of(self, name: str) -> Tensor:
        """Σ w g gᵀ or Σ w g², whatever is kept."""
        if name in self.second:
            return self.second[name]
        n = self.rows[name].shape[1]
        second = self.rows[name].new_zeros(n, n)
        syrk_accumulate_(second, self.rows[name])
        return second

    def _fourth_of(self, names: Sequence[str]) -> Tensor:
        """Σ w ‖g‖⁴ and Σ w Σ_i g_i⁴ of modules side by side, (2,), float64."""
        if names[0] in self.fourth:
            return self.fourth[names[0]]
        weights = self.weights[names[0]].double()
        there = weights > 0
        return _fourth_powers(self.joint_rows(names)[there].square() / weights[there, None], weights[there])

    def tensors(self) -> dict[str, Tensor]:
        """Everything by flat keys, for a file: rows only as far as they are filled."""
        plain = {"second": self.second, "fourth": self.fourth, "first": self.first}
        partly = {"rows": self.rows, "weights": self.weights}
        return {
            **{f"{kind}/{name}": tensor for kind, kept in plain.items() for name, tensor in kept.items()},
            **{f"{kind}/{name}": t[: self.filled[name]] for kind, kept in partly.items() for name, t in kept.items()},
            **{
                f"{kind}/{part}/{name}": tensor
                for kind, modules in self.factors.items()
                for name, sums in modules.items()
                for part, tensor in sums.tensors().items()
            },
        }

    def load(self, tensors: Mapping[str, Tensor], counts: Sequence[float]) -> None:
        """Take up what `tensors` gave, to go on from there.

        Args:
            tensors: By flat keys; moved nowhere, kept as they are.
            counts: `count`, `sequences` and `squares` so far.
        """
        self.take_counts(counts)
        factors: dict[tuple[str, str], dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            if kind in ("rows", "weights"):
                self.capacity = max(self.capacity or 0, len(tensor))
                room = tensor.new_zeros(self.capacity - len(tensor), *tensor.shape[1:])
                getattr(self, kind)[name] = torch.cat([tensor, room]) if len(room) else tensor
                self.filled[name] = len(tensor)
            elif kind in APPROXIMATIONS:
                part, _, name = name.partition("/")
                factors.setdefault((kind, name), {})[part] = tensor
            else:
                getattr(self, kind)[name] = tensor
        for (kind, name), parts in factors.items():
            self.factors.setdefault(kind, {})[name] = LayerFactors(**parts)


def squared_norms(sums: FisherSums | Mixture, names: Sequence[str]) -> Tensor:
    """‖F‖² and ‖diag F‖² in Frobenius norm, (2,), float64.

    Args:
        sums: Of one task or of several.
        names: Modules whose coordinates follow one another: one of "exact" sums, or of "gram" any number.

    Returns:
        The two; from rows without F.
    """
    if not all(map(sums.row_count, names)):
        fisher = sums.fisher(names[0])
        return torch.stack([fisher.square().sum(), fisher.diagonal().square().sum()])
    rows = sums.joint_rows(names)
    gram = rows @ rows.mT if len(rows) < rows.shape[1] else rows.mT @ rows
    return torch.stack([gram.square().sum(), rows.square().sum(0).square().sum()]) / sums.count**2


def _fourth_powers(squares: Tensor, weights: Tensor | None = None) -> Tensor:
    """Σ w ‖g‖⁴ and Σ w Σ_i g_i⁴ of rows g, their squares (N, n) given: (2,), float64."""
    squares = squares.double()
    powers = torch.stack([squares.sum(1).square(), squares.square().sum(1)])
    return powers.sum(1) if weights is None else powers @ weights.double()
