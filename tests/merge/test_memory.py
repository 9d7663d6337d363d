"""`memory`: sums that do not fit are collected in groups of modules, to the same bits."""

from __future__ import annotations

import re

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_fisher import make_model, make_problem, make_sequences

from sst_merge import load_config, merge
from sst_merge.cli import main
from sst_merge.coordinates import weight_basis
from sst_merge.fisher import CollectionSettings, Collector, collect_statistics
from sst_merge.memory import estimate_memory, partition
from sst_merge.part_files import begun_pieces
from sst_merge.problem import Problem
from sst_merge.store import PARTS, FisherFolder
from sst_merge.tasks import Task

FINGERPRINT = {"representation": "exact", "data": {}}


def collected(settings: CollectionSettings, folder: FisherFolder | None):
    bases, origin, patch = make_problem()
    sequences = make_sequences([5, 9, 3, 6, 7])
    with Collector(make_model(), bases, origin, patch, settings) as collector:
        tasks = [Task("", 1.0, sequences[:3], sequences[3:])]
        return collect_statistics(collector, tasks, tasks, folder)


@pytest.mark.parametrize("representation", ["exact", "gram", "diagonal", "kfac_expand"])
@pytest.mark.parametrize("points", [((0.25, 0.5), (0.5, 0.5)), ((0.0,), (1.0,))])
def test_groups_give_the_same_bits(tmp_path, representation, points):
    settings = CollectionSettings(*points, (representation, representation), 2)
    whole = collected(settings, None)
    for groups in (1, 2):
        path = tmp_path / str(groups)
        grouped = CollectionSettings(*points, (representation, representation), 2, groups=groups)
        for statistics in (
            collected(grouped, FisherFolder(path, FINGERPRINT)),
            FisherFolder(path, FINGERPRINT).statistics(),
        ):
            for part in PARTS:
                expected, found = getattr(whole, part).tensors(), getattr(statistics, part).tensors()
                assert expected.keys() == found.keys()
                assert all(torch.equal(expected[key], found[key]) for key in expected)
                assert getattr(whole, part).count == getattr(statistics, part).count
        assert FisherFolder(path, FINGERPRINT).complete
        assert (path / "harm.group0of2.safetensors").is_file() == (groups == 2)


def test_groups_are_gone_on_with_after_a_kill(tmp_path, monkeypatch):
    settings = CollectionSettings(batch_size=1, groups=2)
    whole, steps, one_batch = collected(CollectionSettings(batch_size=1), None), 0, Collector._one_batch

    def step(self, *args) -> None:
        nonlocal steps
        steps += 1
        if steps == 21:  # of 12 for harm and as many for benign, in the second group of the latter
            raise KeyboardInterrupt
        one_batch(self, *args)

    monkeypatch.setattr(Collector, "_one_batch", step)
    with pytest.raises(KeyboardInterrupt):
        collected(settings, FisherFolder(tmp_path, FINGERPRINT))
    assert not FisherFolder(tmp_path, FINGERPRINT).complete
    with pytest.raises(ValueError, match=r"benign was begun in groups of modules, 2 in number, .* asks for 3: give"):
        collected(CollectionSettings(batch_size=1, groups=3), FisherFolder(tmp_path, FINGERPRINT))
    resumed = collected(CollectionSettings(batch_size=1, groups=0), FisherFolder(tmp_path, FINGERPRINT))
    assert (tmp_path / "benign.group1of2.safetensors").is_file() and (tmp_path / "origin.safetensors").is_file()
    for part in PARTS:
        expected, found = getattr(whole, part).tensors(), getattr(resumed, part).tensors()
        assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_groups_are_known_by_a_share_of_the_first(tmp_path):
    """Killed in the first of three groups, two processes leave nothing but their shares of it."""
    for name in ("harm.group0of3.rank1of2", "harm-a.group1of4", "harm-a.groups_of_7"):
        (tmp_path / f"{name}.safetensors").touch()
    assert begun_pieces(tmp_path, "harm") == [f"harm.group{i}of3" for i in range(3)]
    assert begun_pieces(tmp_path, "harm-a") == [f"harm-a.group{i}of4" for i in range(4)]
    assert begun_pieces(tmp_path, "benign") == []


def test_a_bound_makes_groups_and_one_too_low_is_refused_with_advice(setup, tmp_path, capsys):
    config = setup.config("diagonal_sst")
    problem = Problem(load_config(config))
    patch = problem.curvature(problem.config.parameters).patch
    capsys.readouterr()
    bases = {name: weight_basis(problem.updates(name)[0]) for name in patch}
    estimate = estimate_memory(problem, bases, ("diagonal", "diagonal"), "weight")
    beside = sum(estimate.values()) - estimate["Fisher sums"]
    bound = beside + int(0.6 * 4 * sum(basis.n for basis in bases.values()))  # of the sums of one part
    unbound = merge(config).updates(1.0)
    capsys.readouterr()
    bounded = merge(config, memory=bound, out=tmp_path / "out")
    assert re.search(rf"memory: {len(patch)} modules in [2-4] groups, each by its own passes", capsys.readouterr().err)
    for name, update in bounded.updates(1.0).items():
        assert torch.equal(update.dense(), unbound[name].dense())
    assert load_file(next((tmp_path / "out.fisher").glob("harm.group0of*")))
    with pytest.raises(
        ValueError, match=r"memory: .* are needed, .* are there; activations: lower calibration.batch_size"
    ):
        merge(config, memory="1KiB", fisher_dir=tmp_path / "other")
    with pytest.raises(ValueError, match="with a folder of statistics"):
        merge(config, memory=bound)


def test_sizes_are_read_and_nonsense_is_refused(setup, tmp_path, capsys):
    for text, size in (("20GiB", 20 * 2**30), ("1.5 MB", 1.5e6), ("7KB", 7e3), (4096, 4096), ("2T", 2e12), ("12B", 12)):
        assert load_config({**setup.config("sst"), "memory": text}).memory_bytes == size
    for text in ("lots", "-1GB", "5 GiBB", ""):
        with pytest.raises(ValueError, match="memory: expected a size such as 20GiB"):
            load_config({**setup.config("sst"), "memory": text})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(setup.config("sst")))
    assert main(["fisher", str(path), "--out", str(tmp_path / "f"), "--memory", "1KB"]) == 2
    assert "are there" in capsys.readouterr().err


def test_partition_keeps_order_and_balances():
    sizes = {"a": 5, "b": 1, "c": 1, "d": 1, "e": 4}
    assert partition(sizes, 1) == (tuple("abcde"),)
    assert partition(sizes, 2) == (("a", "b"), ("c", "d", "e"))
    assert partition(sizes, 3) == (("a",), ("b", "c", "d"), ("e",))
    assert partition(sizes, 5) == tuple((name,) for name in sizes)
