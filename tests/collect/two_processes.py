"""Cases that run in two processes of a test file, over gloo on the CPU; one that hangs is killed.

The file calls `run` in its test and `main` where it is run as a script.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

WORLD = 2


def run(file: str, case: str, folder: Path, seconds: float) -> None:
    """Runs the case of that file in both processes, waiting this long for each; shows what they wrote if one fails."""
    path = filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
    both = {
        "WORLD_SIZE": str(WORLD),
        "LOCAL_WORLD_SIZE": str(WORLD),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path),
    }
    errors = [folder / f"stderr-{rank}" for rank in range(WORLD)]
    processes = []
    for rank, error in enumerate(errors):
        processes.append(
            subprocess.Popen(
                [sys.executable, file, case, str(folder)],
                env=os.environ | both | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=error.open("w"),
            )
        )
    try:
        codes = [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * WORLD, "\n".join(error.read_text() for error in errors)


def main(cases: dict[str, Callable[[int, Path], None]]) -> None:
    """Joins the other process, runs the case named on the command line with (rank, folder), and exits."""
    rank, folder = int(os.environ["RANK"]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    cases[sys.argv[1]](rank, folder)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive the group, and abort an orderly exit
