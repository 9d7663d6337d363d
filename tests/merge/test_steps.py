"""Merges in several steps: without a filter, by hand from merges of one step, within a budget, interrupted."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from reference import log_probabilities

from sst_merge import load_config, merge
from sst_merge.adapters import factor, write_files
from sst_merge.cli import main
from sst_merge.fisher import Collector


def dense(result, alpha: float) -> dict[str, torch.Tensor]:
    return {name: update.dense() for name, update in result.updates(alpha).items()}


@pytest.mark.parametrize("patch", ["additive", "interpolate"])
def test_without_a_filter_the_whole_patch_is_added(setup, patch):
    """Steps in equal parts, whatever the number: θ_ft + ατ."""
    result = merge(setup.config("sst", steps=3, k=1.0, alpha=[0.0, 0.5, 1.5], patch=patch, where="local"))
    problem = result.problem
    for alpha in (0.0, 0.5, 1.5):
        for name, merged in dense(result, alpha).items():
            utility, safety = (u.dense() for u in problem.updates(name))
            tau = safety if patch == "additive" else safety - utility
            torch.testing.assert_close(merged, utility + alpha * tau, rtol=1e-4, atol=1e-5)
    rows = result.report["steps"]
    assert [(row["alpha"], row["step"]) for row in rows] == [(0.0, 1), *((a, j) for a in (0.5, 1.5) for j in (1, 2, 3))]
    assert all(row["gain_kept"] == pytest.approx(1) and row["kept_energy"] == pytest.approx(1) for row in rows)


@pytest.mark.parametrize(
    "parameters",
    [{"k": 0.4}, {"select": "soft", "mu": 0.5, "damping": 0.1}, {"select": "budget", "rho": 0.02}],
    ids=["top_k", "soft", "budget"],
)
def test_two_steps_are_two_merges(setup, tmp_path, parameters):
    """The first, merged and written, is the new utility adapter; what remains of the patch the new safety adapter."""
    alpha = 0.8
    config = {**setup.config("sst", **parameters, steps=2, alpha=alpha), "dtype": "float64"}
    both = merge(config)
    if "rho" in parameters:
        config["parameters"]["rho"] = parameters["rho"] / 4
    config["parameters"] |= {"steps": 1, "alpha": alpha / 2}
    first = merge(config, out=tmp_path / "half")
    remaining = {}
    for name, moved in dense(first, alpha / 2).items():
        utility, safety = (u.dense() for u in first.problem.updates(name))
        if name in first.plan.curvature.patch:
            remaining[name] = factor(safety - (moved - utility) / alpha, None)[0]
    (tmp_path / "remaining").mkdir()
    sources = (first.problem.utility, first.problem.safety)
    write_files(tmp_path / "remaining", remaining, sources=sources, biases={}, saved={}, dtype=torch.float32)
    config["models"] = [
        {"model": str(tmp_path / "half"), "role": "utility"},
        {"model": str(tmp_path / "remaining"), "role": "safety"},
    ]
    config["parameters"]["alpha"] = alpha
    second = merge(config)
    expected, utility = dense(second, alpha), {n: u.dense() for n, u in first.problem.utility.updates.items()}
    for name, merged in dense(both, alpha).items():
        torch.testing.assert_close(merged, expected[name], rtol=2e-3, atol=2e-5)
    moved = max(float((merged - utility.get(name, 0)).norm()) for name, merged in dense(both, alpha).items())
    config["parameters"] |= {"steps": 1}
    once = merge({**setup.config("sst", **parameters, alpha=alpha), "dtype": "float64"})
    apart = max(float((dense(once, alpha)[name] - merged).norm()) for name, merged in dense(both, alpha).items())
    assert apart > 0.01 * moved, "one step gives the same: the test shows nothing"
    rows = both.report["steps"]
    for row, result in zip(rows, (first, second), strict=True):
        (strength,) = result.report["strengths"]
        assert row["predicted_kl"] == pytest.approx(strength["predicted_kl"], rel=1e-3)
        assert row["predicted_refusal"] == pytest.approx(strength["predicted_refusal"], rel=1e-3)
    (strength,) = both.report["strengths"]
    length = sum(math.sqrt(2 * row["predicted_kl"]) for row in rows)
    assert strength["predicted_kl"] == pytest.approx(length**2 / 2)
    assert strength["predicted_refusal"] == pytest.approx(sum(row["predicted_refusal"] for row in rows))
    if "rho" in parameters:
        assert strength["predicted_kl"] <= parameters["rho"]


def test_what_is_measured_is_the_last_point(setup, tmp_path):
    config = {**setup.config("sst", k=0.3, steps=2), "dtype": "float64"}
    result = merge(config)
    utility = {name: low.dense() for name, low in result.problem.utility.updates.items()}
    merged, kl = dense(result, 1.0), []
    for s in result.problem.calibration["benign"][1]:
        p, q = (log_probabilities(setup.base, d, s) for d in (utility, merged))
        kl.append(float((p.exp() * (p - q)).sum()))
    assert result.report["held_out"][0]["measured_kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-4)


def run(config: dict, out: Path, *arguments: str) -> int:
    path = out.parent / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return main(["merge", str(path), "--out", str(out), *arguments])


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.safetensors")}


def interrupted(setup) -> dict:
    config = setup.config("sst", k=0.4, steps=2, alpha=[0.5, 1.0])
    config["calibration"]["batch_size"] = 3
    return config


def test_statistics_of_every_step_are_kept(setup, tmp_path, monkeypatch):
    assert run(interrupted(setup), tmp_path / "out") == 0
    kept = [f for f in (tmp_path / "out.fisher").iterdir() if f.is_dir()]
    assert len(kept) == 2 and all(f.name.startswith("step-1-") for f in kept)  # one for each strength
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert len(report["steps"]) == 4 and "## Steps" in (tmp_path / "out/report.md").read_text()
    with monkeypatch.context() as patched:
        patched.setattr(Collector, "collect", lambda *a: pytest.fail("collected again"))
        assert run(interrupted(setup), tmp_path / "again", "--fisher", str(tmp_path / "out.fisher")) == 0
        assert files(tmp_path / "again") == files(tmp_path / "out")
        # of another selection, only the first step is there
        with pytest.raises(pytest.fail.Exception, match="collected again"):
            other = interrupted(setup) | {"parameters": {"k": 0.6, "steps": 2}}
            run(other, tmp_path / "other", "--fisher", str(tmp_path / "out.fisher"))


@pytest.mark.parametrize("batches", [5, 24, 27, 40])
def test_interrupted_merges_of_several_steps_end_bit_identical(setup, tmp_path, monkeypatch, batches):
    """In the first step (23 batches), in the second of the first strength, and of the other."""
    assert run(interrupted(setup), tmp_path / "unbroken") == 0
    monkeypatch.setattr("sst_merge.store.SAVE_EVERY", 1)
    monkeypatch.setattr("sst_merge.store.SAVE_SHARE", 0)
    done, whole = iter(range(batches)), Collector._one_batch

    def one_batch(*arguments) -> None:
        if next(done, None) is None:
            raise KeyboardInterrupt
        whole(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Collector, "_one_batch", one_batch)
        assert run(interrupted(setup), tmp_path / "broken") == 130
    assert not (tmp_path / "broken").exists()
    assert run(interrupted(setup), tmp_path / "broken") == 0
    for kind in ("", ".fisher"):
        assert files(tmp_path / f"broken{kind}") == files(tmp_path / f"unbroken{kind}")


@pytest.mark.parametrize(
    ("parameters", "top", "message"),
    [
        ({"steps": 2}, {"tune": True}, "tune with steps: 1"),
        ({"steps": 2, "select": "signed", "rho": 0.1}, {}, "select: signed takes no part of the patch"),
        ({"steps": 0}, {}, r"steps: expected a number in \[1, inf\)"),
        ({"steps": 1.5}, {}, "steps: expected int"),
    ],
)
def test_what_steps_do_not_go_with(setup, parameters, top, message):
    with pytest.raises(ValueError, match=message):
        load_config({**setup.config("sst", **parameters), **top})
