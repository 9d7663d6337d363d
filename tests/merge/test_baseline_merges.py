"""Baselines through whole merges of a tiny Llama, against their formulas on dense ΔW."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
import yaml
from reference import diagonal_fisher
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sst_merge import merge
from sst_merge.cli import main
from sst_merge.methods.entrywise import base_weight


def dense(folder: Path) -> dict[str, torch.Tensor]:
    """ΔW of every module of an adapter's folder, float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): config["lora_alpha"]
        / config["r"]
        * (tensors[key.replace("lora_A", "lora_B")].double() @ a.double())
        for key, a in tensors.items()
        if key.endswith("lora_A.weight")
    }


def deltas(setup) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module -> (Δ_u, Δ_s), zero where an adapter lacks the module."""
    u, s = dense(setup.utility), dense(setup.safety)
    return {n: (u.get(n, 0 * s.get(n, 0)), s.get(n, 0 * u.get(n, 0))) for n in {*u, *s}}


def merged(result, alpha: float) -> dict[str, torch.Tensor]:
    return {name: low.up.double() @ low.down.double() for name, low in result.updates(alpha).items()}


def run(setup, folder: Path, method: str, **parameters: object) -> dict[str, torch.Tensor]:
    """ΔW of every module as `sst-merge merge` writes it."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(setup.config(method, **parameters)))
    assert main(["merge", str(path), "--out", str(folder / "out")]) == 0
    return dense(folder / "out")


def compare(actual: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-5 * float(value.abs().max() + 1e-3), msg=name)


def masked(ratio: torch.Tensor, share: float | None) -> torch.Tensor:
    """The mask by a threshold, instead of by ranking."""
    if share is None:
        return ratio / ratio.max()
    return (ratio >= ratio.flatten().sort(descending=True).values[round(share * ratio.numel()) - 1]).double()


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("sst_v", {"share": 0.1, "epsilon": 0.5}),
        ("sst_v", {"mask": "soft", "patch": "interpolate"}),
        ("sst_m", {"share": 0.1, "patch": "interpolate"}),
        ("sst_m", {"mask": "soft", "epsilon": 2.0}),
    ],
)
def test_data_free_methods_are_their_formulas(setup, tmp_path, load_base, method, parameters):
    both, base = deltas(setup), load_base(setup.base)
    theta = {name: base.get_submodule(name).weight.detach().double() for name in both}
    entries = sum(t.numel() for t in theta.values())
    epsilon = parameters.get("epsilon", 0.1) / entries
    if method == "sst_v":
        epsilon *= sum(float(u.square().sum()) for u, _ in both.values())
    else:
        epsilon *= sum(float((theta[name] + u).abs().sum()) for name, (u, _) in both.items())
    wanted = {}
    for name, (u, s) in both.items():
        if method == "sst_v":
            ratio = (s - u) ** 2 / (u**2 + epsilon)
        else:
            ratio = (theta[name] + s).abs() / ((theta[name] + u).abs() + epsilon)
        mask = masked(ratio, None if parameters.get("mask") == "soft" else parameters["share"])
        tau = s - u if parameters.get("patch") == "interpolate" else s
        wanted[name] = u + 0.7 * mask * tau
    compare(run(setup, tmp_path, method, alpha=0.7, **parameters), wanted)


def test_data_free_methods_need_no_calibration_and_alpha_zero_is_the_utility_adapter(setup):
    for method in ("sst_v", "sst_m"):
        config = setup.config(method, alpha=0.0)
        del config["calibration"]
        compare(merged(merge(config), 0.0), {name: u for name, (u, _) in deltas(setup).items()})


