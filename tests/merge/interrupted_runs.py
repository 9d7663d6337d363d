"""Runs of the command line that are killed: a program of its own, so that it may fork before torch has threads.

    python interrupted_runs.py CONFIG FOLDER TRIALS

Runs `sst-merge fisher` once unbroken, then TRIALS times with kills at random moments until it ends, and the same for
`sst-merge merge`. Prints how many of the broken runs ended with the same bytes as the unbroken one, and how many kills
there were.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import peft  # noqa: F401  (imported before the forks: they are quick then)
import torch
import transformers  # noqa: F401

from sst_merge.cli import main

torch.set_num_threads(1)


def run(arguments: list[str], seconds: float | None) -> int | None:
    """Exit code of the command in a process of its own; None if it was killed after `seconds`."""
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
            code = main(arguments)
        os._exit(code)
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.001)


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of what the statistics and the adapter consist of."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}


def trial(arguments: list[str], out: Path, limit: float, draw: random.Random) -> int:
    """Kill the command at random moments, three times at most, then let it end; how often it was killed."""
    kills = 0
    for _ in range(3):
        code = run([*arguments, "--out", str(out)], draw.uniform(0, limit))
        if code is not None:
            assert code == 0, code
            return kills
        kills += 1
    assert run([*arguments, "--out", str(out)], None) == 0
    return kills


def all_trials(command: list[str], folder: Path, count: int) -> tuple[int, int]:
    """(broken runs that ended as the unbroken one, kills)."""
    started = time.monotonic()
    assert run([*command, "--out", str(folder / "unbroken")], None) == 0
    limit = time.monotonic() - started
    expected, equal, kills = contents(folder / "unbroken"), 0, 0
    for number in range(count):
        out = folder / f"broken{number}"
        kills += trial(command, out, limit, random.Random(number))
        equal += contents(out) == expected
        for left in folder.glob(f"*broken{number}*"):  # statistics, and what a killed process could not remove
            shutil.rmtree(left)
    return equal, kills


if __name__ == "__main__":
    config, folder, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    for name, *options in (("fisher",), ("merge", "--overwrite")):  # which may be killed with its output in place
        (folder / name).mkdir(parents=True)
        equal, kills = all_trials([name, config, *options], folder / name, count)
        print(name, equal, kills, flush=True)
