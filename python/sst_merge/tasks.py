"""Tasks: sets of calibration sequences of one kind, each split into those that find directions and those held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .data import TokenSequence


@dataclass(frozen=True)
class Task:
    """Sequences of one task of a kind.

    Attributes:
        name: Distinct among the tasks of the kind; "" if it is the only one, and has none.
        weight: w_t of F = Σ_t w_t F_t.
        found: Sequences that directions are found with.
        held: Held-out sequences, which judge them.
    """

    name: str
    weight: float
    found: Sequence[TokenSequence]
    held: Sequence[TokenSequence]


def split_held_out(
    sequences: Sequence[TokenSequence], share: float, seed: int, decided: Mapping[tuple[int, ...], bool] | None = None
) -> tuple[list[TokenSequence], list[TokenSequence]]:
    """Sequences to find directions with, and held-out ones to judge them by; both keep at least one.

    Sequences of equal token ids go to the same side: else what is held out would have been seen.

    Args:
        sequences: From `tokenize`.
        share: Share held out, in (0, 1).
        seed: Seed of the draw.
        decided: Token ids -> whether other data that have the same sequence hold it out.

    Returns:
        (found, held), disjoint, together all sequences.

    Raises:
        ValueError: Fewer than two different sequences, or none whose side is still open.
    """
    decided = decided or {}
    groups: dict[tuple[int, ...], list[TokenSequence]] = {}
    for sequence in sequences:
        groups.setdefault(tuple(sequence.input_ids), []).append(sequence)
    if len(groups) < 2:
        raise ValueError(
            f"{len(groups)} usable calibration sequence: at least 2 different ones are needed, one to check the "
            "directions on text they were not found with; give more examples (some hundreds are usual)"
        )
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    keys = list(groups)
    drawn = [groups[keys[i]] for i in order if keys[i] not in decided]
    room = max(1, min(len(sequences) - 1, round(share * len(sequences))))
    held = [s for key, group in groups.items() if decided.get(key) for s in group]
    for group in drawn:
        if len(held) + len(group) <= room:
            held += group
    held = held or min(drawn, key=len, default=[])
    if not 0 < len(held) < len(sequences):
        raise ValueError(
            f"all {len(groups)} different sequences are in other data of the same kind, which put them all on one side "
            "of the held-out split: give each sequence to one task"
        )
    apart = {id(sequence) for sequence in held}
    return [s for s in sequences if id(s) not in apart], [s for s in sequences if id(s) in apart]
