"""Areas of hand-made frontiers against closed forms and a Riemann sum."""

from __future__ import annotations

import numpy as np
import pytest

from sst_merge.compare.frontier import area, staircase


@pytest.mark.parametrize(
    ("safety", "utility", "expected"),
    [
        ([1.0], [1.0], 1.0),  # the ideal
        ([0.0], [0.9], 0.0),  # the utility model alone, which refuses nothing
        ([0.25], [0.8], 0.2),  # one rectangle
        ([0.0, 0.5, 1.0], [0.9, 0.8, 0.2], 0.5),  # two steps: 0.5 · 0.8 + 0.5 · 0.2
        ([0.0, 0.5, 0.4], [0.9, 0.8, 0.3], 0.4),  # the third is beaten in both
        ([1.0, 0.5], [0.2, 0.8], 0.5),  # order does not matter
        ([0.5, 0.5], [0.3, 0.6], 0.3),  # of equal safety, the more useful counts
        ([0.2, 0.6], [0.4, 0.7], 0.42),  # the safer is also more useful
    ],
)
def test_closed_forms(safety, utility, expected):
    assert area(safety, utility) == pytest.approx(expected, abs=1e-15)


def test_area_is_the_integral_of_the_staircase():
    random = np.random.default_rng(0)
    safety, utility = random.random((20, 9)), random.random((20, 9))
    x = (np.arange(20000) + 0.5) / 20000
    heights = [[max(u[s >= at], default=0.0) for at in x[::400]] for s, u in zip(safety, utility, strict=True)]
    for s, u, h in zip(safety, utility, heights, strict=True):
        assert np.array_equal(staircase(s, u, x[::400]), h)
        assert area(s, u) == pytest.approx(staircase(s, u, x).mean(), abs=1e-3)
    assert area(safety, utility).shape == (20,)


def test_a_further_point_never_takes_area_away():
    random = np.random.default_rng(1)
    safety, utility = random.random((50, 6)), random.random((50, 6))
    assert (area(safety, utility) >= area(safety[:, :5], utility[:, :5]) - 1e-15).all()
