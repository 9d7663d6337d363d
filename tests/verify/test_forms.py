"""`sst-merge verify` on every form of either Fisher and on tasks with weights; each must fail where it is sabotaged."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from verified_runs import QUICK, broken, merged, merged_by, theory

from sst_kernels import Scaled
from sst_merge import pencils as merge_pencils
from sst_merge import shrinkage
from sst_merge.cli import main
from sst_merge.data import TokenSequence
from sst_merge.held_out import HeldOut
from sst_merge.tasks import Task
from sst_merge.verify import formed, order, pencils, quadratic
from sst_merge.verify import run as verify_run

pytestmark = pytest.mark.usefixtures("two_planted_and_no_pictures")

FORMS = {
    "K-FAC": {"fisher": "kfac", "approximation": "reduce", "shrinkage": 0.1},
    "EK-FAC towards Kronecker": {"fisher": "ekfac", "shrinkage": 0.3, "shrinkage_target": "kronecker"},
    "mixed": {"fisher": {"harm": "exact", "benign": "kfac"}, "shrinkage": {"harm": 0.2}},
    "rows beside blocks": {"fisher": {"harm": "gram", "benign": "ekfac"}},
    "blocks beside rows": {"fisher": {"harm": "exact", "benign": "gram"}, "shrinkage": "ledoit_wolf"},
    "Ledoit-Wolf": {"shrinkage": "ledoit_wolf", "shrinkage_target": {"harm": "kronecker"}},
    "shrunk rows": {"fisher": "gram", "shrinkage": "ledoit_wolf", "shrinkage_target": {"benign": "kronecker"}},
    "two steps": {"fisher": "kfac", "steps": 2},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_either_fisher_holds(setup, tmp_path, form):
    run = merged(setup, tmp_path, k=0.3, **FORMS[form])
    assert main(["verify", str(run), *QUICK]) == 0
    rows = {row["statement"]: row for row in theory(run)["claims"]}
    assert rows["s asked for = s used"]["checked"] == 2 * (theory(run)["pencils"] - 2)
    for statement in ("γ in report.json = ε Σ tr F_benign / Σ n", "Av = λBv: ‖Av − λBv‖ in the norm of B⁻¹"):
        assert rows[statement]["passed"]
    assert ("s = Ledoit and Wolf's" in rows) == ("ledoit_wolf" in FORMS[form].values())
    towards_kronecker = "shrinkage_target" in FORMS[form]
    assert ("T = the leading singular pair of the rearranged F" in rows) == towards_kronecker
    assert any("later ones were not checked" in note for note in theory(run)["notes"]) == ("steps" in FORMS[form])


LARGE = {
    "rows over modules beside blocks": ({"fisher": {"harm": "gram", "benign": "kfac"}}, 30, 1),
    "a module of few rows": ({"where": "local", "shrinkage": {"benign": 0.1}}, 20, 4),
    "rows shrunk": ({"fisher": {"harm": "gram", "benign": "diagonal"}, "shrinkage": 0.2}, 20, 0),
}
"""Parameters, order up to which matrices are formed, and how many of the run's pencils are checked."""


@pytest.mark.parametrize("case", LARGE)
def test_pencils_too_large_to_be_formed(setup, tmp_path, monkeypatch, case):
    """Of 25 and 9 coordinates a module, 68 in all; 9 or, at two points, 18 rows."""
    parameters, limit, checked = LARGE[case]
    for module, name in ((merge_pencils, "ALL_PAIRS_UP_TO"), (pencils, "FORMED_UP_TO"), (formed, "FORMED_UP_TO")):
        monkeypatch.setattr(module, name, limit)
    run = merged(setup, tmp_path, k=0.3, **parameters)
    assert main(["verify", str(run), *QUICK]) == 0
    rows = {row["statement"]: row for row in theory(run)["claims"]}
    assert theory(run)["pencils"] == 2 + checked
    assert rows["λ in report.json = λ found anew"]["checked"] == max(checked, 1)
    assert ("v_i in the span of D⁻¹Jᵀ and D⁻¹Kᵀ" in rows) == (checked > 0)
    assert ("were not formed" in (run.parent / "run.verify/theory.md").read_text()) == (checked == 0)


def test_a_wrong_solution_of_a_mixed_form_is_found(setup, tmp_path, monkeypatch):
    """The merge damps, shrinks or takes its target otherwise than it says, in verify's own run of it too."""
    run = merged(setup, tmp_path, **FORMS["EK-FAC towards Kronecker"])
    true = merge_pencils._module_fisher

    def spoilt(change):
        def module_fisher(sums, name, form, shape):
            return true(sums, name, replace(form, **change), shape)

        return module_fisher

    for change in ({"shrinkage": 0.31}, {"target": "diagonal"}, {"representation": "exact"}):
        with monkeypatch.context() as patched:
            patched.setattr(merge_pencils, "_module_fisher", spoilt(change))
            assert main(["verify", str(run), *QUICK]) == 1
        assert "pairs" in broken(theory(run))


