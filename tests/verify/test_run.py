"""`sst-merge verify` on a run: what it writes, what it leaves alone, and how it ends when a claim is broken."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from verified_runs import QUICK, broken, merged, theory

from sst_merge import load_config
from sst_merge.cli import main
from sst_merge.problem import Problem
from sst_merge.verify import quadratic
from sst_merge.verify import run as verify_run

pytestmark = pytest.mark.usefixtures("two_planted_and_no_pictures")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def edit(file: Path, change) -> None:
    """Change a safetensors file's tensors, its header kept."""
    with safe_open(file, framework="pt") as source:
        metadata, tensors = source.metadata(), {key: source.get_tensor(key) for key in source.keys()}  # noqa: SIM118
    save_file({key: change(tensor).contiguous() for key, tensor in tensors.items()}, file, metadata=metadata)


def test_a_run_is_verified_and_left_as_it_was(setup, tmp_path, capsys):
    run = merged(setup, tmp_path, where="local", k=0.3)
    before = contents(run), contents(tmp_path / "run.fisher")
    assert main(["verify", str(run), *QUICK]) == 0
    assert (contents(run), contents(tmp_path / "run.fisher")) == before
    assert "passed; wrote" in capsys.readouterr().out
    found, folder = theory(run), tmp_path / "run.verify"
    assert found["passed"] and not found["failures"]
    claims = {row["claim"] for row in found["claims"]}
    every = {"T1", "T2", "T3", "T4", "T5", "T6", "pencil", "pairs", "inertia", "solvers", "planted", "record", "run"}
    assert claims == every | {"limit", "2-D"}
    modules = {row["checked"] for row in found["claims"] if row["claim"] == "record"}
    assert modules == {1, 4}  # γ and s are the run's; v_proj and down_proj of two layers: the safety adapter's
    page = (folder / "theory.md").read_text()
    assert {f"{name}.png" for name in ("margins", "two_dimensions", "quadratic_kl", "quadratic_refusal")} < set(
        contents(folder)
    )
    for picture in folder.glob("*.png"):
        assert f"({picture.name})" in page


def test_an_earlier_result_is_replaced_by_the_same(setup, tmp_path):
    run = merged(setup, tmp_path)
    assert main(["verify", str(run), *QUICK]) == 0
    found = theory(run)
    assert main(["verify", str(run), *QUICK]) == 0
    assert theory(run) == found
    assert main(["verify", str(run), "--seed", "1", *QUICK]) == 0
    assert theory(run) != found


@pytest.mark.parametrize(
    "parameters",
    [
        {"fisher": "gram", "shrinkage": 0.2},
        {"fisher": "diagonal", "scope": "global", "k": 5},
        {"select": "soft", "shrinkage": 0.5, "patch": "interpolate"},
        {"select": "budget", "rho": 0.01, "alpha": [0.5, 1.0]},
        {"select": "signed", "rho": 0.01},
        {"damping": 1e-6, "select": "dof"},
    ],
    ids=str,
)
def test_every_kind_of_pencil_and_filter_holds(setup, tmp_path, parameters):
    run = merged(setup, tmp_path, **parameters)
    assert main(["verify", str(run), *QUICK]) == 0
    claims = {row["claim"]: row["passed"] for row in theory(run)["claims"]}
    assert ("run" in claims) == (parameters.get("select") != "signed")
    assert claims["T1"] and claims["record"]


def test_statistics_that_were_changed_break_the_record(setup, tmp_path, capsys):
    run = merged(setup, tmp_path)
    edit(tmp_path / "run.fisher/benign.safetensors", lambda tensor: 1.01 * tensor)
    assert main(["verify", str(run), *QUICK]) == 1
    assert not theory(run)["passed"] and broken(theory(run)) == {"record"}
    assert "broken: record: λ in report.json" in capsys.readouterr().err
    assert "Everything that failed" in (tmp_path / "run.verify/theory.md").read_text()


