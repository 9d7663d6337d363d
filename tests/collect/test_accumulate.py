"""Accumulated factors against sums over tokens of one sequence at a time, in float64, without hooks or padding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sst_kernels.accumulate import AccumulatorOptions, FactorAccumulator
from sst_kernels.collect import CoreBasis
from sst_kernels.factors import Factors

pytestmark = pytest.mark.filterwarnings("ignore:FactorAccumulator has no factors")

VOCAB = 13


class Recorder(nn.Module):
    """The layer, written out, with its inputs and outputs kept."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.calls = layer, []

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.Embedding):
            y = layer.weight[x]
            x = F.one_hot(x, layer.num_embeddings).to(y.dtype)
        elif type(layer).__name__ == "Conv1D":
            y = x @ layer.weight + layer.bias
        elif isinstance(layer, nn.Conv2d):
            y = layer._conv_forward(x, layer.weight, layer.bias)
        elif isinstance(layer, nn.Linear):
            y = x @ layer.weight.T if layer.bias is None else x @ layer.weight.T + layer.bias
        else:
            y = layer(x)
        if not y.requires_grad:
            y.requires_grad_()
        y.retain_grad()
        self.calls.append((x.detach(), y))
        return y


def recorded(model: nn.Module, names: list[str]) -> tuple[nn.Module, dict[str, Recorder]]:
    model = copy.deepcopy(model)
    recorders = {name: Recorder(model.get_submodule(name)) for name in names}
    for name, recorder in recorders.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, recorder)
    return model, recorders


def dense_sums(
    model: nn.Module, names: list[str], losses: Callable[[nn.Module], Iterator[Tensor]], reduce: bool = False
) -> dict[str, tuple[Tensor, Tensor, int]]:
    """name -> (Σ x xᵀ, Σ δ δᵀ, rows): `losses` runs the model on one sequence after the other."""
    model, recorders = recorded(model, names)
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    for loss in losses(model):
        loss.backward()
        for name, recorder in recorders.items():
            for x, y in recorder.calls:
                x, delta = x.reshape(-1, x.shape[-1]).double(), y.grad.reshape(-1, y.shape[-1]).double()
                rows[name].append((x.mean(0, keepdim=True), delta.sum(0, keepdim=True)) if reduce else (x, delta))
            recorder.calls.clear()
    sums = {}
    for name, parts in rows.items():
        x, delta = (torch.cat(side) for side in zip(*parts, strict=True))
        sums[name] = x.T @ x, delta.T @ delta, len(x)
    return sums


def assert_sums(factors: Factors, expected: dict[str, tuple[Tensor, Tensor, int]], rtol: float = 1e-10) -> None:
    assert factors.layers.keys() == expected.keys()
    for name, (a, g, rows) in expected.items():
        _, n_in = factors.input_of(name)
        assert (float(n_in), float(factors.layers[name].counts[1])) == (rows, rows), name
        a_mean, g_mean = factors.mean(name)
        if a_mean.dim() == 1:
            a_mean = a_mean.diag()
        for actual, wanted in ((a_mean * rows, a), (g_mean * rows, g)):
            torch.testing.assert_close(actual.double(), wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))


def llama(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **changes})).double().eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_embd=8, n_layer=2, n_head=2, n_positions=16, tie_word_embeddings=False)
    return GPT2LMHeadModel(config).double().eval()


def layers_of(model: nn.Module) -> list[str]:
    """Every layer but GPT-2's position embedding, which sees other tokens than the mask tells of."""
    kinds = (nn.Linear, nn.Embedding, nn.Conv2d)
    return [
        n for n, m in model.named_modules() if (isinstance(m, kinds) or type(m).__name__ == "Conv1D") and "wpe" not in n
    ]


LENGTHS = [6, 3, 5]


def sequences(lengths: list[int] = LENGTHS, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator) for length in lengths]


def padded(seqs: list[Tensor], left: bool = False) -> tuple[Tensor, Tensor]:
    longest = max(map(len, seqs))
    ids, mask = torch.zeros(len(seqs), longest, dtype=torch.long), torch.zeros(len(seqs), longest, dtype=torch.long)
    for row, seq in enumerate(seqs):
        where = slice(longest - len(seq), None) if left else slice(0, len(seq))
        ids[row, where], mask[row, where] = seq, 1
    return ids, mask


def next_token_loss(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Σ over real tokens of −log p(next token)."""
    keep = (mask[:, 1:] * mask[:, :-1]).bool()
    return F.cross_entropy(logits[:, :-1][keep], ids[:, 1:][keep], reduction="sum")


def one_at_a_time(seqs: list[Tensor]) -> Callable[[nn.Module], Iterator[Tensor]]:
    def losses(model: nn.Module) -> Iterator[Tensor]:
        for seq in seqs:
            ids = seq.unsqueeze(0)
            yield next_token_loss(model(input_ids=ids, use_cache=False).logits, ids, torch.ones_like(ids))

    return losses


def step(acc: FactorAccumulator, model: nn.Module, seqs: list[Tensor], left: bool = False) -> None:
    """One batch of the empirical Fisher."""
    ids, mask = padded(seqs, left)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False).logits
    acc.training_loss(next_token_loss(logits, ids, mask)).backward()


def gathered(model: nn.Module, seqs: list[Tensor], names: list[str] | None = None, **kwargs: object) -> Factors:
    with FactorAccumulator(model, names or layers_of(model), fisher="empirical", **kwargs) as acc:
        step(acc, model, seqs)
    return acc.factors


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


def test_the_extra_backward_pass_refuses_reentrant_checkpointing():
    model = llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with FactorAccumulator(model, ["lm_head", "model.layers.0.mlp.up_proj"]) as acc:
        loss = acc.sampled_loss(model(input_ids=sequences()[0].unsqueeze(0), use_cache=False).logits)
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            acc.backward(loss)
        loss = acc.sampled_loss(model(input_ids=sequences()[0].unsqueeze(0), use_cache=False).logits)
        loss.backward()
