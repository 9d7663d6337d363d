"""Statistics on disk: sums and counts in safetensors, with the fingerprint of the run that gathers them.

A folder holds `fisher.json`, the fingerprint, and a file for each field of `Statistics` and task, with how far it has
come in its metadata: `harm.safetensors`, or `harm-NAME.safetensors` where the tasks have names. Every file is written
beside its place and renamed into it, so that a run killed at any moment leaves a folder that the next one goes on with.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from . import atomic, distributed
from .data import TokenSequence
from .mixture import KINDS, Statistics, mix_parts, part_name
from .part_files import PIECES, begun_pieces, shares
from .sums import FisherSums

FINGERPRINT_NAME = "fisher.json"
PATCH_NAME = "patch.safetensors"
ANSWERS_NAME = "answers-{kind}-{digest}.json"
PARTS = tuple(f.name for f in fields(Statistics))
STEP_NAME = "step-{step}-{digest}"
SAVE_EVERY = 4  # batches
SAVE_SHARE = 10  # a save waits until this many times what the last one took has passed

SERVES = {
    "exact": {"exact", "gram"},
    "gram": {"gram"},
    "diagonal": {"diagonal", "exact", "gram"},
    **{name: {name, "exact", "gram"} for name in ("kfac_expand", "kfac_reduce")},
}
"""Representation wanted -> those it can be had from."""


def serves(known: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether what is kept of harmful and of benign data will do for what is wanted of each."""
    return all(one in SERVES[other] for one, other in zip(known, wanted, strict=True))


_LEFT = (".*.new", ".tmp*")  # by a process that was killed while it wrote: our names, and safetensors' own
_BESIDE = (
    ANSWERS_NAME.format(kind="*", digest="*"),
    STEP_NAME.format(step="*", digest="*"),
    *(f"{part}-*.safetensors" for part in PARTS),
    *PIECES,
    *_LEFT,
)
_SAME_PATCH = 1e-4  # relative to the largest core: rounding is far below, another basis far above


@dataclass(frozen=True)
class Progress:
    """How far the sums of a part have come.

    Attributes:
        sums: What is there.
        batches: The numbers of the batches, over all points, that are in it; none where it is complete.
        complete: Whether that is all of them.
    """

    sums: FisherSums
    batches: Collection[int]
    complete: bool


