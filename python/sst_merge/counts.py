"""How many sequences statistics are of, by task, and how many their weights leave the worth of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .mixture import Statistics, tasks_in
from .sums import FisherSums

_FEW = 0.5  # of the sequences


def count_sequences(statistics: Statistics, kind: str) -> dict[str, Any]:
    """Numbers of sequences of a kind.

    Args:
        statistics: The statistics.
        kind: "harm" or "benign".

    Returns:
        "found" and "held_out"; where examples have weights "effective_found" and "effective_held_out", (Σω)²/Σω², how
        many equally weighted sequences are worth as much (Kish 1965); and under "tasks" the same and "weight" of every
        task that has a name.
    """
    found, held = (tasks_in(getattr(statistics, field)) for field in (kind, f"{kind}_held"))
    rows = {task: {**_numbers(sums, held[task][0]), "weight": weight} for task, (sums, weight) in found.items()}
    if "" in rows:
        return {key: value for key, value in rows[""].items() if key != "weight"}
    total = {side: sum(row[side] for row in rows.values()) for side in ("found", "held_out")}
    return {**total, "tasks": rows}


def _numbers(found: FisherSums, held: FisherSums) -> dict[str, Any]:
    """Numbers of one task."""
    sides = {"found": found, "held_out": held}
    numbers = {side: round(sums.sequences) for side, sums in sides.items()}
    if any(sums.squares != sums.sequences for sums in sides.values()):
        numbers |= {f"effective_{side}": sums.effective for side, sums in sides.items()}
    return numbers


def few_effective(sequences: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A warning for every part whose weights leave the worth of less than half its sequences.

    Args:
        sequences: Kind -> as from `count_sequences`.

    Returns:
        Sentences.
    """
    return [
        f"calibration.{label}: weights leave {row[side]} sequences ({side.replace('_', ' ')}) the worth of "
        f"{row[f'effective_{side}']:.3g}: the Fisher is that of a few examples; even the weights out, or give more"
        for label, row in _rows(sequences)
        for side in ("found", "held_out")
        if row.get(f"effective_{side}", row[side]) < _FEW * row[side]
    ]


def _rows(sequences: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """("harm" or "harm-TASK", numbers) of every task."""
    for kind, row in sequences.items():
        for task, numbers in row.get("tasks", {"": row}).items():
            yield f"{kind}-{task}".rstrip("-"), numbers
