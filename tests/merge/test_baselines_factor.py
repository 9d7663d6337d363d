"""Diagonal SST over lora_A and lora_B, as its authors run it: its formula, and why it is a trap."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reference import gradients
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sst_merge import load_config, merge
from sst_merge.adapters import LowRank
from sst_merge.coordinates import factor_gradients


def factors(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(scale·lora_B, lora_A) of every module, float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): (
            config["lora_alpha"] / config["r"] * tensors[key.replace("lora_A", "lora_B")].double(),
            a.double(),
        )
        for key, a in tensors.items()
        if key.endswith("lora_A.weight")
    }


def merged(config: dict[str, object], alpha: float) -> dict[str, torch.Tensor]:
    return {name: low.up.double() @ low.down.double() for name, low in merge(config).updates(alpha).items()}


def test_factor_gradients_are_autograds():
    up, down = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 2), (2, 3)))
    targets = torch.randn(5, 4, 3, dtype=torch.float64)
    rows, wanted = [], []
    for target in targets:
        delta = up @ down
        loss = (delta * target).sum() + (delta**3).sum()
        rows.append((target + 3 * delta**2).detach().flatten())
        wanted.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, (up, down))]))
    found = factor_gradients(torch.stack(rows), LowRank(up.detach(), down.detach()))
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", ["hard", "soft"])
def test_it_is_its_formula_on_dense_gradients(setup, mask):
    """F_harm from plain autograd at θ_u, as gradients by B and A; masks per factor; F_benign from the collection."""
    parameters = {"coordinates": "factor", "where": "local", "share": 0.3, "epsilon": 0.5, "mask": mask}
    result = merge(setup.config("diagonal_sst", **parameters))
    found, safety, utility = result.problem.calibration["harm"][0], factors(setup.safety), factors(setup.utility)
    model = AutoModelForCausalLM.from_pretrained(setup.base).eval()
    for name, (up, down) in utility.items():
        model.get_submodule(name).weight.data += (up @ down).float()
    harm = {name: [0 * t for t in pair] for name, pair in safety.items()}
    for _ in gradients(model, found):
        for name, (up, down) in safety.items():
            g = model.get_submodule(name).weight.grad.double()
            harm[name][0] += (g @ down.mT) ** 2 / len(found)
            harm[name][1] += (up.mT @ g) ** 2 / len(found)
    sums = result.plan.curvature.statistics.benign
    benign = {name: sums.diagonal_of(name) for name in safety}
    mean = sum(float(b.sum()) for b in benign.values()) / sum(b.numel() for b in benign.values())
    for name, pair in safety.items():
        parts = benign[name].split([t.numel() for t in pair])
        kept = []
        for t, h, b in zip(pair, harm[name], parts, strict=True):
            ratio = h / (b.reshape(t.shape) + 0.5 * mean)
            threshold = ratio.flatten().sort(descending=True).values[round(0.3 * t.numel()) - 1]
            kept.append(t * ((ratio >= threshold) if mask == "hard" else ratio / ratio.max()))
        u = utility[name][0] @ utility[name][1] if name in utility else 0.0
        low = result.updates(0.7)[name]
        wanted = u + 0.7 * kept[0] @ kept[1]
        torch.testing.assert_close(low.up.double() @ low.down.double(), wanted, rtol=1e-3, atol=1e-5, msg=name)


def test_statistics_of_factors_are_kept_and_are_no_others(setup, tmp_path):
    config = {**setup.config("diagonal_sst", coordinates="factor"), "fisher_dir": str(tmp_path / "fishers")}
    first, again = merged(config, 1.0), merged({k: v for k, v in config.items() if k != "calibration"}, 1.0)
    for name, value in first.items():
        assert torch.equal(again[name], value)
    config["parameters"] = {"coordinates": "weight"}
    with pytest.raises(ValueError, match="coordinates is"):
        merge(config)


def test_whole_masks_are_task_arithmetic_and_no_strength_is_the_utility_adapter(setup):
    config = setup.config("diagonal_sst", coordinates="factor", share=1.0)
    result, utility, safety = merge(config), factors(setup.utility), factors(setup.safety)
    for alpha in (0.0, 0.4):
        for name, low in result.updates(alpha).items():
            pairs = (utility.get(name), 1.0), (safety.get(name), alpha)
            wanted = sum(weight * pair[0] @ pair[1] for pair, weight in pairs if pair is not None)
            torch.testing.assert_close(low.up.double() @ low.down.double(), wanted, rtol=1e-4, atol=1e-5)


def test_it_depends_on_the_gauge_where_the_other_coordinates_do_not(setup):
    """(lora_B G, G⁻¹ lora_A) is the same adapter, and must give the same merge."""
    mix = torch.randn(3, 3, generator=torch.Generator().manual_seed(3)) + 2 * torch.eye(3)
    sizes = {name: float((up @ down).norm()) for name, (up, down) in factors(setup.safety).items()}
    changes = {}
    for coordinates in ("weight", "core", "factor"):
        config = {**setup.config("diagonal_sst", coordinates=coordinates), "dtype": "float64"}
        path = setup.safety / "adapter_model.safetensors"
        tensors, before = load_file(path), merged(config, 1.0)
        mixed = dict(tensors)
        for key in [k for k in tensors if "lora_A" in k]:
            other = key.replace("lora_A", "lora_B")
            mixed[key] = torch.linalg.solve(mix.double(), tensors[key].double()).float().contiguous()
            mixed[other] = (tensors[other].double() @ mix.double()).float().contiguous()
        save_file(mixed, path)
        after = merged(config, 1.0)
        save_file(tensors, path)
        changes[coordinates] = max(float((after[n] - before[n]).norm()) / size for n, size in sizes.items())
    assert changes["weight"] < 1e-4 and changes["core"] < 1e-4
    assert changes["factor"] > 0.05


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("diagonal_sst", {"patch": "interpolate"}), ("fisher_averaging", {}), ("gradient_matching", {})],
)
def test_what_has_no_meaning_is_refused(setup, method, parameters):
    with pytest.raises(ValueError, match="coordinates: factor is for merge_method diagonal_sst with patch: additive"):
        load_config(setup.config(method, coordinates="factor", **parameters))