class FisherFolder:
    """The folder of one collection, made at the first save.

    Args:
        path: The folder.
        fingerprint: What the statistics are of: nested mappings of JSON values.
        device: Where loaded tensors go.
        patch: Module name -> core of τ, kept beside the sums: singular vectors that another machine finds otherwise
            (equal singular values) show in it.

    Raises:
        ValueError: The folder holds something else, or statistics of another run; names the differences.
    """

    def __init__(
        self,
        path: str | Path,
        fingerprint: Mapping[str, Any],
        device: str = "cpu",
        patch: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.path, self.device, self.patch = Path(path), device, dict(patch or {})
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self._waited, self._saved_at, self._took = 0, time.monotonic(), 0.0
        _refuse_foreign(self.path)
        if self._begun:
            wanted, self.fingerprint = self.fingerprint, read_fingerprint(self.path)
            _check_same(self.path, self.fingerprint, wanted, complete=self.complete)
            self._check_patch()
        if distributed.first():
            for left in (left for pattern in _LEFT for left in self.path.glob(pattern)):
                left.unlink()

    def _check_patch(self) -> None:
        """ValueError if the statistics are in other coordinates than the patch is here."""
        file = self.path / PATCH_NAME
        if not self.patch or not file.is_file():
            return
        known = load_file(file, device=self.device)
        scale = max(float(tau.norm()) for tau in self.patch.values())
        for name, tau in self.patch.items():
            if name not in known or float((known[name].to(tau) - tau).norm()) > _SAME_PATCH * scale:
                raise ValueError(
                    f"Fisher folder: {self.path} holds statistics in other coordinates of {name}: its adapters have "
                    "equal singular values, whose vectors each machine finds otherwise; collect all on one machine"
                )

    def _file(self, part: str) -> Path:
        """The file of a part."""
        return self.path / f"{part}.safetensors"

    @property
    def tasks(self) -> dict[str, tuple[str, ...]]:
        """Keys "harm" and "benign" -> names of their tasks; ("",) where there is one without a name."""
        return tasks_of(self.fingerprint)

    @property
    def complete(self) -> bool:
        """Whether every part is there to its end."""
        return all(
            self._is_complete(part_name(field, task)) for field, kind in KINDS.items() for task in self.tasks[kind]
        )

    def _is_complete(self, part: str) -> bool:
        """Whether a part is there to its end, in one file or in those of all its groups."""
        names = begun_pieces(self.path, part) or [part]
        return all(self._file(name).is_file() and self._metadata(name)["complete"] for name in names)

    def batches_done(self, part: str, total: int) -> int:
        """How many of the `total` batches of a part are in what is there of it."""
        if self._is_complete(part):
            return total
        done = self.batches(part)
        return done if isinstance(done, int) else len(done)

    def groups(self, part: str, wanted: int) -> int:
        """In how many groups of modules a part is gone on with: those it was begun in, if they are as small.

        Args:
            part: Its name, from `part_name`.
            wanted: How many groups memory asks for, 0 if sums need not be left in the folder.

        Returns:
            The number; 0 if the part is there to its end.

        Raises:
            ValueError: It was begun in fewer groups.
        """
        if self._is_complete(part):
            return 0
        whole = self._file(part).is_file() or bool(shares(self.path, part))
        begun = len(begun_pieces(self.path, part)) or int(whole)
        if 0 < begun < wanted:
            raise ValueError(
                f"Fisher folder: {part} was begun in groups of modules, {begun} in number, and memory now asks for "
                f"{wanted}: give it more, or remove {self.path}"
            )
        return begun if begun > 1 else wanted

    def load(self, part: str, sums: FisherSums | None = None) -> Progress | None:
        """What is there of a part.

        Args:
            part: Its name, from `part_name`, or that of a `share` or group of it.
            sums: Empty sums with room for all rows; None for a part that is complete.

        Returns:
            The sums and how far they have come; None where there is nothing yet.

        Raises:
            ValueError: The file is damaged.
        """
        file = self._file(part)
        if not file.is_file():
            return self._load_pieces(part)
        metadata = self._metadata(part)
        if metadata["complete"] and not metadata["count"] > 0:
            raise ValueError(f"Fisher folder: {file} sums over {metadata['count']} sequences; collect it again")
        with safe_open(file, framework="pt", device=self.device) as tensors:
            loaded = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
        sums = FisherSums(metadata["representation"]) if sums is None else sums
        sums.load(loaded, [metadata[number] for number in ("count", "sequences", "squares")])
        batches = metadata["batches"]
        return Progress(sums, range(batches) if isinstance(batches, int) else batches, metadata["complete"])

    def _load_pieces(self, part: str) -> Progress | None:
        """A part that was collected in groups, once all are there."""
        pieces = begun_pieces(self.path, part)
        if not pieces or not self._is_complete(part):
            return None
        loaded = [self.load(piece).sums for piece in pieces]
        sums = FisherSums(loaded[0].representation)
        sums.load({key: tensor for each in loaded for key, tensor in each.tensors().items()}, loaded[0].counts)
        return Progress(sums, (), True)

    def statistics(self, weights: Mapping[str, Mapping[str, float]] | None = None) -> Statistics:
        """All parts of a complete collection.

        Args:
            weights: "harm" and "benign" -> task's name -> w_t; None takes every task, of weight 1.

        Returns:
            F = Σ_t w_t F_t of the tasks named.
        """
        if weights is None:
            weights = {kind: dict.fromkeys(tasks, 1.0) for kind, tasks in self.tasks.items()}
        wanted = [(field, task) for field, kind in KINDS.items() for task in weights[kind]]
        return mix_parts({(field, task): self.load(part_name(field, task)).sums for field, task in wanted}, weights)

    def _metadata(self, part: str) -> dict[str, Any]:
        """How far a part has come, from its file's header; ValueError if it is damaged or not of this folder."""
        file = self._file(part)
        try:
            with safe_open(file, framework="pt") as tensors:
                metadata = json.loads(tensors.metadata()["sst_merge"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"Fisher folder: {file} is damaged ({error}); remove it to collect it again") from None
        if metadata.get("run") != _digest(self.fingerprint):
            raise ValueError(
                f"Fisher folder: {file} belongs to another run than {FINGERPRINT_NAME} beside it; remove it to collect "
                "it again"
            )
        return metadata

    def save_now_and_then(self, part: str, sums: FisherSums, batches: Collection[int]) -> None:
        """Save a part after a batch, if `SAVE_EVERY` batches have come and saving is not a tenth of the work.

        Args:
            part: Its name, or that of a `share` of it.
            sums: So far.
            batches: The numbers of the batches in them.
        """
        self._waited += 1
        now = time.monotonic()
        if self._waited < SAVE_EVERY or now - self._saved_at < SAVE_SHARE * self._took:
            return
        self.save(part, sums, batches)
        self._waited, self._saved_at = 0, time.monotonic()
        self._took = self._saved_at - now

    def save(self, part: str, sums: FisherSums, batches: Collection[int] | None = None) -> None:
        """Replace the file of a part.

        Args:
            part: Its name, or that of a `share` of it.
            sums: So far.
            batches: The numbers of the batches in them; None when complete.

        Raises:
            OSError: It cannot be written (disk full, …); the earlier file stays.
        """
        metadata = {
            "representation": sums.representation,
            "count": sums.count,
            "sequences": sums.sequences,
            "squares": sums.squares,
            "batches": _counted(batches or ()),
            "complete": batches is None,
            "run": _digest(self.fingerprint),
        }
        whole, _, share = part.rpartition(".")
        if share.startswith("rank"):
            metadata["after"] = self.batches(whole)
        tensors = {key: tensor.contiguous() for key, tensor in sums.tensors().items()}
        self.begin()
        with atomic.replace_file(self._file(part)) as fresh:
            atomic.save_tensors(fresh, tensors, {"sst_merge": json.dumps(metadata)})

    def after(self, share: str) -> int | list[int]:
        """What `batches` said of the part when a share of it was begun."""
        return self._metadata(share)["after"]

    def batches(self, part: str) -> int | list[int]:
        """Which batches are in a part's file: how many, the first ones, or their numbers; -1 for all."""
        if not self._file(part).is_file():
            return 0
        metadata = self._metadata(part)
        return -1 if metadata["complete"] else metadata["batches"]

    @property
    def _begun(self) -> bool:
        """Whether there is any sum."""
        return any(any(self.path.glob(f"{part}{end}.safetensors")) for part in PARTS for end in ("", ".*", "-*"))

    def begin(self) -> None:
        """Make the folder, before the first part is saved."""
        if self._begun:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        if self.patch:
            with atomic.replace_file(self.path / PATCH_NAME) as fresh:
                atomic.save_tensors(fresh, {name: tau.contiguous() for name, tau in self.patch.items()}, {})
        atomic.write_text(self.path / FINGERPRINT_NAME, json.dumps(self.fingerprint, indent=1) + "\n")


def _counted(batches: Collection[int]) -> int | list[int]:
    """Numbers of batches as JSON: how many, where they are the first ones."""
    numbers = sorted(batches)
    return len(numbers) if numbers == list(range(len(numbers))) else numbers


def _refuse_foreign(path: Path) -> None:
    """ValueError if a folder exists and holds anything but statistics."""
    if not path.exists():
        return
    ours = {FINGERPRINT_NAME, PATCH_NAME, *(f"{part}.safetensors" for part in PARTS)}
    if not path.is_dir() or any(file.name not in ours and not any(map(file.match, _BESIDE)) for file in path.iterdir()):
        raise ValueError(f"Fisher folder: {path} exists and holds other things; name a new or empty folder")


def tasks_of(fingerprint: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Keys "harm" and "benign" -> names of the tasks whose data a fingerprint lists; ("",) where it lists none."""
    parts = [part.partition("-") for part in fingerprint.get("data", {})]
    return {kind: tuple(task for field, _, task in parts if field == kind) or ("",) for kind in ("harm", "benign")}


def load_answers(file: Path) -> list[TokenSequence]:
    """Generated answers, as `save_answers` wrote them; ValueError if the file is damaged."""
    try:
        return [TokenSequence(*record) for record in json.loads(file.read_text(encoding="utf-8"))]
    except (TypeError, ValueError) as error:
        raise ValueError(f"Fisher folder: {file} is damaged ({error}); remove it") from None


def save_answers(file: Path, answers: Sequence[TokenSequence]) -> None:
    """Keep generated answers beside the statistics: a run that goes on, or a later merge, takes these.

    Args:
        file: To be written.
        answers: Prompts with their answers.
    """
    _refuse_foreign(file.parent)
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(file, json.dumps([[s.index, s.input_ids, s.is_target] for s in answers]))


def read_fingerprint(path: Path) -> dict[str, Any]:
    """The fingerprint of a folder of statistics.

    Args:
        path: The folder.

    Returns:
        The fingerprint.

    Raises:
        ValueError: There is none, or it is damaged.
    """
    file = path / FINGERPRINT_NAME
    if not file.is_file():
        raise ValueError(
            f"Fisher folder: {path} holds no {FINGERPRINT_NAME}; name a folder that `sst-merge fisher` wrote"
        )
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Fisher folder: {file} is damaged ({error}); remove {path} and collect again") from None


def _digest(fingerprint: Mapping[str, Any]) -> str:
    """SHA-256 of a fingerprint: what ties a part's file to its folder."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def _check_same(path: Path, known: Mapping[str, Any], wanted: Mapping[str, Any], complete: bool) -> None:
    """ValueError unless the statistics in a folder are those that are wanted."""
    known, wanted = dict(known), dict(wanted)
    if complete:
        wanted.pop("batches", None)  # a matter of speed, once all is summed
        known = {key: value for key, value in known.items() if key in wanted}  # without data here, none to compare
        if serves(_pair(known["representation"]), _pair(wanted["representation"])):
            wanted["representation"] = known["representation"]
    ours, theirs = wanted.pop("data", {}), known.pop("data", {})
    differences = _differences(known, wanted)
    for part, sequences in ours.items():
        missing = len(set(sequences) - set(theirs.get(part, ())))
        if missing or (not complete and sequences != theirs.get(part)):
            differences.append(f"{missing} of the {len(sequences)} sequences of {part} are not in it")
    if differences:
        raise ValueError(
            f"Fisher folder: {path} holds statistics of another run: {'; '.join(differences)}. Name another folder "
            "(--fisher), or remove this one"
        )


def _pair(representation: str | Mapping[str, str]) -> tuple[str, str]:
    """Representations of harmful and of benign data, as a fingerprint has them."""
    if isinstance(representation, str):
        return representation, representation
    return representation["harm"], representation["benign"]


def _differences(known: Any, wanted: Any, where: str = "") -> list[str]:
    """'key: there …, wanted …' for every leaf that differs."""
    if isinstance(known, Mapping) and isinstance(wanted, Mapping):
        keys = dict.fromkeys([*known, *wanted])
        return [d for key in keys for d in _differences(known.get(key), wanted.get(key), f"{where}.{key}".lstrip("."))]
    return [] if known == wanted else [f"{where} is {_short(known)} there, {_short(wanted)} here"]


def _short(value: Any) -> str:
    """A value, hashes cut to what tells them apart."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
