"""Quantised bases and bases spread over devices, through the command line."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from reference import harm_fishers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from sst_merge.adapters import read_adapter
from sst_merge.base import model_bytes
from sst_merge.cli import main
from sst_merge.config import load_config
from sst_merge.merging import merge
from sst_merge.problem import Problem

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.fixture
def wide(setup, base_dir, make_adapter, tmp_path):
    """The setup on a base of 64 units: 4 bit layers take 64 weights of a row at a time."""
    config = LlamaConfig.from_pretrained(base_dir, hidden_size=64, intermediate_size=128, head_dim=16)
    setup.base = tmp_path / "wide"
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(setup.base)
    for file in base_dir.glob("*token*"):
        shutil.copy(file, setup.base)
    setup.utility, _ = make_adapter(setup.base, seed=1, r=2, target_modules=["q_proj", "v_proj"])
    setup.safety, _ = make_adapter(setup.base, seed=2, r=3, target_modules=["v_proj", "down_proj"])
    return setup


def run(setup, tmp_path: Path, *arguments: str, **changes: object) -> tuple[int, Path]:
    path, out = tmp_path / "config.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump({**setup.config("sst", k=0.5, where="local"), **changes}))
    return main(["merge", str(path), "--out", str(out), *arguments]), out


def dequantised(base: Path, bits: str) -> torch.nn.Module:
    """The base in float64 with the weights that bitsandbytes makes of them."""
    from bitsandbytes.functional import dequantize_4bit

    quantization = BitsAndBytesConfig(**(NF4 if bits == "4bit" else {"load_in_8bit": True}))
    quantised = AutoModelForCausalLM.from_pretrained(base, device_map={"": "cpu"}, quantization_config=quantization)
    model = AutoModelForCausalLM.from_pretrained(base).double().eval()
    changed = 0
    for name, module in quantised.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.is_floating_point():
            continue
        if bits == "4bit":
            dense = dequantize_4bit(weight.data, weight.quant_state)
        else:
            dense = weight.data.double() * module.weight.SCB.double()[:, None] / 127
        assert not torch.equal(model.get_submodule(name).weight, dense.double())
        model.get_submodule(name).weight.data = dense.double()
        changed += 1
    assert changed == 14
    return model


@pytest.mark.parametrize(("bits", "tolerance"), [("4bit", 1e-5), ("8bit", 0.05)])
def test_fishers_of_a_quantised_base_are_those_of_its_weights(wide, tmp_path, load_base, bits, tolerance):
    """8 bit layers round their inputs too, in float16 as well, so their Fishers differ by that rounding."""
    code, out = run(wide, tmp_path, quantization=bits)
    assert code == 0
    report = json.loads((out / "report.json").read_text())
    assert "the base is quantised: its Fishers are those of the quantised model" in report["remarks"]

    problem = Problem(load_config(tmp_path / "config.yaml"))
    model = dequantised(wide.base, bits)
    for name, update in read_adapter(wide.utility).updates.items():
        model.get_submodule(name).weight.data += update.dense().double()
    expected = harm_fishers(model, problem)
    with torch.no_grad():  # after which weights repacked for inference would pass no gradient on
        problem.model(torch.ones(1, 4, dtype=torch.int64))
    statistics = problem.curvature(problem.config.parameters).statistics
    for name in statistics.harm.first:
        error = float((statistics.harm.fisher(name) - expected[name]).norm() / expected[name].norm())
        assert error < tolerance, (name, error)
    trace = sum(float(expected[name].trace()) for name in statistics.harm.first)
    assert report["fisher_trace"]["harm"] == pytest.approx(trace, rel=tolerance)
    # far from those of the base in full precision
    plain = merge({**wide.config("sst", where="local")}).plan.curvature.statistics.harm
    moved = [float((plain.fisher(n) - expected[n]).norm() / expected[n].norm()) for n in plain.first]
    assert bits == "8bit" or min(moved) > 10 * tolerance
    stored = sum(p.numel() * p.element_size() for p in problem.model.parameters())
    assert model_bytes(problem.config, problem.skeleton, torch.float32) == stored
    PeftModel.from_pretrained(load_base(wide.base), out)


def test_a_base_in_bfloat16_runs_as_it_is(wide, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(wide.base).bfloat16()
    model.save_pretrained(wide.base)
    assert run(wide, tmp_path)[0] == 0
    problem = Problem(load_config(tmp_path / "config.yaml"))
    assert problem.model.dtype == torch.bfloat16
    model = model.double().eval()
    for name, update in read_adapter(wide.utility).updates.items():
        model.get_submodule(name).weight.data += update.dense().double()
    expected = harm_fishers(model, problem)
    trace = sum(float(expected[name].trace()) for name in problem.safety.updates)
    assert json.loads((tmp_path / "out/report.json").read_text())["fisher_trace"]["harm"] == pytest.approx(
        trace, rel=0.05
    )
    statistics = problem.curvature(problem.config.parameters).statistics
    for name in problem.safety.updates:
        error = float((statistics.harm.fisher(name) - expected[name]).norm() / expected[name].norm())
        assert 1e-5 < error < 0.1, (name, error)  # rounded, so it ran in bfloat16


def test_a_base_that_is_stored_quantised_loads_as_it_is(wide, tmp_path, capsys):
    stored = tmp_path / "stored"
    quantization = BitsAndBytesConfig(**NF4)
    model = AutoModelForCausalLM.from_pretrained(wide.base, device_map={"": "cpu"}, quantization_config=quantization)
    model.save_pretrained(stored)
    for file in wide.base.glob("*token*"):
        (stored / file.name).write_bytes(file.read_bytes())
    parts = [tmp_path / name for name in ("stored-run", "quantised-run")]
    for part, changes in zip(parts, ({"base_model": str(stored)}, {"quantization": "4bit"}), strict=True):
        part.mkdir()
        assert run(wide, part, **changes)[0] == 0
    reports = [json.loads((part / "out/report.json").read_text()) for part in parts]
    for kind in ("harm", "benign"):
        assert reports[0]["fisher_trace"][kind] == pytest.approx(reports[1]["fisher_trace"][kind], rel=1e-4)
    capsys.readouterr()
    assert run(wide, tmp_path, base_model=str(stored), quantization="4bit")[0] == 2
    assert "is stored quantised and loads so" in capsys.readouterr().err
    for changes in ({"base_model": str(stored)}, {"quantization": "8bit"}):
        assert run(wide, tmp_path, "--merge-into-base", **changes)[0] == 2
        assert "merge it into the base of the original precision" in capsys.readouterr().err


def test_whole_parameters_of_quantised_layers_are_refused_and_biases_added(wide, make_adapter):
    whole, _ = make_adapter(wide.base, seed=5, r=2, target_modules=["q_proj"], modules_to_save=["up_proj"])
    problem = Problem(load_config({**wide.config(), "quantization": "4bit"}))
    config = {**wide.config(), "quantization": "4bit"}
    config["models"][0]["model"] = str(whole)
    with pytest.raises(ValueError, match=r"up_proj.weight: the base holds it quantised, .*original precision"):
        _ = Problem(load_config(config)).model
    biased, _ = make_adapter(wide.base, seed=6, r=2, target_modules=["q_proj"], lora_bias=True)
    config["models"][0]["model"] = str(biased)
    problem = Problem(load_config(config))
    name = "model.layers.0.self_attn.q_proj"
    layer, x = problem.model.get_submodule(name), torch.randn(3, 64)
    plain = Problem(load_config({**wide.config(), "quantization": "4bit"})).model.get_submodule(name)
    torch.testing.assert_close(layer(x) - plain(x), problem.utility.biases[name].expand(3, -1), rtol=1e-5, atol=1e-5)


def test_bitsandbytes_is_asked_for_before_any_work(setup, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if "bitsandbytes" in name else find(name, *a)
    )
    assert run(setup, tmp_path, quantization="8bit")[0] == 2
    assert "pip install bitsandbytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": "4bits"}, "quantization: expected one of 4bit, 8bit, got '4bits'; did you mean '4bit'?"),
        ({"quantization": 4}, "quantization: expected str | None, got 4"),
        ({"device_map": "autp"}, "did you mean 'auto'?"),
        ({"device_map": {"model": "gpu"}}, "'gpu' is no torch device"),
        ({"device_map": {"model": 1.5}}, "expected {module: device}"),
        ({"device_map": {"model": 64}}, "cuda:64"),
    ],
)
def test_bad_settings(setup, tmp_path, capsys, changes, message):
    assert run(setup, tmp_path, **changes)[0] == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
MAPS = {
    "auto": "auto",
    "one device": {"": "cpu"},
    "layer on disk": {part: "disk" if part == "model.layers.0" else "cpu" for part in PARTS},
    "embedding on disk": {part: "disk" if part == "model.embed_tokens" else "cpu" for part in PARTS},
}


@pytest.mark.parametrize("name", MAPS)
def test_device_map_changes_no_fisher(setup, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    whole, spread = (
        merge({**setup.config("sst", k=0.5), "device_map": device_map}) for device_map in (None, MAPS[name])
    )
    for module in whole.plan.curvature.patch:
        for kind in ("harm", "benign"):
            wanted, actual = (
                getattr(result.plan.curvature.statistics, kind).fisher(module) for result in (whole, spread)
            )
            torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-9)
    remarks = " ".join(spread.report["remarks"])
    assert ("parameters are offloaded" in remarks) == ("disk" in name)
    code, out = run(setup, tmp_path, device_map=MAPS[name])
    assert code == 0 and load_config(out / "sst_config.yaml").device_map == MAPS[name]
    assert not (tmp_path / "offload").exists()
