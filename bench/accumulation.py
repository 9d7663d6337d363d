"""A training step with factors against the same step without.

    python bench/accumulation.py [--device cuda] [--repeats 10] [--out FILE.json]

A Llama with rank-16 LoRA on all linear layers of the blocks. One step is forward, backward and SGD on a batch.
- core: factors of every wrapped layer in core coordinates (r = 32: two adapters' span), empirical. Bar: 1.25×.
- full: full-width factors of every linear layer of the blocks, every token, no LoRA, all weights trained. Bar: 1 + 1.3
  times the factors' share of the step's flops, printed beside it.
"ours" is the step with factors, "peer" the one without: a "speedup" below 1 is the overhead's inverse. Floor: flops of
forward and backward (4 or 6 · parameters · tokens) and of the factors at the measured rate of a large matrix product.
"""

from __future__ import annotations

import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from harness import Limits, Row, arguments, interleaved, limits, report
from sst_kernels import FactorAccumulator
from sst_kernels.collect import CoreBasis

RANK, CORE = 16, 32
CPU_CASES = [(512, 4, 4, 256), (1024, 4, 4, 256)]  # hidden, layers, batch, tokens
CUDA_CASES = [(2048, 8, 8, 512), (4096, 8, 8, 512)]


def make_model(hidden: int, layers: int, device: torch.device) -> nn.Module:
    """A random Llama, bfloat16 on CUDA."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of the blocks, LoRA's own excepted; wrapped ones by the wrapper's name."""
    found = {}
    for name, module in model.named_modules():
        inner = getattr(module, "base_layer", module)
        if isinstance(inner, nn.Linear) and "layers." in name and "lora_" not in name and "base_layer" not in name:
            found[name] = inner
    return found


def bases(layers: dict[str, nn.Module], device: torch.device) -> dict[str, CoreBasis]:
    """Random orthonormal bases of CORE columns."""
    return {
        name: CoreBasis(*(torch.linalg.qr(torch.randn(d, CORE, device=device))[0] for d in layer.weight.shape))
        for name, layer in layers.items()
    }


def measure(kind: str, case: tuple[int, int, int, int], repeats: int, machine: Limits, device: torch.device) -> Row:
    """Times the two steps, interleaved."""
    hidden, layers, batch, tokens = case
    model = make_model(hidden, layers, device)
    parameters = sum(p.numel() for p in model.parameters())
    if kind == "core":
        model = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))
    targets = linears(model)
    data = torch.randint(8192, (batch, tokens), device=device)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    acc = FactorAccumulator(
        model, list(targets), fisher="empirical", bases=bases(targets, device) if kind == "core" else None
    )

    def step(with_factors: bool) -> Tensor:
        optimizer.zero_grad()
        loss = model(input_ids=data, labels=data).loss
        if with_factors:
            loss = acc.training_loss(loss, tokens=batch * (tokens - 1))
        loss.backward()
        optimizer.step()
        return loss.detach()

    def accumulate() -> None:
        with acc:
            step(True)

    times = interleaved([accumulate, lambda: step(False)], repeats, device)
    assert_counts(acc, targets, batch * tokens)
    rows = batch * tokens
    plain_flops = (4 if kind == "core" else 6) * parameters * rows
    flops = factor_flops(kind, targets, rows)
    share = flops / plain_flops
    label = f"{kind}: hidden {hidden}, {layers} layers, {rows} tokens, factors' share of the flops {share:.1%}"
    print(f"{label}: overhead {times[0] / times[1] - 1:.1%}")
    return Row(label, *times, machine.floor(0, plain_flops + flops))


def factor_flops(kind: str, layers: dict[str, nn.Module], rows: int) -> float:
    """Flops of the factors (and, in core coordinates, of the projections), an input shared by several layers once."""
    total = 0
    for name, layer in layers.items():
        d_out, d_in = layer.weight.shape
        own_input = not name.endswith(("k_proj", "v_proj", "up_proj"))
        if kind == "core":
            total += rows * (2 * (d_out + d_in) * CORE + 2 * CORE * (CORE + 1))
        else:
            total += rows * (d_out * (d_out + 1) + own_input * d_in * (d_in + 1))
    return total


def assert_counts(acc: FactorAccumulator, layers: dict[str, nn.Module], rows: int) -> None:
    """Raises unless every layer has whole batches in its factors."""
    for name in layers:
        counts = acc.factors.layers[name].counts
        if counts[1] == 0 or counts[1] % rows:
            raise RuntimeError(f"layer {name} counted {counts.tolist()} tokens, not a multiple of {rows}")


def main() -> None:
    """Runs all cases."""
    options = arguments(__doc__)
    warnings.filterwarnings("ignore", message="FactorAccumulator has no factors")
    cuda = options.device.type == "cuda"
    machine = limits(options.device, torch.bfloat16 if cuda else torch.float32)
    cases = CUDA_CASES if cuda else CPU_CASES
    rows = [measure(k, c, options.repeats, machine, options.device) for k in ("core", "full") for c in cases]
    report(__doc__.splitlines()[0], rows, options)


if __name__ == "__main__":
    main()
