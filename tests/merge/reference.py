"""The empirical Fisher of refusals in core coordinates, by plain autograd, one sequence at a time."""

from __future__ import annotations

import torch

from sst_merge.problem import Problem

TRANSPOSED = ("Embedding", "Gemma3TextScaledWordEmbedding", "Conv1D")
"""Classes that store W as (d_in, d_out)."""


def harm_fishers(model: torch.nn.Module, problem: Problem) -> dict[str, torch.Tensor]:
    """E[g gᵀ] of every module of the problem, at the weights of `model` (float64, the utility's ΔW added)."""
    found = problem.calibration["harm"][0]
    totals = {name: 0.0 for name in problem.names}
    for sequence in found:
        model.zero_grad()
        logp = model(torch.tensor([sequence.input_ids])).logits[0].log_softmax(-1)
        sum(logp[t - 1, i] for t, i in enumerate(sequence.input_ids) if sequence.is_target[t]).backward()
        for name, basis in problem.bases.items():
            gradient = model.get_submodule(name).weight.grad.flatten(1)
            if type(model.get_submodule(name)).__name__ in TRANSPOSED:
                gradient = gradient.mT
            core = (basis.q_out.mT @ gradient @ basis.q_in).flatten()
            totals[name] = totals[name] + core.outer(core) / len(found)
    return totals
