"""Adapters read and written, against PEFT's own ΔW and PEFT's own logits."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Embedding, LoraLayer
from safetensors.torch import load_file

from sst_merge.adapters import (
    LowRank,
    check_compatible,
    check_fits,
    factor,
    read_adapter,
    write_adapter,
)

ATTENTION = ["q_proj", "v_proj"]

CASES = {
    "list": ("llama", {"target_modules": ATTENTION}),
    "rslora": ("llama", {"target_modules": ATTENTION, "use_rslora": True, "r": 3}),
    "patterns": (
        "llama",
        {
            "target_modules": [*ATTENTION, "down_proj"],
            "rank_pattern": {
                "proj": 3,
                "v_proj": 2,
                r"layers\.1\.self_attn\.q_proj": 7,
                "q_proj": 1,
            },
            "alpha_pattern": {r"^model\.layers\.0\..*": 5, r".*\.1\.mlp\.down_proj": 3},
        },
    ),
    "patterns-rslora": (
        "llama",
        {"target_modules": ATTENTION, "use_rslora": True, "rank_pattern": {"q_proj": 9}},
    ),
    "regex": ("llama", {"target_modules": r".*\.0\.(self_attn\.[qo]|mlp\.up)_proj"}),
    "all-linear": ("llama", {"target_modules": "all-linear", "exclude_modules": ["o_proj"]}),
    "layers": ("llama", {"target_modules": ATTENTION, "layers_to_transform": [1]}),
    "saved": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head", "k_proj"]}),
    "mica": ("llama", {"target_modules": ATTENTION, "init_lora_weights": "mica"}),
    "fan-in-fan-out": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "bias": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True, "fan_in_fan_out": True}),
    "tied-embedding": ("gpt2", {"target_modules": ["wte", "c_fc"], "fan_in_fan_out": True}),
}


@pytest.fixture(params=CASES, name="case")
def _case(request: pytest.FixtureRequest, make_adapter, llama_dir, gpt2_dir) -> tuple[Path, Path, PeftModel]:
    family, config = CASES[request.param]
    base = {"llama": llama_dir, "gpt2": gpt2_dir}[family]
    return base, *make_adapter(base, **config)


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    return {name: layer for name, layer in model.base_model.model.named_modules() if isinstance(layer, LoraLayer)}


def peft_delta(layer: LoraLayer, name: str = "default") -> torch.Tensor:
    """PEFT's own ΔW as (d_out, d_in)."""
    delta = layer.get_delta_weight(name)
    stored_transposed = isinstance(layer, Embedding) or getattr(layer, "fan_in_fan_out", False)
    return delta.T if stored_transposed else delta


