"""The base with a merge added, written by the command line, against models that PEFT merged."""

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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sst_merge.cli import main

MODULES = ["q_proj", "v_proj", "down_proj"]


def run(setup, tmp_path: Path, *arguments: str, method: str = "task_arithmetic", **changes: object) -> Path:
    """The output of `sst-merge merge --merge-into-base`."""
    path, out = tmp_path / "config.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump({**setup.config(method), **changes}))
    assert main(["merge", str(path), "--out", str(out), "--merge-into-base", *arguments]) == 0
    return out


def refusal(setup, tmp_path: Path, capsys, **changes: object) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**setup.config("task_arithmetic"), **changes}))
    assert main(["merge", str(path), "--out", str(tmp_path / "out"), "--merge-into-base"]) == 2
    assert not (tmp_path / "out").exists()
    return capsys.readouterr().err


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def logits(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=input_ids).logits


def rebase(setup, base: Path, base_dir: Path, make_adapter, **both: object) -> None:
    """Put a new base, with the tokenizer, and two adapters on it into the setup."""
    for file in base_dir.glob("*token*"):
        shutil.copy(file, base)
    setup.base = base
    setup.utility, setup.utility_model = make_adapter(base, seed=1, r=2, **both)
    setup.safety, setup.safety_model = make_adapter(base, seed=2, r=3, **both)


@pytest.fixture
def sharded(setup, base_dir, make_adapter, load_base, tmp_path):
    """The tiny Llama in some shards, a generation config and a chat template beside it."""
    base = tmp_path / "sharded"
    load_base(base_dir).save_pretrained(base, max_shard_size="20KB")
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    (base / "pytorch_model.bin").write_bytes(b"not to be copied")
    rebase(setup, base, base_dir, make_adapter, target_modules=MODULES)
    return setup


def test_checkpoint_is_the_base_that_peft_merged_twice(sharded, tmp_path, input_ids, load_base):
    out = run(sharded, tmp_path)
    reference = load_base(sharded.base)
    for adapter in (sharded.utility, sharded.safety):
        reference = PeftModel.from_pretrained(reference, adapter).merge_and_unload()
    written = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(written, input_ids), logits(reference, input_ids), rtol=1e-5, atol=1e-5)
    assert (logits(written, input_ids) - logits(load_base(sharded.base), input_ids)).abs().max() > 1e-2
    assert AutoTokenizer.from_pretrained(out).vocab_size == 50


def test_shards_metadata_and_files_are_the_base_s(sharded, tmp_path):
    out = run(sharded, tmp_path)
    index = "model.safetensors.index.json"
    assert json.loads((out / index).read_text()) == json.loads((sharded.base / index).read_text())
    shards = sorted(file.name for file in sharded.base.glob("*.safetensors"))
    assert len(shards) > 3 and sorted(file.name for file in out.glob("*.safetensors")) == shards
    changed = 0
    for name in shards:
        with safe_open(sharded.base / name, "pt") as base, safe_open(out / name, "pt") as merged:
            assert base.metadata() == merged.metadata() and sorted(base.keys()) == sorted(merged.keys())
            for key in base.keys():  # noqa: SIM118
                same = torch.equal(base.get_tensor(key), merged.get_tensor(key))
                assert same != any(module in key for module in MODULES), key
                changed += not same
    assert changed == 6
    assert (out / "chat_template.jinja").read_text() == (sharded.base / "chat_template.jinja").read_text()
    assert {"generation_config.json", "tokenizer.json", "report.md"} <= {file.name for file in out.iterdir()}
    assert not (out / "pytorch_model.bin").exists() and not (out / "adapter_config.json").exists()


def test_an_index_that_names_other_folders_is_refused(sharded, tmp_path, capsys):
    index = sharded.base / "model.safetensors.index.json"
    tree = json.loads(index.read_text())
    name, file = next(iter(tree["weight_map"].items()))
    tree["weight_map"][name] = f"../{sharded.base.name}/{file}"
    index.write_text(json.dumps(tree))
    assert "files of other folders: ['../sharded/" in refusal(sharded, tmp_path, capsys)


