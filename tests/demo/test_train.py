"""Training and its cache, on a recipe of seconds; what real training reaches is the demo's own table."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sst_merge.demo import train
from sst_merge.demo.train import DemoModels, Phase, Recipe, train_models
from sst_merge.demo.world import World, make_world

TINY = Recipe(32, 48, 1, 2, Phase(12, 8, 1e-3), 2, Phase(9, 8, 1e-3), 4, Phase(3, 8, 1e-3))


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(0)


@pytest.fixture(scope="module")
def models(world: World, tmp_path_factory: pytest.TempPathFactory) -> DemoModels:
    return train_models(world, tmp_path_factory.mktemp("models") / "new" / "folder", 5, TINY)


def test_folders_load_as_models_and_adapters(models: DemoModels, world: World) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models.base_path)
    for path, rank in ((models.utility_path, 2), (models.safety_path, 4)):
        base = AutoModelForCausalLM.from_pretrained(models.base_path)
        adapted = PeftModel.from_pretrained(base, path)
        assert adapted.peft_config["default"].r == rank
        assert all(p.any() for name, p in adapted.named_parameters() if "lora_B" in name), "an adapter did not learn"
    text = " ".join(f"{e.prompt} {e.response}" for e in world.held_forbidden + world.held_utility["strings"])
    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


def test_the_base_learns_and_carries_no_adapter(world: World, tmp_path) -> None:
    brief = Phase(1, 8, 1e-3)
    models = train_models(world, tmp_path, 5, Recipe(32, 48, 1, 2, Phase(60, 32, 1e-2), 2, brief, 4, brief))
    tokenizer = AutoTokenizer.from_pretrained(models.base_path)
    base = AutoModelForCausalLM.from_pretrained(models.base_path)
    prompt = tokenizer("<|user|> please open the window of the bank . <|assistant|>", return_tensors="pt")
    first = base(input_ids=prompt["input_ids"]).logits[0, -1].softmax(0)
    known = tokenizer.convert_tokens_to_ids(["sure", "sorry"])
    assert first[known].sum() > 0.2  # 2/128 at first
    assert not any("lora" in key for key in load_file(models.base_path / "model.safetensors"))


def test_same_call_reuses_and_another_does_not(models: DemoModels, world: World, monkeypatch) -> None:
    folder = models.base_path.parents[1]
    before = load_file(models.utility_path / "adapter_model.safetensors")
    other = train_models(world, folder, 6, TINY)
    assert other.base_path != models.base_path
    monkeypatch.setattr(train, "_train_all", lambda *_: pytest.fail("trained again"))
    assert train_models(world, folder, 5, TINY) == models
    after = load_file(models.utility_path / "adapter_model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_seed_decides_every_weight_and_global_state_is_kept(models: DemoModels, world: World, tmp_path) -> None:
    torch.manual_seed(11)
    again = train_models(world, tmp_path / "again", 5, TINY)
    drawn = torch.rand(1)
    torch.manual_seed(11)
    assert torch.equal(drawn, torch.rand(1))
    for path in ("base/model", "utility/adapter_model", "safety/adapter_model"):
        old, new = (load_file(m.base_path.parent / f"{path}.safetensors") for m in (models, again))
        assert all(torch.equal(old[key], new[key]) for key in old)


def test_interrupted_training_leaves_nothing(world: World, tmp_path, monkeypatch) -> None:
    def stop(*_) -> None:
        raise KeyboardInterrupt

    fit = train.fit
    monkeypatch.setattr(
        train, "fit", lambda model, *rest: stop() if hasattr(model, "peft_config") else fit(model, *rest)
    )
    with pytest.raises(KeyboardInterrupt):
        train_models(world, tmp_path / "m", 0, TINY)
    assert not list(tmp_path.rglob("*.*"))
