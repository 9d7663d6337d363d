"""Two dimensions in which the top direction of one Fisher is the wrong one: A = diag(2, 1), B = diag(4, 0.1)."""

from __future__ import annotations

from typing import Any

import torch

from sst_kernels import Pencil, solve

from ..baselines import top_eigenvectors
from .checks import Check
from .solved import EPS

GAIN, COST = (2.0, 1.0), (4.0, 0.1)
BEST_OF_GAIN, BEST = 0.5, 10.0
"""By hand: 2/4, the quotient of A's first axis; 1/0.1, the pencil's λ₁."""


def counterexample() -> tuple[dict[str, Any], list[Check]]:
    """Ray of the direction that `single_fisher` keeps and of the one that the pencil keeps.

    Returns:
        The numbers, and checks of both against those worked by hand.
    """
    a, b = (torch.tensor(entries, dtype=torch.float64).diag() for entries in (GAIN, COST))
    by_gain = top_eigenvectors(a, 1)[:, 0]
    found = solve(Pencil(a, b), 1)
    by_pencil = found.vectors[:, 0]
    numbers = {"A": list(GAIN), "B": list(COST)}
    checks = []
    for name, v, expected in (("A alone", by_gain, BEST_OF_GAIN), ("the pencil", by_pencil, BEST)):
        unit = v / v.norm()
        gain, cost = float(unit @ a @ unit), float(unit @ b @ unit)
        numbers[name] = {"direction": unit.abs().tolist(), "gain": gain, "cost": cost, "ray": gain / cost}
        statement = f"Ray of the first direction of {name} = {expected:g}"
        off = abs(gain / cost - expected) / expected
        checks.append(Check("2-D", "A = diag(2, 1), B = diag(4, 0.1)", statement, -off, 16 * EPS, "rounding"))
    return numbers, checks
