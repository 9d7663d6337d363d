"""Whole merges on a tiny Llama: against dense ΔW, PEFT itself, and their own invariances."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from reference import diagonal_fisher
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sst_merge import load_config, merge
from sst_merge.baselines import ties
from sst_merge.problem import Problem

FISHER_RUNS = [
    ("sst", {"fisher": "exact", "select": "top_k", "k": 0.3}),
    ("sst", {"fisher": "exact", "select": "soft", "where": "local", "patch": "interpolate"}),
    ("sst", {"fisher": "diagonal", "select": "top_k", "k": 5, "scope": "module"}),
    ("sst", {"fisher": "kfac", "select": "soft"}),
    ("sst", {"fisher": {"benign": "ekfac"}, "select": "soft", "shrinkage": {"harm": "ledoit_wolf"}}),
    ("sst", {"fisher": {"harm": "gram", "benign": "kfac"}, "approximation": "reduce", "select": "soft"}),
    ("sst", {"select": "soft", "shrinkage": "ledoit_wolf", "shrinkage_target": "kronecker"}),
    ("diagonal_sst", {"coordinates": "core"}),
    ("diagonal_sst", {"coordinates": "weight", "mask": "soft", "patch": "interpolate"}),
    ("single_fisher", {"k": 0.3}),
    ("fisher_averaging", {"alpha": 1.0}),
    ("fisher_averaging", {"alpha": 1.0, "coordinates": "core", "where": "local"}),
    ("gradient_matching", {}),
    ("regmean", {"alpha": 1.0}),
]
OTHER_RUNS = [
    ("task_arithmetic", {}),
    ("interpolation", {}),
    ("ties", {"density": 0.4}),
    ("dare", {"drop": 0.4}),
    ("della", {}),
    ("sst_v", {"mask": "soft"}),
    ("sst_m", {"patch": "interpolate"}),
    ("tsv", {}),
    ("isotropic", {"common": 0.5}),
    ("knots", {"density": 0.5}),
    ("subspace_boosting", {"beta": 0.5}),
    ("safe_lora", {"projector": "exact"}),
    ("safe_merge", {"alpha": 1.0, "threshold": 1.0}),
]
IN_FACTORS = [("diagonal_sst", {"coordinates": "factor"})]
"""Not gauge-free: see test_baselines_factor.py."""


def dense(folder: Path) -> dict[str, torch.Tensor]:
    """ΔW of every module as PEFT computes it (lora_alpha = 12, r as stored)."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    out = {}
    for key, a in tensors.items():
        if key.endswith("lora_A.weight"):
            b = tensors[key.replace("lora_A", "lora_B")]
            out[key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")] = (
                config["lora_alpha"] / config["r"] * b.double() @ a.double()
            )
    return out


