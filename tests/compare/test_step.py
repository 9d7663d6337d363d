"""Gain, cost and R of a step against dense gradients, one sequence at a time, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sst_merge import load_config
from sst_merge.compare.step import quadratics
from sst_merge.compare.subject import exact_update, merged_model
from sst_merge.fisher import log_likelihood
from sst_merge.methods import METHODS
from sst_merge.packing import batches
from sst_merge.problem import Problem

ALPHAS = (0.4, 1.0)


def dense_forms(problem: Problem, load_base, steps: dict[str, list[torch.Tensor]], sampled: bool) -> list[float]:
    """E[(Σ_m ⟨G_m, φ_m⟩)²] over held-out sequences at θ_ft + tτ, t = ¼, ½, with the gradients of all weights."""
    totals = [0.0] * len(ALPHAS)
    kind = "benign" if sampled else "harm"
    for t in (0.25, 0.5):
        model = load_base(problem.config.base_model)
        with torch.no_grad():
            for name in problem.names:
                u, s = (update.dense() for update in problem.updates(name))
                model.get_submodule(name).weight += u + t * s
        for sequence in problem.calibration[kind][1]:
            model.zero_grad()
            (batch,) = batches([sequence], 1, "cpu")
            log_likelihood(model, batch, 3 if sampled else None)[0].backward()
            gradients = {name: model.get_submodule(name).weight.grad.double() for name in problem.names}
            for k in range(len(ALPHAS)):
                slope = sum(float((gradients[name] * steps[name][k].double()).sum()) for name in problem.names)
                totals[k] += 0.5 * slope**2 / len(problem.calibration[kind][1])
    return totals


@pytest.mark.parametrize(
    ("method", "in_core"), [("task_arithmetic", True), ("sst", True), ("dare", False), ("knots", False)]
)
def test_quadratics_are_those_of_dense_gradients(setup, load_base, method, in_core):
    problem = Problem(load_config(setup.config(seed=3)))
    judge = problem.config.parameters
    settings = load_config(setup.config(method)).parameters
    settings = replace(settings, seed=3) if hasattr(settings, "seed") else settings
    plan = METHODS[method](problem, settings)
    assert plan.in_core == in_core
    steps = {
        name: [plan.dense(problem, name, alpha) - problem.updates(name)[0].dense() for alpha in ALPHAS]
        for name in problem.names
    }
    found = quadratics(problem, plan, ALPHAS, judge)
    for form, sampled in (("gain", False), ("cost", True)):
        expected = dense_forms(problem, load_base, steps, sampled)
        assert [getattr(step, form) for step in found] == pytest.approx(expected, rel=1e-3)
    assert found[1].ratio == pytest.approx(found[1].gain / found[1].cost)


def test_tasks_and_examples_count_with_their_weights(setup):
    """w_1 q_1 + w_2 q_2 of the tasks alone; in a task of two held-out sequences, ω = 3 and 1 weigh one three times."""

    def forms(changes: dict) -> Problem:
        problem = Problem(load_config(setup.config(seed=3)))
        for kind, tasks in changes.items():
            problem.tasks[kind] = tasks
        plan = METHODS["task_arithmetic"](problem, load_config(setup.config("task_arithmetic")).parameters)
        return quadratics(problem, plan, (1.0,), problem.config.parameters)[0]

    tasks = Problem(load_config(setup.config(seed=3))).tasks
    (whole,) = tasks["harm"]
    first, second = ((s,) for s in whole.held[:2])
    alone = [forms({"harm": (replace(whole, held=part),)}).gain for part in (first, second)]
    mixed = (replace(whole, name="a", weight=0.5, held=first), replace(whole, name="b", weight=2.0, held=second))
    assert forms({"harm": mixed}).gain == pytest.approx(0.5 * alone[0] + 2.0 * alone[1], rel=1e-5)
    heavier = replace(whole, held=(replace(first[0], weight=3.0), second[0]))
    assert forms({"harm": (heavier,)}).gain == pytest.approx(0.75 * alone[0] + 0.25 * alone[1], rel=1e-5)


def test_no_step_has_no_ratio(setup):
    problem = Problem(load_config(setup.config()))
    plan = METHODS["task_arithmetic"](problem, load_config(setup.config("task_arithmetic")).parameters)
    (step,) = quadratics(problem, plan, (0.0,), problem.config.parameters)
    assert (step.gain, step.cost, step.ratio) == (0.0, 0.0, None)


@pytest.mark.parametrize("method", ["sst", "ties", "knots"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_merged_model_computes_with_the_merge_and_is_restored(setup, load_base, input_ids, method, dtype):
    """In place in float32; beside the weights where they would round it."""
    problem = Problem(load_config(setup.config(method), dtype=dtype))
    before = {name: value.clone() for name, value in problem.model.state_dict().items()}
    plan = METHODS[method](problem, problem.config.parameters)
    merged = load_base(setup.base)
    with torch.no_grad():
        for name in problem.names:
            exact = exact_update(problem, plan, name, 0.7).dense()
            assert torch.allclose(exact, plan.dense(problem, name, 0.7), atol=1e-6)
            merged.get_submodule(name).weight += exact
        with merged_model(problem, plan, 0.7) as subject:
            found = subject.model(input_ids).logits.float()
            changed = not torch.equal(
                subject.model.get_submodule(problem.names[0]).weight, before[f"{problem.names[0]}.weight"]
            )
        expected = merged(input_ids).logits
    assert changed == (dtype == "float32")
    error = float((found - expected).norm() / expected.norm())
    assert error < (1e-5 if dtype == "float32" else 0.03)
    assert all(torch.equal(value, before[name]) for name, value in problem.model.state_dict().items())
