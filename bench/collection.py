"""Collecting local exact Fishers: against forward and backward of the same batches without hooks.

    python bench/collection.py [--device cuda] [--repeats 5] [--out FILE.json]

The peer is the base model with the utility update merged into its weights, all weights frozen, differentiated with
respect to the embedding's output: the least that any backward pass through the network costs. Both score the same
labels. Two rank-16 adapters on all linear layers: core coordinates of n = 1024 a module. Floor: 4 · parameters · tokens
flops of forward and activation gradients, over the measured rate of a large matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from harness import Limits, Row, arguments, interleaved, limits, report
from sst_merge.adapters import LowRank
from sst_merge.coordinates import core_basis, to_core
from sst_merge.data import TokenSequence
from sst_merge.fisher import CollectionSettings, Collector, Part, log_likelihood
from sst_merge.packing import batches

RANK = 16


@dataclass(frozen=True)
class Case:
    """A model's shape and a set of batches."""

    hidden: int
    intermediate: int
    layers: int
    tokens: int
    batch_size: int
    batches: int


CPU_CASES = [Case(512, 1408, 4, 128, 8, 4), Case(1024, 2816, 4, 256, 4, 4), Case(2048, 5632, 2, 512, 2, 2)]
CUDA_CASES = [Case(2048, 5632, 8, 512, 8, 4), Case(4096, 14336, 8, 512, 8, 4)]


def make_model(case: Case, device: torch.device) -> nn.Module:
    """A random Llama of the case's shape, frozen; bfloat16 on CUDA."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 64,
        num_key_value_heads=case.hidden // 128,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return LlamaForCausalLM(config).to(device, dtype).eval().requires_grad_(False)


def make_updates(model: nn.Module) -> dict[str, tuple[LowRank, LowRank]]:
    """Two random updates of every linear layer but the head."""
    updates = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            d_out, d_in = module.weight.shape
            device = module.weight.device
            updates[name] = tuple(
                LowRank(0.01 * torch.randn(d_out, RANK, device=device), torch.randn(RANK, d_in, device=device))
                for _ in range(2)
            )
    return updates


@contextmanager
def merged(model: nn.Module, updates: dict[str, tuple[LowRank, LowRank]]) -> Iterator[None]:
    """The utility update in the weights themselves."""
    kept: dict[str, Tensor] = {}
    for name, (utility, _) in updates.items():
        weight = model.get_submodule(name).weight
        kept[name] = weight.clone()
        weight += utility.dense().to(weight.dtype)
    yield
    for name, weight in kept.items():
        model.get_submodule(name).weight.copy_(weight)


def plain(model: nn.Module, sequences: list[TokenSequence], batch_size: int, device: torch.device) -> float:
    """Forward and backward of every batch; the sum of log p."""
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    total = 0.0
    for batch in batches(sequences, batch_size, device):
        loss, _ = log_likelihood(model, batch, None)
        loss.backward()
        total += loss.item()
    handle.remove()
    return total


def make_sequences(case: Case) -> list[TokenSequence]:
    """Random tokens, the second half of each sequence to be predicted."""
    generator = torch.Generator().manual_seed(0)
    return [
        TokenSequence(
            i,
            torch.randint(8192, (case.tokens,), generator=generator).tolist(),
            [t >= case.tokens // 2 for t in range(case.tokens)],
        )
        for i in range(case.batch_size * case.batches)
    ]


def measure(case: Case, repeats: int, machine: Limits, device: torch.device) -> Row:
    """Checks that both compute the same likelihood, then times both."""
    model = make_model(case, device)
    updates = make_updates(model)
    bases = {name: core_basis(pair) for name, pair in updates.items()}
    origin, patch = ({name: to_core(bases[name], updates[name][i]) for name in updates} for i in range(2))
    sequences = make_sequences(case)
    settings = CollectionSettings((0.0,), (1.0,), batch_size=case.batch_size)
    collector = Collector(model, bases, origin, patch, settings)

    def collect() -> None:
        with collector:
            collector.collect(Part("collect", sequences, False, {0.0: 1.0}, "exact"))

    def reference() -> float:
        return plain(model, sequences, case.batch_size, device)

    with collector, torch.no_grad():
        collector.gradients.set_cores(origin)
        hooked = sum(float(log_likelihood(model, b, None)[0]) for b in batches(sequences, case.batch_size, device))
    with merged(model, updates):
        torch.testing.assert_close(hooked, reference(), rtol=1e-2 if device.type == "cuda" else 1e-4, atol=0.0)
        times = interleaved([collect, reference], repeats, device)
    tokens = case.tokens * len(sequences)
    floor = machine.floor(0, 4 * sum(p.numel() for p in model.parameters()) * tokens)
    label = f"hidden {case.hidden}, {case.layers} layers, {len(sequences)} × {case.tokens} tokens, n = 1024"
    return Row(label, *times, floor)


def main() -> None:
    """Runs all cases; "speedup" is peer over ours, to be at least 1/1.3 = 0.77."""
    options = arguments(__doc__)
    dtype = torch.bfloat16 if options.device.type == "cuda" else torch.float32
    machine = limits(options.device, dtype)
    cases = CUDA_CASES if options.device.type == "cuda" else CPU_CASES
    rows = [measure(case, options.repeats, machine, options.device) for case in cases]
    report(__doc__.splitlines()[0], rows, options)


if __name__ == "__main__":
    main()
