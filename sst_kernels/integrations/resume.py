"""Factors in the checkpoints of a training run of one or several processes."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch.distributed as dist

from ..accumulate import FactorAccumulator
from ..factors import Factors


def world() -> tuple[int, int]:
    """(rank, number of processes)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def summed(factors: Factors) -> Factors:
    """The sums over all processes; every process must call this. Several take a copy, as large as the sums."""
    if world()[1] > 1:
        factors = copy.deepcopy(factors)
        factors.all_reduce()
    return factors


def resume(accumulator: FactorAccumulator, saved: Factors) -> None:
    """Puts what `summed` gave in place of the accumulator's sums.

    The first process goes on from the sums, the others from zero, and each takes its share of the step numbers, so
    that sums over processes stay what they were. The numbers of sequences go on beyond those of every process.

    Args:
        accumulator: Its sums are replaced.
        saved: The sums over all processes; taken over.

    Raises:
        ValueError: They are not of the layers, or not gathered in the way, of this accumulator.
    """
    accumulator.factors.check_same(saved)
    rank, size = world()
    steps = {what: getattr(saved, what) // size for what in ("backwards", "forwards")}
    if rank == 0:
        steps = {what: getattr(saved, what) - (size - 1) * share for what, share in steps.items()}
    accumulator.factors = replace(saved, **steps, layers=saved.layers if rank == 0 else {})
