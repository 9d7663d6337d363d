"""Accumulated factors against sums over tokens of one sequence at a time (dense.py)."""

from __future__ import annotations

import copy

import pytest
import torch
from dense import (
    LENGTHS,
    VOCAB,
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
from torch import Tensor, nn
from torch.nn import functional as F

from sst_kernels.accumulate import FactorAccumulator

pytestmark = pytest.mark.filterwarnings("ignore:FactorAccumulator has no factors")


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_factors_equal_dense_sums(make, padding, approximation):
    model = make()
    seqs = sequences([5, 5] if padding == "none" else LENGTHS)
    reduce = approximation == "reduce"
    names = [n for n in layers_of(model) if not (reduce and isinstance(model.get_submodule(n), nn.Embedding))]
    expected = dense_sums(model, names, one_at_a_time(seqs), reduce)
    with FactorAccumulator(model, names, fisher="empirical", approximation=approximation) as acc:
        step(acc, model, seqs, left=padding == "left")
    assert_sums(acc.factors, expected)


def test_all_layers_are_gathered_by_default_without_a_mask():
    model, seqs = gpt2(), sequences([5])
    names = [*layers_of(model), "transformer.wpe"]
    with FactorAccumulator(model, fisher="empirical") as acc:
        ids = seqs[0].unsqueeze(0)
        logits = model(input_ids=ids, use_cache=False).logits
        acc.training_loss(next_token_loss(logits, ids, torch.ones_like(ids))).backward()
    assert_sums(acc.factors, dense_sums(model, names, one_at_a_time(seqs)))


@pytest.mark.parametrize(("scale", "divisor", "tokens"), [(1024.0, 1.0, 1.0), (2.0**16, 4.0, 11.0), (1.0, 3.0, 7.0)])
def test_scaling_and_gradient_accumulation_are_undone(scale, divisor, tokens):
    model, seqs = gpt2(), sequences()
    with FactorAccumulator(model, layers_of(model), fisher="empirical") as acc:
        for seq in seqs:
            ids = seq.unsqueeze(0)
            loss = next_token_loss(model(input_ids=ids, use_cache=False).logits, ids, torch.ones_like(ids)) / tokens
            (acc.training_loss(loss, tokens) * scale / divisor).backward()
    assert_sums(acc.factors, dense_sums(model, layers_of(model), one_at_a_time(seqs)))
    assert acc.factors.backwards == 3


def test_two_declared_losses_of_two_forward_passes_in_one_backward_pass():
    model, seqs = gpt2(), sequences()
    with FactorAccumulator(model, layers_of(model), fisher="empirical") as acc:
        losses = []
        for seq, tokens in zip(seqs, (5.0, 2.0, 4.0), strict=True):
            ids = seq.unsqueeze(0)
            loss = next_token_loss(model(input_ids=ids, use_cache=False).logits, ids, torch.ones_like(ids))
            losses.append(acc.training_loss(loss / tokens, tokens))
        sum(losses).backward()
    assert acc.factors.backwards == 1
    assert_sums(acc.factors, dense_sums(model, layers_of(model), one_at_a_time(seqs)))


def test_one_loss_over_several_forward_passes_counts_them_all():
    model, seqs = llama(), sequences()
    with FactorAccumulator(model, layers_of(model), fisher="empirical") as acc:
        loss = sum(one_at_a_time(seqs)(model))
        acc.training_loss(loss).backward()
    assert_sums(acc.factors, dense_sums(model, layers_of(model), one_at_a_time(seqs)))


def test_a_layer_that_is_called_twice_adds_both_calls_up():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.a(torch.tanh(self.a(x)))

    torch.manual_seed(0)
    model, xs = Twice(), [torch.randn(1, 4).double() for _ in range(3)]
    with FactorAccumulator(model, fisher="empirical") as acc:
        acc.training_loss(model(torch.cat(xs)).pow(2).sum()).backward()
    assert_sums(acc.factors, dense_sums(model, ["a"], lambda m: (m(x).pow(2).sum() for x in xs)))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("reduce", [False, True])
def test_convolution_with_a_change_in_place(frozen, reduce):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 4, 2, padding="same"),
        nn.Flatten(2),
    ).double()
    model.requires_grad_(not frozen)
    images = [torch.randn(1, 2, 5, 4).double() for _ in range(3)]
    with FactorAccumulator(model, fisher="empirical", approximation="reduce" if reduce else "expand") as acc:
        acc.training_loss(model(torch.cat(images)).sin().sum()).backward()
    plain = copy.deepcopy(model).requires_grad_(True)
    rows: dict[str, tuple[list, list]] = {"0": ([], []), "2": ([], [])}
    for image in images:  # patches cut out by hand
        y0 = plain[0](image)
        h = y0.relu()
        y2 = plain[2](h)
        deltas = torch.autograd.grad(y2.sin().sum(), [y0, y2])
        padded_inputs = F.pad(image, (2, 2, 1, 1)), F.pad(h, (0, 1, 0, 1))
        for name, x, d, (kh, kw, sh, sw, dh, dw) in zip(
            rows, padded_inputs, deltas, [(3, 2, 2, 1, 1, 2), (2, 2, 1, 1, 1, 1)], strict=True
        ):
            xs, ds = [], []
            for i in range(d.shape[2]):
                for j in range(d.shape[3]):
                    cut = x[0, :, i * sh : i * sh + dh * kh : dh, j * sw : j * sw + dw * kw : dw][:, :kh, :kw]
                    xs.append(cut.flatten())
                    ds.append(d[0, :, i, j])
            x_rows, d_rows = torch.stack(xs).detach(), torch.stack(ds)
            rows[name][0].append(x_rows.mean(0, keepdim=True) if reduce else x_rows)
            rows[name][1].append(d_rows.sum(0, keepdim=True) if reduce else d_rows)
    expected = {}
    for name, (xs, ds) in rows.items():
        x, d = torch.cat(xs), torch.cat(ds)
        expected[name] = x.T @ x, d.T @ d, len(x)
    assert_sums(acc.factors, expected)