def deltas(setup) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module -> (Δ_u, Δ_s), zero where absent."""
    u, s = dense(setup.utility), dense(setup.safety)
    return {
        n: (
            u.get(n, torch.zeros_like(s.get(n, u.get(n)))),
            s.get(n, torch.zeros_like(u.get(n, s.get(n)))),
        )
        for n in {*u, *s}
    }


def merged(result, alpha=1.0) -> dict[str, torch.Tensor]:
    return {name: low.up.double() @ low.down.double() for name, low in result.updates(alpha).items()}


@pytest.mark.parametrize(("method", "parameters"), FISHER_RUNS + OTHER_RUNS + IN_FACTORS)
def test_output_loads_in_peft_and_its_logits_are_those_of_the_merged_weights(
    setup, tmp_path, input_ids, method, parameters
):
    result = merge(setup.config(method, **parameters), out=tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing keys
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(setup.base), tmp_path / "out").eval()
    stored = set(load_file(tmp_path / "out" / "adapter_model.safetensors"))
    wanted = {k.replace(".default", "") for k in model.state_dict() if "lora_" in k}
    assert stored == wanted
    base = AutoModelForCausalLM.from_pretrained(setup.base).eval()
    with torch.no_grad():
        for name, low in result.updates(1.0).items():
            base.get_submodule(name).weight += (low.up.double() @ low.down.double()).float()
        expected, actual = base(input_ids).logits, model(input_ids).logits
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert set(result.updates(1.0)) == set(deltas(setup))
    for name in ("report.md", "report.json", "sst_config.yaml"):
        assert (tmp_path / "out" / name).stat().st_size > 0


@pytest.mark.parametrize(("method", "parameters"), FISHER_RUNS + OTHER_RUNS)
def test_the_merge_does_not_depend_on_the_gauge(setup, method, parameters):
    """(lora_B G, G⁻¹ lora_A) is the same adapter, so it must give the same merge."""
    config = {**setup.config(method, **parameters), "dtype": "float64"}
    before = merged(merge(config), 0.5)
    path = setup.safety / "adapter_model.safetensors"
    tensors = load_file(path)
    g = torch.randn(3, 3, generator=torch.Generator().manual_seed(3)) + 2 * torch.eye(3)
    for key in [k for k in tensors if "lora_A" in k]:
        other = key.replace("lora_A", "lora_B")
        tensors[key] = torch.linalg.solve(g.double(), tensors[key].double()).float().contiguous()
        tensors[other] = (tensors[other].double() @ g.double()).float().contiguous()
    save_file(tensors, path)
    after = merged(merge(config), 0.5)
    for name, (u, s) in deltas(setup).items():
        error = (after[name] - before[name]).norm() / (u.norm() + s.norm())
        assert error < 1e-4, (name, float(error))  # the gauged factors are rounded to float32


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_linear_methods_and_sst_that_keeps_everything(setup, alpha):
    for config, formula in (
        (setup.config("task_arithmetic"), lambda u, s: u + alpha * s),
        (setup.config("interpolation"), lambda u, s: (1 - alpha) * u + alpha * s),
        (setup.config("sst", k=1.0), lambda u, s: u + alpha * s),
        (setup.config("sst", k=1.0, patch="interpolate"), lambda u, s: (1 - alpha) * u + alpha * s),
        (setup.config("diagonal_sst", share=1.0), lambda u, s: u + alpha * s),
        (
            setup.config("ties", density=0.4),
            lambda u, s: ties([u.float(), s.float()], 0.4, alpha).double(),
        ),
    ):
        actual = merged(merge(config), alpha)
        for name, (u, s) in deltas(setup).items():
            torch.testing.assert_close(
                actual[name], formula(u, s), rtol=0, atol=1e-5 * float((u.abs() + s.abs()).max())
            )


def test_modules_of_the_utility_alone_are_kept_as_they_are(setup):
    actual = merged(merge(setup.config("sst", k=0.1)))
    names = [n for n in dense(setup.utility) if n not in dense(setup.safety)]
    assert len(names) == 2
    for name in names:
        torch.testing.assert_close(actual[name], dense(setup.utility)[name], rtol=0, atol=1e-6)


def test_sweep_comes_from_one_solve_and_equals_single_runs(setup, tmp_path):
    merge(setup.config("sst", k=0.3, alpha=[0.25, 1.0]), out=tmp_path / "sweep")
    for alpha in (0.25, 1.0):
        merge(setup.config("sst", k=0.3, alpha=alpha), out=tmp_path / f"{alpha}")
        one, swept = (
            load_file(tmp_path / f"{alpha}/adapter_model.safetensors"),
            load_file(tmp_path / f"sweep/alpha-{alpha!r}/adapter_model.safetensors"),
        )
        assert all(torch.equal(one[k], swept[k]) for k in one) and one.keys() == swept.keys()
    report = json.loads((tmp_path / "sweep/report.json").read_text())
    kl = {s["alpha"]: s["predicted_kl"] for s in report["strengths"]}
    assert kl[0.25] == pytest.approx(kl[1.0] / 16)
    assert [s["adapter"] for s in report["strengths"]] == ["alpha-0.25", "alpha-1.0"]


def test_requested_rank_is_the_best_truncation_and_its_error_is_reported(setup, tmp_path):
    config = {**setup.config("task_arithmetic"), "output": {"rank": 2}}
    merge(config, out=tmp_path / "out")
    report = json.loads((tmp_path / "out/report.json").read_text())
    worst = 0.0
    written = dense(tmp_path / "out")
    for name, (u, s) in deltas(setup).items():
        sigma = torch.linalg.svdvals(u + s)
        error = float(sigma[2:].norm() / sigma.norm())
        worst = max(worst, error)
        assert float((written[name] - u - s).norm() / (u + s).norm()) == pytest.approx(error, abs=1e-5)
    assert report["strengths"][0]["worst_truncation_error"] == pytest.approx(worst, abs=1e-5)
    assert report["strengths"][0]["largest_rank"] == 2


def test_report_numbers(setup, tmp_path):
    result = merge(setup.config("sst", k=7, scope="global"), out=tmp_path / "out")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert sum(m.get("kept", 0) for m in report["modules"]) == 7
    for row in report["modules"]:
        u, s = deltas(setup)[row["module"]]
        assert row["shape"] == list(u.shape)
        if "kept_energy" not in row:
            continue
        filtered = merged(result)[row["module"]] - u
        assert row["kept_energy"] == pytest.approx(float(filtered.norm() / s.norm()) ** 2, abs=1e-5)
        assert 0 <= row["gain"] <= row["gain_full"] * (1 + 1e-9) and 0 <= row["cost"] <= row["cost_full"] * (1 + 1e-9)
        assert row["kept"] == 0 or row["gain"] == pytest.approx(row["ray"] * row["cost"])
    assert report["sequences"] == {
        "harm": {"found": 9, "held_out": 3},
        "benign": {"found": 8, "held_out": 2},
    }
    text = (tmp_path / "out/report.md").read_text()
    for picture in ("spectrum", "gain_cost", "kept_energy", "ray_held", "damping_share"):
        data = (tmp_path / f"out/{picture}.png").read_bytes()
        assert data.startswith(b"\x89PNG") and f"({picture}.png)" in text
    resolved = load_config(setup.config("sst", k=7, scope="global"), fisher_dir=tmp_path / "out.fisher")
    assert load_config(tmp_path / "out/sst_config.yaml") == resolved


def test_biases_follow_the_method(base_dir, make_adapter, setup):
    for role, seed in (("utility", 7), ("safety", 8)):
        folder, _ = make_adapter(base_dir, seed=seed, r=2, target_modules=["q_proj"], lora_bias=True)
        setattr(setup, role, folder)
    name = "model.layers.0.self_attn.q_proj"
    stored = [
        load_file(folder / "adapter_model.safetensors")[f"base_model.model.{name}.lora_B.bias"] * 6.0  # alpha / r
        for folder in (setup.utility, setup.safety)
    ]
    u, s = stored
    for method, parameters, expected in (
        ("task_arithmetic", {}, u + 0.3 * s),
        ("interpolation", {}, 0.7 * u + 0.3 * s),
        ("sst", {"patch": "interpolate"}, 0.7 * u + 0.3 * s),
        ("sst", {}, u + 0.3 * s),
        ("ties", {"density": 1.0}, ties([u, s], 1.0, 0.3)),
        ("sst_v", {}, u + 0.3 * s),
        ("sst_m", {"patch": "interpolate"}, 0.7 * u + 0.3 * s),
        ("single_fisher", {}, u + 0.3 * s),
        ("tsv", {}, 0.15 * (u + s)),
        ("subspace_boosting", {}, 0.3 * (u + s)),
        ("fisher_averaging", {}, 0.7 * u + 0.3 * s),
        ("della", {}, ties([u, s], 1.0, 0.3)),
        ("isotropic", {}, 0.15 * (u + s)),
        ("knots", {}, ties([u, s], 1.0, 0.3)),
        ("gradient_matching", {}, u + 0.3 * s),
        ("regmean", {}, 0.7 * u + 0.3 * s),
        ("safe_lora", {}, u + 0.3 * s),
        ("safe_merge", {}, 0.7 * u + 0.3 * s),
        ("diagonal_sst", {"coordinates": "factor"}, u + 0.3 * s),
    ):
        with tempfile.TemporaryDirectory() as folder:
            merge(setup.config(method, alpha=0.3, **parameters), out=Path(folder) / "out")
            written = load_file(Path(folder) / "out/adapter_model.safetensors")
        torch.testing.assert_close(written[f"base_model.model.{name}.lora_B.bias"], expected)


def test_diagonal_sst_is_its_formula_on_dense_fishers(setup):
    """r = f_harm/(f_benign + ε·mean), mask per tensor, in weight coordinates; Fishers by plain autograd."""
    config = setup.config("diagonal_sst", where="local", samples=1, share=0.1, epsilon=0.5)
    result = merge(config)
    sums = result.plan.curvature.statistics
    problem = result.problem
    found = problem.calibration["harm"][0]
    model = AutoModelForCausalLM.from_pretrained(setup.base).eval()
    both = deltas(setup)
    for name, (u, _) in both.items():
        model.get_submodule(name).weight.data += u.float()
    harm = diagonal_fisher(model, found, list(dense(setup.safety)))
    benign = {name: sums.benign.second[name].double() / sums.benign.count for name in harm}
    mean = sum(b.sum() for b in benign.values()) / sum(b.numel() for b in benign.values())
    for name in harm:
        ratio = harm[name] / (benign[name].reshape(harm[name].shape) + 0.5 * mean)
        count = round(0.1 * ratio.numel())
        kept = ratio >= ratio.flatten().sort(descending=True).values[count - 1]
        u, s = both[name]
        torch.testing.assert_close(merged(result)[name], u + kept * s, rtol=0, atol=1e-5 * float(s.abs().max()))


def test_soft_mask_and_point_weights_reach_the_statistics(setup):
    soft = merge(setup.config("diagonal_sst", coordinates="core", mask="soft", where="local"))
    hard = merge(setup.config("diagonal_sst", coordinates="core", share=1.0, where="local"))
    name = "model.layers.0.mlp.down_proj"
    sums = soft.plan.curvature.statistics
    ratio = sums.harm.diagonal_of(name) / (
        sums.benign.diagonal_of(name)
        + 0.1
        * sum(float(sums.benign.diagonal_of(n).sum()) for n in soft.plan.curvature.patch)
        / sum(t.numel() for t in soft.plan.curvature.patch.values())
    )
    core = (ratio / ratio.max()).reshape(3, 3) * soft.plan.curvature.patch[name]
    torch.testing.assert_close(soft.plan.update(name, 1.0), core, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(hard.plan.update(name, 1.0), soft.plan.curvature.patch[name])
    linear = merge(setup.config("sst", point_weights="linear", points=[0.25, 0.75])).plan.curvature.statistics.harm
    parts = [merge(setup.config("sst", points=[t])).plan.curvature.statistics.harm.fisher(name) for t in (0.25, 0.75)]
    torch.testing.assert_close(linear.fisher(name), 0.75 * parts[0] + 0.25 * parts[1], rtol=1e-4, atol=1e-9)


def test_dare_draws_anew_for_every_module_and_seed(setup):
    def zeros(seed: int) -> dict[str, torch.Tensor]:
        result = merge(setup.config("dare", seed=seed))
        return {n: result.plan.update(n, 1.0) == 0 for n in dense(setup.safety) if "down" in n}

    first, second = zeros(0), zeros(1)
    patterns = [*first.values(), *second.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(patterns) for b in patterns[:i])


def test_tied_weights_are_not_changed_by_a_saved_head(base_dir, make_adapter, setup, tmp_path, input_ids):
    config = LlamaConfig.from_pretrained(base_dir, tie_word_embeddings=True)
    torch.manual_seed(0)
    base = tmp_path / "tied"
    LlamaForCausalLM(config).save_pretrained(base)
    for file in base_dir.glob("tokenizer*"):
        shutil.copy(file, base)
    folder, peft_model = make_adapter(base, seed=5, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    setup.base, setup.utility = base, folder
    setup.safety, _ = make_adapter(base, seed=6, r=2, target_modules=["v_proj"])
    problem = Problem(load_config(setup.config("sst")))
    for name, low in problem.utility.updates.items():
        problem.model.get_submodule(name).weight.data += low.dense()
    with torch.no_grad():
        torch.testing.assert_close(problem.model(input_ids).logits, peft_model(input_ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_fishers_in_another_dtype_or_device(setup, device, dtype):
    """The same labels (harm) give the same Fishers, to the rounding of the model's dtype, wherever it runs."""
    exact = merge({**setup.config("sst", k=5), "dtype": "float64"})
    other = merge({**setup.config("sst", k=5), "dtype": dtype, "device": str(device)})
    for name in exact.plan.curvature.patch:
        wanted = exact.plan.curvature.statistics.harm.fisher(name)
        actual = other.plan.curvature.statistics.harm.fisher(name).cpu()
        error = float((actual - wanted).norm() / wanted.norm())
        assert error < (0.1 if dtype == "bfloat16" else 1e-8), name
        u, s = deltas(setup)[name]
        assert float(merged(other)[name].cpu().sub(u).norm()) < 10 * float(s.norm())


def test_weights_scale_the_updates(setup):
    config = setup.config("task_arithmetic")
    config["models"][1]["parameters"] = {"weight": 0.5}
    actual = merged(merge(config))
    for name, (u, s) in deltas(setup).items():
        torch.testing.assert_close(actual[name], u + 0.5 * s, rtol=0, atol=1e-6)


def test_what_has_no_curvature_is_carried_and_named(base_dir, make_adapter, setup, tmp_path, input_ids):
    saved, _ = make_adapter(base_dir, seed=5, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    config = setup.config("sst")
    config["models"][0]["model"] = str(saved)
    merge(config, out=tmp_path / "out")
    report = (tmp_path / "out/report.md").read_text()
    assert "lm_head.weight: whole parameter (modules_to_save), copied" in report
    out = load_file(tmp_path / "out/adapter_model.safetensors")
    given = load_file(saved / "adapter_model.safetensors")
    (key,) = (k for k in given if "lm_head" in k)
    assert torch.equal(out[key], given[key])
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(setup.base), tmp_path / "out")
