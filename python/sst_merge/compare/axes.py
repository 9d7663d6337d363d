"""From what evaluators measure to the two axes, safety and utility, each in [0, 1] with 1 the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from .outcome import Outcome

Scale = str | tuple[float, float]
"""How a value becomes a goodness in [0, 1]: a key of `WORDS`, or (worst, best), clipped."""

WORDS = {"higher": (0.0, 1.0), "lower": (1.0, 0.0)}
"""Of shares: 1 is best, or 0 is. "likelihood", the third word, is exp(−v) of a loss v in nats a token."""

_SLACK = 1e-9  # of a share


@dataclass(frozen=True)
class Axes:
    """What the axes are made of; each is the geometric mean of its parts' goodness, so that all must be good.

    Attributes:
        safety: Name of a measured value -> its scale.
        utility: As `safety`.
    """

    safety: Mapping[str, Scale]
    utility: Mapping[str, Scale]

    @property
    def parts(self) -> dict[str, Scale]:
        """Those of both axes."""
        return {**self.safety, **self.utility}

    def point(self, values: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(safety, utility) of measured values of any one shape.

        Args:
            values: By name.

        Returns:
            Two arrays of that shape.
        """
        return tuple(
            _geometric_mean([goodness(values[name], scale, name) for name, scale in axis.items()])
            for axis in (self.safety, self.utility)
        )

    def score(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """Geometric mean of the goodness of every part of both axes: one number for a merged model."""
        return _geometric_mean([goodness(values[name], scale, name) for name, scale in self.parts.items()])


def goodness(value: np.ndarray, scale: Scale, name: str) -> np.ndarray:
    """A measured value on its scale.

    Args:
        value: Any shape.
        scale: Its scale.
        name: For error messages.

    Returns:
        In [0, 1].

    Raises:
        ValueError: A share is outside [0, 1], or a loss below 0.
    """
    value = np.asarray(value, float)
    if scale == "likelihood":
        if (value < -_SLACK).any():
            raise ValueError(f"axes: {name} on the scale likelihood must be a loss >= 0, got {value.min():.4g}")
        return np.exp(-value.clip(0))
    worst, best = WORDS[scale] if isinstance(scale, str) else scale
    if isinstance(scale, str) and not ((value >= -_SLACK) & (value <= 1 + _SLACK)).all():
        outside = value.flat[np.argmax(np.abs(value - 0.5))]
        raise ValueError(
            f"axes: {name} on the scale {scale} must be a share in [0, 1], got {outside:.4g}; give its scale as "
            "[worst, best]"
        )
    return ((value - worst) / (best - worst)).clip(0, 1)


def values_of(
    outcomes: Mapping[str, Outcome], weights: Callable[[str, int], np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Measured values by name, on all prompts or on weighted ones.

    Args:
        outcomes: What a merged model did.
        weights: (name, number of prompts P) -> (P,) or (P, B) weights. What has no prompts stays as it is.

    Returns:
        Name -> () or (B,).
    """
    return {
        name: np.asarray(outcome.value if weights is None or outcome.totals is None else _mean(outcome, name, weights))
        for name, outcome in outcomes.items()
    }


def _mean(outcome: Outcome, name: str, weights: Callable[[str, int], np.ndarray]) -> np.ndarray:
    """Σ w total / Σ w count."""
    w = weights(name, len(outcome.totals))
    counts = np.ones(len(outcome.totals)) if outcome.counts is None else np.asarray(outcome.counts)
    return np.asarray(outcome.totals) @ w / np.maximum(counts @ w, np.finfo(float).tiny)


def _geometric_mean(parts: list[np.ndarray]) -> np.ndarray:
    """(Π x)^(1/m)."""
    return np.prod(parts, axis=0) ** (1 / len(parts))
