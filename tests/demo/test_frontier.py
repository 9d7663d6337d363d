"""The sweep measures the very models it names, leaves the base as it was, and its summary picks what it says."""

from __future__ import annotations

import json

import pytest
import torch

from sst_merge.demo import run
from sst_merge.demo.frontier import Measured, merged_weights, summarise
from sst_merge.demo.run import run_demo
from sst_merge.demo.train import Phase, Recipe


def test_summary_picks_the_best_score_and_the_most_utility_at_90_percent():
    rows = [
        Measured("a", 0.5, 0.2, 0.0, 0.9, 0.6),
        Measured("a", 1.0, 0.9, 0.1, 0.5, 0.8),
        Measured("a", 1.5, 0.95, 0.3, 0.6, 0.7),
        Measured("b", 1.0, 0.8, 0.0, 0.7, 0.75),
    ]
    a, b = summarise(rows)
    assert (a["best score"], a["at alpha"], a["utility"]) == (0.8, 1.0, 0.5)
    assert (a["utility at 90% refusal"], a["over-refusal there"]) == (0.6, 0.3)
    assert b["utility at 90% refusal"] is None and b["best score"] == 0.75


def test_merged_weights_add_and_restore():
    class Problem:
        model = torch.nn.Sequential(torch.nn.Linear(3, 2))

    before = Problem.model[0].weight.detach().clone()
    delta = torch.ones(2, 3)
    with pytest.raises(KeyError), merged_weights(Problem, {"0": delta}) as model:
        assert torch.equal(model[0].weight, before + delta)
        raise KeyError
    assert torch.equal(Problem.model[0].weight, before)


@pytest.fixture
def quick_demo(monkeypatch):
    """The demo with next to no training and two methods."""
    tiny = Recipe(hidden_size=32, intermediate_size=32, layers=1, heads=2, base=Phase(4, 8, 1e-3))
    tiny = Recipe(**{**tiny.__dict__, "utility": Phase(3, 8, 1e-3), "safety": Phase(3, 8, 1e-3)})
    train = run.train_models
    monkeypatch.setattr(run, "train_models", lambda world, folder, seed: train(world, folder, seed, tiny))
    runs = {"task arithmetic": ("task_arithmetic", {}), "SST exact": ("sst", {})}
    monkeypatch.setattr(run, "RUNS", runs)
    sweep = run.sweep
    counted = []

    def counting(config, measure):
        counted.append(config)
        return sweep(config, measure, (0.0, 1.0), runs)

    monkeypatch.setattr(run, "sweep", counting)
    return counted


def test_demo_from_nothing_and_from_its_cache(tmp_path, quick_demo, capsys):
    run_demo(tmp_path / "demo", seeds=2)
    assert len(quick_demo) == 2
    for seed in range(2):
        folder = tmp_path / f"demo/seed{seed}"
        assert (folder / "merged/report.md").exists() and (folder / "merged/adapter_model.safetensors").exists()
        assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG")
        frontier = json.loads((folder / "frontier.json").read_text())
        alone = {row["label"]: row for row in frontier["alone"]}
        zero = [row for row in frontier["rows"] if row["alpha"] == 0.0]
        for row in zero:  # α = 0 is the utility adapter by itself, whatever the method
            assert row["utility"] == alone["utility adapter alone"]["utility"]
    text = (tmp_path / "demo/demo.md").read_text()
    assert "task arithmetic" in text and "2 seeds" in text
    run_demo(tmp_path / "demo", seeds=2)
    assert len(quick_demo) == 2 and (tmp_path / "demo/demo.md").read_text() == text


@pytest.mark.parametrize("seeds", [0, -1])
def test_bad_arguments(tmp_path, seeds):
    with pytest.raises(ValueError, match="seeds: expected at least 1"):
        run_demo(tmp_path / "demo", seeds=seeds)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        run_demo(tmp_path / "file")
