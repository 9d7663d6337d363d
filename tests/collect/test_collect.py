"""Gradient rows against autograd through an explicitly updated weight, one sequence at a time, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sst_kernels.collect import CoreBasis, CoreGradients


def tiny_llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).double().eval()


def tiny_gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=23, n_embd=16, n_layer=2, n_head=2, n_positions=16, tie_word_embeddings=False)
    return GPT2LMHeadModel(config).double().eval()


LLAMA_MODULES = {
    "model.embed_tokens": (16, 23),
    "model.layers.0.self_attn.q_proj": (16, 16),
    "model.layers.0.self_attn.v_proj": (8, 16),
    "model.layers.1.mlp.down_proj": (16, 24),
    "lm_head": (23, 16),
}
GPT2_MODULES = {"transformer.h.0.attn.c_attn": (48, 16), "transformer.h.1.mlp.c_proj": (16, 64)}


def random_bases(
    modules: dict[str, tuple[int, int]],
) -> tuple[dict[str, CoreBasis], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def orthonormal(d: int, r: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(d, r, dtype=torch.float64, generator=generator)).Q

    bases = {name: CoreBasis(orthonormal(d_out, 3), orthonormal(d_in, 4)) for name, (d_out, d_in) in modules.items()}
    cores = {name: 0.3 * torch.randn(3, 4, dtype=torch.float64, generator=generator) for name in modules}
    return bases, cores


def batch_of(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, 23, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    return ids * mask, mask


def loss_of(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Σ log p of tokens 3… of each sequence: the first three are a prompt."""
    keep = mask[:, 1:].bool() & (torch.arange(1, ids.shape[1]) >= 3)
    return -F.cross_entropy(logits[:, :-1][keep], ids[:, 1:][keep], reduction="sum")


def reference_rows(model, bases, cores, ids, mask) -> dict[str, torch.Tensor]:
    """∂/∂C of each sequence's own loss, through the weights W + Q_out C Q_inᵀ, without padding and without hooks."""
    leaves = {name: core.clone().requires_grad_() for name, core in cores.items()}
    rows = {name: [] for name in bases}
    for sequence, keep in zip(ids, mask.bool(), strict=True):
        weights = {}
        for name, basis in bases.items():
            module = model.get_submodule(name)
            update = basis.q_out @ leaves[name] @ basis.q_in.mT
            transposed = isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
            weights[f"{name}.weight"] = module.weight + (update.mT if transposed else update)
        tokens = sequence[keep].unsqueeze(0)
        logits = functional_call(model, weights, kwargs={"input_ids": tokens, "use_cache": False}).logits
        loss = loss_of(logits, tokens, torch.ones_like(tokens))
        for name, leaf in leaves.items():
            rows[name].append(torch.autograd.grad(loss, leaf, retain_graph=True)[0].flatten())
    return {name: torch.stack(r) for name, r in rows.items()}


def collected_rows(model, bases, cores, ids, mask, repeats: int = 1) -> dict[str, torch.Tensor]:
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in bases}
    size, length = ids.shape
    with CoreGradients(model, bases, bases.keys()) as gradients:
        gradients.set_cores(cores)
        gradients.consume = lambda name, g: rows[name].append(g.rows())
        gradients.layout(torch.arange(0, size * length + 1, length), mask.flatten().double())
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for repeat in range(repeats):
            loss_of(logits, ids, mask).backward(retain_graph=repeat + 1 < repeats)
    assert all(len(r) == repeats for r in rows.values())
    return {name: torch.cat(r) for name, r in rows.items()}


def assert_rows_equal(actual, expected, rtol=1e-9):
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=rtol, atol=rtol * float(expected[name].abs().max())
        )


@pytest.mark.parametrize(("make", "modules"), [(tiny_llama, LLAMA_MODULES), (tiny_gpt2, GPT2_MODULES)])
def test_rows_equal_autograd_one_sequence_at_a_time(make, modules):
    model, (bases, cores), (ids, mask) = make(), random_bases(modules), batch_of([9, 4, 7])
    expected = reference_rows(model, bases, cores, ids, mask)
    assert_rows_equal(collected_rows(model, bases, cores, ids, mask), expected)


