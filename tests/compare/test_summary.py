"""Verdicts on planted tables: a win, a tie, a loss; strengths chosen on one half and scored on the other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sst_merge.compare.axes import Axes, goodness, values_of
from sst_merge.compare.outcome import Outcome
from sst_merge.compare.summary import SAFETY_WANTED, _half, summarise, utility_where_safe
from sst_merge.compare.verdict import p_value, short_sweeps, verdict

AXES = Axes({"refusal": "higher"}, {"kept": "higher"})


def row(alpha: float, refusal, kept, method: str = "ties") -> dict:
    """A measured row; a list has one value a prompt."""
    outcomes = {
        name: Outcome.over_prompts(value) if isinstance(value, list) else Outcome(value)
        for name, value in (("refusal", refusal), ("kept", kept))
    }
    numbers = dict.fromkeys(("gain", "cost", "ratio", "kl", "refusal_change"), 1.0)
    return {"alpha": alpha, "merge_method": method, **numbers, "outcomes": outcomes}


def planted(areas: dict[str, list[float]], shared: bool = False, methods: dict[str, str] | None = None):
    """A summary in which a label's area on replicate r is areas[label][r]: full refusal, utility as given."""
    rows = {
        label: [[row(1.0, 1.0, value, (methods or {}).get(label, "ties"))] for value in values]
        for label, values in areas.items()
    }
    count = len(next(iter(areas.values())))
    seeds = {f"seed{i}": i for i in range(count)}
    return summarise(rows, {"utility alone": [row(0.0, 0.0, 1.0)] * count}, seeds, (AXES, 0.95, shared))


BASE = np.array([0.80, 0.85, 0.75, 0.9, 0.7])


def test_a_win():
    said = verdict(planted({"A": list(BASE), "B": list(BASE - 0.2 + [0.01, -0.01, 0.0, 0.01, -0.01])}))
    assert said[0].startswith("Best: A, area under the frontier 0.800 [")
    assert said[1].startswith("Second: B, difference -0.200 [-0.2") and ", separated" in said[1]
    assert said[2] == "A is separated from all 1 others."


def test_a_tie():
    summary = planted({"A": list(BASE), "B": list(BASE - 0.01 + [0.1, -0.1, 0.1, -0.1, 0.0])})
    said = verdict(summary)
    assert "not separated (adjusted p" in said[1]
    assert said[2] == "A is not separated from any of the 1 others."
    equal = verdict(planted({"A": list(BASE), "B": list(BASE)}))
    assert equal[1] == "Second: B, difference 0.000, equal."


def test_a_loss_of_this_projects_method_is_said_like_any_other():
    noise = np.array([0.01, -0.01, 0.0, 0.01, -0.01])
    areas = {"SST exact": list(BASE - 0.3 + noise), "A": list(BASE), "B": list(BASE - 0.1 + noise)}
    said = verdict(planted(areas, methods={"SST exact": "sst"}))
    assert said[0].startswith("Best: A") and said[1].startswith("Second: B")
    assert said[-1].startswith("The best variant of sst, SST exact, is number 3: difference -0.300 [")
    assert ", separated" in said[-1]


def test_some_are_separated_and_some_are_not():
    areas = {"A": list(BASE), "B": list(BASE - 0.01 + [0.1, -0.1, 0.1, -0.1, 0.0]), "C": list(BASE - 0.4)}
    areas["C"][0] += 0.01
    said = verdict(planted(areas))
    assert said[2] == "Not separated from the best: 1 of 2 others: B."


def test_p_is_adjusted_for_the_number_of_variants():
    noise = np.array([0.03, -0.05, 0.02, 0.04, -0.03])
    alone = planted({"A": list(BASE), "B": list(BASE - 0.05 + noise)})
    many = planted({"A": list(BASE), **{f"B{i}": list(BASE - 0.05 - 1e-9 * i + noise) for i in range(4)}})
    assert many.standings[1].p == pytest.approx(4 * alone.standings[1].p)
    assert alone.standings[1].p == pytest.approx(alone.standings[1].difference.p)


def test_one_replicate_without_prompts_claims_nothing():
    said = verdict(planted({"A": [0.9], "B": [0.5]}))
    assert said[0] == "Best: A, area under the frontier 0.900."
    assert "with no variation measured" in said[1]


def test_shared_prompts_add_what_the_choice_of_prompts_may_change():
    random = np.random.default_rng(0)
    answers = {"A": random.random(100) < 0.9, "B": random.random(100) < 0.5}
    rows = {label: [[row(1.0, [1.0] * 100, kept.astype(float).tolist())]] * 3 for label, kept in answers.items()}
    origin = {"utility alone": [row(0.0, [0.0] * 100, [1.0] * 100)] * 3}
    seeds = {f"seed{i}": i for i in range(3)}
    apart, shared = (summarise(rows, origin, seeds, (AXES, 0.95, s)) for s in (False, True))
    assert apart.standings[0].area.low is None  # three times the same: nothing varied
    found, share = shared.standings[0].area, answers["A"].mean()
    binomial = (share * (1 - share) / 100) ** 0.5
    assert found.high - found.mean == pytest.approx(1.96 * binomial, rel=0.1)
    difference = shared.standings[1].difference
    paired = (answers["B"].astype(float) - answers["A"]).std() / 10
    assert difference.high - difference.mean == pytest.approx(1.96 * paired, rel=0.1)


