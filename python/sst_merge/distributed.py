"""Processes that work together (torchrun): who they are, and what the others hear when one of them stops.

Every process runs the same program on the same data. `together` lets each of them beat in the store of
torch.distributed; where they wait for one another they look whether all beat still, so that the end of one, whatever
it was, is told with its rank and soon. Without a process group there is one process, and nothing here costs anything.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

T = TypeVar("T")

SILENCE = 30.0
"""Seconds without a beat after which a process counts as gone."""

_BEAT = 0.5  # seconds
_POLL = 0.02
_GRACE = 10.0  # seconds in which the cause is looked for, once something is known to be wrong: launchers wait 30
_QUIET = 4 * _BEAT  # without a beat, where something is known to be wrong


class RankStopped(ConnectionError):
    """Another process has stopped, and this one cannot go on alone."""


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is."""
    return dist.get_rank() if world() > 1 else 0


def first() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def own_device(device: str) -> str:
    """The device of this process that a name without an index means: safetensors takes "cuda" for the first one."""
    return f"cuda:{torch.cuda.current_device()}" if world() > 1 and device == "cuda" else device


def gather_objects(value: Any) -> list[Any]:
    """The value of every process, in the order of ranks; small ones, as they are pickled."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def of_first(value: Any) -> Any:
    """The first process' value, on all: what may differ by rounding, and is decided by, is the same everywhere."""
    return gather_objects(value if first() else None)[0]


def broadcast(
    value: Any, tensors: Mapping[str, Tensor], source: int, device: torch.device | str
) -> tuple[Any, dict[str, Tensor]]:
    """What one process has, on all; a collective call.

    Args:
        value: A small object, pickled; that of `source` counts.
        tensors: By key; those of `source` count, and stay there what they are.
        source: The rank.
        device: Where the others want the tensors.

    Returns:
        Its value and tensors.
    """
    header = [(value, {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()})]
    dist.broadcast_object_list(header, source)
    value, shapes = header[0]
    received = {}
    for key, (shape, dtype) in shapes.items():
        own = tensors[key].contiguous() if rank() == source else torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(own, source)
        received[key] = own
    return value, received


def spread(
    costs: Mapping[str, float], work: Callable[[list[str]], dict[str, T]], device: torch.device | str
) -> dict[str, T]:
    """`work(keys)`, the keys dealt over the processes, dearest first and always to the one with least to do.

    Args:
        costs: Key -> what it costs, in any unit; the same on all ranks.
        work: Gives a flat dataclass for every key, its tensors on `device`.
        device: Where this rank, which may have no key, gets the tensors of the others.

    Returns:
        Key -> what was made of it, on every rank.
    """
    if world() == 1:
        return work(list(costs))
    owner, load = {}, [0.0] * world()
    for key in sorted(costs, key=costs.get, reverse=True):
        owner[key] = load.index(min(load))
        load[owner[key]] += costs[key]
    own = work([key for key in costs if owner[key] == rank()])
    meet()
    found = {}
    for key, source in owner.items():
        kind, plain, tensors = None, {}, {}
        if source == rank():
            kind, values = type(own[key]), vars(own[key])
            tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
            plain = {name: value for name, value in values.items() if name not in tensors}
        (kind, plain), tensors = broadcast((kind, plain), tensors, source, device)
        found[key] = kind(**plain, **tensors)
    return {key: found[key] for key in costs}