def test_every_strength_has_a_checkpoint_of_its_own(sharded, tmp_path):
    out = run(sharded, tmp_path, method="sst", parameters={"alpha": [0.5, 1.0], "k": 0.5})
    strengths = json.loads((out / "report.json").read_text())["strengths"]
    assert [s["checkpoint"] for s in strengths] == ["alpha-0.5", "alpha-1.0"]
    half, whole = (tensors_of(out / s["checkpoint"]) for s in strengths)
    name = "model.layers.0.mlp.down_proj"
    delta = sharded.utility_model.base_model.model.get_submodule(name).get_delta_weight("default").detach()
    zero = tensors_of(sharded.base)[f"{name}.weight"] + delta
    torch.testing.assert_close(whole[f"{name}.weight"] - zero, 2 * (half[f"{name}.weight"] - zero), rtol=0, atol=1e-5)
    assert float((whole[f"{name}.weight"] - zero).norm()) > 1e-2


def test_each_tensor_keeps_its_dtype_and_is_rounded_once(setup, base_dir, make_adapter, load_base, tmp_path):
    base = tmp_path / "bfloat16"
    model = load_base(base_dir).bfloat16()
    model.model.layers[0].self_attn.q_proj.float()
    model.save_pretrained(base)
    rebase(setup, base, base_dir, make_adapter, target_modules=MODULES)
    out = run(setup, tmp_path)
    before, after = tensors_of(base), tensors_of(out)
    assert {key: t.dtype for key, t in after.items()} == {key: t.dtype for key, t in before.items()}
    assert {t.dtype for t in after.values()} == {torch.bfloat16, torch.float32}
    worst = 0.0
    for name, layer in setup.utility_model.base_model.model.named_modules():
        if not name.endswith(tuple(MODULES)):
            continue
        other = setup.safety_model.base_model.model.get_submodule(name)
        change = layer.get_delta_weight("default").double() + other.get_delta_weight("default").double()
        exact = before[f"{name}.weight"].double() + change
        stored = after[f"{name}.weight"].double()
        resolution = torch.finfo(after[f"{name}.weight"].dtype).eps / 2
        arithmetic = 1e-6 * float(change.abs().max())  # ΔW itself is a float32 product
        assert bool(((stored - exact).abs() <= resolution * exact.abs() + arithmetic).all()), name
        worst = max(worst, float((stored - exact).norm() / change.norm()))
    (strength,) = json.loads((out / "report.json").read_text())["strengths"]
    assert strength["worst_rounding_error"] == pytest.approx(worst, rel=1e-3)


