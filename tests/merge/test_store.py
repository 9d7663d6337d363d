"""Statistics on disk: reused, gone on with after a kill, added up, and never mixed."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from sst_merge import load_config, merge
from sst_merge.cli import main
from sst_merge.memory import estimate_memory
from sst_merge.problem import Problem
from sst_merge.store import PARTS, FisherFolder


def write_config(setup, path: Path, **changes) -> str:
    config = setup.config("sst", **changes.pop("parameters", {}))
    calibration = changes.pop("calibration", {})
    config["calibration"] = None if calibration is None else {**config["calibration"], **calibration}
    path.write_text(yaml.safe_dump({**config, **changes}))
    return str(path)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_fisher_and_merge_are_separate_and_a_second_merge_collects_nothing(setup, tmp_path, monkeypatch):
    config = write_config(setup, tmp_path / "config.yaml", parameters={"k": 0.3})
    assert main(["fisher", config, "--out", str(tmp_path / "fisher")]) == 0
    assert main(["merge", config, "--out", str(tmp_path / "together")]) == 0
    monkeypatch.setattr("sst_merge.fisher.Collector.collect", lambda *a: pytest.fail("collected again"))
    assert main(["merge", config, "--fisher", str(tmp_path / "fisher"), "--out", str(tmp_path / "apart")]) == 0
    for key, tensor in adapter(tmp_path / "together").items():
        assert torch.equal(tensor, adapter(tmp_path / "apart")[key])
    others = (
        {"k": 0.8},
        {"select": "soft", "damping": 0.1},
        {"select": "dof", "shrinkage": 0.5},
        {"select": "budget", "rho": 0.01},
        {"select": "signed", "rho": 0.01},
        {"fisher": "diagonal"},
    )
    for number, parameters in enumerate(others):
        other = write_config(setup, tmp_path / "other.yaml", parameters=parameters)
        fisher, out = str(tmp_path / "fisher"), str(tmp_path / f"other{number}")
        assert main(["merge", other, "--fisher", fisher, "--out", out]) == 0
        report = json.loads((tmp_path / f"other{number}/report.json").read_text())
        assert report["sequences"]["harm"] == {"found": 9, "held_out": 3} and report["fisher_dir"] == fisher


def test_gram_statistics_serve_every_representation(setup, tmp_path, monkeypatch):
    config = write_config(setup, tmp_path / "config.yaml", parameters={"fisher": "gram", "k": 0.5})
    assert main(["merge", config, "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert list(report["directions"]) == ["all modules"] and report["joint"]["cost"] > 0
    fresh = merge(setup.config("sst")).updates(1.0)
    monkeypatch.setattr("sst_merge.fisher.Collector.collect", lambda *a: pytest.fail("collected again"))
    reused = merge(setup.config("sst"), fisher_dir=tmp_path / "out.fisher").updates(1.0)
    for name, update in fresh.items():
        torch.testing.assert_close(reused[name].dense(), update.dense(), rtol=1e-4, atol=1e-5)


def test_killed_runs_end_bit_identical(setup, tmp_path):
    """SIGKILL at random moments, several times a run: 25 runs of each command (`TRIALS` for another number)."""
    config = write_config(setup, tmp_path / "config.yaml", calibration={"batch_size": 1}, parameters={"samples": 2})
    trials = os.environ.get("TRIALS", "25")
    program = [
        sys.executable,
        str(Path(__file__).with_name("interrupted_runs.py")),
        config,
        str(tmp_path / "runs"),
        trials,
    ]
    done = subprocess.run(
        program, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=900
    )
    assert done.returncode == 0, done.stderr
    for line, name in zip(done.stdout.splitlines(), ("fisher", "merge"), strict=True):
        command, equal, kills = line.split()
        assert (command, equal) == (name, trials) and int(kills) >= int(trials)


@pytest.mark.parametrize("collected", ["exact", "gram"])
def test_kronecker_fishers_are_had_from_what_is_there(setup, tmp_path, monkeypatch, collected):
    """Either approximation, K-FAC or EK-FAC, on either side, with its own shrinkage: as if it had been collected so."""
    config = setup.config("sst", fisher=collected)
    merge(config, out=tmp_path / "first")
    forms = (
        {"fisher": "kfac"},
        {"fisher": {"harm": "exact", "benign": "kfac"}, "approximation": "reduce", "shrinkage": {"harm": 0.2}},
        {"fisher": "ekfac", "shrinkage": 0.3, "shrinkage_target": "kronecker"},
        {"shrinkage": "ledoit_wolf"},
        {"shrinkage": "ledoit_wolf", "shrinkage_target": "kronecker"},
    )
    fresh = [merge(setup.config("sst", k=0.4, **form)) for form in forms]
    monkeypatch.setattr("sst_merge.fisher.Collector.collect", lambda *a: pytest.fail("collected again"))
    for result, form in zip(fresh, forms, strict=True):
        again = merge(setup.config("sst", k=0.4, **form), fisher_dir=tmp_path / "first.fisher")
        for name, update in again.updates(1.0).items():
            torch.testing.assert_close(update.dense(), result.updates(1.0)[name].dense(), rtol=1e-3, atol=1e-4)
        said = again.report["fishers"]["benign"]
        assert said["representation"] == again.problem.config.parameters.form("benign").representation
        assert 0 <= said["shrinkage"]["least"] <= said["shrinkage"]["most"] <= 1


def split_lines(path: Path, folder: Path) -> list[Path]:
    """The lines of a file, in two files."""
    lines = path.read_text().splitlines()
    halves = []
    for i, part in enumerate((lines[: len(lines) // 2], lines[len(lines) // 2 :])):
        halves.append(folder / f"{path.stem}{i}.jsonl")
        halves[-1].write_text("\n".join(part))
    return halves


@pytest.mark.parametrize("representation", ["exact", "gram", "diagonal", "kfac", {"harm": "kfac", "benign": "exact"}])
def test_parts_add_up(setup, tmp_path, capsys, representation):
    """Sums of both halves of the data: every part, weighed by its sequences."""
    harm, benign = split_lines(setup.harm, tmp_path), split_lines(setup.benign, tmp_path)
    folders = [str(tmp_path / f"part{i}") for i in (0, 1)]
    for folder, h, b in zip(folders, harm, benign, strict=True):
        data = {"harm": str(h), "benign": str(b)}
        parameters = {"fisher": representation}
        config = write_config(setup, tmp_path / "config.yaml", calibration=data, parameters=parameters)
        assert main(["fisher", config, "--out", folder]) == 0
    assert main(["fisher", "--add", *folders, "--out", str(tmp_path / "sum")]) == 0
    parts = [FisherFolder(f, json.loads((Path(f) / "fisher.json").read_text())).statistics() for f in folders]
    total = FisherFolder(tmp_path / "sum", json.loads((tmp_path / "sum/fisher.json").read_text())).statistics()
    for part in PARTS:
        ours, theirs = getattr(total, part), [getattr(p, part) for p in parts]
        assert ours.count == sum(t.count for t in theirs)
        for name in ours.first:
            means = sum(t.count * t.mean_gradient(name) for t in theirs) / ours.count
            torch.testing.assert_close(ours.mean_gradient(name), means, rtol=1e-5, atol=1e-7)
            if part != "origin" and not ours.representation.startswith("kfac"):  # whose product is no sum
                fishers = sum(t.count * t.fisher(name) for t in theirs) / ours.count
                torch.testing.assert_close(ours.fisher(name), fishers, rtol=1e-5, atol=1e-7)
            for kind in ours.approximations:
                sums, *halves = (x.factors[kind][name] for x in (ours, *theirs))
                for key, tensor in sums.tensors().items():
                    torch.testing.assert_close(tensor, halves[0].tensors()[key] + halves[1].tensors()[key])
            if name in ours.fourth or name in ours.rows:
                moments = sum(t._fourth_of([name]) for t in theirs)
                torch.testing.assert_close(ours._fourth_of([name]), moments, rtol=1e-5, atol=0.0)
    # the sum serves either half's configuration, and one without data
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    for number, change in enumerate((config, {k: v for k, v in config.items() if k != "calibration"})):
        (tmp_path / "again.yaml").write_text(yaml.safe_dump(change))
        out = tmp_path / f"out{number}"
        command = ["merge", str(tmp_path / "again.yaml"), "--fisher", str(tmp_path / "sum"), "--out", str(out)]
        assert main(command) == 0, capsys.readouterr().err
        assert ("held_out" in json.loads((out / "report.json").read_text())) == (number == 0)
    capsys.readouterr()
    assert main(["fisher", "--add", folders[0], folders[0], "--out", str(tmp_path / "twice")]) == 2
    assert "sequences of harm are in two" in capsys.readouterr().err and not (tmp_path / "twice").exists()


MIXED = {
    "another base": (lambda s, c: c.update(base_model=str(s.base.parent / "other")), "models.base"),
    "another adapter": (lambda s, c: c["models"][1]["parameters"].update(weight=0.5), "models.safety"),
    "other data": (lambda s, c: c["calibration"].update(harm=str(s.benign)), "8 of the 8 sequences of harm are not"),
    "another seed": (lambda s, c: c["parameters"].update(seed=3), "seed"),
    "other points": (lambda s, c: c["parameters"].update(points=[0.5]), "points"),
    "another dtype": (lambda s, c: c.update(dtype="float64"), "dtype"),
    "more held out": (lambda s, c: c["calibration"].update(held_out=0.5), "3 of the 6 sequences of harm_held are not"),
    "shorter sequences": (lambda s, c: c["calibration"].update(max_length=8), "sequences of harm are not"),
    "more samples": (lambda s, c: c["parameters"].update(samples=2), "samples"),
    "another patch": (lambda s, c: c["parameters"].update(patch="interpolate"), "patch"),
    "more than there is": (lambda s, c: c["parameters"].update(fisher="gram"), "representation"),
    "more of one side": (lambda s, c: c["parameters"].update(fisher={"benign": "gram"}), "representation"),
}


def test_statistics_of_another_normalisation_are_refused(setup, tmp_path, capsys):
    config = write_config(setup, tmp_path / "config.yaml")
    assert main(["fisher", config, "--out", str(tmp_path / "fisher")]) == 0
    known = json.loads((tmp_path / "fisher/fisher.json").read_text())
    statistics = FisherFolder(tmp_path / "fisher", known).statistics()
    other = {"normalisation": "token", "data": {part: [part] for part in known["data"]}}
    tokens = FisherFolder(tmp_path / "tokens", {**known, **other})
    for part in PARTS:
        tokens.save(part, getattr(statistics, part))
    folders = [str(tmp_path / "fisher"), str(tmp_path / "tokens")]
    assert main(["fisher", "--add", *folders, "--out", str(tmp_path / "sum")]) == 2
    assert 'normalisation is "token" there, "sequence" here' in capsys.readouterr().err
    assert not (tmp_path / "sum").exists()


@pytest.mark.parametrize("fault", MIXED)
def test_statistics_of_another_run_are_refused(setup, tmp_path, capsys, fault):
    config = setup.config("sst")
    config["models"][1]["parameters"] = {}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["fisher", str(path), "--out", str(tmp_path / "fisher")]) == 0
    change, named = MIXED[fault]
    if fault == "another base":
        shutil.copytree(setup.base, setup.base.parent / "other", dirs_exist_ok=True)
        weights = load_file(setup.base / "model.safetensors")
        weights["model.norm.weight"] = 2 * weights["model.norm.weight"]
        save_file(weights, setup.base.parent / "other/model.safetensors", metadata={"format": "pt"})
    change(setup, config)
    path.write_text(yaml.safe_dump(config))
    before = {p.name: p.read_bytes() for p in (tmp_path / "fisher").iterdir()}
    command = ["merge", str(path), "--fisher", str(tmp_path / "fisher"), "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert main(command) == 2
    error = capsys.readouterr().err
    assert re.search(rf"another run: .*{named}", error), error
    assert {p.name: p.read_bytes() for p in (tmp_path / "fisher").iterdir()} == before and not (
        tmp_path / "out"
    ).exists()


def edit_metadata(file: Path, **changes) -> None:
    """Rewrite what a part says of itself."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        metadata = json.loads(opened.metadata()["sst_merge"])
    save_file(load_file(file), file, metadata={"sst_merge": json.dumps({**metadata, **changes})})


