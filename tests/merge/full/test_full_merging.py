"""Merges of full checkpoints by the command line, against whole state dicts merged by hand in float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trio import Trio, tensors_of

from sst_merge.full import elementwise, tensors

INDEX = "model.safetensors.index.json"


@pytest.fixture
def small_slabs(monkeypatch) -> None:
    """Tensors in many slabs, none of whose ratios are kept."""
    monkeypatch.setattr(tensors, "SLAB", 37)
    monkeypatch.setattr(elementwise, "_KEPT", 100)


def patch_of(trio: Trio, patch: str = "additive") -> dict[str, torch.Tensor]:
    origin, safety = trio.tensors("base" if patch == "additive" else "utility"), trio.tensors("safety")
    return {name: safety[name] - origin[name] for name in safety}


def ratios_of(trio: Trio, method: str, epsilon: float = 0.1) -> dict[str, torch.Tensor]:
    """r in float64; no two are so near that float32 would rank them otherwise."""
    base, utility, safety = (trio.tensors(owner) for owner in ("base", "utility", "safety"))
    harm, benign = (load_file(trio.fisher / f"{kind}.safetensors") for kind in ("harm", "benign"))
    pair = {
        "diagonal_sst": lambda name: (harm[name].double(), benign[name].double()),
        "sst_v": lambda name: ((safety[name] - utility[name]) ** 2, (utility[name] - base[name]) ** 2),
        "sst_m": lambda name: (safety[name].abs(), utility[name].abs()),
    }[method]
    pairs = {name: pair(name) for name in utility}
    mean = torch.cat([below.flatten() for _, below in pairs.values()]).mean()
    return {name: above / (below + epsilon * mean) for name, (above, below) in pairs.items()}


def masks(ratios: dict[str, torch.Tensor], mask: str, scope: str, share: float) -> dict[str, torch.Tensor]:
    """By sorting."""
    groups = [list(ratios)] if scope == "global" else [[name] for name in ratios]
    found = {}
    for group in groups:
        pooled = torch.cat([ratios[name].flatten() for name in group])
        if mask == "soft":
            kept = pooled / pooled.max()
        else:
            kept = torch.zeros_like(pooled)
            kept[pooled.argsort(descending=True, stable=True)[: max(1, round(share * len(pooled)))]] = 1
        parts = kept.split([ratios[name].numel() for name in group])
        found |= {name: part.reshape(ratios[name].shape) for name, part in zip(group, parts, strict=True)}
    return found


@pytest.mark.parametrize("scope", ["module", "global"])
@pytest.mark.parametrize("mask", ["hard", "soft"])
@pytest.mark.parametrize("method", ["diagonal_sst", "sst_v", "sst_m"])
def test_masked_merges_are_those_made_by_hand(trio, small_slabs, method, mask, scope):
    patch = "interpolate" if mask == "soft" else "additive"
    out = trio.run(method, mask=mask, scope=scope, patch=patch, share=0.3, alpha=0.7)
    m = masks(ratios_of(trio, method), mask, scope, 0.3)
    tau, utility, merged = patch_of(trio, patch), trio.tensors("utility"), tensors_of(out)
    assert merged.keys() == utility.keys()
    for name, theta in utility.items():
        torch.testing.assert_close(merged[name].double(), theta + 0.7 * m[name] * tau[name], rtol=1e-5, atol=1e-6)
    report = json.loads((out / "report.json").read_text())
    kept = sum(float(x.sum()) for x in m.values()) / sum(x.numel() for x in m.values())
    assert report["kept_share"] == pytest.approx(kept, rel=1e-4)
    for row in report["modules"]:
        name = next(name for name in tau if name.endswith(row["module"]))
        energy = (m[name] * tau[name]).square().sum() / tau[name].square().sum()
        assert row["kept_energy"] == pytest.approx(float(energy), rel=1e-4)


def test_a_hard_global_mask_keeps_exactly_the_first_by_argsort(trio, small_slabs):
    """Small integers for Fishers: many ratios are equal, and the first ones in the order of the files are kept."""
    generator = torch.Generator().manual_seed(3)
    names = trio.tensors("utility")
    harm = {name: torch.randint(0, 4, t.shape, generator=generator).float() for name, t in names.items()}
    benign = {name: torch.ones(t.shape) for name, t in names.items()}
    trio.save_fishers(harm, benign)
    out = trio.run("diagonal_sst", scope="global", share=0.4, alpha=1.0)
    order = []
    for file in sorted(trio.utility.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            order += stored.offset_keys()
    m = masks({name: harm[name] for name in order}, "hard", "global", 0.4)
    tau, utility, merged = patch_of(trio), trio.tensors("utility"), tensors_of(out)
    for name in order:
        expected = torch.where(m[name] == 1, utility[name] + tau[name], utility[name])
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(merged[name][m[name] == 0], utility[name].float()[m[name] == 0])


@pytest.mark.parametrize("method", ["task_arithmetic", "interpolation"])
def test_the_merged_folder_is_the_model_merged_by_hand(trio, input_ids, method):
    """It loads with no key missing or unexpected; shards, index and metadata are the utility model's."""
    out = trio.run(method, alpha=[0.25, 0.5])
    reference = AutoModelForCausalLM.from_pretrained(trio.utility).eval()
    patch = patch_of(trio, "additive" if method == "task_arithmetic" else "interpolate")
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter += (0.5 * patch[name]).float()
    written, loading = AutoModelForCausalLM.from_pretrained(out / "alpha-0.5", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected, got = (model.eval()(input_ids=input_ids).logits for model in (reference, written))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(out / "alpha-0.25").vocab_size == 50
    assert (out / "alpha-0.5" / INDEX).read_text() == (trio.utility / INDEX).read_text()
    for file in trio.utility.glob("*.safetensors"):
        with safe_open(file, "pt") as before, safe_open(out / "alpha-0.25" / file.name, "pt") as after:
            assert before.metadata() == after.metadata() and before.offset_keys() == after.offset_keys()


@pytest.mark.parametrize("scope", ["module", "global"])
def test_slabs_of_any_size_give_the_same_bits(trio, monkeypatch, scope):
    whole = tensors_of(trio.run("diagonal_sst", scope=scope, out="whole"))
    monkeypatch.setattr(tensors, "SLAB", 101)
    monkeypatch.setattr(elementwise, "_KEPT", 1000)
    parts = tensors_of(trio.run("diagonal_sst", scope=scope, out="parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in trio.tensors("utility"))


def test_shards_of_any_number_give_the_same_bits(make_trio, base_dir, tmp_path):
    trio = make_trio(base_dir, shards=("20KB", "1GB"))
    sharded = tensors_of(trio.run("diagonal_sst", scope="global"))
    AutoModelForCausalLM.from_pretrained(trio.utility).save_pretrained(trio.root / "single")
    AutoModelForCausalLM.from_pretrained(trio.safety).save_pretrained(trio.root / "split", max_shard_size="9KB")
    trio.utility, trio.safety = trio.root / "single", trio.root / "split"
    single = tensors_of(trio.run("diagonal_sst", out="again", scope="global"))
    assert sharded.keys() == single.keys() and all(torch.equal(sharded[name], single[name]) for name in single)


def test_each_model_keeps_its_dtype_and_is_rounded_once(make_trio, base_dir):
    trio = make_trio(base_dir, torch.bfloat16)
    out = trio.run("task_arithmetic", alpha=0.7)
    merged, utility, tau = tensors_of(out), trio.tensors("utility"), patch_of(trio)
    worst = 0.0
    for name, theta in utility.items():
        exact = (theta.float() + 0.7 * tau[name].float()).double()
        assert merged[name].dtype == torch.bfloat16
        lost = merged[name].double() - exact
        assert bool((lost.abs() <= 2.0**-8 * exact.abs() + 1e-7).all())
        worst = max(worst, float(lost.norm() / (0.7 * tau[name]).norm()))
    (strength,) = json.loads((out / "report.json").read_text())["strengths"]
    assert strength["worst_rounding_error"] == pytest.approx(worst, rel=1e-3)


def test_weights_of_the_roles_scale_their_updates(trio):
    models = [
        {"model": str(trio.utility), "role": "utility", "parameters": {"weight": 0.5}},
        {"model": str(trio.safety), "role": "safety", "parameters": {"weight": 2.0}},
    ]
    trio.config = {"models": models}
    merged = tensors_of(trio.run("task_arithmetic", alpha=0.3))
    base, utility, safety = (trio.tensors(owner) for owner in ("base", "utility", "safety"))
    for name, theta in base.items():
        expected = theta + 0.5 * (utility[name] - theta) + 0.6 * (safety[name] - theta)
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_a_run_that_is_killed_leaves_nothing(trio):
    """SIGKILL in the middle of a shard; the next run clears away what it left."""
    trio.run("task_arithmetic")
    script = (
        "import os, signal, sys\n"
        "from sst_merge.full import writer\n"
        "from sst_merge.cli import main\n"
        "write, calls = writer.ShardWriter.write, []\n"
        "def killed(*args):\n"
        "    calls.append(1)\n"
        "    write(*args)\n"
        "    if len(calls) == 5:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "writer.ShardWriter.write = killed\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", script, "merge", str(trio.root / "config.yaml"), "--out", str(trio.root / "cut")]
    assert subprocess.run(command, timeout=60, env=os.environ, check=False).returncode == -9
    assert not (trio.root / "cut").exists()
    assert len(list(trio.root.glob(".cut.*.new"))) == 1
    again = tensors_of(trio.run("task_arithmetic", out="cut"))
    assert not list(trio.root.glob(".cut.*")) and again.keys() == trio.tensors("utility").keys()


def test_a_full_disk_is_an_error_that_leaves_nothing(trio, capsys, monkeypatch):
    from sst_merge.full import merging, writer

    class Full(writer.FileIO):
        def write(self, data) -> int:
            if self.tell() > 9000:
                raise OSError(28, "No space left on device")
            return super().write(data[:4096])

    monkeypatch.setattr(writer, "FileIO", Full)
    said = trio.refusal(capsys)
    assert "could not be written (the disk is full); make room, or name another folder" in said
    monkeypatch.undo()
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda folder: os.statvfs_result and type("U", (), {"free": 10}))
    assert "GB are needed for 1 checkpoint(s)" in trio.refusal(capsys)
