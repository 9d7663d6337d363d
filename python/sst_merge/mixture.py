"""Sums over tasks: F = Σ_t w_t F_t of several sets of data, each kept apart so that its weight can change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sst_kernels import Diagonal, Gram, Scaled, Sum
from sst_kernels.operators import Dense, Operator

from .sums import FisherSums

KINDS = {"harm": "harm", "benign": "benign", "harm_held": "harm", "benign_held": "benign", "origin": "harm"}
"""Field of `Statistics` -> the kind of data it is of."""


def part_name(field: str, task: str) -> str:
    """What the sums of one task are called: the field of `Statistics`, and the task's name if it has one."""
    return f"{field}-{task}" if task else field


@dataclass(frozen=True)
class Mixture:
    """F = Σ_t w_t F_t, where F_t is the mean over the sequences of task t; the weights need not sum to 1.

    Offers what `FisherSums` offers of one task. Fishers and gradients are float64.

    Attributes:
        tasks: Task's name -> its sums, all of the same representation and modules.
        weights: Task's name -> w_t.
    """

    tasks: Mapping[str, FisherSums]
    weights: Mapping[str, float]

    @property
    def count(self) -> float:
        """N = Σ_t N_t, sequences of all tasks, each weighted as its examples are."""
        return sum(sums.count for sums in self.tasks.values())

    @property
    def sequences(self) -> float:
        """How many sequences all tasks have, whatever their weights."""
        return sum(sums.sequences for sums in self.tasks.values())

    def fisher(self, name: str) -> Tensor:
        """F of a module, symmetric (n, n), or its diagonal (n,)."""
        return sum(self.weights[task] * sums.fisher(name) for task, sums in self.tasks.items())

    def diagonal_of(self, name: str) -> Tensor:
        """Diag F, (n,)."""
        return sum(self.weights[task] * sums.diagonal_of(name) for task, sums in self.tasks.items())

    def mean_gradient(self, name: str) -> Tensor:
        """ḡ = Σ_t w_t ḡ_t, (n,)."""
        return sum(self.weights[task] * sums.mean_gradient(name) for task, sums in self.tasks.items())

    def quadratic(self, names: Sequence[str], vectors: Tensor) -> Tensor:
        """vᵀFv for every column v of `vectors`, (Σ n, m): (m,)."""
        return sum(self.weights[task] * sums.quadratic(names, vectors) for task, sums in self.tasks.items())

    def operator(self, name: str, representation: str) -> Operator:
        """F of a module in some representation: Diagonal, Gram or Dense as of one task, else a Sum of the tasks'."""
        if representation == "diagonal":
            return Diagonal(self.diagonal_of(name))
        if representation in ("exact", "gram"):
            return Gram(self.joint_rows([name]), self.count) if self.row_count(name) else Dense(self.fisher(name))
        return Sum(
            [Scaled(sums.operator(name, representation), self.weights[task]) for task, sums in self.tasks.items()]
        )

    def row_count(self, name: str) -> int:
        """How many rows of a module are kept; 0 unless every task keeps them."""
        counts = [sums.row_count(name) for sums in self.tasks.values()]
        return sum(counts) if all(counts) else 0

    def sampling_variance(self, names: Sequence[str]) -> Tensor:
        """Σ_ij Var(F_ij) and Σ_i Var(F_ii), (2,): Σ_t w_t² times the tasks' own, which are independent."""
        return sum(self.weights[task] ** 2 * sums.sampling_variance(names) for task, sums in self.tasks.items())

    def joint_rows(self, names: Sequence[str]) -> Tensor:
        """J of several modules side by side, JᵀJ = N·F: rows of task t times √(w_t N/N_t); (rows, Σ n)."""
        scales = {task: math.sqrt(self.weights[task] * self.count / sums.count) for task, sums in self.tasks.items()}
        return torch.cat([scales[task] * sums.joint_rows(names) for task, sums in self.tasks.items()])


@dataclass(frozen=True)
class Statistics:
    """Fishers of both kinds, from sequences that find directions and from held-out ones that judge them.

    Attributes:
        harm: Empirical Fisher of refusals; of several tasks, a `Mixture`, as every field.
        benign: True Fisher of the model's own behaviour.
        harm_held: As `harm`, held-out sequences.
        benign_held: As `benign`, held-out sequences.
        origin: Σ g of log p(refusal) at θ_ft over the sequences of `harm`; its mean carries the sign.
    """

    harm: FisherSums | Mixture
    benign: FisherSums | Mixture
    harm_held: FisherSums | Mixture
    benign_held: FisherSums | Mixture
    origin: FisherSums | Mixture

    def gradient(self, name: str) -> Tensor:
        """ḡ, the mean gradient of log p(refusal) at θ_ft: (n,), float64."""
        return self.origin.mean_gradient(name)


def tasks_in(sums: FisherSums | Mixture) -> dict[str, tuple[FisherSums, float]]:
    """Task's name -> its sums and w_t; the name is "" where there is one task of weight 1."""
    if isinstance(sums, FisherSums):
        return {"": (sums, 1.0)}
    return {task: (own, sums.weights[task]) for task, own in sums.tasks.items()}


def mix_parts(sums: Mapping[tuple[str, str], FisherSums], weights: Mapping[str, Mapping[str, float]]) -> Statistics:
    """Statistics of all tasks.

    Args:
        sums: (Field of `Statistics`, task's name) -> sums.
        weights: "harm" and "benign" -> task's name -> w_t.

    Returns:
        Every field as `mix` gives it.
    """
    return Statistics(
        **{
            field: mix({task: sums[field, task] for task in weights[kind]}, weights[kind])
            for field, kind in KINDS.items()
        }
    )


def mix(tasks: Mapping[str, FisherSums], weights: Mapping[str, float]) -> FisherSums | Mixture:
    """F = Σ_t w_t F_t: the sums themselves, if they are of one task of weight 1.

    Args:
        tasks: Task's name -> its sums.
        weights: Task's name -> w_t.

    Returns:
        What a field of `Statistics` is.
    """
    if list(weights.values()) == [1.0]:
        return tasks[next(iter(weights))]
    return Mixture(tasks, weights)