def logits(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.double().eval()(input_ids=input_ids).logits


@pytest.fixture
def load_in_peft(load_base):
    """Load as a user would; every stored key used, every adapter key of the model filled."""

    def load(base: Path, folder: Path) -> PeftModel:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model = PeftModel.from_pretrained(load_base(base), folder)
        result = model.load_adapter(folder, "again")
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        return model

    return load


def test_read_equals_peft(case, load_base):
    base, folder, model = case
    adapter = read_adapter(folder)
    layers = lora_layers(model)
    assert list(adapter.updates) == sorted(layers)
    for name, layer in layers.items():
        torch.testing.assert_close(adapter.updates[name].dense(), peft_delta(layer).detach())
        assert (name in adapter.embeddings) == isinstance(layer, Embedding)
    assert adapter.base_model == str(base)
    check_fits(adapter, load_base(base))


def test_written_adapter_reproduces_the_logits(case, tmp_path, input_ids, load_base, load_in_peft):
    """One adapter with weight 1 reproduces itself, in PEFT, at scale 1 in every module."""
    base, folder, model = case
    adapter = read_adapter(folder)
    out = tmp_path / "out"
    write_adapter(out, adapter.updates, sources=[adapter], biases=adapter.biases, saved=adapter.saved)
    written = load_in_peft(base, out)
    assert {layer.scaling["default"] for layer in lora_layers(written).values()} == {1.0}
    assert set(lora_layers(written)) == set(lora_layers(model))
    expected, unadapted = logits(model, input_ids), logits(load_base(base), input_ids)
    assert (expected - unadapted).abs().max() > 1e-2
    torch.testing.assert_close(logits(written, input_ids), expected, rtol=1e-5, atol=1e-6)


def test_two_adapters_with_different_ranks_and_modules_add_up(
    make_adapter, llama_dir, tmp_path, input_ids, load_base, load_in_peft
):
    folder_a, model_a = make_adapter(llama_dir, seed=1, target_modules=ATTENTION)
    folder_b, model_b = make_adapter(llama_dir, seed=2, r=6, target_modules=["q_proj", "down_proj"], use_rslora=True)
    a, b = read_adapter(folder_a), read_adapter(folder_b)
    check_compatible([a, b])
    updates = {}
    for name in a.updates.keys() | b.updates.keys():
        parts = [adapter.updates[name] for adapter in (a, b) if name in adapter.updates]
        updates[name] = LowRank(torch.cat([p.up for p in parts], 1), torch.cat([p.down for p in parts]))
    write_adapter(tmp_path / "out", updates, sources=[a, b])
    reference = load_base(llama_dir).double()
    with torch.no_grad():
        for model in (model_a, model_b):
            for name, layer in lora_layers(model).items():
                reference.get_submodule(name).weight += peft_delta(layer).double()
    written = load_in_peft(llama_dir, tmp_path / "out")
    torch.testing.assert_close(logits(written, input_ids), logits(reference, input_ids), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_half_precision_tensors(make_adapter, llama_dir, tmp_path, stored):
    folder, model = make_adapter(llama_dir, target_modules=ATTENTION, stored=stored, lora_alpha=4)
    assert {t.dtype for t in load_file(folder / "adapter_model.safetensors").values()} == {stored}
    adapter = read_adapter(folder)
    for name, layer in lora_layers(model).items():
        torch.testing.assert_close(adapter.updates[name].dense(), peft_delta(layer).detach())
    write_adapter(tmp_path / "out", adapter.updates, sources=[adapter], dtype=stored)
    back = read_adapter(tmp_path / "out")
    for name, update in adapter.updates.items():  # α = r: the same numbers are stored again
        assert torch.equal(back.updates[name].up, update.up)
        assert torch.equal(back.updates[name].down, update.down)


def test_overflow_of_the_stored_dtype_is_refused(make_adapter, llama_dir, tmp_path):
    adapter = read_adapter(make_adapter(llama_dir, target_modules=ATTENTION)[0])
    updates = {name: update.scaled(1e6) for name, update in adapter.updates.items()}
    with pytest.raises(ValueError, match=r"q_proj.*not finite as torch.float16.*wider"):
        write_adapter(tmp_path / "out", updates, sources=[adapter], dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def test_patterns_keep_layer_1_and_layer_11_apart(make_adapter, deep_llama_dir, tmp_path, load_in_peft):
    """Every module of 13 layers has a rank of its own kind; PEFT must find each exactly."""
    folder, _ = make_adapter(deep_llama_dir, r=1, target_modules=["q_proj", "gate_proj"])
    adapter = read_adapter(folder)
    generator = torch.Generator().manual_seed(0)
    updates = {}
    for index, (name, update) in enumerate(adapter.updates.items()):
        d_out, d_in = update.shape
        rank = 1 + index % 5
        updates[name] = LowRank(
            torch.randn(d_out, rank, generator=generator),
            torch.randn(rank, d_in, generator=generator),
        )
    write_adapter(tmp_path / "out", updates, sources=[adapter])
    layers = lora_layers(load_in_peft(deep_llama_dir, tmp_path / "out"))
    assert {n: layer.r["default"] for n, layer in layers.items()} == {n: u.rank for n, u in updates.items()}
    for name, layer in layers.items():
        torch.testing.assert_close(peft_delta(layer).detach(), updates[name].dense())


def test_rank_zero_is_stored_as_zeros_and_loads(make_adapter, llama_dir, tmp_path, load_in_peft):
    adapter = read_adapter(make_adapter(llama_dir, target_modules=ATTENTION)[0])
    updates = {name: factor(torch.zeros(u.shape))[0] for name, u in adapter.updates.items()}
    assert {update.rank for update in updates.values()} == {0}
    write_adapter(tmp_path / "out", updates, sources=[adapter])
    for layer in lora_layers(load_in_peft(llama_dir, tmp_path / "out")).values():
        assert peft_delta(layer).count_nonzero() == 0


def test_saved_and_bias_survive(make_adapter, gpt2_dir, tmp_path, load_in_peft):
    folder, model = make_adapter(
        gpt2_dir,
        target_modules=["c_attn"],
        modules_to_save=["ln_f"],
        lora_bias=True,
        fan_in_fan_out=True,
    )
    adapter = read_adapter(folder)
    assert sorted(adapter.saved) == ["transformer.ln_f.bias", "transformer.ln_f.weight"]
    for name, layer in lora_layers(model).items():
        expected = layer.lora_B["default"].bias * layer.scaling["default"]
        torch.testing.assert_close(adapter.biases[name], expected.detach())
    one = dict(list(adapter.biases.items())[:1])  # the other module then gets a bias of zero
    write_adapter(tmp_path / "out", adapter.updates, sources=[adapter], biases=one, saved=adapter.saved)
    back = read_adapter(tmp_path / "out")
    load_in_peft(gpt2_dir, tmp_path / "out")
    assert {name: bool(b.count_nonzero()) for name, b in back.biases.items()} == {
        name: name in one for name in adapter.updates
    }
    for name, tensor in adapter.saved.items():
        assert torch.equal(back.saved[name], tensor)


def test_resized_vocabulary_is_carried_as_stored(make_adapter, gpt2_dir, tmp_path, input_ids, load_base):
    """Whole parameters stored outside modules_to_save overwrite the base's, and stay outside it."""
    folder, model = make_adapter(gpt2_dir, target_modules=["c_attn"], fan_in_fan_out=True)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.3)
    model.save_pretrained(folder, save_embedding_layers=True)
    adapter = read_adapter(folder)
    assert "transformer.wte.weight" in adapter.saved
    write_adapter(tmp_path / "out", adapter.updates, sources=[adapter], saved=adapter.saved)
    written = PeftModel.from_pretrained(load_base(gpt2_dir), tmp_path / "out")
    assert written.peft_config["default"].modules_to_save is None
    torch.testing.assert_close(logits(written, input_ids), logits(model, input_ids), rtol=1e-5, atol=1e-6)


def test_named_adapter_is_found_in_its_subfolder(make_adapter, llama_dir, tmp_path):
    folder, model = make_adapter(llama_dir, name="safety", target_modules=ATTENTION)
    assert not (folder / "adapter_config.json").exists()
    adapter = read_adapter(folder)
    assert adapter.path == folder / "safety"
    for name, layer in lora_layers(model).items():
        torch.testing.assert_close(adapter.updates[name].dense(), peft_delta(layer, "safety").detach())
    shutil.copytree(folder / "safety", folder / "other")
    with pytest.raises(ValueError, match=r"several adapters; name one of them: .*other, .*safety"):
        read_adapter(folder)


def test_read_dtype(make_adapter, llama_dir):
    folder, _ = make_adapter(llama_dir, target_modules=ATTENTION)
    update = next(iter(read_adapter(folder, dtype=torch.float64).updates.values()))
    assert update.up.dtype == update.down.dtype == torch.float64


def test_writing_nothing_is_refused(make_adapter, llama_dir, tmp_path):
    adapter = read_adapter(make_adapter(llama_dir, target_modules=ATTENTION)[0])
    with pytest.raises(ValueError, match="without modules"):
        write_adapter(tmp_path / "out", {}, sources=[adapter])
    with pytest.raises(ValueError, match="not among the updates"):
        write_adapter(tmp_path / "out", adapter.updates, sources=[adapter], biases={"x": torch.ones(3)})
    assert not (tmp_path / "out").exists()


def test_written_config_names_its_modules_exactly(make_adapter, llama_dir, tmp_path):
    adapter = read_adapter(make_adapter(llama_dir, target_modules="all-linear")[0])
    nameless = dataclasses.replace(adapter, base_model=None)
    write_adapter(tmp_path / "out", adapter.updates, sources=[nameless, adapter])
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == list(adapter.updates)
    assert config["base_model_name_or_path"] == str(llama_dir)
    assert config["lora_alpha"] == config["r"] and not config["use_rslora"]


def test_factor_is_the_best_approximation_of_its_rank():
    generator = np.random.default_rng(0)
    dense = generator.normal(size=(17, 23)) @ np.diag(0.7 ** np.arange(23.0))
    sigma = np.linalg.svd(dense, compute_uv=False)
    for rank in (1, 5, 16):
        low, error = factor(torch.from_numpy(dense), rank)
        assert low.rank == rank
        expected = np.linalg.norm(sigma[rank:]) / np.linalg.norm(sigma)
        assert error == pytest.approx(expected, rel=1e-10)
        residual = np.linalg.norm(dense - low.dense().numpy()) / np.linalg.norm(dense)
        assert residual == pytest.approx(expected, rel=1e-8)
    low, error = factor(torch.from_numpy(dense))
    assert low.rank == 17 and error == 0.0
    np.testing.assert_allclose(low.dense().numpy(), dense, atol=1e-12)


def test_factor_finds_the_numerical_rank():
    generator = np.random.default_rng(1)
    dense = generator.normal(size=(40, 3)) @ generator.normal(size=(3, 30))
    low, error = factor(torch.from_numpy(dense))
    assert low.rank == 3 and error < 1e-14
    assert factor(torch.from_numpy(dense), rank=10)[0].rank == 3
    assert factor(torch.zeros(4, 5))[0].rank == 0
    with pytest.raises(ValueError, match="rank must be at least 1"):
        factor(torch.ones(2, 2), 0)
    with pytest.raises(ValueError, match="finite matrix"):
        factor(torch.tensor([[float("nan")]]))


def test_low_rank_arithmetic():
    generator = torch.Generator().manual_seed(3)
    up = torch.randn(9, 4, generator=generator)
    low = LowRank(up, torch.randn(4, 7, generator=generator))
    assert (low.rank, low.shape) == (4, (9, 7))
    torch.testing.assert_close(low.scaled(-2.5).dense(), -2.5 * (low.up @ low.down))
    expected = np.linalg.svd(low.up.double().numpy() @ low.down.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(low.singular_values().numpy(), expected[:4], rtol=1e-12)
    with pytest.raises(ValueError, match=r"got \(9, 4\) and \(3, 7\)"):
        LowRank(up, torch.ones(3, 7))
