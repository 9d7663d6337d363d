"""The method `sst` in mergekit's own command: the checkpoint is base + ΔW of `sst-merge merge`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sst_merge.cli import main

SETTINGS = {"k": 0.3, "alpha": 0.7, "points": [0.5]}


def mergekit_config(setup, **changes: object) -> dict[str, object]:
    roles = {"utility": setup.utility, "safety": setup.safety}
    return {
        "base_model": str(setup.base),
        "models": [{"model": f"{setup.base}+{path}", "parameters": {"role": role}} for role, path in roles.items()],
        "merge_method": "sst",
        "parameters": {
            **SETTINGS,
            "harm": str(setup.harm),
            "benign": str(setup.benign),
            "max_length": 32,
            "batch_size": 4,
        },
        "dtype": "float32",
        **changes,
    }


def run(config: dict[str, object], out: Path, *options: str) -> int:
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return main(["mergekit", str(path), str(out), *options])


def merged_by_peft(setup, tmp_path: Path) -> torch.nn.Module:
    """The adapter that `sst-merge merge` writes, merged into the base by PEFT."""
    config = tmp_path / "ours.yaml"
    config.write_text(yaml.safe_dump(setup.config("sst", **SETTINGS)))
    assert main(["merge", str(config), "--out", str(tmp_path / "ours")]) == 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(setup.base), tmp_path / "ours")
    return model.merge_and_unload().eval()


def assert_same_model(setup, tmp_path: Path, out: Path, input_ids: torch.Tensor) -> None:
    expected = merged_by_peft(setup, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    theirs = expected.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, theirs[name], rtol=0, atol=1e-6), name
    with torch.no_grad():
        assert torch.allclose(model(input_ids).logits, expected(input_ids).logits, rtol=0, atol=1e-5)


def test_the_command_in_a_process_of_its_own(setup, tmp_path, input_ids):
    config, out = tmp_path / "config.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump(mergekit_config(setup)))
    before = {path.name for path in tmp_path.iterdir()}
    command = [sys.executable, "-m", "sst_merge.cli", "mergekit", str(config), str(out), "--out-shard-size", "20K"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == before | {"out", "out.fisher"}  # no scratch is left
    assert_same_model(setup, tmp_path, out, input_ids)
    assert len(list(out.glob("model-*.safetensors"))) > 1  # mergekit's own option was heard
    assert (out / "mergekit_config.yml").read_text() == config.read_text()
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(setup.base).get_vocab()
    assert json.loads((out / "report.json").read_text())["strengths"][0]["alpha"] == 0.7
    assert "# out" in (out / "README.md").read_text()


def test_roles_are_marked_and_order_means_nothing(setup, tmp_path):
    config = mergekit_config(setup)
    assert run(config, tmp_path / "one") == 0
    base = {"model": str(setup.base)}  # which mergekit lets one list as well
    assert run({**config, "models": [*config["models"][::-1], base]}, tmp_path / "other") == 0
    for model in config["models"]:
        role = model["parameters"]["role"]
        model["parameters"]["role"] = {"utility": "safety", "safety": "utility"}[role]
    assert run(config, tmp_path / "exchanged") == 0
    one, other, exchanged = (
        load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("one", "other", "exchanged")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(one[name], exchanged[name]) for name in one)


def test_statistics_are_kept_and_used_again(setup, tmp_path):
    config = mergekit_config(setup)
    assert run(config, tmp_path / "one") == 0
    kept = {"fisher_dir": str(tmp_path / "one.fisher")}  # in place of calibration
    assert run({**config, "parameters": SETTINGS | kept}, tmp_path / "again") == 0
    one, again = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("one", "again"))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not (tmp_path / "again.fisher").exists()


def test_dtype_and_the_cache_of_merged_adapters_are_mergekits(setup, tmp_path):
    cache = tmp_path / "cache"
    options = ("--lora-merge-cache", str(cache))
    assert run(mergekit_config(setup, dtype="float32", out_dtype="bfloat16"), tmp_path / "out", *options) == 0
    merged = load_file(next((tmp_path / "out").glob("*.safetensors")))
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert len(list(cache.iterdir())) == 2
    expected = merged_by_peft(setup, tmp_path).state_dict()
    for name, tensor in merged.items():  # rounded once, from float32
        assert torch.allclose(tensor.float(), expected[name], rtol=2**-8, atol=1e-7), name


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("gpt2_dir", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "lora_bias": True}),
        ("base_dir", {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}),
    ],
)
def test_transposed_layers_embeddings_and_whole_parameters(
    setup, make_adapter, tmp_path, input_ids, request, base, options
):
    """GPT-2's square c_proj would not notice a missing transposition by its shape."""
    folder = shutil.copytree(request.getfixturevalue(base), tmp_path / "base")
    AutoTokenizer.from_pretrained(setup.base).save_pretrained(folder)
    setup.safety, _ = make_adapter(folder, seed=2, r=3, target_modules=options["target_modules"][:1])
    setup.utility, _ = make_adapter(folder, seed=1, r=2, **options)
    setup.base = folder
    assert run(mergekit_config(setup), tmp_path / "out") == 0
    assert_same_model(setup, tmp_path, tmp_path / "out", input_ids)


