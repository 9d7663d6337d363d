"""Plain float64 references, one sequence at a time: Fishers by autograd, and what merged weights make of sequences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from sst_merge.data import TokenSequence
from sst_merge.problem import Problem

TRANSPOSED = ("Embedding", "Gemma3TextScaledWordEmbedding", "Conv1D")
"""Classes that store W as (d_in, d_out)."""


def harm_fishers(model: torch.nn.Module, problem: Problem) -> dict[str, torch.Tensor]:
    """E[g gᵀ] of every module of the problem, at the weights of `model` (float64, the utility's ΔW added)."""
    found = problem.calibration["harm"][0]
    totals = {name: 0.0 for name in problem.names}
    for _ in gradients(model, found):
        for name, basis in problem.bases.items():
            gradient = model.get_submodule(name).weight.grad.flatten(1)
            if type(model.get_submodule(name)).__name__ in TRANSPOSED:
                gradient = gradient.mT
            core = (basis.q_out.mT @ gradient @ basis.q_in).flatten()
            totals[name] = totals[name] + core.outer(core) / len(found)
    return totals


def diagonal_fisher(
    model: torch.nn.Module, sequences: list[TokenSequence], names: list[str]
) -> dict[str, torch.Tensor]:
    """E[g²] of the weights of some modules, float64."""
    totals = {name: 0.0 for name in names}
    for _ in gradients(model, sequences):
        for name in names:
            totals[name] = totals[name] + model.get_submodule(name).weight.grad.double() ** 2 / len(sequences)
    return totals


def gradients(model: torch.nn.Module, sequences: list[TokenSequence]) -> Iterator[None]:
    """Leave ∇ log p(sequence) in the model's .grad, for each sequence in turn."""
    for sequence in sequences:
        model.zero_grad()
        logp = model(torch.tensor([sequence.input_ids])).logits[0].log_softmax(-1)
        sum(logp[t - 1, i] for t, i in enumerate(sequence.input_ids) if sequence.is_target[t]).backward()
        yield


def log_probabilities(base: Path, deltas: Mapping[str, torch.Tensor], sequence: TokenSequence) -> torch.Tensor:
    """Log p at the positions that predict a loss-bearing token, from weights changed by hand; float64."""
    model = AutoModelForCausalLM.from_pretrained(base).double().eval()
    with torch.no_grad():
        for name, delta in deltas.items():
            model.get_submodule(name).weight += delta.double()
        logp = model(input_ids=torch.tensor([sequence.input_ids])).logits[0].log_softmax(-1)
    return logp[[t - 1 for t, wanted in enumerate(sequence.is_target) if wanted]]