def test_sst_m_reads_weights_that_are_stored_transposed(gpt2_dir, make_adapter):
    """Conv1D (d_in, d_out) and embeddings (vocabulary, d_out), neither square."""
    folders = [make_adapter(gpt2_dir, seed=i, r=2, target_modules=["c_attn", "wte"])[0] for i in (1, 2)]
    roles = [{"model": str(f), "role": role} for f, role in zip(folders, ("utility", "safety"), strict=True)]
    result = merge(
        {"base_model": str(gpt2_dir), "models": roles, "merge_method": "sst_m", "parameters": {"share": 0.1}}
    )
    stored = AutoModelForCausalLM.from_pretrained(gpt2_dir)
    updates = {name: [u.dense().double() for u in result.problem.updates(name)] for name in result.problem.names}
    theta = {name: stored.get_submodule(name).weight.detach().double().mT for name in updates}
    assert {t.shape for t in theta.values()} == {(96, 32), (32, 50)}
    total = sum(float((theta[name] + u).abs().sum()) for name, (u, _) in updates.items())
    epsilon = 0.1 * total / sum(t.numel() for t in theta.values())
    wanted = {}
    for name, (u, s) in updates.items():
        ratio = (theta[name] + s).abs() / ((theta[name] + u).abs() + epsilon)
        wanted[name] = u + masked(ratio, 0.1) * s
    compare(merged(result, 1.0), wanted)


def test_sst_m_refuses_quantised_weights():
    layer = torch.nn.Linear(3, 2)
    layer.weight = torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.int8), requires_grad=False)
    problem = SimpleNamespace(model=torch.nn.ModuleDict({"layer": layer}), config=SimpleNamespace(device="cpu"))
    with pytest.raises(ValueError, match="those of layer are quantised.*use sst_v"):
        base_weight(problem, "layer")


@pytest.mark.parametrize("method", ["sst_v", "sst_m"])
def test_a_utility_adapter_of_zeros(setup, tmp_path, capsys, method):
    """SST-V has nothing to compare with; SST-M still has the base's weights."""
    path = setup.utility / "adapter_model.safetensors"
    save_file({key: torch.zeros_like(value) for key, value in load_file(path).items()}, path)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(setup.config(method)))
    code = main(["merge", str(config), "--out", str(tmp_path / "out")])
    if method == "sst_m":
        assert code == 0
    else:
        assert code == 2 and "the utility adapter changes nothing" in capsys.readouterr().err


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_tsv_of_cores_is_tsv_of_the_dense_updates(setup, tmp_path, share):
    wanted = {}
    for name, (u, s) in deltas(setup).items():
        wanted[name] = 0.7 * (u + s)
        if u.any() and s.any():
            parts = []
            for update, rank in ((u, 2), (s, 3)):
                left, sigma, right = np.linalg.svd(update.numpy())
                k = int(share * rank)
                parts.append((left[:, :k], sigma[:k], right[:k].T))
            left, sigma, right = (np.concatenate(p, axis=-1) for p in zip(*parts, strict=True))
            dense_merge = scipy.linalg.polar(left)[0] * sigma @ scipy.linalg.polar(right)[0].T
            wanted[name] = 0.7 * torch.from_numpy(dense_merge)
    compare(run(setup, tmp_path, "tsv", alpha=0.7, share=share), wanted)


@pytest.mark.parametrize("beta", [0.01, 0.6])
def test_subspace_boosting_of_cores_is_that_of_the_dense_updates(setup, tmp_path, beta):
    wanted = {}
    for name, (u, s) in deltas(setup).items():
        left, sigma, right = np.linalg.svd((u + s).numpy(), full_matrices=False)
        rank = np.linalg.matrix_rank((u + s).numpy(), rtol=1e-6)
        cutoff = next(i for i in range(rank) if sigma[: i + 1].sum() >= beta * sigma[:rank].sum())
        boosted = np.maximum(sigma, sigma[cutoff])
        boosted[rank:] = 0
        wanted[name] = 0.7 * torch.from_numpy(left * boosted @ right)
    compare(run(setup, tmp_path, "subspace_boosting", alpha=0.7, beta=beta), wanted)