def test_a_change_of_tied_embeddings_is_refused(setup, make_adapter, gpt2_dir, tmp_path, capsys):
    folder = shutil.copytree(gpt2_dir, tmp_path / "base")
    AutoTokenizer.from_pretrained(setup.base).save_pretrained(folder)
    setup.utility, _ = make_adapter(folder, seed=1, r=2, target_modules=["wte", "c_attn"])
    setup.safety, _ = make_adapter(folder, seed=2, r=2, target_modules=["c_attn"])
    setup.base = folder
    assert run(mergekit_config(setup), tmp_path / "out") == 2
    assert "transformer.wte.weight is changed, but the base ties" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("attention_bias", "message"),
    [(False, "base layer has no bias"), (True, "lacks ['model.layers.0.self_attn.q_proj.bias'")],
)
def test_a_change_that_the_checkpoint_cannot_hold_is_refused(
    setup, make_adapter, tmp_path, capsys, attention_bias, message
):
    """A bias for a layer without one; and one that mergekit's description of a Llama leaves out."""
    folder = tmp_path / "base"
    config = LlamaConfig.from_pretrained(setup.base, attention_bias=attention_bias)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(setup.base).save_pretrained(folder)
    setup.utility, _ = make_adapter(folder, seed=1, r=2, target_modules=["q_proj"], lora_bias=True)
    setup.safety, _ = make_adapter(folder, seed=2, r=2, target_modules=["q_proj"])
    setup.base = folder
    assert run(mergekit_config(setup), tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def spoil(config: dict, **parameters: object) -> dict:
    return {**config, "parameters": {**config["parameters"], **parameters}}


def with_models(config: dict, *models: dict) -> dict:
    return {**config, "models": [*models]}


MISTAKES = {
    "no YAML of mergekit": (lambda c, s: {"merge_method": "sst"}, "no configuration of mergekit"),
    "another method": (lambda c, s: {**c, "merge_method": "ties"}, "expected sst, got 'ties'"),
    "slices": (lambda c, s: {**c, "models": None, "slices": []}, "no configuration of mergekit"),
    "no base": (lambda c, s: {**c, "base_model": None}, "base_model"),
    "a parameter misspelt": (lambda c, s: spoil(c, dampng=1.0), "did you mean 'damping'"),
    "several strengths": (lambda c, s: spoil(c, alpha=[0.5, 1.0]), "expected one strength"),
    "a filter": (lambda c, s: spoil(c, alpha=[{"filter": "mlp", "value": 1.0}]), "alpha"),
    "no calibration": (lambda c, s: {**c, "parameters": {}}, "the files `harm` and `benign`"),
    "a full checkpoint": (
        lambda c, s: with_models(c, c["models"][0], {"model": str(s.base), "parameters": {"role": "safety"}}),
        "mergekit-extract-lora",
    ),
    "no role": (lambda c, s: with_models(c, c["models"][0], {"model": c["models"][1]["model"]}), "role"),
    "one role twice": (lambda c, s: with_models(c, c["models"][0], c["models"][0]), "two entries"),
    "a tokenizer": (lambda c, s: {**c, "tokenizer_source": "union"}, "keeps the base's vocabulary"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_before_anything_is_loaded(setup, tmp_path, capsys, mistake):
    change, message = MISTAKES[mistake]
    assert run(change(mergekit_config(setup), setup), tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and "memory:" not in error
    assert not (tmp_path / "out").exists()


def test_an_option_that_mergekit_does_not_have(setup, tmp_path, capsys):
    assert run(mergekit_config(setup), tmp_path / "out", "--lo-cpu") == 2
    assert "No such option '--lo-cpu'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as done:
        run(mergekit_config(setup), tmp_path / "out", "--help")
    assert done.value.code == 0 and "--out-shard-size" in capsys.readouterr().out


def test_a_full_folder_is_not_written_to(setup, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert run(mergekit_config(setup), tmp_path / "out") == 2
    assert "not empty" in capsys.readouterr().err and os.listdir(tmp_path / "out") == ["mine"]
