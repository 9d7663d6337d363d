"""The demo trains, merges, compares and reports; a second run reuses all that it can."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from sst_merge.compare import Variant
from sst_merge.demo import evaluate, run
from sst_merge.demo.run import run_demo
from sst_merge.demo.train import Phase, Recipe


@pytest.fixture
def quick_demo(monkeypatch):
    """The demo with next to no training and two methods; counts its measurements."""
    tiny = Recipe(hidden_size=32, intermediate_size=32, layers=1, heads=2, base=Phase(4, 8, 1e-3))
    tiny = replace(tiny, utility=Phase(3, 8, 1e-3), safety=Phase(3, 8, 1e-3))
    train = run.train_models
    monkeypatch.setattr(run, "train_models", lambda world, folder, seed: train(world, folder, seed, tiny))
    methods = {"task arithmetic": Variant("task_arithmetic"), "SST exact": Variant("sst")}
    monkeypatch.setattr(run, "SETTINGS", replace(run.SETTINGS, methods=methods, alphas=(1.0,)))
    counted = []

    def counting(*arguments):
        counted.append(arguments)
        return measure(*arguments)

    measure = evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", counting)
    return counted


def test_demo_from_nothing_and_from_its_cache(tmp_path, quick_demo, capsys):
    run_demo(tmp_path / "demo", seeds=2)
    models = 4 + 2  # alone, and merged
    assert len(quick_demo) == 2 * models
    for seed in range(2):
        folder = tmp_path / f"demo/seed{seed}"
        assert (folder / "merged/report.md").exists() and (folder / "merged/adapter_model.safetensors").exists()
        assert (tmp_path / f"demo/comparison/frontier-seed{seed}.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "demo/comparison/compare.json").read_text())
    whole = found["references"]["both, whole"]
    for seed, measured in found["variants"]["task arithmetic"]["replicates"].items():
        assert measured["rows"][0]["outcomes"] == whole[seed]["outcomes"]  # α = 1 is both adapters as they are
    assert "Best: " in capsys.readouterr().out
    run_demo(tmp_path / "demo", seeds=2)
    assert len(quick_demo) == 2 * models
    again = json.loads((tmp_path / "demo/comparison/compare.json").read_text())
    assert again["variants"] == found["variants"]


@pytest.mark.parametrize("seeds", [0, -1])
def test_bad_arguments(tmp_path, seeds):
    with pytest.raises(ValueError, match="seeds: expected at least 1"):
        run_demo(tmp_path / "demo", seeds=seeds)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        run_demo(tmp_path / "file")
