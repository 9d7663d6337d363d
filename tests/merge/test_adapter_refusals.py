"""What cannot be merged is refused: the message names the file, the key and the remedy."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from sst_merge.adapters import LowRank, check_compatible, check_fits, read_adapter
from sst_merge.adapters.peft_config import HARMLESS, REFUSED, USED

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(make_adapter, llama_dir) -> Path:
    return make_adapter(llama_dir, target_modules=["q_proj", "v_proj"])[0]


def edit_config(folder: Path, **settings: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | settings))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_every_setting_of_peft_is_classified():
    """A newer PEFT with a new setting fails here, before its adapters are misread."""
    names = [field.name for field in dataclasses.fields(LoraConfig)]
    for name in names:
        assert sum(name in table for table in (REFUSED, USED, HARMLESS)) == 1, name


def test_every_lora_variant_of_peft_is_refused_or_known_to_be_linear():
    variants = {f.name for f in dataclasses.fields(LoraConfig) if f.metadata.get("is_lora_variant")}
    assert variants - REFUSED.keys() == {"velora_config"}  # changes the backward pass only


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_settings(folder, name):
    edit_config(folder, **{name: True})
    with pytest.raises(ValueError, match=f"{CONFIG}: {name} is set: .*[;,:] "):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; only LORA"),
        ({"bias": "all"}, "bias is 'all': .*train with bias='none'"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "changed the base weights"),
        ({"r": 0}, f"{CONFIG}: r must be a positive integer, got 0"),
        ({"lora_alpha": "x"}, "lora_alpha must be a finite number, got 'x'"),
        ({"rank_pattern": {"q_proj": 2.5}}, r"rank_pattern\['q_proj'\] must be a positive"),
        ({"rank_pattern": [1]}, r"rank_pattern must be an object, got \[1\]"),
        ({"alpha_pattern": {"(": 2}}, r"alpha_pattern '\(' is no regular expression"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list"),
        ({"rank_pattern": {"q_proj": 3}}, r"q_proj: lora_A and lora_B must be \(3, d_in\)"),
        ({"lora_bias": True}, "lora_B.bias is missing although lora_bias is True"),
    ],
)
def test_bad_settings(folder, settings, message):
    edit_config(folder, **settings)
    with pytest.raises(ValueError, match=message):
        read_adapter(folder)


def test_harmless_settings_change_nothing(folder):
    before = read_adapter(folder)
    edit_config(folder, lora_dropout=0.5, init_lora_weights="eva", eva_config={"rho": 2.0})
    after = read_adapter(folder)
    assert all(torch.equal(u.up, after.updates[n].up) for n, u in before.updates.items())


def test_unknown_setting_is_warned_about(folder):
    edit_config(folder, new_trick=True, retired_flag=None)
    with pytest.warns(UserWarning, match=r"settings unknown here.*\['new_trick'\]"):
        read_adapter(folder)


def put(key: str, *shape: int) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({key: torch.ones(shape)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q0}.lora_B.weight"), "q_proj: expected lora_A and lora_B"),
        (put(f"{Q0}.lora_B.weight", 32, 5), r"must be .*got \(4, 32\) and \(32, 5\)"),
        (put(f"{Q0}.lora_B.bias", 32), "lora_B.bias is stored although lora_bias is False"),
        (put(f"{Q0}.lora_magnitude_vector", 32), "lora_magnitude_vector belongs to DoRA"),
        (put(f"{Q0}.lora_diag", 4), "lora_diag is neither a LoRA factor"),
        (put("base_model.model.model.norm.weight", 32), "norm.weight is neither"),
        (put("other.lora_A.weight", 4, 32), "other.lora_A.weight is neither"),
        (
            lambda t: t[f"{Q0}.lora_A.weight"].view(-1)[7].fill_(torch.nan),
            "lora_A.weight holds NaN",
        ),
        (lambda t: t[f"{Q0}.lora_B.weight"][3].fill_(-torch.inf), "lora_B.weight holds NaN or inf"),
        (lambda t: t.clear(), "holds no LoRA weights"),
        (
            lambda t: [put(f"{Q0}.lora_{x}.weight", 4, 4, 3, 3)(t) for x in "AB"],
            r"or a convolution's \(4, c_in, k…\) and \(d_out, 4, 1…\)",
        ),
        (
            lambda t: [put(f"{Q0}.lora_{x}.weight", 4, 4, 1, 1, 1)(t) for x in "AB"],
            "q_proj: LoRA of a Conv3d.*train without that module",
        ),
        (
            lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 32, dtype=torch.int8)}),
            "expected floating point, got torch.int8",
        ),
    ],
)
def test_bad_tensors(folder, change, message):
    edit_weights(folder, change)
    with pytest.raises(ValueError, match=message) as caught:
        read_adapter(folder)
    assert str(folder / WEIGHTS) in str(caught.value)


@pytest.mark.parametrize("kept", [0, 5, 200, -8])
def test_truncated_weights(folder, kept):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:kept])
    with pytest.raises(ValueError, match=f"{WEIGHTS}: damaged or not a safetensors file"):
        read_adapter(folder)


def test_missing_files(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no such folder.*downloaded first"):
        read_adapter(tmp_path / "org" / "name")
    with pytest.raises(ValueError, match="got a file"):
        read_adapter(folder / CONFIG)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin: a pickle.*safe_serialization=True"):
        read_adapter(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(ValueError, match=f"{WEIGHTS}: missing"):
        read_adapter(folder)
    (folder / CONFIG).write_text("{")
    with pytest.raises(ValueError, match=f"{CONFIG}: not valid JSON"):
        read_adapter(folder)
    (folder / CONFIG).write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=f"{CONFIG}: not valid JSON"):
        read_adapter(folder)
    (folder / CONFIG).write_text("[]")
    with pytest.raises(ValueError, match=f"{CONFIG}: expected a JSON object, got list"):
        read_adapter(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(ValueError, match=f"{CONFIG} is missing"):
        read_adapter(folder)


def test_incompatible_adapters(make_adapter, llama_dir, folder):
    first, second = read_adapter(folder), read_adapter(folder)
    check_compatible([first, second])
    check_compatible([first, dataclasses.replace(second, base_model=None)])
    check_compatible([first, dataclasses.replace(second, revision="main")])
    check_compatible([first, dataclasses.replace(second, base_model=f"{llama_dir}/.")])
    with pytest.raises(ValueError, match=r"different base models.*'other/base' \(revision 'main'"):
        check_compatible([first, dataclasses.replace(second, base_model="other/base")])
    with pytest.raises(ValueError, match="revision 'v2'"):
        check_compatible([first, dataclasses.replace(second, revision="v2")])
    name = "model.layers.1.self_attn.v_proj"
    wider = second.updates | {name: LowRank(torch.ones(17, 1), torch.ones(1, 32))}
    with pytest.raises(ValueError, match=rf"{name} is .*\(16, 32\) in one and \(17, 32\)"):
        check_compatible([first, first, dataclasses.replace(second, updates=wider)])


def test_two_adapters_that_replace_parameters(make_adapter, llama_dir):
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    first = read_adapter(make_adapter(llama_dir, seed=1, **settings)[0])
    second = read_adapter(make_adapter(llama_dir, seed=2, **settings)[0])
    with pytest.raises(ValueError, match=r"both replace whole parameters.*lm_head.weight"):
        check_compatible([first, second])
    check_compatible([first, dataclasses.replace(second, saved=first.saved)])
    updating = read_adapter(make_adapter(llama_dir, target_modules=["lm_head"])[0])
    for pair in ([updating, first], [first, updating]):
        with pytest.raises(ValueError, match=r"replaces lm_head.weight, which .* updates"):
            check_compatible(pair)


def test_copies_of_the_base_embedding_are_no_conflict(make_adapter, llama_dir):
    """PEFT stores the base's own embedding beside a LoRA of it; two such adapters add up."""
    settings = {"target_modules": ["embed_tokens"]}
    pair = [read_adapter(make_adapter(llama_dir, seed=seed, **settings)[0]) for seed in (1, 2)]
    name = "model.embed_tokens.weight"
    assert [list(adapter.saved) for adapter in pair] == [[name]] * 2
    check_compatible(pair)
    norm = read_adapter(make_adapter(llama_dir, target_modules=["q_proj"], modules_to_save=["norm"])[0])
    check_compatible([pair[0], norm])
    moved = dataclasses.replace(pair[1], saved={name: pair[1].saved[name] + 1})
    with pytest.raises(ValueError, match=r"different copies of .*embed_tokens.*base models differ"):
        check_compatible([pair[0], moved])