def test_damaged_statistics_are_an_error(setup, tmp_path, capsys):
    run = merged(setup, tmp_path)
    (tmp_path / "run.fisher/benign.safetensors").write_bytes(b"damaged")
    assert main(["verify", str(run), *QUICK]) == 2
    assert "benign.safetensors is damaged" in capsys.readouterr().err
    assert not (tmp_path / "run.verify").exists()


def test_statistics_of_a_pencil_that_is_none_are_an_error(setup, tmp_path, capsys):
    run = merged(setup, tmp_path, fisher="diagonal")
    edit(tmp_path / "run.fisher/harm.safetensors", lambda tensor: -tensor)
    assert main(["verify", str(run), *QUICK]) == 1
    assert "pencil" in broken(theory(run))


def test_missing_statistics_name_the_command_and_are_found_elsewhere(setup, tmp_path, capsys):
    run = merged(setup, tmp_path)
    shutil.move(tmp_path / "run.fisher", tmp_path / "moved")
    assert main(["verify", str(run), *QUICK]) == 2
    error = capsys.readouterr().err
    assert "--fisher" in error and f"sst-merge fisher {run}/sst_config.yaml --out {tmp_path}/run.fisher" in error
    assert not (tmp_path / "run.fisher").exists()  # nothing was collected
    assert main(["verify", str(run), "--fisher", str(tmp_path / "moved"), *QUICK]) == 0
    (tmp_path / "moved/origin.safetensors").unlink()
    assert main(["verify", str(run), "--fisher", str(tmp_path / "moved"), *QUICK]) == 2
    assert "not complete" in capsys.readouterr().err
    assert not (tmp_path / "moved/origin.safetensors").exists()


def test_calibration_data_that_were_changed_are_an_error(setup, tmp_path, capsys):
    run = merged(setup, tmp_path)
    setup.harm.write_text(setup.harm.read_text().replace("w1", "w2"))
    assert main(["verify", str(run), *QUICK]) == 2
    assert "sequences of harm" in capsys.readouterr().err


def test_a_folder_that_is_no_run_and_a_method_without_pencils(setup, tmp_path, capsys):
    assert main(["verify", str(tmp_path), *QUICK]) == 2
    assert "holds no sst_config.yaml; name a folder that `sst-merge merge --out` wrote" in capsys.readouterr().err
    run = merged(setup, tmp_path, "ties")
    assert main(["verify", str(run), *QUICK]) == 2
    assert "merged by ties, which solves no pencil" in capsys.readouterr().err


def test_settings_and_output_folders_that_cannot_be(setup, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["verify", "--alphas", "0.5"]) == 2
    assert "alphas: expected two or more" in capsys.readouterr().err
    assert main(["verify", "--challengers", "0"]) == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").write_text("mine")
    assert main(["verify", "--out", "mine"]) == 2
    assert "holds no theory.json" in capsys.readouterr().err
    assert main(["verify"]) == 0
    assert json.loads((tmp_path / "planted.verify/theory.json").read_text())["pencils"] == 2


def test_dear_claims_are_tried_on_some_pencils_and_the_page_says_so(setup, tmp_path, monkeypatch):
    run = merged(setup, tmp_path)
    monkeypatch.setattr(verify_run, "THOROUGH", 1)
    assert main(["verify", str(run), *QUICK]) == 0
    (note,) = (note for note in theory(run)["notes"] if "evenly" in note)
    assert note in (tmp_path / "run.verify/theory.md").read_text()
    checked = {row["statement"]: row["checked"] for row in theory(run)["claims"]}
    assert checked["λ by dense"] == 2 + 1 and checked["VᵀBV = I"] > 2 + 1


def test_without_calibration_data_nothing_is_measured(setup, tmp_path):
    run = merged(setup, tmp_path)
    config = yaml.safe_load((run / "sst_config.yaml").read_text())
    del config["calibration"]
    (run / "sst_config.yaml").write_text(yaml.safe_dump(config))
    assert main(["verify", str(run), *QUICK]) == 0
    assert theory(run)["sweep"] == [] and "nothing was measured" in theory(run)["notes"][-1]


