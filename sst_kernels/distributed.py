"""`solve_distributed`: a batch of pencils dealt over the processes of torch.distributed."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .davidson import DavidsonOptions
from .operators import Operator, as_operator
from .pencil import Pencil
from .result import Counts, EigenResult
from .solve import solve

_ROWS = ("values", "vectors", "backward_errors", "b_orthogonality", "status")  # a row for each pencil
# Dimensions of an operator's tensors behind its batch dimensions.
_RANKS = {
    "Dense": {"matrix": 2},
    "Mirrored": {"matrix": 2},
    "Diagonal": {"entries": 1},
    "Kronecker": {},
    "Scaled": {"scale": 0},
    "Damped": {"damping": 0},
    "Sum": {},
    "EKFAC": {"left_vectors": 2, "right_vectors": 2, "entries": 2},
    "Gram": {"rows": 2, "count": 0},
    "LowRankPlusDiagonal": {"factor": 2, "entries": 1, "core": 2},
}


def solve_distributed(pencil: Pencil, k: int, *, group: dist.ProcessGroup | None = None, **options: Any) -> EigenResult:
    """`solve` with each rank solving its share of the batch; every rank returns the whole result.

    A collective call: every rank of the group passes the same pencil, on its own device. The flat batch is
    cut into contiguous ranges whose lengths differ by at most one. Nothing here is differentiated.

    Args:
        pencil: batch (..., n, n) of any operators but callables.
        k: number of pairs.
        group: the processes; None for all.
        **options: of `solve`.

    Returns:
        The result of `solve(pencil, k, **options)`, on the device of the pencil. Counts are the largest of any
        rank; the method and the history are those of the first rank that had pencils. Each rank sends its
        results to all, about nk numbers a pencil.

    Raises:
        RuntimeError: on every rank, if any raised; names each such rank and its error.
    """
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    total = math.prod(pencil.batch_shape)
    bounds = [total * i // world for i in range(world + 1)]
    found, failure = None, None
    start, stop = bounds[rank], bounds[rank + 1]
    try:
        own = _options_of(options.pop("options", None), pencil.batch_shape, start, stop)
        with torch.no_grad():
            found = solve(pencils_of(pencil, start, stop), k, options=own, **options)
    except Exception as error:  # the other ranks wait: they must hear of it
        failure = error
    message = None if failure is None else f"{type(failure).__name__}: {failure}"
    facts = None if found is None else {f.name: getattr(found, f.name) for f in fields(found) if f.name not in _ROWS}
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, (message, facts), group=group)
    failed = [f"rank {i}: {text}" for i, (text, _) in enumerate(everyone) if text is not None]
    if failed:
        raise RuntimeError(f"solve_distributed: {'; '.join(failed)}") from failure
    lengths = [stop - start for start, stop in pairwise(bounds)]
    rows = {name: _all_gather(getattr(found, name), lengths, group) for name in _ROWS}
    whole = everyone[next((i for i, length in enumerate(lengths) if length), 0)][1]
    whole["counts"] = Counts(
        *(max(column) for column in zip(*(theirs["counts"] for _, theirs in everyone), strict=True))
    )
    return EigenResult(**{name: x.reshape(pencil.batch_shape + x.shape[1:]) for name, x in rows.items()}, **whole)


def pencils_of(pencil: Pencil, start: int, stop: int) -> Pencil:
    """The pencils start … stop − 1 of the batch in row-major order, as one of batch shape (stop − start,)."""
    return Pencil(*(_operators_of(x, pencil.batch_shape, start, stop) for x in (pencil.A, pencil.B)))


def _options_of(options: DavidsonOptions | None, batch: torch.Size, start: int, stop: int) -> DavidsonOptions | None:
    """The options for pencils start … stop − 1: their start vectors, and their preconditioners."""
    if not isinstance(options, DavidsonOptions):
        return options
    vectors, inverse = options.start, options.preconditioner
    if isinstance(vectors, Tensor) and vectors.shape[:-2] == batch:  # else `solve` says what is wrong
        vectors = vectors.reshape(-1, *vectors.shape[-2:])[start:stop]
    if inverse is not None:
        inverse = as_operator(inverse, "DavidsonOptions: preconditioner")
        inverse = _operators_of(inverse, batch, start, stop)
    return replace(options, start=vectors, preconditioner=inverse)


def _operators_of(operator: Operator, batch: torch.Size, start: int, stop: int) -> Operator:
    """Members start … stop − 1 of an operator broadcast to `batch`; what it shares among them stays shared.

    Returns:
        An operator of the same class.

    Raises:
        TypeError: if the operator has no tensors to cut.
    """
    kind = type(operator)
    if kind.__name__ not in _RANKS:
        raise TypeError(
            f"solve_distributed: cannot cut a {kind.__name__} into its batch; expected one of {list(_RANKS)}"
        )
    single = math.prod(batch) == 1
    index, rest = [], torch.arange(start, stop)
    for size in reversed(batch):
        index.insert(0, rest % max(size, 1))
        rest = rest // max(size, 1)

    def cut(value: Any, name: str) -> Any:
        if isinstance(value, Operator):
            return _operators_of(value, batch, start, stop)
        if isinstance(value, list | tuple):
            return [cut(x, name) for x in value]
        if not isinstance(value, Tensor):
            return value
        own = value.dim() - _RANKS[kind.__name__][name]
        sizes, core = value.shape[:own], value.shape[own:]
        if single:
            return value.reshape(core).expand(stop - start, *core)
        if all(size == 1 for size in sizes):
            return value.reshape(core)
        used = zip(index[len(batch) - own :], sizes, strict=True)
        return value[tuple((i if size > 1 else torch.zeros_like(i)).to(value.device) for i, size in used)]

    return kind(**{f.name: cut(getattr(operator, f.name), f.name) for f in fields(operator)})


def _all_gather(part: Tensor, lengths: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Rows of all ranks, `lengths` of each, in the order of the ranks."""
    nccl = "nccl" in dist.get_backend(group)
    device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
    sent = part.new_zeros(max(lengths), *part.shape[1:], device=device)
    sent[: len(part)] = part
    real = torch.view_as_real(sent) if sent.is_complex() else sent
    received = [torch.empty_like(real) for _ in lengths]
    dist.all_gather(received, real.contiguous(), group=group)
    rows = torch.cat([x[:length] for x, length in zip(received, lengths, strict=True)])
    return (torch.view_as_complex(rows) if sent.is_complex() else rows).to(part.device)
