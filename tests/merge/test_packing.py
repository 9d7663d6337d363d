"""Packed rows: the same Fishers as dense gradients of each sequence alone; models that cannot keep sequences apart."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
)

from sst_kernels.collect import CoreBasis
from sst_kernels.labels import counter_uniform
from sst_merge.cli import main
from sst_merge.data import TokenSequence
from sst_merge.fisher import CollectionSettings, Collector, Part
from sst_merge.packing import batches, check_packing

VOCABULARY = 13
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(intermediate_size=24, num_key_value_heads=1, **SIZES),
    "sliding window": MistralConfig(intermediate_size=24, num_key_value_heads=1, sliding_window=3, **SIZES),
    "absolute positions": GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
    ),
}
WATCHED = {
    "llama": ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"],
    "sliding window": ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj"],
    "absolute positions": ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"],
}
LENGTHS = [2, 9, 3, 6, 8, 5, 4, 7]


def make_model(config) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)  # initial weights are so small that every distribution is uniform
    return model


def dense(model, name) -> torch.Tensor:
    """The weight as (d_out, d_in)."""
    weight = model.get_submodule(name).weight
    return weight.mT if type(model.get_submodule(name)).__name__ == "Conv1D" else weight


def make_cores(model, names):
    g = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    bases = {}
    for name in names:
        d_out, d_in = dense(model, name).shape
        bases[name] = CoreBasis(torch.linalg.qr(draw(d_out, 2)).Q, torch.linalg.qr(draw(d_in, 3)).Q)
    return bases, {n: draw(2, 3) for n in names}, {n: draw(2, 3) for n in names}


def make_sequences() -> list[TokenSequence]:
    g = torch.Generator().manual_seed(3)
    return [
        TokenSequence(
            10 + i, torch.randint(VOCABULARY, (n,), generator=g).tolist(), [t >= min(2, n - 1) for t in range(n)]
        )
        for i, n in enumerate(LENGTHS)
    ]


def dense_fisher(model, bases, cores, sequences, seed) -> dict[str, torch.Tensor]:
    """Mean of g gᵀ by autograd through explicit weights, a sequence at a time; labels by the inverse CDF."""
    total = dict.fromkeys(bases, 0)
    for s in sequences:
        leaves = {n: c.clone().requires_grad_() for n, c in cores.items()}
        weights = {}
        for n, b in bases.items():
            weight = dense(model, n) + b.q_out @ leaves[n] @ b.q_in.mT
            weights[f"{n}.weight"] = weight.mT if dense(model, n) is not model.get_submodule(n).weight else weight
        logits = torch.func.functional_call(model, weights, kwargs={"input_ids": torch.tensor([s.input_ids])}).logits[0]
        logp, loss = logits.log_softmax(-1), 0
        for t, label in enumerate(s.input_ids):
            if s.is_target[t]:
                if seed is not None:
                    u = counter_uniform(seed, torch.tensor(s.index), torch.tensor(t)).item()
                    label = int((logp[t - 1].exp().cumsum(0) <= u).sum())
                loss = loss + logp[t - 1, label]
        for n, leaf in leaves.items():
            g = torch.autograd.grad(loss, leaf, retain_graph=True)[0].flatten()
            total[n] = total[n] + torch.outer(g, g) / len(sequences)
    return total


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_packed_fishers_are_those_of_each_sequence_alone(kind, sampled):
    model, sequences = make_model(CONFIGS[kind]), make_sequences()
    bases, origin, patch = make_cores(model, WATCHED[kind])
    cores = {n: origin[n] + 0.5 * patch[n] for n in origin}
    expected = dense_fisher(model, bases, cores, sequences, 5 if sampled else None)
    for batch_size, row_length in ((2, 11), (1, 40), (3, None)):
        settings = CollectionSettings(batch_size=batch_size, row_length=row_length, seed=5)
        with Collector(model, bases, origin, patch, settings) as collector:
            sums = collector.collect(Part("test", sequences, sampled, {0.5: 1.0}, "exact"))
        assert sums.count == len(sequences)
        for name in bases:
            torch.testing.assert_close(sums.fisher(name), expected[name], rtol=1e-5, atol=1e-7)


def test_rows_hold_every_sequence_once_whole_and_within_their_length():
    sequences = make_sequences()
    seen = {}
    for batch in batches(sequences, 2, "cpu", row_length=11):
        assert batch.input_ids.shape[1] <= 11
        spans = zip(batch.index.tolist(), batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True)
        for index, start, end in spans:
            kept = batch.attention_mask.flatten()[start:end].bool()
            tokens, targets, positions, owners = (
                t.flatten()[start:end][kept].tolist()
                for t in (batch.input_ids, batch.is_target, batch.position_ids, batch.sequence_index)
            )
            assert positions == list(range(len(tokens))) and set(owners) == {index}
            assert not batch.is_target.flatten()[start:end][~kept].any()
            seen[index] = tokens, targets
    assert seen == {s.index: (s.input_ids, s.is_target) for s in sequences}
    shapes = [batch.input_ids.shape for batch in batches(sequences, 2, "cpu", row_length=11)]
    assert shapes == [
        (2, 11),
        (2, 11),
    ]  # 44 tokens cannot do with fewer; the order given, or the shortest first, would need five rows
    assert [batch.input_ids.shape[1] for batch in batches(sequences, 3, "cpu")] == [9, 6, 3]  # longest first


def test_models_that_keep_packed_sequences_apart_pass():
    for config in CONFIGS.values():
        for dtype in (torch.float32, torch.bfloat16):
            check_packing(make_model(config).to(dtype), VOCABULARY)


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4),
        BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2),
        OPTConfig(ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=64, **SIZES),
    ],
    ids=["recurrent", "alibi", "learned positions from the mask"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_mix_packed_sequences_are_refused(config, dtype):
    with pytest.raises(ValueError, match=r"change each other in .*ForCausalLM.*use packing: false"):
        check_packing(make_model(config).to(dtype), VOCABULARY)


def test_packing_through_the_command_line(setup, tmp_path):
    reports = []
    for packing in (False, True):
        config = setup.config("sst", samples=2)
        config["calibration"] |= {"packing": packing}
        config["dtype"] = "float64"
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        assert main(["merge", str(tmp_path / "config.yaml"), "--out", str(tmp_path / f"out{packing}")]) == 0
        reports.append(json.loads((tmp_path / f"out{packing}" / "report.json").read_text()))
    plain, packed = reports
    assert packed["fisher_trace"] == pytest.approx(plain["fisher_trace"], rel=1e-5)
    assert packed["strengths"][0]["predicted_kl"] == pytest.approx(plain["strengths"][0]["predicted_kl"], rel=1e-4)


def test_a_model_that_mixes_sequences_is_refused_through_the_command_line(setup, make_adapter, tmp_path, capsys):
    from transformers import AutoTokenizer

    base = tmp_path / "opt"
    config = OPTConfig(ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=64, **{**SIZES, "vocab_size": 50})
    make_model(config).float().save_pretrained(base)
    AutoTokenizer.from_pretrained(setup.base).save_pretrained(base)
    setup.base = base
    setup.utility, setup.safety = (make_adapter(base, seed=i, target_modules=["q_proj"])[0] for i in (1, 2))
    config = setup.config("sst")
    for packing, code in ((True, 2), (False, 0)):
        config["calibration"] |= {"packing": packing}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        assert main(["merge", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "out")]) == code
        assert ("calibration.packing" in capsys.readouterr().err) == packing
