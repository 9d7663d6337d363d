"""The command line on bad input: a message with the remedy, a non-zero exit, nothing half-written."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from sst_merge.cli import main


def run_merge(setup, tmp_path: Path, capsys, *arguments: str, method: str = "sst", **changes) -> tuple[int, str]:
    """Exit code and standard error of `sst-merge merge`, after checking that failure leaves nothing behind."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**setup.config(method), **changes}))
    before = {p.name for p in tmp_path.iterdir()}
    code = main(["merge", str(path), "--out", str(tmp_path / "out"), *arguments])
    if code:
        assert {p.name for p in tmp_path.iterdir()} - {"out.fisher"} == before - {"out.fisher"}
    return code, capsys.readouterr().err


def edit_weights(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors, sorted(tensors)[0])
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)


def edit_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncate(setup) -> None:
    path = setup.safety / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


BAD_ADAPTERS = {
    "missing weights": (lambda s: (s.safety / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
    "missing folder": (lambda s: shutil.rmtree(s.safety), str),
    "truncated weights": (truncate, "adapter_model.safetensors"),
    "NaN": (lambda s: edit_weights(s.safety, lambda t, k: t[k].fill_(torch.nan)), "NaN or infinity"),
    "infinity": (lambda s: edit_weights(s.utility, lambda t, k: t[k][0].fill_(torch.inf)), "NaN or infinity"),
    "another width": (
        lambda s: edit_weights(s.safety, lambda t, k: t.update({k: torch.zeros(len(t[k]), 7)})),
        "7",
    ),
    "another base": (lambda s: edit_config(s.safety, base_model_name_or_path="somewhere/else"), "somewhere/else"),
    "DoRA": (lambda s: edit_config(s.safety, use_dora=True), "DoRA|dora"),
    "no LoRA": (lambda s: edit_config(s.safety, peft_type="IA3"), "IA3"),
}


@pytest.mark.parametrize("fault", BAD_ADAPTERS)
def test_bad_adapters(setup, tmp_path, capsys, fault):
    spoil, message = BAD_ADAPTERS[fault]
    spoil(setup)
    code, error = run_merge(setup, tmp_path, capsys)
    assert code == 2 and error.startswith("sst-merge: error: ")
    wanted = str(setup.safety) if message is str else message
    assert any(word in error for word in wanted.split("|")), error
    assert "Traceback" not in error


def test_adapters_that_do_not_fit_the_base(setup, gpt2_dir, tmp_path, capsys):
    for folder in (setup.utility, setup.safety):
        edit_config(folder, base_model_name_or_path=str(gpt2_dir))
    code, error = run_merge(setup, tmp_path, capsys, base_model=str(gpt2_dir))
    assert code == 2 and "q_proj" in error


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no example"),
        ([{"prompt": "w1", "response": "w2"}], "at least 2"),
        ([{"prompt": "w1 " * 40, "response": "w2"}] * 3, "none of the 3 calibration examples"),
        ([{"prompt": "w1", "answer": "w2"}] * 3, "line 1"),
        ([{"prompt": "w1"}] * 3, "leaves no room"),
    ],
)
@pytest.mark.parametrize("kind", ["harm", "benign"])
def test_bad_calibration(setup, tmp_path, capsys, kind, lines, message):
    getattr(setup, kind).write_text("\n".join(json.dumps(line) for line in lines))
    code, error = run_merge(setup, tmp_path, capsys)
    assert code == 2 and message in error and f"calibration.{kind}" in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": {"k": 10**6, "scope": "global"}}, "the model has n = "),
        ({"parameters": {"k": 10**6, "scope": "module"}}, "module 'model.layers.0"),
        ({"parameters": {"alpha": 11}}, "alpha"),
        ({"base_model": "/nowhere"}, "base_model"),
        ({"dtype": "float8"}, "dtype"),
    ],
)
def test_bad_parameters(setup, tmp_path, capsys, changes, message):
    code, error = run_merge(setup, tmp_path, capsys, **changes)
    assert code == 2 and message in error