@pytest.fixture
def patch(setup, tmp_path) -> tuple[Problem, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Problem, cores of θ_ft, and the whole patch."""
    problem = Problem(load_config(setup.config(where="local")))
    curvature = problem.curvature(problem.config.parameters)
    return problem, dict(curvature.origin), dict(curvature.patch)


def test_slopes_are_those_of_float64_differences(setup, patch):
    problem, origin, phi = patch
    step = 1e-4
    ends = []
    for t in (-step, 0.0, step):
        model = AutoModelForCausalLM.from_pretrained(setup.base).double().eval()
        for name, core in origin.items():
            basis = problem.bases[name]
            moved = core + t * phi[name] if name in phi else core
            model.get_submodule(name).weight.data += basis.q_out.double() @ moved @ basis.q_in.double().mT
        ends.append(model)
    for kind in ("benign", "harm"):
        found = quadratic.slopes(problem, origin, phi, kind, 0)
        for i, sequence in enumerate(problem.calibration[kind][1]):
            at = [t - 1 for t, wanted in enumerate(sequence.is_target) if wanted]
            with torch.no_grad():
                low, here, high = (m(torch.tensor([sequence.input_ids])).logits[0, at].log_softmax(-1) for m in ends)
            d = (high - low) / (2 * step)
            assert (here.exp() * d**2).sum() == pytest.approx(
                float(found.second[sequence_row(problem, kind, i)]), rel=1e-2
            )
            if kind == "harm":
                labels = torch.tensor(sequence.input_ids)[[t + 1 for t in at]]
                slope = d.gather(1, labels[:, None]).sum()
                assert slope == pytest.approx(float(found.slope[sequence_row(problem, kind, i), 0]), rel=1e-3, abs=1e-4)


def sequence_row(problem: Problem, kind: str, i: int) -> int:
    """Where the i-th held-out sequence is: batches are sorted by length."""
    order = [int(j) for b in quadratic.batches(problem.calibration[kind][1], 4, "cpu") for j in b.index]
    return order.index(problem.calibration[kind][1][i].index)


def test_a_wrong_factor_in_either_limit_is_found(setup, tmp_path, monkeypatch):
    run = merged(setup, tmp_path, where="local", k=0.5)
    true = quadratic.slopes
    for keys in (("second", "coarse"), ("slope",)):

        def spoilt(*arguments, keys: tuple[str, ...] = keys):
            found = true(*arguments)
            return replace(found, **{key: 2 * getattr(found, key) for key in keys})

        monkeypatch.setattr(quadratic, "slopes", spoilt)
        assert main(["verify", str(run), *QUICK]) == 1
        assert broken(theory(run)) == {"limit"}


def test_where_the_model_holds_by_hand():
    alphas = [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0]
    rows = [{"alpha": a, "measured_kl": a**2 * (1 + (4 * a) ** 2), "predicted": a**2} for a in alphas]
    low, high = quadratic.holds(rows, "predicted")
    # 1 + (4α)² = 2 at α = ¼, which is a point of the grid
    assert low == pytest.approx(1 / 16) and high == pytest.approx(1 / 4, rel=0.01)
    assert quadratic.holds([{**row, "measured_kl": 9 * row["predicted"]} for row in rows], "predicted") is None
    between = [{"alpha": a, "measured_kl": k, "predicted": 1.0} for a, k in ((1.0, 0.1), (2.0, 10.0))]
    low, high = quadratic.holds(between, "predicted")
    expected = 2 ** np.interp(np.log10([0.5, 2]), [-1, 1], [0, 1])
    assert (low, high) == pytest.approx(tuple(expected), rel=1e-2)
    assert quadratic.holds([{**row, "predicted": 0.0} for row in rows], "predicted") is None
