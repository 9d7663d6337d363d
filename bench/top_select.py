"""The mask of the largest tenth of a tensor: top_mask against torch.topk.

    python bench/top_select.py [--device cuda] [--repeats 30] [--out FILE.json]

The peer is topk's indices scattered into a mask; it needs all values at once and says nothing of ties. Values are
|x| of a normal x, and integers from 0 to 9, of which many tie. n float32: bytes 3 · 4n read + n written.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from harness import Limits, Row, arguments, interleaved, limits, report
from sst_kernels import top_mask

SIZES = [1 << 16, 1 << 20, 1 << 24, 1 << 27]


def by_topk(values: Tensor, count: int) -> Tensor:
    """A mask of as many values; which of equal ones is not defined."""
    return torch.zeros_like(values, dtype=torch.bool).index_fill_(0, values.topk(count, sorted=False).indices, True)


def measure(values: Tensor, case: str, repeats: int, machine: Limits) -> Row:
    """Checks and times one case."""
    count = values.numel() // 10
    mask, peer = top_mask(values, count), by_topk(values, count)
    assert int(mask.sum()) == count, "as many as wanted"
    assert torch.equal(values[mask].sort().values, values[peer].sort().values), "the largest"
    tied = values == values[mask].min()
    kept = int((mask & tied).sum())
    assert torch.equal((mask & tied).nonzero(), tied.nonzero()[:kept]), "the first of equal ones"
    times = interleaved([partial(top_mask, values, count), partial(by_topk, values, count)], repeats, values.device)
    return Row(case, *times, machine.floor(13 * values.numel(), 0))


def main() -> None:
    """Runs all cases."""
    options = arguments(__doc__)
    machine = limits(options.device, torch.float32)
    rows = []
    for n in SIZES:
        normal = torch.randn(n, device=options.device).abs_()
        rows.append(measure(normal, f"n={n} normal", options.repeats, machine))
        few = torch.randint(10, (n,), device=options.device).float()
        rows.append(measure(few, f"n={n} ten values", options.repeats, machine))
    report(__doc__.splitlines()[0], rows, options)


if __name__ == "__main__":
    main()