def test_a_base_named_by_its_place_in_the_cache(setup, base_dir, tmp_path):
    """The files are copied, not linked into the cache."""
    repository, commit = tmp_path / "cache" / "models--someone--tiny", "0" * 40
    blobs, snapshot = repository / "blobs", repository / "snapshots" / commit
    shutil.copytree(base_dir, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**setup.config("task_arithmetic"), "base_model": "someone/tiny"}))
    command = [sys.executable, "-m", "sst_merge.cli", "merge", str(path), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache")}
    run = subprocess.run([*command, "--merge-into-base"], env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    before, after = tensors_of(base_dir), tensors_of(tmp_path / "out")
    assert sum(not torch.equal(before[key], after[key]) for key in after) == 6 and before.keys() == after.keys()
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    AutoTokenizer.from_pretrained(tmp_path / "out")


TIED = {  # what the adapter holds, and whether that unties
    "embedding and head": ({"target_modules": ["wte", "lm_head", "c_fc"]}, True),
    "embedding": ({"target_modules": ["wte", "c_attn"]}, True),
    "head": ({"target_modules": ["lm_head", "c_attn"]}, True),
    "saved head": ({"target_modules": ["c_attn", "c_proj"], "modules_to_save": ["lm_head"]}, True),
    "bias": ({"target_modules": ["c_attn", "mlp.c_proj"], "lora_bias": True}, False),
    "saved norm": ({"target_modules": ["c_attn"], "modules_to_save": ["ln_f"]}, False),
}


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("case", TIED)
def test_tied_embeddings_conv1d_and_biases(
    setup, gpt2_dir, base_dir, make_adapter, tmp_path, input_ids, load_base, case, prefix
):
    """What an adapter changes of tied embeddings, PEFT shows unmerged; the files of the Hub lack the prefix."""
    base = tmp_path / "gpt2"
    shutil.copytree(gpt2_dir, base)
    tensors = load_file(base / "model.safetensors")
    assert "lm_head.weight" not in tensors
    renamed = {prefix + key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    save_file(renamed, base / "model.safetensors", metadata={"format": "pt"})
    settings, untied = TIED[case]
    rebase(setup, base, base_dir, make_adapter, fan_in_fan_out=True, **settings)
    setup.safety, _ = make_adapter(base, seed=2, target_modules=["c_fc"], fan_in_fan_out=True)
    out = run(setup, tmp_path, parameters={"alpha": 0.0})
    expected = logits(setup.utility_model, input_ids)
    written = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(written, input_ids), expected, rtol=1e-5, atol=1e-5)
    assert (expected - logits(load_base(base), input_ids)).abs().max() > 1e-2
    assert json.loads((out / "config.json").read_text()).get("tie_word_embeddings", True) is not untied
    assert ("lm_head.weight" in tensors_of(out)) is untied
    assert ("tie_word_embeddings is false now" in (out / "report.md").read_text()) is untied


def test_untied_head_is_in_the_index(setup, base_dir, make_adapter, load_base, tmp_path, input_ids):
    base = tmp_path / "tied"
    model = load_base(base_dir)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(base, max_shard_size="20KB")
    assert "lm_head.weight" not in tensors_of(base)
    rebase(setup, base, base_dir, make_adapter, target_modules=["lm_head", "q_proj"])
    out = run(setup, tmp_path, parameters={"alpha": 0.0})
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(out), input_ids),
        logits(setup.utility_model, input_ids),
        rtol=1e-5,
        atol=1e-5,
    )
    before, after = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (base, out))
    assert after["weight_map"].keys() - before["weight_map"].keys() == {"lm_head.weight"}
    sizes = [sum(t.nbytes for t in tensors_of(folder).values()) for folder in (base, out)]
    assert after["metadata"]["total_size"] - before["metadata"]["total_size"] == sizes[1] - sizes[0] == 50 * 32 * 4


def test_what_has_no_place_in_the_base_is_refused_by_name(setup, base_dir, make_adapter, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(base_dir, base)
    rebase(setup, base, base_dir, make_adapter, target_modules=["q_proj"])
    config, weights = base / "config.json", base / "model.safetensors"
    stored, tensors = config.read_text(), load_file(weights)

    assert "output.rank: a checkpoint of the base has no rank" in refusal(setup, tmp_path, capsys, output={"rank": 2})
    quantised = json.loads(stored) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    config.write_text(json.dumps(quantised))
    assert "merge it into the base of the original precision" in refusal(setup, tmp_path, capsys)
    config.write_text(stored)

    renamed = {key.replace("layers.1.self_attn.q_proj", "layers.1.attention.q"): t for key, t in tensors.items()}
    save_file(renamed, weights, metadata={"format": "pt"})
    assert "no tensors named ['model.layers.1.self_attn.q_proj.weight']" in refusal(setup, tmp_path, capsys)
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, weights, metadata={"format": "pt"})
    assert f"{name} is stored as torch.float8_e4m3fn" in refusal(setup, tmp_path, capsys)
    save_file(tensors | {name: torch.full_like(tensors[name], 65504).half()}, weights, metadata={"format": "pt"})
    models = [entry | {"parameters": {"weight": 10.0}} for entry in setup.config()["models"]]
    assert f"{name} overflows torch.float16" in refusal(
        setup, tmp_path, capsys, models=models, parameters={"alpha": 10.0}
    )
    weights.write_bytes(b"")
    assert "could not be loaded: model.safetensors is damaged" in refusal(setup, tmp_path, capsys)
    weights.unlink()
    assert "must hold model.safetensors, or shards" in refusal(setup, tmp_path, capsys)
    save_file(tensors, weights, metadata={"format": "pt"})

    setup.utility, _ = make_adapter(base, target_modules=["q_proj"], lora_bias=True)
    assert "no bias where the adapters add one: ['model.layers.0.self_attn.q_proj'" in refusal(setup, tmp_path, capsys)
