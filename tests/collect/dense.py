"""Small models, and sums over tokens of one sequence at a time, in float64, without hooks or padding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sst_kernels.accumulate import FactorAccumulator
from sst_kernels.factors import Factors

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
