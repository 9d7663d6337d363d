"""Merges of every kind of adapter through the command line, against PEFT with both adapters active on one base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from reference import TRANSPOSED, harm_fishers
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from sst_merge.cli import main
from sst_merge.config import load_config
from sst_merge.problem import Problem

PATTERNS = {
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 7},
    "alpha_pattern": {r"^model\.layers\.0\..*": 5, "down_proj": 3},
}
CASES = {  # base, the utility's settings, the safety's
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "k_proj"]}, None),
    "tied embedding": ("gpt2", {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}, None),
    "tied head": ("gpt2", {"target_modules": ["lm_head", "c_fc"], "fan_in_fan_out": True}, None),
    "scaled embedding": ("gemma3", {"target_modules": ["embed_tokens", "q_proj"]}, None),
    "patterns": ("llama", PATTERNS, None),
    "patterns, rsLoRA": ("llama", {**PATTERNS, "use_rslora": True}, {"target_modules": "all-linear", "r": 3}),
    "saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}, PATTERNS),
    "saved head of tied": (
        "gpt2",
        {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"], "fan_in_fan_out": True},
        {"target_modules": ["wte"]},
    ),
}


def save_gemma3(folder: Path) -> None:
    """A base that multiplies its tied embeddings by √hidden_size."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "sliding_window": 16}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Gemma3TextConfig(**sizes, **heads)).save_pretrained(folder)


@pytest.fixture(params=CASES)
def case(request, setup, llama_dir, gpt2_dir, base_dir, make_adapter, tmp_path):
    """The setup with the case's adapters."""
    family, utility, safety = CASES[request.param]
    setup.base = tmp_path / family
    if family == "gemma3":
        save_gemma3(setup.base)
    else:
        shutil.copytree({"llama": llama_dir, "gpt2": gpt2_dir}[family], setup.base)
    for file in base_dir.glob("*token*"):
        shutil.copy(file, setup.base)
    setup.utility, _ = make_adapter(setup.base, seed=1, **utility)
    setup.safety, _ = make_adapter(setup.base, seed=2, **{"r": 2, **(safety or utility)})
    return setup


def run(setup, out: Path, *arguments: str, method: str = "task_arithmetic", **parameters: object) -> Path:
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(setup.config(method, **parameters)))
    assert main(["merge", str(path), "--out", str(out), *arguments]) == 0
    return out


def logits(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=input_ids).logits


def both_active(setup, load_base) -> PeftModel:
    model = PeftModel.from_pretrained(load_base(setup.base), setup.utility, adapter_name="utility")
    model.load_adapter(setup.safety, "safety")
    model.base_model.set_adapter(["utility", "safety"])
    return model


def test_merged_logits_are_those_of_both_adapters(case, tmp_path, input_ids, load_base):
    expected = logits(both_active(case, load_base), input_ids)
    assert (expected - logits(load_base(case.base), input_ids)).abs().max() > 1e-2
    written = PeftModel.from_pretrained(load_base(case.base), run(case, tmp_path / "adapter"))
    torch.testing.assert_close(logits(written, input_ids), expected, rtol=1e-4, atol=1e-4)
    whole = AutoModelForCausalLM.from_pretrained(run(case, tmp_path / "whole", "--merge-into-base"))
    torch.testing.assert_close(logits(whole, input_ids), expected, rtol=1e-4, atol=1e-4)


def test_sst_covers_each_module_and_names_the_rest(case, tmp_path, load_base):
    out = run(case, tmp_path / "sst", method="sst", where="local", k=0.5)
    problem = Problem(load_config(tmp_path / "sst.yaml"))
    report = json.loads((out / "report.json").read_text())
    covered = {row["module"] for row in report["modules"] if "kept" in row}
    assert covered == set(problem.safety.updates)
    assert {line.split(":")[0] for line in report["not_covered"]} == set(problem.saved)
    reference = load_base(case.base).double()
    for module in reference.modules():  # tied weights have a gradient each
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            module.weight = nn.Parameter(module.weight.detach().clone())
    for name, value in problem.saved.items():
        reference.get_parameter(name).data = value.double()
    for name, update in problem.utility.updates.items():
        module, delta = reference.get_submodule(name), update.dense().double()
        module.weight.data += delta.mT if type(module).__name__ in TRANSPOSED else delta
    statistics = problem.curvature(problem.config.parameters).statistics
    for name, expected in harm_fishers(reference, problem).items():
        if name in covered:
            error = (statistics.harm.fisher(name) - expected).norm() / expected.norm()
            assert float(error) < 1e-4, (name, float(error))
    model = PeftModel.from_pretrained(load_base(case.base), out)
    result = model.load_adapter(out, "again")
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
