"""Statistics in a folder: what keeping them costs a collection, and what a later merge pays to read them.

    python bench/reuse.py [--device cuda] [--repeats 3] [--out FILE.json]

The models of bench/collection.py. "kept": ours gathers the exact Fishers and keeps them, every few batches, in a
folder; the peer gathers them in memory (bar: at least 0.9). "read": ours opens the folder and reads all of it; the peer
gathers again. Floor of "kept" as in bench/collection.py; of "read", its bytes over the copy bandwidth.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from collection import CPU_CASES, CUDA_CASES, Case, make_model, make_sequences, make_updates
from harness import Limits, Row, arguments, interleaved, limits, report
from sst_merge.coordinates import core_basis, to_core
from sst_merge.fisher import CollectionSettings, Collector, collect_statistics
from sst_merge.mixture import Statistics
from sst_merge.store import FisherFolder
from sst_merge.tasks import Task

RUN = {"representation": "exact"}


def measure(case: Case, repeats: int, machine: Limits, device: torch.device) -> list[Row]:
    """Checks that what is read is what was gathered, then times all three."""
    model, sequences = make_model(case, device), make_sequences(case)
    updates = make_updates(model)
    bases = {name: core_basis(pair) for name, pair in updates.items()}
    origin, patch = ({name: to_core(bases[name], updates[name][i]) for name in updates} for i in range(2))
    settings = CollectionSettings((0.0,), (1.0,), batch_size=case.batch_size)
    collector, half = Collector(model, bases, origin, patch, settings), len(sequences) // 2
    data = [Task("", 1.0, sequences[:half], sequences[half:])]

    def gather(folder: FisherFolder | None = None) -> Statistics:
        with collector:
            return collect_statistics(collector, data, data, folder)

    with tempfile.TemporaryDirectory() as scratch:
        counter = iter(range(10**6))
        kept = Path(scratch, "kept")
        statistics = gather(FisherFolder(kept, RUN, str(device)))

        def gather_and_keep() -> Statistics:
            return gather(FisherFolder(Path(scratch, f"run{next(counter)}"), RUN, str(device)))

        def read() -> Statistics:
            return FisherFolder(kept, RUN, str(device)).statistics()

        for name in bases:
            torch.testing.assert_close(read().harm.fisher(name), statistics.harm.fisher(name), rtol=0, atol=0)
        keep, again, reading = interleaved([gather_and_keep, gather, read], repeats, device, warmups=1)
        size = sum(file.stat().st_size for file in kept.iterdir())
    passes = 4 * sum(p.numel() for p in model.parameters()) * case.tokens * 2 * len(sequences)
    label = f"hidden {case.hidden}, {case.layers} layers, 2 × {len(sequences)} × {case.tokens} tokens, {size >> 20} MiB"
    return [
        Row(f"kept: {label}", keep, again, machine.floor(0, passes)),
        Row(f"read: {label}", reading, again, machine.floor(size, 0)),
    ]


def main() -> None:
    """Runs all cases."""
    options = arguments(__doc__)
    dtype = torch.bfloat16 if options.device.type == "cuda" else torch.float32
    machine = limits(options.device, dtype)
    cases = CUDA_CASES if options.device.type == "cuda" else CPU_CASES[:1]
    rows = [row for case in cases for row in measure(case, options.repeats, machine, options.device)]
    report(__doc__.splitlines()[0], rows, options)


if __name__ == "__main__":
    main()
