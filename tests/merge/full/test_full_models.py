"""What three full checkpoints must have in common: names, prefixes, tied embeddings, shapes, vocabularies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
from trio import Trio, tensors_of

from sst_merge import merge

WEIGHTS = "model.safetensors"


@pytest.fixture
def gpt2(make_trio, gpt2_dir) -> Trio:
    """Tied embeddings, Conv1D, biases; one file each."""
    return make_trio(gpt2_dir, shards=("1GB", "1GB"))


def change_weights(folder: Path, change) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def change_config(folder: Path, **keys: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def untie(folder: Path) -> None:
    """Store an output embedding of other values."""
    change_weights(folder, lambda t: t | {"lm_head.weight": t["transformer.wte.weight"].flip(0).contiguous()})
    change_config(folder, tie_word_embeddings=False)


def logits_of(folder: Path, input_ids: torch.Tensor) -> torch.Tensor:
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(input_ids=input_ids).logits


def arithmetic(trio: Trio, input_ids: torch.Tensor, alpha: float) -> torch.Tensor:
    """Logits of θ_u + α(θ_s − θ_0), the parameters of loaded models added, output embeddings each for itself."""
    models = [AutoModelForCausalLM.from_pretrained(f) for f in (trio.utility, trio.safety, trio.base)]
    utility, safety, base = models
    heads = [model.get_output_embeddings().weight.detach().clone() for model in models]
    with torch.no_grad():
        for p, s, b in zip(
            utility.transformer.parameters(),
            safety.transformer.parameters(),
            base.transformer.parameters(),
            strict=True,
        ):
            p += alpha * (s - b)
        utility.lm_head.weight = torch.nn.Parameter(heads[0] + alpha * (heads[1] - heads[2]))
        return utility.eval()(input_ids=input_ids).logits


@pytest.mark.parametrize("unties", ["none", "safety", "utility", "base", "all"])
def test_tied_embeddings_are_one_tensor_where_all_three_tie_them(gpt2, input_ids, unties):
    for owner in ("base", "utility", "safety"):
        if unties in (owner, "all"):
            untie(getattr(gpt2, owner))
    out = gpt2.run("task_arithmetic", alpha=0.6)
    torch.testing.assert_close(logits_of(out, input_ids), arithmetic(gpt2, input_ids, 0.6), rtol=1e-4, atol=1e-5)
    assert ("lm_head.weight" in tensors_of(out)) is (unties != "none")
    assert json.loads((out / "config.json").read_text()).get("tie_word_embeddings", True) is (unties == "none")
    remarked = "tie_word_embeddings is false" in (out / "report.md").read_text()
    assert remarked is (unties in ("safety", "base"))


def test_a_tied_embedding_that_is_stored_twice_is_ranked_once_and_written_twice(gpt2, input_ids):
    change_weights(gpt2.utility, lambda t: t | {"lm_head.weight": t["transformer.wte.weight"].clone()})
    out = gpt2.run("sst_m", scope="global", share=0.3)
    merged = tensors_of(out)
    assert torch.equal(merged["lm_head.weight"], merged["transformer.wte.weight"])
    assert not torch.equal(merged["lm_head.weight"], load_file(gpt2.utility / WEIGHTS)["lm_head.weight"])
    rows = json.loads((out / "report.json").read_text())["modules"]
    assert sum(row["entries"] for row in rows) == sum(t.numel() for t in gpt2.tensors("base").values())
    logits_of(out, input_ids)


def test_an_untied_head_is_in_the_index(make_trio, gpt2_dir, input_ids):
    trio = make_trio(gpt2_dir, shards=("20KB", "1GB"))
    untie(trio.safety)
    out = trio.run("task_arithmetic", alpha=0.6)
    torch.testing.assert_close(logits_of(out, input_ids), arithmetic(trio, input_ids, 0.6), rtol=1e-4, atol=1e-5)
    before, after = (json.loads((f / f"{WEIGHTS}.index.json").read_text()) for f in (trio.utility, out))
    assert after["weight_map"].keys() - before["weight_map"].keys() == {"lm_head.weight"}
    assert after["metadata"]["total_size"] - before["metadata"]["total_size"] == 50 * 32 * 4


def test_files_with_and_without_the_prefix_of_the_class_are_one_model(gpt2, input_ids):
    """As the `gpt2` of the Hub; its buffers, which the class has no more, and integers are copied."""
    expected = arithmetic(gpt2, input_ids, 0.6)
    change_weights(
        gpt2.utility,
        lambda t: {key.removeprefix("transformer."): value for key, value in t.items()} | {"steps": torch.arange(3)},
    )
    out = gpt2.run("task_arithmetic", alpha=0.6)
    merged = tensors_of(out)
    assert torch.equal(merged.pop("steps"), torch.arange(3)) and "wte.weight" in merged
    assert "steps: copied from the utility model" in (out / "report.md").read_text()
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(out).eval()(input_ids=input_ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_models_that_are_not_three_of_one_kind_are_refused_by_name(gpt2, capsys, make_adapter, gpt2_dir):
    stored = load_file(gpt2.safety / WEIGHTS)
    name = "transformer.h.1.mlp.c_fc.weight"

    change_weights(gpt2.safety, lambda t: {key: value for key, value in t.items() if key != name})
    said = gpt2.refusal(capsys)
    assert "safety: " in said and "lacks h.1.mlp.c_fc.weight, which base and utility have" in said
    change_weights(gpt2.safety, lambda t: stored | {name: stored[name][:, :-1].contiguous()})
    assert "h.1.mlp.c_fc.weight is 32 × 128 in base, 32 × 128 in utility, 32 × 127 in safety" in gpt2.refusal(capsys)
    change_weights(gpt2.safety, lambda t: stored | {name: stored[name].to(torch.float8_e4m3fn)})
    assert "safety: " in (said := gpt2.refusal(capsys)) and "in no floating-point dtype" in said
    change_weights(gpt2.safety, lambda t: stored | {name: torch.full_like(stored[name], torch.nan)})
    assert "safety: h.1.mlp.c_fc.weight holds NaN" in gpt2.refusal(capsys)
    assert "safety: h.1.mlp.c_fc.weight holds NaN" in gpt2.refusal(capsys, "sst_v")
    (gpt2.safety / WEIGHTS).write_bytes(b"not tensors")
    assert "safety: " in (said := gpt2.refusal(capsys)) and WEIGHTS in said
    save_file(stored, gpt2.safety / WEIGHTS, metadata={"format": "pt"})

    shutil.copy(gpt2.utility / WEIGHTS, gpt2.safety / WEIGHTS)
    assert "utility and safety hold the same weights" in gpt2.refusal(capsys)
    shutil.copy(gpt2.base / WEIGHTS, gpt2.safety / WEIGHTS)
    assert "the patch is zero" in gpt2.refusal(capsys)
    save_file(stored, gpt2.safety / WEIGHTS, metadata={"format": "pt"})

    change_config(gpt2.base, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "original precision, and the base is quantised" in gpt2.refusal(capsys)
    shutil.copy(gpt2_dir / "config.json", gpt2.base / "config.json")
    assert "ties merges adapters; full checkpoints are merged by sst, diagonal_sst" in gpt2.refusal(capsys, "ties")
    gpt2.safety, _ = make_adapter(gpt2_dir, target_modules=["c_attn"], fan_in_fan_out=True)
    assert "utility is a full checkpoint and the other an adapter" in gpt2.refusal(capsys)


def test_overflow_names_the_tensor(gpt2, capsys):
    for owner in ("utility", "safety"):
        change_weights(getattr(gpt2, owner), lambda t: {key: value.half() for key, value in t.items()})
    name = "transformer.h.0.mlp.c_fc.weight"
    change_weights(gpt2.safety, lambda t: t | {name: torch.full_like(t[name], 60000)})
    assert f"{name} overflows F16 at alpha 10" in gpt2.refusal(capsys, alpha=10.0)


def test_another_vocabulary_is_refused_with_advice(trio, capsys):
    model = AutoModelForCausalLM.from_pretrained(trio.safety)
    model.resize_token_embeddings(53)
    model.save_pretrained(trio.safety)
    said = capsys.readouterr() and trio.refusal(capsys)
    assert "vocabulary: embed_tokens.weight has a row for every token: 50 in base, 50 in utility, 53 in safety" in said
    assert "resize_token_embeddings(N)" in said


def test_another_tokenizer_is_refused(trio, capsys):
    file = trio.safety / "tokenizer.json"
    tree = json.loads(file.read_text())
    words = tree["model"]["vocab"]
    words["w3"], words["w4"] = words["w4"], words["w3"]
    file.write_text(json.dumps(tree))
    Tokenizer.from_file(str(file))
    said = trio.refusal(capsys)
    assert "the tokenizers of base and safety give tokens different ids" in said and "one vocabulary" in said


def test_configurations_that_differ_are_remarked_on(trio):
    change_config(trio.safety, rope_theta=5e5)
    out = trio.run("task_arithmetic")
    assert "config.json: rope_theta is" in (out / "report.md").read_text()


def test_adapters_are_not_ranked_together(setup, tmp_path):
    with pytest.raises(ValueError, match="sst_v of adapters ranks in every module; use scope: module"):
        merge(setup.config("sst_v", scope="global"), out=tmp_path / "out")
