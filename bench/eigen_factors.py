"""Pencils of Kronecker factors from a real, small transformer: curvature on one kind of text against another."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sst_kernels import FactorAccumulator

_VOCABULARY, _TOKENS = 512, 128


def factor_pencils(hidden: int, *, layers: int = 4, damping: float = 1e-3) -> dict[str, tuple[NDArray, NDArray]]:
    """Factors of all blocks of a Llama, one batch of pencils for each kind of layer and factor.

    The model is trained for a few steps on both kinds of text (counting up by a stride of its own in each sequence;
    random walks), so that its covariances have structure. A is the factor on the first kind, B on the second, damped
    by a share of its mean eigenvalue.

    Args:
        hidden: Width; the largest pencils are of order 7/2 of it.
        layers: Number of blocks, the size of each batch.
        damping: The share.

    Returns:
        Name -> (A, B), each (layers, n, n) float32.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(_config(hidden, layers))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(20):
        optimizer.zero_grad()
        data = (_counting if step % 2 else _walking)(8, generator)
        model(input_ids=data, labels=data).loss.backward()
        optimizer.step()
    gains, costs = (_factors(model, make, generator) for make in (_counting, _walking))
    pencils = {}
    for kind in ("q_proj", "down_proj"):
        names = [name for name in gains if name.endswith(kind)]
        for i, side in enumerate(("input", "gradient")):
            a, b = (np.stack([factors[name][i].numpy() for name in names]) for factors in (gains, costs))
            mean = np.trace(b, axis1=1, axis2=2) / b.shape[-1]
            b += (damping * mean)[:, None, None] * np.eye(b.shape[-1], dtype=b.dtype)
            pencils[f"{kind} {side} factors"] = (a, b)
    return pencils


def _config(hidden: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 64),
        use_cache=False,
    )


def _counting(sequences: int, generator: torch.Generator) -> Tensor:
    start, stride = torch.randint(1, _VOCABULARY, (2, sequences, 1), generator=generator)
    return (start + stride * torch.arange(_TOKENS)) % _VOCABULARY


def _walking(sequences: int, generator: torch.Generator) -> Tensor:
    steps = torch.randint(-3, 4, (sequences, _TOKENS), generator=generator)
    return steps.cumsum(1) % _VOCABULARY


def _factors(model: nn.Module, make: object, generator: torch.Generator) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean input and gradient factors of every linear layer of the blocks."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers." in name]
    accumulator = FactorAccumulator(model, names, fisher="empirical")
    for _ in range(4):
        data = make(8, generator)
        with accumulator:
            loss = model(input_ids=data, labels=data).loss
            accumulator.training_loss(loss, tokens=8 * (_TOKENS - 1)).backward()
    return {name: accumulator.factors.mean(name) for name in names}