def test_packed_sequences():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCAB, 5), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, VOCAB)).double()
    seqs = sequences()
    packed, lengths = torch.cat(seqs), torch.tensor([0, *map(len, seqs)])
    expected = dense_sums(model, ["1", "3"], lambda m: (m(s).pow(2).sum() for s in seqs), reduce=True)
    for ids in (packed, packed.unsqueeze(0)):
        with FactorAccumulator(model, ["1", "3"], fisher="empirical", approximation="reduce") as acc:
            acc.batch(cu_seqlens=lengths.cumsum(0))
            acc.training_loss(model(ids).pow(2).sum()).backward()
        assert_sums(acc.factors, expected)


def test_weights_of_tokens_weigh_both_factors():
    torch.manual_seed(0)
    model, x, w = nn.Linear(3, 2).double(), torch.randn(2, 4, 3).double(), torch.tensor([[1, 0.5, 0, 2], [0, 1, 1, 3]])
    with FactorAccumulator(model, fisher="empirical") as acc:
        acc.batch(w.double())
        y = model(x)
        acc.training_loss((y**2).sum()).backward()
    rows, delta, weight = x.reshape(-1, 3), 2 * y.detach().reshape(-1, 2), w.double().flatten()
    a, g = acc.factors.mean("")
    torch.testing.assert_close(a, rows.T @ (weight[:, None] * rows) / weight.sum())
    torch.testing.assert_close(g, delta.T @ (weight[:, None] * delta) / weight.sum())


def test_one_example_of_one_layer_is_the_exact_fisher():
    """KFAC of a rank-one gradient: G ⊗ A = vec(∇W) vec(∇W)ᵀ, with ∇W from autograd's weight gradient."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 4).double(), torch.randn(1, 3).double()
    with FactorAccumulator(model, fisher="empirical") as acc:
        acc.training_loss(F.cross_entropy(model(x), torch.tensor([2]))).backward()
    a, g = acc.factors.mean("")
    row = model.weight.grad.flatten()
    torch.testing.assert_close(torch.kron(g, a), torch.outer(row, row))


def test_trace_of_both_sums_is_the_sum_of_squared_example_gradients():
    """For one shared |x|: Σ_n ‖∇W_n‖² = tr(A) · Σ‖δ‖², with ∇W_n from looped autograd."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 4).double(), F.normalize(torch.randn(6, 3).double(), dim=1)
    target = torch.randint(0, 4, (6,))
    with FactorAccumulator(model, fisher="empirical") as acc:
        acc.training_loss(F.cross_entropy(model(x), target), tokens=6).backward()
    a, g = acc.factors.mean("")
    squares = 0.0
    for n in range(6):
        (row,) = torch.autograd.grad(F.cross_entropy(model(x[n : n + 1]), target[n : n + 1]), model.weight)
        squares += float(row.square().sum())
    assert float(a.trace() * g.trace() * 6) == pytest.approx(squares, rel=1e-12)


def test_the_extra_backward_pass_touches_no_gradient():
    model, seqs = llama(), sequences()
    expected = gathered(model, seqs)
    model.zero_grad(set_to_none=True)
    ids, mask = padded(seqs)
    with FactorAccumulator(model, layers_of(model), fisher="empirical") as acc:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        loss = next_token_loss(logits, ids, mask)
        acc.backward(acc.training_loss(loss), retain_graph=True)
        assert all(p.grad is None for p in model.parameters())
        loss.backward()  # not declared: the gradients, and nothing more in the sums
    assert all(p.grad is not None for p in model.parameters())
    for name, layer in acc.factors.layers.items():
        assert torch.equal(layer.grad_factor, expected.layers[name].grad_factor)
        assert torch.equal(layer.counts, expected.layers[name].counts)
