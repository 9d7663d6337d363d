"""Factors of models that are checkpointed, compiled, autocast, wrapped, quantised, projected or tied (dense.py)."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from dense import (
    assert_sums,
    dense_sums,
    gathered,
    gpt2,
    layers_of,
    llama,
    next_token_loss,
    one_at_a_time,
    padded,
    sequences,
    step,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sst_kernels.accumulate import AccumulatorOptions, FactorAccumulator
from sst_kernels.collect import CoreBasis

pytestmark = pytest.mark.filterwarnings("ignore:FactorAccumulator has no factors")


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant, frozen):
    model, seqs = llama(), sequences()
    expected = dense_sums(model, layers_of(model), one_at_a_time(seqs))
    model.requires_grad_(not frozen)
    model.train()  # transformers checkpoints in training mode only; this model has no dropout
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_sums(gathered(model, seqs), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_forward_passes_before_their_backward_passes_under_checkpointing(reentrant):
    """A recomputed block must use the mask of its own batch, though both batches have one shape."""
    model, seqs = llama(), sequences([5, 3, 4, 5])
    expected = dense_sums(model, layers_of(model), one_at_a_time(seqs))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    losses = []
    with FactorAccumulator(model, layers_of(model), fisher="empirical") as acc:
        for part in (seqs[:2], seqs[2:]):
            ids, mask = padded(part)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            losses.append(acc.training_loss(next_token_loss(logits, ids, mask)))
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        losses[0].backward()
        losses[1].backward()
    assert_sums(acc.factors, expected)


def test_a_model_that_is_checkpointed_as_a_whole():
    model, ids = gpt2(), sequences([5])[0].unsqueeze(0)
    expected = dense_sums(model, layers_of(model), one_at_a_time([ids[0]]))
    with FactorAccumulator(model, layers_of(model), fisher="empirical", options=AccumulatorOptions(every=2)) as acc:
        logits = checkpoint(model, input_ids=ids, use_cache=False, use_reentrant=False).logits
        acc.training_loss(next_token_loss(logits, ids, torch.ones_like(ids))).backward()
    assert_sums(acc.factors, expected)
    assert acc.factors.forwards == 1


@pytest.mark.parametrize("how", ["before", "after", "original given", "in place", "one layer"])
def test_compiled_models(how):
    torch._dynamo.reset()
    model, seqs = llama(), sequences([4, 4])
    expected = dense_sums(model, layers_of(model), one_at_a_time(seqs))
    names, called = layers_of(model), model
    if how == "one layer":
        model.model.layers[0].mlp.up_proj.compile(backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    else:
        called = torch.compile(model, backend="eager")
    if how != "after":
        called(input_ids=seqs[0].unsqueeze(0), use_cache=False)
    with FactorAccumulator(model if how == "original given" else called, names, fisher="empirical") as acc:
        step(acc, called, seqs)
    assert_sums(acc.factors, expected)


def test_passes_left_out_run_compiled():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model = torch.compile(net, backend=counter)
    with FactorAccumulator(model, fisher="empirical", options=AccumulatorOptions(every=3)) as acc:
        for _ in range(6):
            acc.training_loss(model(torch.ones(2, 3)).sum()).backward()
    assert (acc.factors.backwards, acc.factors.forwards, counter.frame_count) == (2, 6, 1)
    assert set(acc.factors.layers) == {"0", "2"}


def test_autocast_rows_are_those_that_the_layer_multiplied():
    model, seqs = llama().float(), sequences()
    names = [name for name in layers_of(model) if "embed" not in name]

    def rounded(m: nn.Module) -> Iterator[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            yield from one_at_a_time(seqs)(m)

    expected = dense_sums(model, names, rounded)
    with torch.autocast("cpu", torch.bfloat16), FactorAccumulator(model, names, fisher="empirical") as acc:
        for seq in seqs:
            ids = seq.unsqueeze(0)
            loss = next_token_loss(model(input_ids=ids, use_cache=False).logits, ids, torch.ones_like(ids))
            acc.training_loss(loss).backward()
    assert acc.factors.layers["lm_head"].grad_factor.dtype == torch.float32
    for name in names:  # the reference's x is not rounded to bfloat16: 2⁻⁹ relative in x, twice that in x xᵀ
        a, g, rows = expected[name]
        a_mean, g_mean = (m.double() * rows for m in acc.factors.mean(name))
        torch.testing.assert_close(a_mean, a, rtol=2**-7, atol=2**-7 * float(a.abs().max()))
        torch.testing.assert_close(g_mean, g, rtol=1e-5, atol=1e-5 * float(g.abs().max()))


@pytest.mark.parametrize("extra", [False, True])
def test_a_backward_pass_inside_autocast_sums_as_one_outside(extra):
    """Rows are projected in their own precision, whatever is on when the gradient arrives."""
    torch.manual_seed(0)
    model, x = nn.Linear(6, 5).requires_grad_(False), torch.randn(7, 6)
    basis = CoreBasis(torch.linalg.qr(torch.randn(5, 3)).Q, torch.linalg.qr(torch.randn(6, 2)).Q)

    def gathered(inside: bool) -> tuple[Tensor, Tensor]:
        with FactorAccumulator(model, fisher="empirical", bases={"": basis}) as acc:
            loss = acc.training_loss(model(x).pow(2).sum())
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                acc.backward(loss) if extra else loss.backward()
        return acc.factors.mean("")

    for ours, theirs in zip(gathered(True), gathered(False), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_lora_layers_are_gathered_at_the_wrapper():
    """x and δ of y = W x + B A x are those of a plain layer with the merged weight."""
    plain, seqs = llama(), sequences()
    targets = ["q_proj", "v_proj", "down_proj"]
    names = [n for n in layers_of(plain) if n.endswith(tuple(targets))]
    torch.manual_seed(1)
    lora = get_peft_model(
        copy.deepcopy(plain), LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    ).double()
    merged = copy.deepcopy(lora).merge_and_unload().requires_grad_(True)
    expected = dense_sums(merged, names, one_at_a_time(seqs))
    with FactorAccumulator(lora, rf".*({'|'.join(targets)}).*", fisher="empirical") as acc:
        step(acc, lora, seqs)
    assert_sums(acc.factors, {f"base_model.model.{name}": sums for name, sums in expected.items()}, rtol=1e-6)


def test_quantised_layers_are_known_by_their_sizes_and_never_read():
    class Linear4bit(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.dense = [linear.weight.detach()]

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.dense[0].T

    model, seqs = llama(), sequences()
    name = "model.layers.1.mlp.up_proj"
    expected = dense_sums(model, [name], one_at_a_time(seqs))
    model.model.layers[1].mlp.up_proj = Linear4bit(model.model.layers[1].mlp.up_proj)
    assert_sums(gathered(model.requires_grad_(False), seqs, [name]), expected)


def bases_of(model: nn.Module, names: list[str]) -> dict[str, CoreBasis]:
    generator = torch.Generator().manual_seed(4)

    def orthonormal(d: int, r: int) -> Tensor:
        return torch.linalg.qr(torch.randn(d, r, dtype=torch.float64, generator=generator)).Q

    sizes = {}
    for name in names:
        module = model.get_submodule(name)
        weight = module.weight.flatten(1)
        transposed = isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
        sizes[name] = weight.T.shape if transposed else weight.shape
    return {name: CoreBasis(orthonormal(d_out, 2), orthonormal(d_in, 3)) for name, (d_out, d_in) in sizes.items()}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_bases_project_both_factors(make, approximation, checkpointed):
    """Q_inᵀ A Q_in and Q_outᵀ G Q_out of the dense sums; the token embedding too, for both approximations."""
    model, seqs = make(), sequences()
    names = layers_of(model)
    bases, reduce = bases_of(model, names), approximation == "reduce"
    dense = dense_sums(model, names, one_at_a_time(seqs), reduce)
    expected = {
        name: (b.q_in.T @ dense[name][0] @ b.q_in, b.q_out.T @ dense[name][1] @ b.q_out, dense[name][2])
        for name, b in bases.items()
    }
    if checkpointed:
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with FactorAccumulator(model, fisher="empirical", approximation=approximation, bases=bases) as acc:
        step(acc, model, seqs)
    assert_sums(acc.factors, expected)
    assert not acc.factors.shared  # every basis is another


def test_layers_with_one_input_share_its_factor():
    model, seqs = llama(), sequences()
    factors = gathered(model, seqs)
    attention, mlp = "model.layers.0.self_attn.", "model.layers.1.mlp."
    assert {n: o for n, o in factors.shared.items() if n.startswith((attention, mlp))} == {
        f"{attention}k_proj": f"{attention}q_proj",
        f"{attention}v_proj": f"{attention}q_proj",
        f"{mlp}up_proj": f"{mlp}gate_proj",
    }
    assert factors.layers[f"{attention}k_proj"].input_factor is None
    alone = gathered(model, seqs, options=AccumulatorOptions(share_inputs=False))
    assert not alone.shared
    for name in factors.specs:
        for ours, theirs in zip(factors.mean(name), alone.mean(name), strict=True):
            assert torch.equal(ours, theirs)


def test_tied_weights_have_factors_for_each_use():
    model, seqs = llama(tie_word_embeddings=True), sequences()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    factors = gathered(model, seqs)
    assert factors.tied == {"lm_head": "model.embed_tokens"}
    assert_sums(factors, dense_sums(model, layers_of(model), one_at_a_time(seqs)))


def test_the_extra_backward_pass_refuses_reentrant_checkpointing():
    model = llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with FactorAccumulator(model, ["lm_head", "model.layers.0.mlp.up_proj"]) as acc:
        loss = acc.sampled_loss(model(input_ids=sequences()[0].unsqueeze(0), use_cache=False).logits)
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            acc.backward(loss)
        loss = acc.sampled_loss(model(input_ids=sequences()[0].unsqueeze(0), use_cache=False).logits)
        loss.backward()


def test_the_extra_backward_pass_computes_in_the_precision_of_the_forward_pass():
    """Autocast that is on around it must not round the gradients on their way to lower layers."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), torch.randn(7, 6)

    def gathered(inside: bool) -> Tensor:
        with FactorAccumulator(model, fisher="empirical") as acc:
            loss = acc.training_loss(model(x).pow(2).sum())
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                acc.backward(loss)
        return acc.factors.mean("0")[1]

    assert torch.equal(gathered(True), gathered(False))