class _Watch:
    """The beats of all processes, and what is known of their ends.

    Args:
        number: How many watches there were in this process before.

    Attributes:
        stopped: Of the first process that is known to have stopped, in words.
    """

    def __init__(self, number: int) -> None:
        self.store = dist.PrefixStore(f"sst_merge/{number}", _get_default_store())
        self.rank, self.world, self.stopped = rank(), world(), ""
        self.others = [r for r in range(self.world) if r != self.rank]
        self._meetings = 0
        self._beats = {r: (b"", time.monotonic()) for r in self.others}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        """Beat and listen until `end`."""
        beat = 0
        while not self._over.wait(_BEAT if beat else 0):
            beat += 1
            try:
                self.store.set(f"beat/{self.rank}", str(beat))
                for other in self.others:
                    self._listen(other)
                self._judge(SILENCE)
            except RuntimeError as error:  # of the store, which rank 0 or the launcher holds
                self.stopped = self.stopped or f"rank 0 stopped (the store of torch.distributed is gone: {error})"
                return

    def _listen(self, other: int) -> None:
        """What there is of one process."""
        if self.store.check([f"failed/{other}"]):
            self.stopped = self.stopped or f"rank {other} stopped ({self.store.get(f'failed/{other}').decode()})"
        if self.store.check([key := f"beat/{other}"]) and (beat := self.store.get(key)) != self._beats[other][0]:
            self._beats[other] = beat, time.monotonic()

    def _judge(self, limit: float) -> None:
        """Take the process that has been silent for longer than a limit, and longest, for stopped."""
        other, (_, heard) = min(self._beats.items(), key=lambda item: item[1][1])
        if (silent := time.monotonic() - heard) > limit:
            self.stopped = self.stopped or (
                f"rank {other} stopped (no sign of life for {silent:.0f} s: it was killed, or its machine is down)"
            )

    def check(self) -> None:
        """Raise if another process is known to have stopped.

        Raises:
            RankStopped: Names it.
        """
        if self.stopped:
            raise RankStopped(f"{self.stopped}; what was collected is kept, and the same command goes on with it")

    def meet(self) -> None:
        """Wait for all; RankStopped if one does not come."""
        self._meetings += 1
        keys = [f"meeting/{self._meetings}/{r}" for r in range(self.world)]
        self.store.set(keys[self.rank], "")
        while not self.store.check(keys):
            self.check()
            time.sleep(_POLL)

    def find(self) -> str:
        """Which process stopped, something being known to be wrong; empty if none can be found."""
        deadline = time.monotonic() + _GRACE
        while not self.stopped and time.monotonic() < deadline:
            self._judge(_QUIET)
            time.sleep(_POLL)
        return self.stopped

    def fail(self, error: BaseException) -> None:
        """Tell the others what stops this process."""
        if not isinstance(error, RankStopped):
            self.store.set(f"failed/{self.rank}", f"{type(error).__name__}: {error}")

    def leave(self) -> None:
        """Wait for all, rank 0, which may hold the store, being the last to go."""
        self.meet()
        self.store.set(f"left/{self.rank}", "")
        while self.rank == 0 and not self.store.check([f"left/{r}" for r in range(self.world)]):
            self.check()
            time.sleep(_POLL)

    def end(self) -> None:
        """Beat no more."""
        self._over.set()
        self._thread.join(5)


_watch: _Watch | None = None
_watches = 0


def meet() -> None:
    """Wait until every process is here.

    Raises:
        RankStopped: One has stopped.
    """
    if _watch is not None:
        _watch.meet()


def check() -> None:
    """Look whether every process is alive, at no cost.

    Raises:
        RankStopped: One has stopped.
    """
    if _watch is not None:
        _watch.check()


@contextmanager
def together() -> Iterator[None]:
    """Within it the processes hear of each other's end; they leave it together.

    Raises:
        RankStopped: Another process raised, died, or was not heard of for `SILENCE` seconds; names it.
    """
    global _watch, _watches
    if world() == 1 or _watch is not None:
        yield
        return
    _watch, _watches = _Watch(_watches), _watches + 1
    try:
        yield
        _watch.leave()
    except RankStopped:
        raise
    except BaseException as error:
        if isinstance(error, RuntimeError) and (stopped := _watch.find()):
            raise RankStopped(stopped) from error  # a collective that broke because of another process
        _watch.fail(error)
        raise
    finally:
        _watch.end()
        _watch = None


@contextmanager
def joined() -> Iterator[None]:
    """Within it this process is one of those that torchrun started, if it did; on CUDA each has a device.

    `sst_merge.merge` and `collect` work together with the others wherever the caller has made a process group.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        dist.destroy_process_group()


def _terminated(number: int, frame: object) -> None:
    """The launcher ends this process because another one has ended: say which."""
    found = _watch.find() if _watch is not None else ""
    raise RankStopped(found or "the launcher stopped this process")