DAMAGE = {
    "cut": (lambda f: f.write_bytes(f.read_bytes()[:-100]), "damaged"),
    "no metadata": (lambda f: save_file(load_file(f), f), "damaged"),
    "of another run": (lambda f: edit_metadata(f, run="0"), "another run"),
    "count of zero": (lambda f: edit_metadata(f, count=0.0), "sums over 0"),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_damaged_statistics_are_named(setup, tmp_path, capsys, fault):
    config = write_config(setup, tmp_path / "config.yaml")
    assert main(["fisher", config, "--out", str(tmp_path / "fisher")]) == 0
    change, message = DAMAGE[fault]
    change(tmp_path / "fisher/benign.safetensors")
    assert main(["merge", config, "--fisher", str(tmp_path / "fisher"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "benign.safetensors" in error and message in error and "Traceback" not in error


def test_a_foreign_folder_is_left_alone(setup, tmp_path, capsys):
    config = write_config(setup, tmp_path / "config.yaml")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a").write_text("mine")
    assert main(["fisher", config, "--out", str(tmp_path / "notes")]) == 2
    assert "new or empty folder" in capsys.readouterr().err and [p.name for p in (tmp_path / "notes").iterdir()] == [
        "a"
    ]
    assert main(["fisher", config, "--add", "x", "y", "--out", str(tmp_path / "z")]) == 2
    assert main(["fisher", "--out", str(tmp_path / "z")]) == 2
    assert main(["fisher", "--add", str(tmp_path / "notes"), str(tmp_path), "--out", str(tmp_path / "z")]) == 2
    assert "fisher.json" in capsys.readouterr().err


def limit_files(size: int) -> None:
    """No file may grow beyond `size`: to a writer the same as a disk that is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("arguments", [[], ["--merge-into-base"]])
def test_a_full_disk_leaves_no_output(setup, tmp_path, arguments):
    config = write_config(setup, tmp_path / "config.yaml", merge_method="task_arithmetic", calibration=None)
    before = {p.name for p in tmp_path.iterdir()}
    command = [sys.executable, "-m", "sst_merge.cli", "merge", config, "--out", str(tmp_path / "out"), *arguments]
    full = subprocess.run(command, capture_output=True, text=True, preexec_fn=lambda: limit_files(4000))
    assert full.returncode == 2 and "could not be written" in full.stderr, full.stderr
    assert "Traceback" not in full.stderr and {p.name for p in tmp_path.iterdir()} == before


def test_a_full_disk_loses_nothing(setup, tmp_path):
    config = write_config(setup, tmp_path / "config.yaml", calibration={"batch_size": 1})
    command = [sys.executable, "-m", "sst_merge.cli", "fisher", config, "--out", str(tmp_path / "fisher")]
    full = subprocess.run(command, capture_output=True, text=True, preexec_fn=lambda: limit_files(4000))
    assert full.returncode == 2 and "could not be written" in full.stderr and "Traceback" not in full.stderr, (
        full.stderr
    )
    assert not [p for p in (tmp_path / "fisher").iterdir() if ".new" in p.name]
    assert main(["fisher", config, "--out", str(tmp_path / "fisher")]) == 0
    assert main(["fisher", config, "--out", str(tmp_path / "unbroken")]) == 0
    for part in PARTS:
        name = f"{part}.safetensors"
        assert (tmp_path / "fisher" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()


def test_generated_answers_are_kept_with_the_statistics(setup, tmp_path, monkeypatch):
    """Prompts alone: the second merge generates nothing, and measures on the same answers."""
    prompts = [json.dumps({"prompt": f"w{i} w{i + 1}"}) for i in range(12)]
    setup.harm.write_text("\n".join(prompts))
    config = write_config(setup, tmp_path / "config.yaml", calibration={"max_new_tokens": 5})
    assert main(["merge", config, "--out", str(tmp_path / "first")]) == 0
    monkeypatch.setattr("sst_merge.calibration.generate_answers", lambda *a: pytest.fail("generated again"))
    again = ["merge", config, "--fisher", str(tmp_path / "first.fisher"), "--out", str(tmp_path / "second")]
    assert main(again) == 0
    first, second = (json.loads((tmp_path / out / "report.json").read_text()) for out in ("first", "second"))
    assert first["held_out"] == second["held_out"] and any("answers generated" in r for r in second["remarks"])
    next((tmp_path / "first.fisher").glob("answers-harm-*.json")).write_text("[[1")
    assert main([*again[:-1], str(tmp_path / "third")]) == 2


def test_answers_of_every_part_are_kept_in_the_sum(setup, tmp_path, monkeypatch):
    folders = []
    for i in (0, 1):
        prompts = [json.dumps({"prompt": f"w{j} w{j + 20 * i}"}) for j in range(1, 7)]
        setup.harm.write_text("\n".join(prompts))
        setup.benign.write_text("\n".join(json.dumps({"text": f"w{j} w{i} w{j + 3}"}) for j in range(1, 7)))
        config = write_config(setup, tmp_path / "config.yaml", calibration={"max_new_tokens": 5})
        folders.append(str(tmp_path / f"part{i}"))
        assert main(["fisher", config, "--out", folders[-1]]) == 0
    assert main(["fisher", "--add", *folders, "--out", str(tmp_path / "sum")]) == 0
    monkeypatch.setattr("sst_merge.calibration.generate_answers", lambda *a: pytest.fail("generated again"))
    assert main(["merge", config, "--fisher", str(tmp_path / "sum"), "--out", str(tmp_path / "out")]) == 0


def test_other_coordinates_are_refused(setup, tmp_path, capsys):
    """As if another machine had found other singular vectors: τ has another core."""
    config = write_config(setup, tmp_path / "config.yaml")
    assert main(["fisher", config, "--out", str(tmp_path / "fisher")]) == 0
    file = tmp_path / "fisher/patch.safetensors"
    cores = load_file(file)
    name = sorted(cores)[-1]
    cores[name] = cores[name].flip(0).contiguous()
    save_file(cores, file)
    assert main(["merge", config, "--fisher", str(tmp_path / "fisher"), "--out", str(tmp_path / "out")]) == 2
    assert f"other coordinates of {name}" in capsys.readouterr().err


@pytest.mark.parametrize("lies", ["statistics", "data"])
def test_output_never_replaces_statistics_or_data(setup, tmp_path, capsys, lies):
    config = write_config(setup, tmp_path / "config.yaml", merge_method="task_arithmetic", parameters={})
    assert main(["merge", config, "--out", str(tmp_path / "out")]) == 0
    changes = {}
    if lies == "data":
        shutil.copy(setup.harm, tmp_path / "out/mine.jsonl")
        changes = {"calibration": {"harm": str(tmp_path / "out/mine.jsonl")}}
    config = write_config(setup, tmp_path / "config.yaml", **changes)
    fisher = [] if lies == "data" else ["--fisher", str(tmp_path / "out/statistics")]
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert main(["merge", config, "--out", str(tmp_path / "out"), "--overwrite", *fisher]) == 2
    assert "holds, or lies in" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_the_memory_estimate_knows_the_size_of_the_sums(setup, tmp_path):
    for representation in ("exact", "gram", "diagonal", "kfac", {"harm": "kfac", "benign": "exact"}):
        problem = Problem(load_config(setup.config("sst", fisher=representation, samples=2)))
        statistics = problem.curvature(problem.config.parameters).statistics
        parts = [getattr(statistics, part) for part in PARTS[:4]]
        kept = [t for p in parts for t in {**p.second, **p.rows}.values()]
        factors = [f for p in parts for modules in p.factors.values() for f in modules.values()]
        kept += [t for f in factors for t in (f.grad_factor, f.input_factor)]
        held = sum(t.numel() * t.element_size() for t in kept)
        bases = {name: problem.bases[name] for name in statistics.harm.first}
        collected = problem.config.parameters.collected[1]
        assert estimate_memory(problem, bases, collected, "core")["Fisher sums"] == held


def test_what_a_killed_process_left_is_no_obstacle(setup, tmp_path):
    """Names as safetensors and we give them while a file is written; at every stage of a collection."""
    config, fisher = write_config(setup, tmp_path / "config.yaml"), tmp_path / "fisher"
    fisher.mkdir()
    for _ in range(2):  # before the first part, and beside whole ones
        for name in (".tmpPMiIRn", ".harm.safetensors.ab12.new"):
            (fisher / name).write_bytes(b"1")
        assert main(["fisher", config, "--out", str(fisher)]) == 0
        assert not [file.name for file in fisher.iterdir() if file.name.startswith(".")]