@pytest.mark.parametrize("k", [3, 0.2])
def test_single_fisher_is_its_formula_on_the_collected_fisher(setup, tmp_path, k):
    """Q from the Fisher of the core, lifted to the dense ΔW and applied there."""
    result = merge(setup.config("single_fisher", k=k))
    fishers = result.plan.curvature.statistics.harm
    wanted = {}
    for name, (u, s) in deltas(setup).items():
        fisher, basis = fishers.fisher(name).numpy(), result.problem.bases[name]
        count = min(k if isinstance(k, int) else max(1, round(k * len(fisher))), np.linalg.matrix_rank(fisher))
        core_vectors = np.linalg.eigh(fisher)[1][:, ::-1][:, :count]
        lifted = np.kron(basis.q_out.numpy(), basis.q_in.numpy()) @ core_vectors  # vec is row-major
        projector = torch.from_numpy(lifted @ lifted.T)
        flat_u, flat_s = u.flatten(), s.flatten()
        wanted[name] = (flat_u - projector @ flat_u + 0.7 * projector @ flat_s).reshape(u.shape)
        assert float((wanted[name] - u).norm()) > 1e-3 * float(u.norm()), "the projection must matter"
    compare(run(setup, tmp_path, "single_fisher", k=k, alpha=0.7), wanted)


def test_fisher_averaging_is_its_formula_on_dense_fishers(setup, tmp_path):
    """`points: [1]`: F_s is the empirical Fisher at θ_s, here by plain autograd; F_u from the collection."""
    parameters = {"points": [1.0], "epsilon": 0.01}
    result = merge(setup.config("fisher_averaging", **parameters))
    both, found = deltas(setup), result.problem.calibration["harm"][0]
    model = AutoModelForCausalLM.from_pretrained(setup.base).eval()
    for name, update in dense(setup.safety).items():
        model.get_submodule(name).weight.data += update.float()
    harm = diagonal_fisher(model, found, list(both))
    sums = result.plan.curvature.statistics.benign
    benign = {name: sums.diagonal_of(name).reshape(f.shape) for name, f in harm.items()}
    for fisher in (harm, benign):
        floor = 0.01 * sum(float(f.sum()) for f in fisher.values()) / sum(f.numel() for f in fisher.values())
        fisher.update({name: f.clamp(min=floor) for name, f in fisher.items()})
        norm = math.sqrt(sum(float(f.square().sum()) for f in fisher.values()))
        fisher.update({name: f / norm for name, f in fisher.items()})
    wanted = {}
    for name, (u, s) in both.items():
        f_u, f_s = 0.7 * benign[name], 0.3 * harm[name]
        wanted[name] = (f_u * u + f_s * s) / (f_u + f_s)
    compare(run(setup, tmp_path, "fisher_averaging", alpha=0.3, **parameters), wanted)


@pytest.mark.parametrize("coordinates", ["weight", "core"])
def test_fisher_averaging_ends_at_the_two_adapters(setup, coordinates):
    result = merge(setup.config("fisher_averaging", coordinates=coordinates))
    compare(merged(result, 0.0), {name: u for name, (u, _) in deltas(setup).items()})
    compare(merged(result, 1.0), {name: s for name, (_, s) in deltas(setup).items()})
    halfway = merged(result, 0.5)
    assert any(float((halfway[name] - (u + s) / 2).abs().max()) > 0.01 for name, (u, s) in deltas(setup).items())


def test_modules_that_an_additive_patch_does_not_reach(setup):
    """Δ_s = 0 there, so no Fisher is collected: Q is empty, and the average is the plain one."""
    name = "model.layers.0.self_attn.q_proj"
    u = dense(setup.utility)[name]
    for method, share in (("single_fisher", 1.0), ("fisher_averaging", 0.6)):
        result = merge(setup.config(method, patch="additive", alpha=0.4))
        assert name not in result.plan.curvature.patch
        compare({name: merged(result, 0.4)[name]}, {name: share * u})
