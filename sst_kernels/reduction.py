"""Sums of Kronecker factors over the processes of torch.distributed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from .factors import Factors
from .layer_factors import LayerFactors

_BUCKET_BYTES = 64 * 2**20  # of one collective: large enough to be bound by bandwidth


def all_reduce(factors: Factors, group: dist.ProcessGroup | None = None) -> None:
    """Every rank's sums ← the sums over all ranks (`Factors.all_reduce`)."""
    _agree(factors, group)
    for tensors, flat in _buckets(factors.layers.values(), group):
        dist.all_reduce(flat, group=group)
        _unpack(flat, tensors)


def reduce_to_owners(factors: Factors, group: dist.ProcessGroup | None = None) -> None:
    """Each layer's sums over all ranks, on one rank (`Factors.reduce_to_owners`)."""
    _agree(factors, group)
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    holders = [name for name in factors.layers if name not in factors.shared]
    keeper = {name: i % world for i, name in enumerate(holders)}
    keeper |= {name: keeper[holder] for name, holder in factors.shared.items()}
    for target in range(world):
        layers = [layer for name, layer in factors.layers.items() if keeper[name] == target]
        for tensors, flat in _buckets(layers, group):
            dist.reduce(flat, target if group is None else dist.get_global_rank(group, target), group=group)
            if rank == target:
                _unpack(flat, tensors)
    factors.layers = {name: layer for name, layer in factors.layers.items() if keeper[name] == rank}
    factors.shared = {name: holder for name, holder in factors.shared.items() if name in factors.layers}


def _agree(factors: Factors, group: dist.ProcessGroup | None) -> None:
    """The same layers, in one order, with the same shared inputs on every rank; step numbers are summed."""
    steps = (factors.backwards, factors.forwards, factors.sequences)
    dtypes = {name: layer.grad_factor.dtype for name, layer in factors.layers.items()}
    everyone: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, (factors.without_sums(), dtypes, steps), group=group)
    seen: dict[str, torch.dtype] = {}
    for theirs, their_dtypes, _ in everyone:
        factors.check_same(theirs)
        seen |= their_dtypes
    factors.backwards, factors.forwards, factors.sequences = (
        sum(s) for s in zip(*(s for *_, s in everyone), strict=True)
    )
    for name in seen:
        holders = {theirs.shared.get(name) for theirs, their_dtypes, _ in everyone if name in their_dtypes}
        holder = holders.pop() if len(holders) == 1 else None
        if factors.shared.get(name) not in (None, holder):
            factors.unshare(name)
        if holder is not None:
            factors.shared[name] = holder
    factors.shared = {name: holder for name, holder in factors.shared.items() if name in seen}
    device = next((layer.counts.device for layer in factors.layers.values()), "cpu")
    factors.layers = {
        name: factors.layers.get(name) or LayerFactors.zeros(spec, seen[name], device, name in factors.shared)
        for name, spec in factors.specs.items()
        if name in seen
    }


def _buckets(layers: Iterable[LayerFactors], group: dist.ProcessGroup | None) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Tensors of one dtype and their copy in one flat buffer where the group's backend can reach it."""
    nccl = "nccl" in dist.get_backend(group)
    device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for layer in layers:
        for tensor in layer.tensors().values():
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for tensors in by_dtype.values():
        while tensors:
            bucket = [tensors.pop(0)]
            while tensors and sum(t.nbytes for t in bucket) + tensors[0].nbytes <= _BUCKET_BYTES:
                bucket.append(tensors.pop(0))
            yield bucket, torch.cat([t.to(device) for t in bucket])


def _unpack(flat: Tensor, tensors: list[Tensor]) -> None:
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part)
