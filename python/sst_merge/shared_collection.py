"""A part of the statistics summed by several processes: batches by turns, sums in the order of ranks.

Batch k of those that are left goes to rank k mod world, and keeps what it has until the part is done; then
Σ = Σ_earlier + Σ_rank 0 + Σ_rank 1 + …, on every rank in this order. So the same number of processes gives the same
bits, however often it was interrupted, and another number the same up to rounding. In the folder each rank keeps its
own share beside the part's file (`store`); another number of processes, or one, goes on from them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from . import distributed, part_files
from .store import FisherFolder, Progress
from .sums import FisherSums

if TYPE_CHECKING:
    from .fisher import Collector, Part


def collect_together(collector: Collector, part: Part, folder: FisherFolder | None, bar: tqdm) -> FisherSums:
    """The sums of a part, complete, on every rank.

    Args:
        collector: Entered, on every rank.
        part: What to sum.
        folder: Where shares, and at the end the sums, are kept.
        bar: Told of this rank's batches.

    Returns:
        The sums.

    Raises:
        RankStopped: Another process has stopped; names it.

    Cost: a share of the passes, and each rank's sums sent to all at the end. A model of FSDP2 is run by all ranks in
    step, those with fewer batches repeating one whose gradients are dropped.
    """
    rank, world = distributed.rank(), distributed.world()
    share = part_files.share(part.name, rank, world)
    before = own = None
    distributed.meet()  # earlier parts are written
    if folder is not None:
        if distributed.first():
            settle(folder, part.name, world)
        distributed.meet()
        before, own = folder.load(part.name), folder.load(share, collector.empty(part))
        if before is not None and before.complete:
            return before.sums

    def save(sums: FisherSums, batches: list[int]) -> None:
        distributed.check()
        if folder is not None:
            folder.save_now_and_then(share, sums, batches)

    count = len(collector.batches(part))
    known = set() if before is None else set(before.batches)
    left = [k for k in range(count) if k not in known]
    mine = left[rank::world]
    own = own or Progress(collector.empty(part), (), False)
    missing = len(mine) - len(own.batches)
    steps = max(distributed.gather_objects(missing)) if runs_in_step(collector.model) else missing
    sums = collector.collect(part, own, save, bar, mine)
    for _ in range(steps - missing):
        collector.accompany(part)
    distributed.meet()
    total = _gathered(sums, before, collector.device)
    collector.check(total)
    if folder is not None and distributed.first():
        folder.save(part.name, total)
        part_files.drop_shares(folder.path, part.name)
    return total


def settle(folder: FisherFolder, part: str, world: int) -> None:
    """Make a folder ready for a part to be gone on with by `world` processes; one of them calls this.

    Shares of another number of processes are added to the part's file. A share says which batches that file had when
    it was begun, so one that was added already, before a process was killed, is known and removed.

    Args:
        folder: The folder; its part is changed.
        part: Name of a part, or of one of its groups.
        world: How many processes go on.
    """
    folder.begin()
    known = [s for s in part_files.shares(folder.path, part) if folder.after(s) == folder.batches(part)]
    if known and all(s.endswith(f"of{world}") for s in known):
        return
    if known:
        found = [progress for progress in map(folder.load, [part, *known]) if progress is not None]
        sums = found[0].sums
        for progress in found[1:]:
            sums = sums.merged(progress.sums)
        folder.save(part, sums, [number for progress in found for number in progress.batches])
    part_files.drop_shares(folder.path, part)


def runs_in_step(model: nn.Module) -> bool:
    """Whether a forward pass needs all ranks: parameters are sharded by FSDP2."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def _gathered(sums: FisherSums, before: Progress | None, device: torch.device | str) -> FisherSums:
    """What there was before and every rank's sums, added in the order of ranks."""
    total = None if before is None else before.sums
    for source in range(distributed.world()):
        (kind, counts), tensors = distributed.broadcast(
            (sums.representation, sums.counts), sums.tensors(), source, device
        )
        if tensors:
            theirs = FisherSums(kind)
            theirs.load(tensors, counts)
            total = theirs if total is None else total.merged(theirs)
    return sums if total is None else total
