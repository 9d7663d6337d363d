"""Collection by two processes against one, with FSDP2, interrupted, and with a process that dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import scipy.linalg
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file
from test_fisher import NAMES, make_model, make_problem, make_sequences
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from two_processes import WORLD, main, run

import sst_merge.cli
from sst_merge import directions, merge
from sst_merge.adapters import read_adapter
from sst_merge.directions import find_directions
from sst_merge.distributed import RankStopped, together
from sst_merge.fisher import CollectionSettings, Collector, Part, collect_statistics
from sst_merge.mixture import Statistics
from sst_merge.settings import SstParameters
from sst_merge.store import PARTS, FisherFolder
from sst_merge.sums import FisherSums
from sst_merge.tasks import Task

FINGERPRINT = {"representation": "exact", "data": {}}


def collected(model, settings: CollectionSettings, folder: FisherFolder | None = None, count: int = 7) -> Statistics:
    """Statistics of `count` sequences each, a quarter of them held out."""
    bases, origin, patch = make_problem()
    sequences = make_sequences([5, 9, 3, 6, 7, 4, 8][:count])
    tasks = [Task("", 1.0, sequences[:-2], sequences[-2:])]
    with Collector(model, bases, origin, patch, settings) as collector:
        return collect_statistics(collector, tasks, tasks, folder)


def alone(model, settings: CollectionSettings, sequences: list, sampled: bool) -> FisherSums:
    """One part by this process, whatever the number of processes."""
    bases, origin, patch = make_problem()
    points = dict(zip(settings.points, settings.point_weights, strict=True))
    with Collector(model, bases, origin, patch, settings) as collector:
        return collector.collect(Part("alone", sequences, sampled, points, settings.representations[0]))


def check(statistics: Statistics, settings: CollectionSettings, count: int = 7) -> None:
    """Both Fishers equal those of one process."""
    sequences = make_sequences([5, 9, 3, 6, 7, 4, 8][:count])
    for kind, sampled in (("harm", False), ("benign", True)):
        for suffix, part in (("", sequences[:-2]), ("_held", sequences[-2:])):
            expected, found = alone(make_model(), settings, part, sampled), getattr(statistics, kind + suffix)
            assert found.count == pytest.approx(expected.count)
            for name in NAMES:
                assert (name in found.rows) == (name in expected.rows)
                torch.testing.assert_close(found.fisher(name), expected.fisher(name), rtol=1e-9, atol=1e-12)
                torch.testing.assert_close(
                    found.mean_gradient(name), expected.mean_gradient(name), rtol=1e-9, atol=1e-12
                )


def same_bits(first: Statistics, second: Statistics) -> bool:
    """Whether all tensors are equal."""
    pairs = ((getattr(first, part).tensors(), getattr(second, part).tensors()) for part in PARTS)
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


def equal_to_one_process(rank: int, folder: Path) -> None:
    """Every representation; 14 or 6 rows of n = 6 coordinates; fewer batches than ranks."""
    for representation in ("exact", "gram", "diagonal", "kfac_reduce"):
        for count, size in ((7, 2), (7, 8), (4, 1)):
            settings = CollectionSettings((0.25, 0.5), (0.75, 0.25), (representation, representation), size)
            with together():
                statistics = collected(make_model(), settings, count=count)
            check(statistics, settings, count)
            assert same_bits(statistics, collected(make_model(), settings, count=count))


def fsdp(rank: int, folder: Path) -> None:
    """Every layer sharded; the ranks have 3 and 2 batches."""
    model = make_model()
    for layer in model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (WORLD,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    settings = CollectionSettings((0.5,), (1.0,), batch_size=1)
    with together():
        check(collected(model, settings), settings)


def solves(rank: int, folder: Path) -> None:
    """Pencils dealt over the ranks: the eigenvalues of scipy, module by module, on both."""
    settings = CollectionSettings(batch_size=4)
    statistics, (_, _, patch) = collected(make_model(), settings), make_problem()
    own, solve = [], directions.solve_pencils

    def seen(statistics, patch, *rest) -> Iterator:
        own.extend(patch)
        return solve(statistics, patch, *rest)

    with pytest.MonkeyPatch.context() as monkey, together():
        monkey.setattr(directions, "solve_pencils", seen)
        found, gamma = find_directions(statistics, patch, SstParameters())
    assert list(found) == list(NAMES) and own == [list(NAMES)[rank]]
    for name in NAMES:
        a, b = statistics.harm.fisher(name), statistics.benign.fisher(name) + gamma * torch.eye(6).double()
        values, vectors = found[name].values, found[name].vectors
        assert found[name].names == (name,)
        numpy.testing.assert_allclose(values, scipy.linalg.eigh(a, b, eigvals_only=True)[::-1], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(a @ vectors, b @ vectors * values, rtol=1e-7, atol=1e-7)


def groups(rank: int, folder: Path) -> None:
    """A group of modules after another, by both ranks."""
    settings = CollectionSettings(batch_size=1, groups=2)
    with together():
        grouped = collected(make_model(), settings, FisherFolder(folder / "groups", FINGERPRINT))
    assert same_bits(grouped, collected(make_model(), CollectionSettings(batch_size=1)))
    files = [f"{part}.group{i}of2.safetensors" for part in PARTS for i in range(2)]
    assert sorted(file.name for file in (folder / "groups").glob("*.safetensors")) == sorted(files)


class Interrupted(Exception):
    """In a test."""


def interrupted(rank: int, folder: Path) -> None:
    """Stopped after each number of batches; gone on with by as many processes, and left for one."""
    settings = CollectionSettings(batch_size=1)
    unbroken = collected(make_model(), settings)
    for limit in range(1, 8):
        path, saved = folder / f"broken{limit}", 0

        def save_always(self, part, sums, batches, limit=limit) -> None:
            nonlocal saved
            self.save(part, sums, batches)
            saved += 1
            if saved == limit:
                raise Interrupted

        with pytest.MonkeyPatch.context() as patch, pytest.raises((Interrupted, RankStopped)):
            patch.setattr(FisherFolder, "save_now_and_then", save_always)
            with together():
                collected(make_model(), settings, FisherFolder(path, FINGERPRINT))
        dist.barrier()
        if limit % 2:
            with together():
                resumed = collected(make_model(), settings, FisherFolder(path, FINGERPRINT))
            assert same_bits(resumed, unbroken)
            assert same_bits(FisherFolder(path, FINGERPRINT).statistics(), unbroken)
            assert not list(path.glob("*rank*"))


def failing(rank: int, folder: Path) -> None:
    """An error of one rank is told by the other."""
    with pytest.raises(ValueError if rank else RankStopped) as raised, together():
        if rank:
            raise ValueError("bad data")
        collected(make_model(), CollectionSettings(batch_size=1))
    assert "bad data" in str(raised.value)
    if rank == 0:
        assert str(raised.value).startswith("rank 1 stopped (ValueError: bad data)")


CASES = {f.__name__: f for f in (equal_to_one_process, fsdp, solves, groups, interrupted, failing)}


@pytest.mark.parametrize("case", ["equal_to_one_process", "fsdp", "solves", "groups", "failing"])
def test_two_processes(tmp_path, case):
    run(__file__, case, tmp_path, seconds=240)


def test_interrupted_shares_are_gone_on_with_by_any_number_of_processes(tmp_path):
    run(__file__, "interrupted", tmp_path, seconds=240)
    settings = CollectionSettings(batch_size=1)
    for limit in (2, 4, 6):
        path = tmp_path / f"broken{limit}"
        assert list(path.glob("*.rank*of2.safetensors"))
        check(collected(make_model(), settings, FisherFolder(path, FINGERPRINT)), settings)
        assert not list(path.glob("*rank*"))


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    """Two processes of this file by torch's launcher."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD), __file__]
    path = os.pathsep.join([str(Path(__file__).parents[1] / "collect"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launch, *arguments], env=environment, capture_output=True, text=True, timeout=300)


def test_a_dying_rank_is_named_and_the_next_run_goes_on(setup, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**setup.config("sst"), "dtype": "bfloat16"}))
    whole, broken = (str(tmp_path / name) for name in ("whole", "broken"))
    fine = torchrun("cli", "fisher", str(config), "--out", whole)
    assert fine.returncode == 0, fine.stderr
    assert fine.stdout.count("wrote") == 1
    killed = torchrun("killed", "fisher", str(config), "--out", broken)
    assert killed.returncode != 0
    assert "sst-merge: error: rank 1 stopped (no sign of life for" in killed.stderr
    assert (tmp_path / "broken" / "harm.safetensors").is_file()
    resumed = torchrun("cli", "fisher", str(config), "--out", broken)
    assert resumed.returncode == 0, resumed.stderr
    for part in PARTS:
        first, second = (load_file(tmp_path / name / f"{part}.safetensors") for name in ("whole", "broken"))
        assert all(torch.equal(first[key], second[key]) for key in first), part


def test_a_merge_by_two_processes_is_written_once(setup, tmp_path):
    config, out = tmp_path / "config.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump(setup.config("sst", k=0.5)))
    merged = torchrun("cli", "merge", str(config), "--out", str(out), "--overwrite")
    assert merged.returncode == 0, merged.stderr
    assert merged.stdout.count("wrote") == 1 and (out / "report.html").is_file()
    found, expected = read_adapter(out).updates, merge(setup.config("sst", k=0.5)).updates(1.0)
    for name, update in expected.items():
        torch.testing.assert_close(found[name].dense(), update.dense(), rtol=1e-3, atol=1e-4)


def killed_in_the_second_part() -> None:
    """Rank 1 kills itself in the middle of the benign data."""
    steps = 0
    one_batch = Collector._one_batch

    def step(self, *args) -> None:
        nonlocal steps
        steps += 1
        if os.environ["RANK"] == "1" and steps == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        one_batch(self, *args)

    Collector._one_batch = step


if __name__ == "__main__":
    if sys.argv[1] in CASES:
        main(CASES)
    if sys.argv[1] == "killed":
        killed_in_the_second_part()
    sys.exit(sst_merge.cli.main(sys.argv[2:]))