def test_adapter_that_does_not_fit(make_adapter, load_base, llama_dir, gpt2_dir, deep_llama_dir):
    adapter = read_adapter(make_adapter(llama_dir, target_modules=["q_proj"], modules_to_save=["norm"])[0])
    model = load_base(llama_dir)
    check_fits(adapter, model)
    with pytest.raises(ValueError, match=r"base model has no model.layers.0.self_attn.q_proj;"):
        check_fits(adapter, load_base(gpt2_dir))
    with pytest.raises(
        ValueError,
        match=r"q_proj must be a linear layer .*\(32, 32\), .* has a Linear .*\(16, 16\)",
    ):
        check_fits(adapter, load_base(deep_llama_dir))
    renamed = {"model.layers.0.self_attn.q_prj": adapter.updates[next(iter(adapter.updates))]}
    with pytest.raises(ValueError, match=r"no model.*q_prj \(nearest: .*q_proj\)"):
        check_fits(dataclasses.replace(adapter, updates=renamed), model)
    on_block = {"model.layers.0": LowRank(torch.ones(32, 1), torch.ones(1, 32))}
    with pytest.raises(ValueError, match=r"layers.0 must be a linear layer .*has a LlamaDecoderLay"):
        check_fits(dataclasses.replace(adapter, updates=on_block), model)
    as_linear = {"model.embed_tokens": LowRank(torch.ones(32, 1), torch.ones(1, 50))}
    with pytest.raises(ValueError, match=r"embed_tokens must be a linear layer .*has a Embedding"):
        check_fits(dataclasses.replace(adapter, updates=as_linear), model)
    resized = {"model.norm.weight": torch.ones(33)}
    with pytest.raises(ValueError, match=r"model.norm.weight is \(33,\), the base model has \(32,\)"):
        check_fits(dataclasses.replace(adapter, saved=resized), model)
    with pytest.raises(ValueError, match=r"base model has no score.weight"):
        check_fits(dataclasses.replace(adapter, saved={"score.weight": torch.ones(3)}), model)
