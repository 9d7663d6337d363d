"""The later baselines through whole merges of a tiny Llama, against their formulas on dense ΔW."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sst_merge import grams, merge
from sst_merge.baselines import della, gradient_matching, isotropic, knots, safe_lora, safe_merge
from sst_merge.cli import main
from sst_merge.config import load_config
from sst_merge.problem import Problem


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
    return {n: (u.get(n, 0 * s.get(n, 0)), s.get(n, 0 * u.get(n, 0))) for n in sorted({*u, *s})}


def run(setup, folder: Path, method: str, **parameters: object) -> dict[str, torch.Tensor]:
    """ΔW of every module as `sst-merge merge` writes it."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(setup.config(method, **parameters)))
    assert main(["merge", str(path), "--out", str(folder / "out")]) == 0
    return dense(folder / "out")


def compare(actual: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=2e-5 * float(value.abs().max() + 1e-3), msg=name)


FORMULAS = {
    "isotropic": ({"common": 0.6}, lambda u, s: 0.7 * isotropic([u, s], 0.6)),
    "knots": ({"density": 0.5}, lambda u, s: knots([u, s], 0.5, 0.7)),
    "safe_lora": ({"threshold": 0.5, "projector": "exact"}, lambda u, s: safe_lora(u, s, 0.5, True, 0.7)),
    "safe_merge": ({"threshold": 0.7}, lambda u, s: safe_merge(u, s, 0.7, False, 0.7)),
}
"""Method -> parameters, and the same on dense matrices in float64, which their own tests compare with the authors'."""


@pytest.mark.parametrize("method", FORMULAS)
def test_cores_stand_for_the_dense_updates(setup, tmp_path, method):
    parameters, formula = FORMULAS[method]
    wanted = {name: formula(*pair) for name, pair in deltas(setup).items()}
    compare(run(setup, tmp_path, method, alpha=0.7, **parameters), wanted)


def test_della_is_its_formula_with_one_generator_a_module(setup, tmp_path):
    wanted = {}
    for i, (name, pair) in enumerate(deltas(setup).items()):
        generator = torch.Generator().manual_seed(2 * len(deltas(setup)) + i)
        wanted[name] = della([t.float() for t in pair], 0.4, 0.2, 0.7, generator).double()
    compare(run(setup, tmp_path, "della", drop=0.4, window=0.2, seed=2, alpha=0.7), wanted)


@pytest.mark.parametrize("coordinates", ["weight", "core"])
def test_gradient_matching_is_its_formula_on_the_collected_fishers(setup, coordinates):
    result = merge(setup.config("gradient_matching", coordinates=coordinates, epsilon=0.5))
    statistics, wanted = result.plan.curvature.statistics, {}
    fishers = {n: [s.diagonal_of(n) for s in (statistics.benign, statistics.harm)] for n in result.plan.curvature.patch}
    mean = sum(float(f.sum()) for f, _ in fishers.values()) / sum(len(f) for f, _ in fishers.values())
    for name, (u, s) in deltas(setup).items():
        basis = result.problem.bases[name]
        if coordinates == "core":
            u, s = (basis.q_out.mT @ t @ basis.q_in for t in (u, s))
        f = tuple(x.reshape(u.shape) for x in fishers[name])
        merged = gradient_matching(u, s, f, 0.5 * mean, 0.7)
        wanted[name] = basis.q_out @ merged @ basis.q_in.mT if coordinates == "core" else merged
    compare({n: low.up.double() @ low.down.double() for n, low in result.updates(0.7).items()}, wanted)


def test_gradient_matching_adds_where_no_fisher_reaches(setup):
    name = "model.layers.0.self_attn.q_proj"
    result = merge(setup.config("gradient_matching", patch="additive", alpha=0.4))
    low = result.updates(0.4)[name]
    assert name not in result.plan.curvature.patch
    compare({name: low.up.double() @ low.down.double()}, {name: dense(setup.utility)[name]})


def inputs_of(base: Path, adapter: Path, sequences, names) -> dict[str, torch.Tensor]:
    """X of every module, a row a token, with PEFT's own model."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval().merge_and_unload()
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, rows=seen[name]: rows.append(args[0][0]))
    with torch.no_grad():
        for sequence in sequences:
            model(torch.tensor([sequence.input_ids]))
    return {name: torch.cat(rows).double() for name, rows in seen.items()}


@pytest.mark.parametrize("at_once", [1, 1 << 32])
def test_regmean_is_least_squares_on_both_models_own_inputs(setup, tmp_path, monkeypatch, at_once):
    """With a = 1 and a small ridge: the normal equations of the layers' outputs, per token of each set."""
    monkeypatch.setattr(grams, "BYTES_AT_ONCE", at_once)
    problem = Problem(load_config(setup.config("regmean")))
    both, wanted = deltas(setup), {}
    benign, harm = (problem.calibration[kind][0] for kind in ("benign", "harm"))
    x_u = inputs_of(setup.base, setup.utility, benign, both)
    x_s = inputs_of(setup.base, setup.safety, harm, both)
    for name, (u, s) in both.items():
        (root_u, root_s) = (0.7 / len(x_u[name])) ** 0.5, (0.3 / len(x_s[name])) ** 0.5
        ridge = [
            (weight * 1e-3 * float(x.square().mean())) ** 0.5 * np.eye(x.shape[1])
            for weight, x in ((0.7, x_u[name]), (0.3, x_s[name]))
        ]
        rows = np.concatenate([root_u * x_u[name], root_s * x_s[name], *ridge])
        targets = np.concatenate(
            [
                root_u * x_u[name] @ u.mT,
                root_s * x_s[name] @ s.mT,
                *(r @ t.numpy().T for r, t in zip(ridge, (u, s), strict=True)),
            ]
        )
        wanted[name] = torch.from_numpy(np.linalg.lstsq(rows, targets, rcond=None)[0].T)
    found = run(setup, tmp_path, "regmean", alpha=0.3, reduction=1.0, epsilon=1e-3)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-3 * float(value.abs().max()), msg=name)
        plain = 0.7 * both[name][0] + 0.3 * both[name][1]
        assert float((value - plain).abs().max()) > 0.02 * float(value.abs().max()), "the inputs must matter"


