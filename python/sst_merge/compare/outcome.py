"""What an evaluator measured on one merged model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """A number, Σ totals / Σ counts where it is a mean over prompts.

    Attributes:
        value: The number.
        totals: One a prompt; None where only the number is known.
        counts: What each total is a sum over (tokens); None for one each.
    """

    value: float
    totals: tuple[float, ...] | None = None
    counts: tuple[float, ...] | None = None

    @classmethod
    def over_prompts(cls, totals: Sequence[float], counts: Sequence[float] | None = None) -> Outcome:
        """The mean of what each prompt gave.

        Args:
            totals: One a prompt, at least one.
            counts: Positive in sum; None for one each.

        Returns:
            The outcome.
        """
        totals = tuple(map(float, totals))
        counts = None if counts is None else tuple(map(float, counts))
        return cls(math.fsum(totals) / (len(totals) if counts is None else math.fsum(counts)), totals, counts)

    def as_json(self) -> dict[str, Any]:
        """For a line of a journal."""
        return {key: value for key, value in vars(self).items() if value is not None}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Outcome:
        """What `as_json` gave."""
        lists = {key: tuple(record[key]) for key in ("totals", "counts") if key in record}
        return cls(record["value"], **lists)


def read_answer(name: str, answer: Any) -> dict[str, Outcome]:
    """What a user's function returned, or a command printed: a number, a list of one a prompt, or a mapping of these.

    Args:
        name: The evaluator's.
        answer: Of Python or JSON; numpy's and torch's scalars are numbers.

    Returns:
        `name` -> outcome, of a mapping `name.key` -> outcome.

    Raises:
        ValueError: It is something else, empty, or not finite.

    Example:
        >>> read_answer("mine", [1, 0, 1, 1])["mine"].value
        0.75
    """
    if isinstance(answer, Mapping) and answer:
        return {k: v for key, part in answer.items() for k, v in read_answer(f"{name}.{key}", part).items()}
    if isinstance(answer, (list, tuple)) and answer and all(_is_number(item) for item in answer):
        return {name: Outcome.over_prompts([float(item) for item in answer])}
    if _is_number(answer):
        return {name: Outcome(float(answer))}
    raise ValueError(
        f"evaluator {name}: expected a finite number, a list of numbers (one a prompt), or a mapping of these, got "
        f"{str(answer)[:200]!r}"
    )


def _is_number(value: Any) -> bool:
    """A finite real number, or a scalar of numpy or torch that is one."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    return isinstance(value, Real) and math.isfinite(value)
