"""What a check found, and many checks as one row: the worst of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """One claim held against one pencil.

    Attributes:
        claim: "T1" to "T6", or a word; a heading of theory.md.
        where: The module, or the planted pencil.
        statement: What is claimed, as a formula.
        margin: How far the claim is from being violated, in units of its scale; of an equation, minus the deviation.
        tolerance: How far below zero rounding can take the margin, in the same units.
        reason: Where the tolerance comes from.
        limit: A tolerance above it decides nothing.
    """

    claim: str
    where: str
    statement: str
    margin: float
    tolerance: float
    reason: str
    limit: float = 0.1

    @property
    def passed(self) -> bool:
        """Whether the margin is above −tolerance; NaN is not."""
        return self.margin >= -self.tolerance

    @property
    def decided(self) -> bool:
        """Whether rounding leaves anything to be decided: a broken claim does not need the tolerance's leave."""
        return self.tolerance <= self.limit or not self.passed

    @property
    def room(self) -> float:
        """Margin in units of the tolerance: least is worst; −1 is the limit."""
        return self.margin / max(self.tolerance, 1e-300)


def summarise(checks: Iterable[Check]) -> list[dict[str, Any]]:
    """A row for every statement: how often it was tried, and where it came nearest to failing.

    Args:
        checks: Any.

    Returns:
        Rows of JSON values, in the order in which the statements came; `passed` is None where rounding decided
        nothing.
    """
    groups: dict[tuple[str, str], list[Check]] = {}
    for check in checks:
        groups.setdefault((check.claim, check.statement), []).append(check)
    rows = []
    for (claim, statement), group in groups.items():
        failed = [check for check in group if not check.passed]
        decided = [check for check in group if check.decided]
        worst = min(failed or decided or group, key=lambda check: (check.room == check.room, check.room))  # NaN first
        rows.append(
            {
                "claim": claim,
                "statement": statement,
                "checked": len(group),
                "undecided": len(group) - len(decided),
                "failed": len(failed),
                "worst_margin": worst.margin,
                "tolerance": worst.tolerance,
                "where": worst.where,
                "reason": worst.reason,
                "passed": not failed if decided else None,
            }
        )
    return rows


def failures(checks: Iterable[Check]) -> list[dict[str, Any]]:
    """Every check that failed, as JSON values."""
    return [asdict(check) for check in checks if not check.passed]
