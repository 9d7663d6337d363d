"""Diagonal SST of full checkpoints, Fisher files given: against reading every input twice and writing the output.

    python bench/full_checkpoint.py [--gigabytes 1] [--repeats 3] [--folder DIR] [--out FILE.json]

Random float32 Llama checkpoints (base, utility, safety) of about so many gigabytes each in shards of a quarter of that,
and Fisher files of the same size, are made in DIR. The peer is dd: every input read twice, and as many bytes as one
checkpoint written and flushed, with caches cold. Ours is `sst-merge merge` as a process of its own, imports included,
caches cold: whole seconds and peak resident memory as the kernel counts them (ru_maxrss). Runs take turns. The bar:
within 1.5× of dd, under 1.5 GB. Caches are dropped file by file (posix_fadvise), which needs no privilege; a kernel
or file system that ignores the advice makes both faster.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from harness import parser, provenance

OWNERS = ("base", "utility", "safety")
METHODS = [{"scope": "module"}, {"scope": "global"}, {"mask": "soft"}]


@dataclass(frozen=True)
class Measured:
    """One candidate: seconds and peak resident bytes of every run."""

    case: str
    seconds: list[float]
    resident: list[int]

    def row(self, peer: float) -> dict[str, float | str]:
        """Medians, and the ratio to dd."""
        seconds = statistics.median(self.seconds)
        return {"case": self.case, "seconds": seconds, "times dd": seconds / peer, "peak GB": max(self.resident) / 1e9}


def make_inputs(folder: Path, gigabytes: float) -> None:
    """Three checkpoints in shards, and two Fisher files."""
    hidden = 64 * max(2, round(gigabytes**0.5 * 16))
    layer = 4 * (4 * hidden * hidden + 3 * hidden * 4 * hidden)
    config = LlamaConfig(
        vocab_size=32000 if gigabytes >= 0.5 else 2000,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        num_hidden_layers=1,
    )
    ends = 8 * config.vocab_size * hidden
    config.num_hidden_layers = max(1, round((gigabytes * 1e9 - ends) / layer))
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for owner in OWNERS:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1e-3 * torch.randn(())
                parameter.view(-1)[::3] *= 1.01
        model.save_pretrained(folder / owner, max_shard_size=f"{max(1, round(gigabytes * 250))}MB")
    (folder / "fisher").mkdir()
    for kind in ("harm", "benign"):
        diagonals = {name: torch.rand(p.shape).square_() for name, p in model.named_parameters()}
        total = sum(float(d.double().sum()) for d in diagonals.values())
        metadata = {"sst_merge": json.dumps({"normalisation": "sequence", "count": 100, "sum": total})}
        save_file(diagonals, folder / "fisher" / f"{kind}.safetensors", metadata=metadata)


def drop_caches(folder: Path) -> None:
    """Flush every file of the inputs, and forget its pages."""
    for file in (f for f in folder.rglob("*") if f.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def run_dd(folder: Path) -> float:
    """Seconds of dd: every input twice, then one checkpoint's bytes written and flushed."""
    inputs = sorted(file for file in folder.rglob("*.safetensors") if "out" not in file.parts)
    size = sum(f.stat().st_size for f in (folder / "utility").glob("*.safetensors"))
    seconds = 0.0
    for _ in range(2):
        drop_caches(folder)
        start = time.perf_counter()
        for file in inputs:
            subprocess.run(["dd", f"if={file}", "of=/dev/null", "bs=4M", "status=none"], check=True)
        seconds += time.perf_counter() - start
    target = folder / "written"
    start = time.perf_counter()
    command = [
        "dd",
        "if=/dev/zero",
        f"of={target}",
        "bs=4M",
        f"count={max(1, size >> 22)}",
        "conv=fsync",
        "status=none",
    ]
    subprocess.run(command, check=True)
    seconds += time.perf_counter() - start
    target.unlink()
    return seconds


def run_ours(folder: Path, parameters: dict[str, str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of `sst-merge merge` in a process of its own."""
    config = {
        "base_model": "base",
        "models": [{"model": role, "role": role} for role in OWNERS[1:]],
        "merge_method": "diagonal_sst",
        "parameters": {"share": 0.2, **parameters},
        "fisher_dir": "fisher",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    out = folder / "out"
    drop_caches(folder)
    command = [sys.executable, "-m", "sst_merge.cli", "merge", str(folder / "config.yaml"), "--out", str(out)]
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}")
    check(folder, json.loads((out / "report.json").read_text()), parameters)
    shutil.rmtree(out)
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def check(folder: Path, report: dict, parameters: dict[str, str]) -> None:
    """A hard mask keeps the share that was asked for, of as many entries as the checkpoint has."""
    entries = sum(row["entries"] for row in report["modules"])
    stored = sum(f.stat().st_size for f in (folder / "utility").glob("*.safetensors"))
    assert abs(4 * entries - stored) < 1e-3 * stored + 1e5, (entries, stored)
    if parameters.get("mask") != "soft":
        assert abs(report["kept_share"] - 0.2) < 1e-3, report["kept_share"]


def main() -> None:
    """Measure, print, write."""
    options = parser(__doc__)
    options.add_argument("--gigabytes", type=float, default=1.0, help="of one checkpoint")
    options.add_argument("--folder", type=Path, help="where inputs and output lie (default: the temporary folder)")
    options.set_defaults(repeats=3)
    given = options.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        make = multiprocessing.get_context("spawn").Process(target=make_inputs, args=(folder, given.gigabytes))
        make.start()  # apart: a process that is started counts its parent's memory as its own
        make.join()
        dd: list[float] = []
        ours = [Measured(", ".join(f"{k}: {v}" for k, v in m.items()), [], []) for m in METHODS]
        for _ in range(given.repeats):
            dd.append(run_dd(folder))
            for measured, parameters in zip(ours, METHODS, strict=True):
                seconds, resident = run_ours(folder, parameters)
                measured.seconds.append(seconds)
                measured.resident.append(resident)
        size = sum(f.stat().st_size for f in (folder / "utility").glob("*.safetensors")) / 1e9
    peer = statistics.median(dd)
    rows = [measured.row(peer) for measured in ours]
    print(f"{__doc__.splitlines()[0]}\n\n{size:.3g} GB a checkpoint; dd {peer:.3g} s\n")
    print("| case | seconds | times dd | peak GB |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['case']} | {row['seconds']:.3g} | {row['times dd']:.2f} | {row['peak GB']:.2f} |")
    if given.out:
        content = {"question": __doc__.splitlines()[0], "gigabytes": size, "dd seconds": peer, "rows": rows}
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps({**content, "provenance": provenance(given.device)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
