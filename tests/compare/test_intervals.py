"""Intervals and p-values against scipy's, and Holm's adjustment by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from sst_merge.compare.intervals import Estimate, estimate, holm

VALUES = [0.81, 0.84, 0.79, 0.9, 0.86]


def test_without_prompts_it_is_students_interval_and_test():
    result = estimate(VALUES, 0.9)
    interval = stats.ttest_1samp(VALUES, 0).confidence_interval(0.9)
    assert (result.low, result.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert result.p == pytest.approx(stats.ttest_1samp(VALUES, 0).pvalue)


def test_paired_differences_are_scipys_paired_test():
    others = [0.8, 0.85, 0.75, 0.84, 0.86]
    result = estimate(np.subtract(VALUES, others), 0.95)
    expected = stats.ttest_rel(VALUES, others)
    assert result.p == pytest.approx(expected.pvalue)
    assert result.low == pytest.approx(expected.confidence_interval(0.95).low)


def test_prompts_add_their_variance_and_degrees_of_freedom():
    prompts = np.array([0.8, 0.9, 0.85, 0.82])
    a, b = np.var(VALUES, ddof=1) / 5, np.var(prompts, ddof=1)
    freedom = (a + b) ** 2 / (a**2 / 4)
    half = stats.t.ppf(0.975, freedom) * (a + b) ** 0.5
    result = estimate(VALUES, 0.95, prompts)
    assert (result.low, result.high) == (pytest.approx(0.84 - half), pytest.approx(0.84 + half))


def test_one_replicate_has_the_prompts_alone():
    prompts = np.array([0.7, 0.9, 0.8, 0.85])
    result = estimate([0.8], 0.95, prompts)
    half = stats.norm.ppf(0.975) * np.std(prompts, ddof=1)
    assert (result.low, result.high) == (pytest.approx(0.8 - half), pytest.approx(0.8 + half))
    assert estimate([0.8], 0.95) == Estimate(0.8)


def test_where_nothing_varied_nothing_is_claimed():
    assert estimate([0.8, 0.8, 0.8], 0.95) == Estimate(pytest.approx(0.8))
    assert estimate([0.0, 0.0], 0.95, np.zeros(10)) == Estimate(0.0)


def test_intervals_cover_as_often_as_they_say():
    random = np.random.default_rng(0)
    samples = random.normal(0.3, 1.0, (2000, 5))
    covered = np.mean([r.low <= 0.3 <= r.high for r in (estimate(s, 0.9) for s in samples)])
    assert covered == pytest.approx(0.9, abs=3 * (0.9 * 0.1 / 2000) ** 0.5)


def test_holm_by_hand():
    # sorted 0.01, 0.02, 0.03, 0.9: times 4, 3, 2, 1; never smaller than one before
    assert holm([0.03, 0.01, 0.9, 0.02]) == pytest.approx([0.06, 0.04, 0.9, 0.06])
    assert holm([0.6, 0.5]) == pytest.approx([1.0, 1.0])
