"""Held-out measurements against explicitly merged weights; tuning; the warning when directions do not survive."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from reference import log_probabilities
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sst_merge import load_config, merge
from sst_merge.cli import main
from sst_merge.data import read_examples, tokenize
from sst_merge.held_out import warnings_of
from sst_merge.report import _not_surviving
from sst_merge.tasks import split_held_out


def run(config: dict, tmp_path: Path, *arguments: str) -> dict:
    """The report of `sst-merge merge`."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["merge", str(path), "--out", str(tmp_path / "out"), "--overwrite", *arguments]) == 0
    return json.loads((tmp_path / "out/report.json").read_text())


@pytest.mark.parametrize(
    ("method", "parameters"), [("sst", {"k": 0.5}), ("ties", {"density": 0.5}), ("task_arithmetic", {})]
)
def test_measured_changes_are_those_of_the_merged_weights(setup, tmp_path, method, parameters):
    config = setup.config(method, alpha=[0.3, 1.5], **parameters)
    report = run({**config, "dtype": "float64"}, tmp_path)
    result = merge({**config, "dtype": "float64"})
    utility = {name: low.dense() for name, low in result.problem.utility.updates.items()}
    tokenizer = AutoTokenizer.from_pretrained(setup.base)
    held = {}
    for kind, path in (("harm", setup.harm), ("benign", setup.benign)):
        held[kind] = split_held_out(tokenize(read_examples(path), tokenizer, 32), 0.25, 0)[1]
    for row in report["held_out"]:
        merged = {name: low.dense() for name, low in result.updates(row["alpha"]).items()}
        kl, change = [], []
        for s in held["benign"]:
            before, after = (log_probabilities(setup.base, d, s) for d in (utility, merged))
            kl.append(float((before.exp() * (before - after)).sum()))
        for s in held["harm"]:
            labels = torch.tensor([i for i, wanted in zip(s.input_ids, s.is_target, strict=True) if wanted])[:, None]
            before, after = (log_probabilities(setup.base, d, s).gather(1, labels).sum() for d in (utility, merged))
            change.append(float(after - before))
        assert row["measured_kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-4)
        assert row["measured_refusal"] == pytest.approx(sum(change) / len(change), rel=1e-4)
        error = torch.tensor(change).std() / len(change) ** 0.5
        assert row["measured_refusal_se"] == pytest.approx(float(error), rel=1e-4)
        assert (row["predicted_kl"] is None) == (method != "sst")


def test_predictions_are_the_quadratic_model(setup, tmp_path):
    """½α²φᵀF_benign φ and αḡᵀφ, over the modules, from the merged weights themselves."""
    result = merge(setup.config("sst", k=0.4, alpha=[0.5, 2.0]))
    curvature = result.plan.curvature
    for row in result.report["strengths"]:
        kl, whole, refusal, alpha = 0.0, 0.0, 0.0, row["alpha"]
        for name in curvature.patch:
            phi = (result.plan.update(name, alpha) - curvature.origin[name]).flatten()  # α times the filtered patch
            kl += 0.5 * float(phi @ curvature.statistics.benign.fisher(name) @ phi)
            refusal += float(curvature.statistics.gradient(name) @ phi)
            tau = alpha * curvature.patch[name].flatten()
            whole += 0.5 * float(tau @ curvature.statistics.benign.fisher(name) @ tau)
        assert row["predicted_kl"] == pytest.approx(kl, rel=1e-6)
        assert row["predicted_refusal"] == pytest.approx(refusal, rel=1e-6)
        assert row["predicted_kl_unfiltered"] == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(
    ("parameters", "size"),
    [({}, "k"), ({"select": "soft", "fisher": "gram"}, "mu"), ({"select": "budget", "rho": 0.01}, "rho")],
)
def test_tuning_takes_the_best_candidate_and_says_which(setup, tmp_path, monkeypatch, parameters, size):
    monkeypatch.setattr("sst_merge.tune.ALPHAS", (0.5, 1.0))
    monkeypatch.setattr("sst_merge.tune._DAMPING", (0.1, 1.0))
    monkeypatch.setattr("sst_merge.tune._SHRINKAGE", (0.0, 0.5))
    config = {**setup.config("sst", **parameters), "output": {"rank": 2}}  # what is written is what is tuned
    report = run(config, tmp_path, "--tune")
    tuning = report["tuning"]
    chosen, candidates = tuning["chosen"], tuning["candidates"]
    assert chosen["objective"] == min(c["objective"] for c in candidates)
    for c in candidates:
        assert c["objective"] == pytest.approx(c["kl"] + c["refusal_loss"])
    for name, least in ((size, 3), ("damping", 2), ("shrinkage_benign", 2), ("alpha", 2)):
        assert len({c[name] for c in candidates}) >= least, name
    joint = parameters.get("fisher") == "gram"  # whose F_harm keeps its rows
    assert {c["shrinkage_harm"] for c in candidates} >= ({0.0} if joint else {0.0, 0.5, "ledoit_wolf"})
    pairs = {(c["shrinkage_harm"], c["shrinkage_benign"]) for c in candidates}
    assert "ledoit_wolf" in {s for _, s in pairs} and (joint or pairs & {(0.0, 0.5), (0.5, 0.0)})
    # the merge that was written is the chosen one: again without tuning, from the resolved configuration
    resolved = load_config(tmp_path / "out/sst_config.yaml").parameters
    assert {name: getattr(resolved, name) for name in (size, "damping", "alpha")} == {
        name: chosen[name] for name in (size, "damping", "alpha")
    }
    for kind in ("harm", "benign"):
        form = resolved.form(kind)
        assert (form.shrinkage, form.target) == (chosen[f"shrinkage_{kind}"], chosen[f"target_{kind}"])
    again = merge({**yaml.safe_load((tmp_path / "out/sst_config.yaml").read_text()), "tune": False})
    assert again.report["held_out"][0]["measured_kl"] == pytest.approx(chosen["kl"], rel=1e-4)
    assert report["held_out"][0]["measured_kl"] == pytest.approx(chosen["kl"], rel=1e-4)


def test_tuning_is_for_sst_with_data(setup, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(setup.config("ties")))
    assert main(["merge", str(path), "--out", str(tmp_path / "out"), "--tune"]) == 2
    assert "only merge_method sst is tuned" in capsys.readouterr().err


def test_a_list_of_strengths_is_the_grid_of_tuning(setup, tmp_path, monkeypatch):
    monkeypatch.setattr("sst_merge.tune._DAMPING", (1.0,))
    monkeypatch.setattr("sst_merge.tune._SHRINKAGE", (0.0,))
    report = run(setup.config("sst", alpha=[0.3, 0.7]), tmp_path, "--tune")
    assert {c["alpha"] for c in report["tuning"]["candidates"]} == {0.3, 0.7}


def test_biases_and_whole_parameters_are_measured_as_they_are_written(base_dir, make_adapter, setup, tmp_path):
    """KL(utility ‖ merged), both loaded by PEFT: LoRA biases of both adapters, and the safety adapter's own head."""
    head = load_file(base_dir / "model.safetensors")
    assert "lm_head.weight" in head
    biased = {"lora_bias": True, "target_modules": ["q_proj"]}
    utility, _ = make_adapter(base_dir, seed=3, r=2, **biased)
    safety, _ = make_adapter(base_dir, seed=4, r=2, modules_to_save=["lm_head"], **biased)
    for role, folder in (("utility", utility), ("safety", safety)):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        for key in [key for key in tensors if key.endswith("lora_B.bias")]:
            tensors[key] = torch.full_like(tensors[key], 0.3 if role == "utility" else -0.8)
        save_file(tensors, path)
    config = setup.config("sst", k=0.5)
    config["models"] = [{"model": str(utility), "role": "utility"}, {"model": str(safety), "role": "safety"}]
    (row,) = run(config, tmp_path)["held_out"]
    models = []
    for folder in (utility, tmp_path / "out"):
        base = AutoModelForCausalLM.from_pretrained(base_dir)
        models.append(PeftModel.from_pretrained(base, folder).eval())
    sequences = tokenize(read_examples(setup.benign), AutoTokenizer.from_pretrained(base_dir), 32)
    kl = []
    for s in split_held_out(sequences, 0.25, 0)[1]:
        at = [t - 1 for t, wanted in enumerate(s.is_target) if wanted]
        with torch.no_grad():
            p, q = (m(input_ids=torch.tensor([s.input_ids])).logits[0].log_softmax(-1)[at] for m in models)
        kl.append(float((p.exp() * (p - q)).sum()))
    assert row["measured_kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-3)


ROW = {"alpha": 1.0, "measured_kl": 0.2, "predicted_kl": 0.1, "measured_refusal": 1.0, "measured_refusal_se": 0.1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"measured_refusal": -0.3}, "refuses less"),
        ({"measured_refusal": -0.1}, None),  # within two standard errors
        ({"measured_kl": 1.2}, "predicted 0.1"),
        ({"measured_kl": 0.05, "predicted_kl": 0.001}, None),  # too little to matter
        ({"measured_kl": float("nan")}, "not finite"),
        ({"predicted_kl": None, "measured_kl": 5.0}, None),
    ],
)
def test_measurements_warn(changes, message):
    warnings = warnings_of([{**ROW, **changes}])
    assert len(warnings) == (message is not None) and all(message in w for w in warnings)


def test_a_warning_when_directions_do_not_survive():
    assert _not_surviving({"ray_held_kept": 2.0, "ray_held_whole_patch": 1.0}) == []
    assert _not_surviving({"ray_held_kept": 1.0, "ray_held_whole_patch": 1.0}) == []
    (warning,) = _not_surviving({"ray_held_kept": 0.5, "ray_held_whole_patch": 1.0})
    assert "0.5" in warning and "shrinkage" in warning


def test_noise_is_warned_about_through_the_command_line(setup, tmp_path, capsys):
    """Found on one sequence, judged on others: the top direction of each module is that sequence's own."""
    config = setup.config("sst", k=1, damping=1e-6, where="local")
    config["calibration"]["held_out"] = 0.9
    report = run(config, tmp_path)
    survival = report["survival"]
    assert survival["ray_held_kept"] < survival["ray_held_whole_patch"]
    assert "do not survive" in report["warnings"][0] and "do not survive" in capsys.readouterr().err
    assert "do not survive" in (tmp_path / "out/report.md").read_text()