def test_a_wrong_target_or_damping_is_found(setup, tmp_path, monkeypatch):
    run = merged(setup, tmp_path, **FORMS["EK-FAC towards Kronecker"])
    nearest, find = shrinkage.nearest_kronecker, verify_run.find_directions
    with monkeypatch.context() as patched:
        patched.setattr(shrinkage, "nearest_kronecker", lambda *given: Scaled(nearest(*given), 1.001))
        assert main(["verify", str(run), *QUICK]) == 1
    failed = {row["statement"] for row in theory(run)["failures"]}
    assert "T = the leading singular pair of the rearranged F" in failed
    monkeypatch.setattr(verify_run, "find_directions", lambda s, tau, p: find(s, tau, replace(p, damping=1.001)))
    assert main(["verify", str(run), *QUICK]) == 1
    assert {"record", "pairs"} <= broken(theory(run))


def test_another_intensity_or_damping_than_recorded_is_found(setup, tmp_path):
    run = merged(setup, tmp_path, shrinkage="ledoit_wolf")
    whole = json.loads((run / "report.json").read_text())
    for change, statement in (
        (lambda tree: tree["fishers"]["harm"]["shrinkage"].update(most=0.5), "s of F_harm in report.json"),
        (lambda tree: tree["fishers"]["benign"]["shrinkage"].update(mean=0.1), "s of F_benign in report.json"),
        (lambda tree: tree.update(gamma=1.001 * tree["gamma"]), "γ in report.json"),
    ):
        tree = json.loads(json.dumps(whole))
        change(tree)
        (run / "report.json").write_text(json.dumps(tree))
        assert main(["verify", str(run), *QUICK]) == 1
        (failed,) = theory(run)["failures"]
        assert failed["statement"].startswith(statement)


def test_a_wrong_formula_of_the_intensity_is_found(setup, tmp_path, monkeypatch):
    run = merged(setup, tmp_path, shrinkage="ledoit_wolf")
    for module in (merge_pencils, formed):
        true = module.intensity
        monkeypatch.setattr(module, "intensity", lambda *given, true=true: 0.99 * true(*given))
    assert main(["verify", str(run), *QUICK]) == 1
    assert "s = Ledoit and Wolf's" in {row["statement"] for row in theory(run)["failures"]}


def two_tasks(setup, tmp_path, weights=(0.5, 2.0), **parameters) -> dict:
    """Both kinds of data in two tasks each, the examples weighted."""
    config = setup.config("sst", **parameters)
    for kind in ("harm", "benign"):
        lines = [json.loads(line) for line in getattr(setup, kind).read_text().splitlines()]
        config["calibration"][kind] = []
        for name, part, weight in (("one", lines[:5], weights[0]), ("two", lines[5:], weights[1])):
            path = tmp_path / f"{kind}-{name}.jsonl"
            path.write_text("\n".join(json.dumps({**r, "weight": 1 + i % 3}) for i, r in enumerate(part)))
            config["calibration"][kind].append({"data": str(path), "weight": weight, "name": name})
    config["calibration"]["held_out"] = 0.5
    return config


def test_tasks_with_weights_hold_and_another_weight_does_not(setup, tmp_path):
    run = merged_by(two_tasks(setup, tmp_path, where="local", fisher={"benign": "gram"}, k=0.3), tmp_path)
    assert main(["verify", str(run), *QUICK]) == 0
    found = {row["statement"]: row for row in theory(run)["claims"]}
    limits = [row for statement, row in found.items() if row["claim"] == "limit"]
    assert len(limits) == 3 and all(row["passed"] is not False for row in limits)
    config = yaml.safe_load((run / "sst_config.yaml").read_text())
    for kind in ("harm", "benign"):
        changed = json.loads(json.dumps(config))
        changed["calibration"][kind][1]["weight"] = 2.01
        (run / "sst_config.yaml").write_text(yaml.safe_dump(changed))
        assert main(["verify", str(run), *QUICK]) == 1
        assert broken(theory(run)) == {"record"}


def test_the_measured_gain_is_the_second_moment_over_tasks():
    """By hand: changes of log p of three sequences alike, and of one, whose task weighs 2."""
    changes = torch.tensor([0.5, -0.25, 1.0], dtype=torch.float64)
    error = float(changes.std() / 3**0.5)
    rows = ({"kind": "harm", "task": "a", "measured_refusal": float(changes.mean()), "measured_refusal_se": error},)
    rows += ({"kind": "harm", "task": "b", "measured_refusal": 0.5, "measured_refusal_se": None},)
    sequences = [TokenSequence(i, [1, 2], [False, True]) for i in range(3)]
    tasks = {"harm": (Task("a", 1.0, [], sequences), Task("b", 2.0, [], sequences[:1]))}
    measured = HeldOut(0.0, None, 0.0, 0.0, None, rows)
    expected = float(changes.mean() ** 2 + changes.var()) + 2 * 0.5**2
    assert order._second_moment(SimpleNamespace(tasks=tasks), measured) == pytest.approx(expected)
    alone = SimpleNamespace(tasks={"harm": (Task("", 1.0, [], sequences),)})
    measured = HeldOut(0.0, None, 0.0, float(changes.mean()), error)
    assert order._second_moment(alone, measured) == pytest.approx(expected - 0.5)


def test_slopes_that_forget_the_weights_break_the_limits(setup, tmp_path, monkeypatch):
    run = merged_by(two_tasks(setup, tmp_path, where="local", k=0.5), tmp_path)
    true = quadratic.slopes

    def even(*arguments):
        found = true(*arguments)
        return replace(found, weights=torch.full_like(found.weights, 1 / len(found.weights)))

    monkeypatch.setattr(quadratic, "slopes", even)
    assert main(["verify", str(run), *QUICK]) == 1
    assert broken(theory(run)) == {"limit"}