def test_the_strength_is_chosen_on_one_half_and_scored_on_the_other():
    prompts, seed = 40, 3
    halves = [_half("kept", prompts, seed, half) for half in (0, 1)]
    assert (halves[0] + halves[1] == 1).all() and halves[0].sum() == 20
    lucky = [float(x) for x in halves[0]]  # right on the validation half alone
    steady = [float(x) for x in (np.arange(prompts) % 5 > 0)]
    rows = {"A": [[row(0.5, [1.0] * prompts, lucky), row(1.0, [1.0] * prompts, steady)]]}
    origin = {"utility alone": [row(0.0, [0.0] * prompts, [1.0] * prompts)]}
    curve = summarise(rows, origin, {"seed": seed}, (AXES, 0.95, False)).standings[0].curves[0]
    assert (curve.alphas[curve.chosen], curve.score) == (0.5, 0.0)
    tested = (np.asarray(steady) @ halves[1] / 20) ** 0.5
    assert curve.alphas[curve.best] == 1.0 and curve.best_score == pytest.approx(tested)
    assert curve.tested == {"refusal": 1.0, "kept": 0.0}


def test_the_tuned_strength_is_scored_beside():
    rows = [row(0.5, 1.0, 0.25), {**row(1.0, 1.0, 0.64), "tuned": {"alpha": 0.5}}]
    rows[0]["tuned"] = {"alpha": 0.5}
    found = summarise({"A": [rows]}, {"utility alone": [row(0, 0.0, 1.0)]}, {"s": 0}, (AXES, 0.95, False))
    curve = found.standings[0].curves[0]
    assert (curve.tuned_score, curve.score) == (pytest.approx(0.5), pytest.approx(0.8))
    assert not found.halved


def test_utility_where_safe():
    curve = planted({"A": [0.7]}).standings[0].curves[0]
    assert utility_where_safe(curve) == pytest.approx(0.7)
    weak = replace(curve, safety=np.array([0.0, SAFETY_WANTED - 0.01]))
    assert utility_where_safe(weak) is None


def test_goodness_of_scales():
    assert goodness(0.3, "higher", "x") == pytest.approx(0.3) and goodness(0.3, "lower", "x") == pytest.approx(0.7)
    assert goodness(np.log(2), "likelihood", "x") == pytest.approx(0.5)
    assert goodness(7.0, (10.0, 5.0), "x") == pytest.approx(0.6) and goodness(12.0, (10.0, 5.0), "x") == 0
    with pytest.raises(ValueError, match=r"axes: x on the scale higher must be a share in \[0, 1\], got 3"):
        goodness(3.0, "higher", "x")
    with pytest.raises(ValueError, match="must be a loss >= 0, got -1"):
        goodness(-1.0, "likelihood", "x")


def test_weighted_values_are_sums_over_counts():
    outcomes = {"loss": Outcome.over_prompts([1.0, 6.0], [1, 3]), "whole": Outcome(0.4)}
    assert values_of(outcomes) == {"loss": pytest.approx(7 / 4), "whole": 0.4}
    found = values_of(outcomes, lambda name, count: np.array([[2.0, 0.0], [1.0, 5.0]]))
    assert found["loss"] == pytest.approx([8 / 5, 2.0]) and found["whole"] == 0.4


def test_an_axis_of_something_that_was_not_measured():
    with pytest.raises(ValueError, match="no evaluator measured 'other'; measured were refusal, kept"):
        summarise({}, {"utility alone": [row(0, 0.0, 1.0)]}, {"s": 0}, (Axes({"other": "higher"}, {}), 0.95, False))


def swept(safety: list[float], method: str = "ties"):
    """A summary of one variant whose strengths 1, 2, … have these safeties."""
    rows = {"A": [[row(float(i), x, 0.5, method) for i, x in enumerate(safety, start=1)]]}
    return summarise(rows, {"utility alone": [row(0.0, 0.0, 1.0)]}, {"s": 0}, (AXES, 0.95, False))


def test_a_sweep_that_ends_too_early_is_named():
    assert short_sweeps(swept([0.0, 0.3]))[0].startswith("The sweep may end too early for A: on some replicate")
    assert short_sweeps(swept([0.0, 0.0])) and not short_sweeps(swept([0.3, 0.1]))
    assert not short_sweeps(swept([0.3, 0.95])) and not short_sweeps(swept([0.0, 0.3], "interpolation"))


def test_p_values_in_words():
    assert (p_value(0.0123), p_value(1e-90)) == ("0.012", "< 0.0001")
