"""Per-sequence weighted sums of outer products: khatri_rao_rows against torch.bmm.

    python bench/khatri_rao.py [--device cuda] [--repeats 30] [--out FILE.json]

The peer is the best torch has for sequences of one length, ((b · w)ᵀ a) by bmm; ours takes any
lengths. S sequences of L tokens, widths r: 2 S L r² flops; bytes 2 S L r · size + 4 S r².
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from harness import Limits, Row, arguments, interleaved, limits, report
from sst_kernels import khatri_rao_rows

CASES = [(16, 64, 16), (16, 64, 32), (16, 64, 64), (16, 512, 16), (16, 512, 64), (64, 512, 64)]
DTYPES = [torch.float32, torch.bfloat16]


def by_bmm(a: Tensor, b: Tensor, weight: Tensor, sequences: int) -> Tensor:
    """The same sums for sequences of equal length, in the weight's dtype."""
    a, b = (x.view(sequences, -1, x.shape[1]).to(weight.dtype) for x in (a, b))
    return torch.bmm((b * weight.view(sequences, -1, 1)).mT, a).flatten(1)


def measure(case: tuple[int, int, int], dtype: torch.dtype, repeats: int, machine: Limits, device: torch.device) -> Row:
    """Checks and times one case."""
    sequences, length, r = case
    a, b = (torch.randn(sequences * length, r, device=device).to(dtype) for _ in range(2))
    weight = torch.rand(sequences * length, device=device)
    cu_seqlens = torch.arange(0, sequences * length + 1, length, device=device)
    ours = partial(khatri_rao_rows, a, b, cu_seqlens, weight)
    peer = partial(by_bmm, a, b, weight, sequences)
    exact = by_bmm(a.double(), b.double(), weight.double(), sequences)
    torch.testing.assert_close(ours().double(), exact, rtol=1e-4, atol=1e-4 * length**0.5)
    times = interleaved([ours, peer], repeats, device)
    moved = 2 * a.numel() * a.element_size() + 4 * sequences * r * r
    floor = machine.floor(moved, 2 * sequences * length * r * r)
    return Row(f"S={sequences} L={length} r={r} {str(dtype).removeprefix('torch.')}", *times, floor)


def main() -> None:
    """Runs all cases."""
    options = arguments(__doc__)
    machine = limits(options.device, torch.float32)
    rows = [measure(case, dtype, options.repeats, machine, options.device) for dtype in DTYPES for case in CASES]
    report(__doc__.splitlines()[0], rows, options)


if __name__ == "__main__":
    main()
