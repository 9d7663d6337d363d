r"""The frontier of safety against utility, and the area under it.

A method's points are (s_j, u_j), safety and utility in [0, 1] at every strength α_j, and at α = 0, where nothing is
merged and the utility model is what it was. Its frontier is the staircase

    U(x) = max{u_j : s_j ≥ x},   0 where no strength is as safe as x,

and its area ∫₀¹ U(x) dx: the hypervolume of the points (Zitzler and Thiele 1999) against the reference point (0, 0),
where (1, 1) has 1. In words: the utility that is left, on average over the safety that may be asked for. Only measured
points count; nothing is interpolated between strengths.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def area(safety: ArrayLike, utility: ArrayLike) -> np.ndarray:
    """∫₀¹ max{u_j : s_j ≥ x} dx.

    Args:
        safety: (..., J), in [0, 1].
        utility: (..., J), in [0, 1].

    Returns:
        (...), in [0, 1]. Cost: O(J log J) each.

    Example:
        >>> round(float(area([0.0, 0.5, 1.0], [0.9, 0.8, 0.2])), 6)  # 0.5 · 0.8 + 0.5 · 0.2
        0.5
    """
    safety, utility = np.asarray(safety, float), np.asarray(utility, float)
    order = np.argsort(safety, axis=-1)
    s, u = (np.take_along_axis(values, order, axis=-1) for values in (safety, utility))
    best = np.maximum.accumulate(u[..., ::-1], axis=-1)[..., ::-1]  # of the points at least as safe
    return (np.diff(s, axis=-1, prepend=0.0) * best).sum(-1)


def staircase(safety: ArrayLike, utility: ArrayLike, x: ArrayLike) -> np.ndarray:
    """U(x) = max{u_j : s_j ≥ x}; 0 where there is no such point.

    Args:
        safety: (J,).
        utility: (J,).
        x: (X,), the safety asked for.

    Returns:
        (X,).
    """
    enough = np.asarray(safety, float) >= np.asarray(x, float)[:, None]
    return np.where(enough, np.asarray(utility, float), 0.0).max(-1)
