"""`apply_sst` on a live PEFT model: the same adapter as `sst-merge merge` writes, and nothing else changed."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import bitsandbytes
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel
from peft.utils.integrations import dequantize_module_weight
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from sst_merge import apply_sst
from sst_merge.cli import main

SETTINGS = {"k": 0.3, "alpha": 0.7, "points": [0.5]}


def live(base: Path, utility: Path, safety: Path) -> PeftModel:
    """Both adapters in one model; the safety adapter is active and trainable, the model in training mode."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(model, utility, adapter_name="helpful")
    model.load_adapter(safety, adapter_name="refuses", is_trainable=True)
    model.set_adapter("refuses")
    return model.train()


def records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_command(setup, tmp_path: Path, **settings: object) -> PeftModel:
    """What the command line makes of the same files, loaded by PEFT."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(setup.config("sst", **settings)))
    assert main(["merge", str(config), "--out", str(tmp_path / "out")]) == 0
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(setup.base), tmp_path / "out").eval()


def apply(model: PeftModel, setup, **settings: object):
    names = {"utility": "helpful", "safety": "refuses"}
    data = {"harm": setup.harm, "benign": setup.benign}
    return apply_sst(model, **{**names, **data, "max_length": 32, "batch_size": 4, **settings})


def state(model: PeftModel) -> dict[str, object]:
    """All that must stay: values by name, which object each is, gradients wanted, modes, the active adapter."""
    return {
        "values": {key: value.clone() for key, value in model.state_dict().items()},
        "objects": {key: id(value) for key, value in model.named_parameters()},
        "requires_grad": {key: value.requires_grad for key, value in model.named_parameters()},
        "modes": {key: module.training for key, module in model.named_modules()},
        "types": {key: type(module) for key, module in model.named_modules()},
        "active": copy.copy(model.active_adapters),
        "random": torch.get_rng_state(),
    }


def assert_kept(before: dict[str, object], after: dict[str, object], name: str = "sst") -> None:
    """Everything that was there is as it was; what is new belongs to the adapter `name` and is frozen."""
    for kind in ("objects", "requires_grad", "modes", "types"):
        assert {key: after[kind][key] for key in before[kind]} == before[kind]
    for key, value in before["values"].items():
        assert torch.equal(value, after["values"][key]), key
    new = after["values"].keys() - before["values"].keys()
    assert new and all(name in key.split(".") for key in new)
    assert not any(
        after["requires_grad"][key] for key in after["requires_grad"].keys() - before["requires_grad"].keys()
    )
    assert after["active"] == before["active"] and torch.equal(after["random"], before["random"])


@pytest.fixture
def model(setup) -> PeftModel:
    return live(setup.base, setup.utility, setup.safety)


def test_the_adapter_is_that_of_the_command_and_the_model_stays_as_it_was(setup, model, tmp_path, input_ids):
    model.base_model.model.model.norm.weight.requires_grad_(True)
    before = state(model)
    result = apply(model, setup, **SETTINGS)
    assert_kept(before, state(model))
    assert result.path is None and result.report["strengths"][0]["alpha"] == 0.7
    reference = by_command(setup, tmp_path, **SETTINGS)
    model.eval().set_adapter("sst")
    with torch.no_grad():
        logits, expected = (m(input_ids).logits for m in (model, reference))
        model.set_adapter("helpful")
        utility = model(input_ids).logits
    assert torch.equal(logits, expected)
    assert not torch.allclose(logits, utility, atol=1e-3)  # the patch is there
    read = {name: update.dense() for name, update in result.problem.utility.updates.items()}
    for parameter in model.parameters():
        parameter.data.zero_()
    assert all(torch.equal(update.dense(), read[name]) for name, update in result.problem.utility.updates.items())
    ranks = {m.r["sst"] for m in model.modules() if hasattr(m, "r") and "sst" in m.r}
    assert ranks == {m.r["default"] for m in reference.modules() if hasattr(m, "r")}


def test_examples_may_be_given_as_records_or_as_messages(setup, model, input_ids):
    apply(model, setup, **SETTINGS)
    harm = [
        [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]}]
        for r in records(setup.harm)
    ]
    tokenizer = AutoTokenizer.from_pretrained(setup.base)
    with torch.no_grad():
        apply(model, setup, harm=harm, benign=records(setup.benign), tokenizer=tokenizer, name="again", **SETTINGS)
        logits = []
        for name in ("sst", "again"):
            model.eval().set_adapter(name)
            logits.append(model(input_ids).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "v_proj"], "lora_bias": True, "use_rslora": True, "rank_pattern": {"v_proj": 3}},
    ],
)
def test_embeddings_whole_parameters_and_biases_come_along(setup, make_adapter, tmp_path, input_ids, options):
    setup.utility, _ = make_adapter(setup.base, seed=3, r=2, **options)
    model = live(setup.base, setup.utility, setup.safety)
    before = state(model)
    apply(model, setup, **SETTINGS)
    assert_kept(before, state(model))
    reference = by_command(setup, tmp_path, **SETTINGS)
    model.eval().set_adapter("sst")
    with torch.no_grad():
        assert torch.allclose(model(input_ids).logits, reference(input_ids).logits, rtol=0, atol=1e-5)


def test_a_quantised_base_is_left_alone(setup, make_adapter, tmp_path):
    """The same merge as on a dense base that holds the dequantised weights."""
    base = tmp_path / "base"  # bitsandbytes quantises blocks of 64
    config = LlamaConfig.from_pretrained(
        setup.base, hidden_size=64, head_dim=16, intermediate_size=128, num_key_value_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(base)
    AutoTokenizer.from_pretrained(setup.base).save_pretrained(base)
    adapters = [make_adapter(base, seed=seed, r=2, target_modules=["q_proj", "down_proj"])[0] for seed in (1, 2)]
    quantised = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(load_in_4bit=True), dtype=torch.float32
    )
    dense = AutoModelForCausalLM.from_pretrained(base)
    for name, module in quantised.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            dense.get_submodule(name).weight.data = dequantize_module_weight(module).data
    updates = []
    for start in (dense, quantised):
        model = PeftModel.from_pretrained(start, adapters[0], adapter_name="helpful")
        model.load_adapter(adapters[1], adapter_name="refuses")
        before = state(model)
        updates.append(apply(model, setup, **SETTINGS).updates(0.7))
        assert_kept(before, state(model))
    layer = quantised.model.layers[1].mlp.down_proj.base_layer
    layer.weight.quant_state.packing_format_for_cpu = True  # as after inference on some CPUs
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj.* was repacked by bitsandbytes"):
        apply(model, setup, name="again")
    for name, update in updates[0].items():
        assert torch.allclose(update.dense(), updates[1][name].dense(), rtol=0, atol=1e-5), name


def test_a_base_in_bfloat16_stays_so(setup, input_ids):
    model = live(setup.base, setup.utility, setup.safety)
    model.base_model.model.bfloat16()
    before = state(model)
    apply(model, setup, **SETTINGS)
    assert_kept(before, state(model))
    assert {p.dtype for n, p in model.named_parameters() if ".sst." in n} == {torch.float32}


def test_failure_changes_nothing(setup, model):
    before = state(model)
    with pytest.raises(ValueError, match="got k"):
        apply(model, setup, k=10**6)
    after = state(model)
    assert after["objects"] == before["objects"] and after["modes"] == before["modes"]
    assert after["types"] == before["types"] and after["requires_grad"] == before["requires_grad"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"utility": "helpfull"}, "did you mean 'helpful'"),
        ({"safety": "x"}, r"it has \['helpful', 'refuses'\]"),
        ({"safety": "helpful"}, "must be two adapters"),
        ({"name": "refuses"}, "already"),
        ({"name": "sst.v2"}, "without a point"),
        ({"name": "lora"}, "no part of 'lora_'"),
        ({"alpha": [0.5, 1.0]}, "alpha: expected one strength"),
        ({"dampng": 1.0}, "did you mean 'damping'"),
        ({"harm": []}, "holds no example"),
        ({"benign": [{"promt": "w1"}]}, "line 1"),
    ],
)
def test_mistakes_are_named(setup, model, settings, message):
    with pytest.raises(ValueError, match=message):
        apply(model, setup, **settings)
    assert set(model.peft_config) == {"helpful", "refuses"}


def test_models_and_adapters_that_cannot_be_merged(setup, model):
    with pytest.raises(ValueError, match="expected a PeftModel"):
        apply(model.get_base_model(), setup)
    model.add_adapter("dora", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="'dora'.*not linear"):
        apply(model, setup, safety="dora")
    model.eval().merge_adapter(["helpful"])
    with pytest.raises(ValueError, match=r"unmerge_adapter\(\)"):
        apply(model, setup)