@pytest.mark.parametrize("method", ["regmean", "safe_merge", "gradient_matching"])
def test_alpha_zero_is_the_utility_adapter(setup, tmp_path, method):
    compare(run(setup, tmp_path, method, alpha=0.0), {name: u for name, (u, _) in deltas(setup).items()})


def test_regmean_does_not_depend_on_batches_or_packing(setup):
    config = setup.config("regmean", alpha=0.3)
    results = []
    for change in ({}, {"batch_size": 1}, {"packing": True, "batch_size": 2}):
        changed = {**config, "dtype": "float64", "calibration": {**config["calibration"], **change}}
        results.append({n: low.up.double() @ low.down.double() for n, low in merge(changed).updates(0.3).items()})
    for other in results[1:]:
        compare(other, results[0])


def test_regmean_interpolates_embeddings(gpt2_dir, make_adapter, setup):
    """Their inputs are indices; convolutions of GPT-2 (Conv1D) are linear maps like any."""
    setup.base = gpt2_dir
    for role, seed in (("utility", 1), ("safety", 2)):
        folder, _ = make_adapter(gpt2_dir, seed=seed, r=2, target_modules=["c_attn", "wte"])
        setattr(setup, role, folder)
    for file in (setup.harm, setup.benign):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        ids = [[int(w[1:]) + 3 for w in f"{line['prompt']} {line['response']}".split()] for line in lines]
        file.write_text("\n".join(json.dumps({"input_ids": i, "labels": i}) for i in ids))
    config = setup.config("regmean", alpha=0.3)
    tokenizer = load_config(config).base_model
    assert tokenizer == str(gpt2_dir)
    result = merge(config)
    updates, problem = result.updates(0.3), result.problem
    u, s = (t.dense() for t in problem.updates("transformer.wte"))
    torch.testing.assert_close(updates["transformer.wte"].dense(), 0.7 * u + 0.3 * s, rtol=1e-4, atol=1e-5)
    name = "transformer.h.1.attn.c_attn"
    u, s = (t.dense() for t in problem.updates(name))
    assert float((updates[name].dense() - (0.7 * u + 0.3 * s)).abs().max()) > 0.01


def test_factors_are_truncated_as_matrices_are(setup):
    """KnOTS and RegMean give ΔW in factors; `output.rank` cuts their singular values."""
    result = merge({**setup.config("knots"), "output": {"rank": 2}})
    for name, (u, s) in deltas(setup).items():
        whole = knots([u, s], 1.0, 1.0).numpy()
        low, error = result.plan.low_rank(result.problem, name, 1.0, 2)
        left, sigma, right = np.linalg.svd(whole, full_matrices=False)
        assert error == pytest.approx(np.linalg.norm(sigma[2:]) / np.linalg.norm(sigma), abs=1e-5)
        found = (low.up.double() @ low.down.double()).numpy()
        np.testing.assert_allclose(found, left[:, :2] * sigma[:2] @ right[:2], atol=1e-4 * sigma[0])
        np.testing.assert_allclose(result.plan.dense(result.problem, name, 1.0), whole, atol=1e-4 * sigma[0])


def test_regmean_names_a_module_without_inputs(setup, monkeypatch):
    monkeypatch.setattr(grams, "_add", lambda sums, name, rows, mask: sums.update({name: 0 * torch.eye(2)}))
    with pytest.raises(ValueError, match="module 'model.layers.0.mlp.down_proj' saw no finite input of the utility"):
        merge(setup.config("regmean"))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="saw 3 tokens but the batch has 4"):
        grams._add({}, "expert", torch.ones(3, 2), torch.ones(4))


def test_regmean_needs_data(setup):
    config = setup.config("regmean")
    del config["calibration"]
    with pytest.raises(ValueError, match="regmean needs `calibration`"):
        load_config(config)


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("della", {"drop": 0.05}, "window: drop ± window/2 must lie in"),
        ("della", {"drop": 0.95, "window": 0.1}, "window: drop ± window/2 must lie in"),
        ("safe_lora", {"threshold": 1.5}, "threshold: expected a number in"),
        ("safe_lora", {"projector": "exactly"}, "did you mean 'exact'"),
        ("safe_merge", {"alpha": 1.5}, "safe_merge needs alpha in"),
        ("regmean", {"alpha": 1.5}, "regmean needs alpha in"),
        ("isotropic", {"common": -0.1}, "common: expected a number in"),
    ],
)
def test_bad_settings_are_named(setup, method, parameters, message):
    with pytest.raises(ValueError, match=message):
        load_config(setup.config(method, **parameters))