@pytest.mark.parametrize(("make", "modules"), [(tiny_llama, LLAMA_MODULES), (tiny_gpt2, GPT2_MODULES)])
def test_rows_for_kronecker_factors_are_the_tokens_that_bear_gradient(make, modules):
    """Their outer products sum to the gradient; padding and text after the last loss have no weight."""
    model, (bases, cores), (ids, mask) = make(), random_bases(modules), batch_of([9, 4, 7])
    expected, seen = reference_rows(model, bases, cores, ids, mask), {}
    with CoreGradients(model, bases, bases.keys()) as gradients:
        gradients.set_cores(cores)
        gradients.consume = seen.__setitem__
        gradients.layout(torch.arange(0, 28, 9), mask.flatten().double())
        loss_of(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, ids, mask).backward()
    last = torch.tensor([7, 2, 5])  # position of the last token before one that bears loss
    for name, tokens in seen.items():
        rows, reduced = tokens.expanded, tokens.reduced
        total = expected[name].sum(0)
        assert_rows_equal({name: tokens.total()}, {name: total})
        outer = rows.delta.mT @ (rows.weight[:, None] * rows.x)
        assert_rows_equal({name: outer.flatten()}, {name: total})
        bearing = rows.weight.reshape(3, 9) > 0
        assert not (bearing & (torch.arange(9) > last[:, None])).any() and bearing.any(1).all()
        delta, x = (t.reshape(3, 9, -1) for t in (rows.delta, rows.x))
        count = bearing.sum(1, keepdim=True)
        torch.testing.assert_close(reduced.x, (bearing[..., None] * x).sum(1) / count, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(reduced.delta, (bearing[..., None] * delta).sum(1), rtol=1e-9, atol=1e-12)


def test_logits_are_those_of_the_updated_weights():
    model, (bases, cores), (ids, _) = tiny_llama(), random_bases(LLAMA_MODULES), batch_of([9, 9])
    with torch.no_grad(), CoreGradients(model, bases, ()) as gradients:
        gradients.set_cores(cores)
        hooked = model(input_ids=ids, use_cache=False).logits
        plain = model(input_ids=ids, use_cache=False)
    with torch.no_grad():
        for name, basis in bases.items():
            update = basis.q_out @ cores[name] @ basis.q_in.mT
            weight = model.get_submodule(name).weight
            weight += update.mT if name.endswith("embed_tokens") else update
        torch.testing.assert_close(hooked, model(input_ids=ids, use_cache=False).logits, rtol=1e-12, atol=1e-12)
    assert torch.equal(plain.logits, hooked)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model, (bases, cores), (ids, mask) = (
        tiny_llama(),
        random_bases(LLAMA_MODULES),
        batch_of([9, 4, 7]),
    )
    expected = reference_rows(model, bases, cores, ids, mask)
    model.train()  # transformers checkpoints in training mode only; this model has no dropout
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_rows_equal(collected_rows(model, bases, cores, ids, mask), expected)


def test_unwatched_modules_compute_but_give_no_rows():
    model, (bases, cores), (ids, mask) = tiny_llama(), random_bases(LLAMA_MODULES), batch_of([9, 4])
    expected = reference_rows(model, bases, cores, ids, mask)
    watched = ["model.layers.1.mlp.down_proj"]
    rows = {}
    with CoreGradients(model, bases, watched) as gradients:
        gradients.set_cores(cores)
        gradients.consume = lambda name, g: rows.__setitem__(name, g.rows())
        gradients.layout(torch.tensor([0, 9, 18]), mask.flatten().double())
        loss_of(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, ids, mask).backward()
    assert list(rows) == watched
    assert_rows_equal(rows, {name: expected[name] for name in watched})


def test_repeated_backward_hands_out_rows_again():
    model, (bases, cores), (ids, mask) = tiny_llama(), random_bases(LLAMA_MODULES), batch_of([5, 6])
    twice = collected_rows(model, bases, cores, ids, mask, repeats=2)
    for rows in twice.values():
        assert torch.equal(rows[:2], rows[2:])


def test_frozen_weights_get_no_gradient_and_everything_is_restored():
    model, (bases, cores), (ids, mask) = tiny_llama(), random_bases(LLAMA_MODULES), batch_of([5])
    frozen = model.model.norm.weight.requires_grad_(False)
    before = model(input_ids=ids).logits
    collected_rows(model, bases, cores, ids, mask)
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters() if p is not frozen) and not frozen.requires_grad
    assert torch.equal(model(input_ids=ids).logits, before)


def test_errors_name_the_module():
    model, (bases, cores) = tiny_llama(), random_bases(LLAMA_MODULES)
    with pytest.raises(ValueError, match="no module named 'nowhere'"):
        CoreGradients(model, {"nowhere": bases["lm_head"]}, ())
    gradients = CoreGradients(model, bases, ())
    with pytest.raises(ValueError, match=r"cores\['lm_head'\] must be \(3, 4\).*got \(4, 3\)"):
        gradients.set_cores({"lm_head": cores["lm_head"].mT})


def test_observe_shows_the_inputs_of_every_forward_pass():
    model, names = (
        tiny_llama(),
        ["model.embed_tokens", "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"],
    )
    bases, cores = random_bases({name: LLAMA_MODULES[name] for name in names})
    ids, _ = batch_of([5, 3])
    moved = {}
    for name, basis in bases.items():
        update = basis.q_out @ cores[name] @ basis.q_in.mT
        moved[f"{name}.weight"] = model.get_submodule(name).weight + (update.mT if "embed" in name else update)
    wanted: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, n=name: wanted.update({n: args[0]}))
        for name in names
    ]
    functional_call(model, moved, kwargs={"input_ids": ids})
    for handle in handles:
        handle.remove()
    seen: dict[str, torch.Tensor] = {}
    with CoreGradients(model, bases, watched=()) as gradients, torch.no_grad():
        gradients.set_cores(cores)
        gradients.observe = lambda name, rows: seen.update({name: rows})
        model(ids)
    assert seen.keys() == set(names)
    for name in names:
        torch.testing.assert_close(seen[name], wanted[name].detach(), rtol=1e-9, atol=1e-12)