def test_existing_output_is_kept_unless_told_otherwise(setup, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_merge(setup, tmp_path, capsys)[0] == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    code, error = run_merge(setup, tmp_path, capsys)
    assert code == 2 and "--overwrite" in error
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert run_merge(setup, tmp_path, capsys, "--overwrite", method="task_arithmetic", parameters={})[0] == 0
    assert json.loads((out / "report.json").read_text())["merge_method"] == "task_arithmetic"
    # a failure with --overwrite leaves the old output as it was
    code, _ = run_merge(setup, tmp_path, capsys, "--overwrite", parameters={"k": 10**6})
    assert code == 2 and json.loads((out / "report.json").read_text())["merge_method"] == "task_arithmetic"


def test_memory_is_printed_and_a_run_that_cannot_fit_is_refused(setup, tmp_path, capsys, monkeypatch):
    assert run_merge(setup, tmp_path, capsys)[0] == 0
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out.fisher")
    monkeypatch.setattr("sst_merge.memory.available_memory", lambda device: 1000)
    code, error = run_merge(setup, tmp_path, capsys)
    assert code == 2 and "are needed" in error and "batch_size" in error


def test_output_never_replaces_an_input(setup, tmp_path, capsys):
    before = {p: p.read_bytes() for p in setup.safety.rglob("*") if p.is_file()}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(setup.config("task_arithmetic")))
    for out in (setup.safety, setup.safety / "inside", setup.safety.parent):
        assert main(["merge", str(path), "--out", str(out), "--overwrite"]) == 2
        assert "the input" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in setup.safety.rglob("*") if p.is_file()} == before


def test_failure_leaves_no_parent_folders(setup, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(setup.config("sst", k=10**6)))
    assert main(["merge", str(path), "--out", str(tmp_path / "new/deep/out")]) == 2
    assert "got k" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "new/deep").iterdir()] == ["out.fisher"]  # what was gathered is kept
    path.write_text(yaml.safe_dump(setup.config("task_arithmetic") | {"base_model": str(setup.base / "absent")}))
    assert main(["merge", str(path), "--out", str(tmp_path / "other/deep/out")]) == 2
    assert not (tmp_path / "other").exists()


def test_damaged_bases(setup, base_dir, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(base_dir, broken)
    for folder in (setup.utility, setup.safety):
        edit_config(folder, base_model_name_or_path=str(broken))
    tensors = load_file(broken / "model.safetensors")
    missing = {k: v for k, v in tensors.items() if "layers.1.mlp.up_proj" not in k}
    save_file(missing, broken / "model.safetensors", metadata={"format": "pt"})
    code, error = run_merge(setup, tmp_path, capsys, base_model=str(broken))
    assert code == 2 and "lacks the weights" in error and "layers.1.mlp.up_proj" in error
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-500])
    code, error = run_merge(setup, tmp_path, capsys, base_model=str(broken))
    assert code == 2 and "could not be loaded" in error
    (broken / "model.safetensors").unlink()
    torch.save(tensors, broken / "pytorch_model.bin")
    code, error = run_merge(setup, tmp_path, capsys, base_model=str(broken))
    assert code == 2 and "safetensors" in error


def test_inspect(setup, capsys):
    assert main(["inspect", str(setup.safety)]) == 0
    assert "model.layers.0.mlp.down_proj" in capsys.readouterr().out
    assert main(["inspect", str(setup.safety), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["modules"]) == 4
    assert main(["inspect", str(setup.safety / "absent")]) == 2


def test_interrupt_at_any_moment_leaves_no_output(setup, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(setup.config("sst", samples=50)))
    command = [sys.executable, "-m", "sst_merge.cli", "merge", str(config), "--out", str(tmp_path / "out")]
    before = {p.name for p in tmp_path.iterdir()}
    draw = random.Random(0)
    interrupted = 0
    for _ in range(6):
        process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(os.environ, OMP_NUM_THREADS="1"),
        )
        line = " "
        while line and "memory:" not in line:  # printed just before collection begins
            line = process.stderr.readline()
        time.sleep(draw.uniform(0, 1.5))
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        if (tmp_path / "out").exists():  # the signal came too late: the output must be whole
            assert {p.name for p in tmp_path.iterdir()} == before | {"out", "out.fisher"}
            assert {"adapter_model.safetensors", "report.json", "report.md", "report.html", "spectrum.png"} <= {
                p.name for p in (tmp_path / "out").iterdir()
            }
            shutil.rmtree(tmp_path / "out")
            continue
        interrupted += 1
        assert process.returncode == 130 and "no output was written" in error, error
        assert {p.name for p in tmp_path.iterdir()} <= before | {"out.fisher"}
        shutil.rmtree(tmp_path / "out.fisher", ignore_errors=True)
    assert interrupted
