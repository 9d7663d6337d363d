"""What a collection gathers: per-sequence gradients g of every module, as sums and counts, so that parts add up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sst_kernels import syrk_accumulate_

REPRESENTATIONS = ("exact", "gram", "diagonal")


@dataclass
class FisherSums:
    """Σ w g gᵀ and Σ w g over sequences, per module, with their count.

    "exact" keeps the matrix Σ w g gᵀ (n, n) of a module, or the rows √w g (N, n) themselves where there will be fewer
    of them than n: the same numbers in less memory. "gram" keeps the rows of every module, from which curvature
    across modules can be had. "diagonal" keeps Σ w g² (n,), and "gradient" nothing but Σ w g.

    Attributes:
        representation: "exact", "gram", "diagonal" or "gradient".
        capacity: N, how many rows a module will get; None where that is not known (then "exact" keeps matrices).
        second: Module name -> (n, n), only its lower triangle is meaningful; or (n,).
        rows: Module name -> (N, n); those beyond `filled` are still to come.
        filled: Module name -> how many of its rows are there.
        first: Module name -> (n,), Σ w g.
        count: Σ w over sequences.
    """

    representation: str
    capacity: int | None = None
    second: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    filled: dict[str, int] = field(default_factory=dict)
    first: dict[str, Tensor] = field(default_factory=dict)
    count: float = 0.0

    def add(self, name: str, rows: Tensor, weight: float) -> None:
        """Σ ← Σ + w Σ_s g_s g_sᵀ for the rows g_s of one module, in place.

        Args:
            name: Module name.
            rows: (S, n), float32 or float64.
            weight: w.
        """
        if name not in self.first:
            self._start(name, rows)
        self.first[name].add_(rows.sum(0), alpha=weight)
        if name in self.rows:
            start = self.filled[name]
            self.filled[name] = start + len(rows)
            self.rows[name][start : self.filled[name]] = math.sqrt(weight) * rows
        elif self.representation == "diagonal":
            self.second[name].add_(rows.square().sum(0), alpha=weight)
        elif self.representation == "exact":
            syrk_accumulate_(self.second[name], rows, alpha=weight)

    def _start(self, name: str, like: Tensor) -> None:
        """Zeros for one module."""
        n = like.shape[1]
        self.first[name] = like.new_zeros(n)
        if self.keeps_rows(n):
            self.rows[name], self.filled[name] = like.new_zeros(self.capacity, n), 0
        elif self.representation != "gradient":
            self.second[name] = like.new_zeros(n if self.representation == "diagonal" else (n, n))

    def keeps_rows(self, n: int) -> bool:
        """Whether a module of n coordinates keeps its rows."""
        few = self.capacity is not None and self.capacity < n
        return self.representation == "gram" or (self.representation == "exact" and few)

    def fisher(self, name: str) -> Tensor:
        """F = Σ w g gᵀ / Σ w, symmetric (n, n), or its diagonal (n,); float64."""
        if name in self.rows:
            rows = self.rows[name].double()
            return rows.mT @ rows / self.count
        second = self.second[name].double() / self.count
        return second if second.ndim == 1 else second.tril() + second.tril(-1).mT

    def diagonal_of(self, name: str) -> Tensor:
        """Diag F, (n,), float64."""
        if name in self.rows:
            return self.rows[name].double().square().sum(0) / self.count
        second = self.second[name].double() / self.count
        return second if second.ndim == 1 else second.diagonal()

    def mean_gradient(self, name: str) -> Tensor:
        """ḡ = Σ w g / Σ w, (n,), float64."""
        return self.first[name].double() / self.count

    def joint_rows(self, names: Sequence[str]) -> Tensor:
        """J of several modules side by side, JᵀJ = count·F: (N, Σ n), float64."""
        return torch.cat([self.rows[name].double() for name in names], dim=1)

    def quadratic(self, names: Sequence[str], vectors: Tensor) -> Tensor:
        """vᵀFv for every column v.

        Args:
            names: The modules whose coordinates, one after another, the rows of `vectors` are: one, or with "gram"
                any number.
            vectors: (Σ n, m), float64.

        Returns:
            (m,), float64.
        """
        if all(name in self.rows for name in names):
            parts = vectors.split([self.rows[name].shape[1] for name in names])
            image = sum(self.rows[name].double() @ part for name, part in zip(names, parts, strict=True))
            return image.square().sum(0) / self.count
        fisher = self.fisher(names[0])
        return (vectors * (fisher @ vectors if fisher.ndim == 2 else fisher.unsqueeze(1) * vectors)).sum(0)

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
        total = FisherSums(self.representation, capacity, count=self.count + other.count)
        for name in self.first:
            total.first[name] = self.first[name] + other.first[name]
            if total.keeps_rows(len(total.first[name])):
                total.rows[name] = torch.cat([self.rows[name], other.rows[name]])
                total.filled[name] = len(total.rows[name])
            elif name in self.second or name in self.rows:
                total.second[name] = self._second_of(name) + other._second_of(name)
        return total

    def _second_of(self, name: str) -> Tensor:
        """Σ w g gᵀ or Σ w g², whatever is kept."""
        if name in self.second:
            return self.second[name]
        n = self.rows[name].shape[1]
        second = self.rows[name].new_zeros(n, n)
        syrk_accumulate_(second, self.rows[name])
        return second

    def tensors(self) -> dict[str, Tensor]:
        """Everything by flat keys, for a file: rows only as far as they are filled."""
        return {
            **{f"second/{name}": tensor for name, tensor in self.second.items()},
            **{f"rows/{name}": tensor[: self.filled[name]] for name, tensor in self.rows.items()},
            **{f"first/{name}": tensor for name, tensor in self.first.items()},
        }

    def load(self, tensors: Mapping[str, Tensor], count: float) -> None:
        """Take up what `tensors` gave, to go on from there.

        Args:
            tensors: By flat keys; moved nowhere, kept as they are.
            count: Σ w so far.
        """
        self.count = count
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "rows":
                self.capacity = max(self.capacity or 0, len(tensor))
                if len(tensor) < self.capacity:
                    room = tensor.new_zeros(self.capacity - len(tensor), tensor.shape[1])
                    self.rows[name] = torch.cat([tensor, room])
                else:
                    self.rows[name] = tensor
                self.filled[name] = len(tensor)
            else:
                {"second": self.second, "first": self.first}[kind][name] = tensor


@dataclass(frozen=True)
class Statistics:
    """Fishers of both kinds, from sequences that find directions and from held-out ones that judge them.

    Attributes:
        harm: Empirical Fisher of refusals.
        benign: True Fisher of the model's own behaviour.
        harm_held: As `harm`, held-out sequences.
        benign_held: As `benign`, held-out sequences.
        origin: Σ g of log p(refusal) at θ_ft over the sequences of `harm`; its mean carries the sign.
    """

    harm: FisherSums
    benign: FisherSums
    harm_held: FisherSums
    benign_held: FisherSums
    origin: FisherSums

    def gradient(self, name: str) -> Tensor:
        """ḡ, the mean gradient of log p(refusal) at θ_ft: (n,), float64."""
        return self.origin.mean_gradient(name)
