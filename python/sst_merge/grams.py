"""Gram matrices of what the layers of each model see on its own data, by forward passes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sst_kernels import syrk_accumulate_
from sst_kernels.collect import CoreGradients
from sst_kernels.rows import unwrapped

from .base import input_device
from .calibration import ANSWERED_BY
from .packing import batches, check_packing
from .settings import ROLES

if TYPE_CHECKING:
    from .problem import Problem

BYTES_AT_ONCE = 1 << 32
"""Of Gram matrices held together; those of an 8B model's modules are about ten times as many."""


class InputGrams:
    """G = Σ x xᵀ/T of a module's inputs: (G_u, G_s), at θ_u over benign and at θ_s over harmful sequences.

    As many modules are gathered together as `BYTES_AT_ONCE` hold, and forgotten when the next group is asked for, so
    ask in the order of `problem.names`. The sequences are those that find directions, every token but padding counts.

    Args:
        problem: The models, with calibration data.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        modules = {name: problem.skeleton.get_submodule(name) for name in problem.names}
        self.names = [name for name, module in modules.items() if not isinstance(unwrapped(module), nn.Embedding)]
        self._held: dict[str, tuple[Tensor, Tensor]] = {}

    def of(self, name: str) -> tuple[Tensor, Tensor] | None:
        """(G_u, G_s) of a module, (d_in, d_in) each, float64; None for an embedding, whose inputs are indices.

        Args:
            name: Module name.

        Returns:
            The matrices.

        Raises:
            ValueError: A module saw no tokens, or others than the batch has.

        Cost: a forward pass over both sets for every group of modules.
        """
        if name not in self.names:
            return None
        if name not in self._held:
            self._held = {}  # before the next group is made
            group = self._group(name)
            found = [self._gather(role, group) for role in ROLES]
            self._held = {member: tuple(grams[member] for grams in found) for member in group}
        return tuple((lower.tril() + lower.tril(-1).mT).double() for lower in self._held[name])

    def _group(self, first: str) -> list[str]:
        """Names from this one on, as many as fit."""
        group, size = [], 0
        for name in self.names[self.names.index(first) :]:
            size += len(ROLES) * 4 * self.problem.updates(name)[0].shape[1] ** 2
            if group and size > BYTES_AT_ONCE:
                break
            group.append(name)
        return group

    def _gather(self, role: str, group: Sequence[str]) -> dict[str, Tensor]:
        """The lower triangles of G of some modules for one role."""
        problem, calibration = self.problem, self.problem.config.calibration
        kind = next(kind for kind, answering in ANSWERED_BY.items() if answering == role)
        row_length = calibration.max_length if calibration.packing else None
        if calibration.packing:
            check_packing(problem.model, problem.model_config.vocab_size)
        rows_of = batches(problem.calibration[kind][0], calibration.batch_size, input_device(problem.model), row_length)
        grams: dict[str, Tensor] = {}
        tokens = 0
        with CoreGradients(problem.model, problem.bases, watched=()) as update, torch.no_grad():
            update.set_cores({name: problem.cores(name)[ROLES.index(role)] for name in problem.names})
            for batch in tqdm(list(rows_of), desc=f"inputs, {role}", unit="batch", leave=False):
                mask = batch.attention_mask.flatten()

                def observe(name: str, rows: Tensor, mask: Tensor = mask) -> None:
                    if name in group:
                        _add(grams, name, rows.flatten(0, -2), mask)

                update.observe = observe
                problem.model(**batch.model_inputs, use_cache=False)
                tokens += int(mask.sum())
        for name in group:
            if name not in grams or not torch.isfinite(grams[name].diagonal()).all() or not grams[name].any():
                raise ValueError(f"regmean: module {name!r} saw no finite input of the {role} model's data")
        return {name: gram / tokens for name, gram in grams.items()}


def _add(grams: dict[str, Tensor], name: str, rows: Tensor, mask: Tensor) -> None:
    """Σ x xᵀ, lower triangle, in place."""
    if len(rows) != len(mask):
        raise ValueError(
            f"regmean: module {name!r} saw {len(rows)} tokens but the batch has {len(mask)}: modules that see other "
            "tokens (routed experts) are not covered"
        )
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    if name not in grams:
        grams[name] = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=dtype)
    syrk_accumulate_(grams[name], rows, mask.to(rows.device, dtype))
