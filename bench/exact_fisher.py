"""The exact Fisher of a layer from its tokens: khatri_rao_syrk_accumulate_ against materialised rows.

    python bench/exact_fisher.py [--device cuda] [--repeats 10] [--out FILE.json]

F += Σ_s g_s g_sᵀ with g_s = Σ_{t∈s} b_t⊗a_t, n = r². The peer makes all rows g by bmm, then F.addmm_(G.T, G). For S
sequences of L tokens: 2 S L n + S n (n + 1) flops; bytes 2 S L r · size + 4 n (n + 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness import Limits, Row, arguments, interleaved, limits, report
from sst_kernels import khatri_rao_syrk_accumulate_

CASES = [(16384, 1, 16), (16384, 1, 32), (512, 128, 16), (512, 128, 32)]  # S, L, r


def by_rows(F: Tensor, a: Tensor, b: Tensor, sequences: int) -> Tensor:
    """The same update of the whole square."""
    a, b = (x.view(sequences, -1, x.shape[1]) for x in (a, b))
    g = torch.bmm(b.mT, a).flatten(1)
    return F.addmm_(g.T, g)


def measure(case: tuple[int, int, int], repeats: int, machine: Limits, device: torch.device) -> Row:
    """Checks and times one case."""
    sequences, length, r = case
    n = r * r
    a, b = (torch.randn(sequences * length, r, device=device) for _ in range(2))
    cu_seqlens = torch.arange(0, sequences * length + 1, length, device=device)
    F, square = (torch.zeros(n, n, device=device) for _ in range(2))
    khatri_rao_syrk_accumulate_(F, a, b, cu_seqlens)
    exact = by_rows(square.double(), a.double(), b.double(), sequences).tril()
    torch.testing.assert_close(F.double(), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))
    times = interleaved(
        [lambda: khatri_rao_syrk_accumulate_(F, a, b, cu_seqlens), lambda: by_rows(square, a, b, sequences)],
        repeats,
        device,
    )
    moved = 2 * a.numel() * a.element_size() + 4 * n * (n + 1)
    floor = machine.floor(moved, 2 * sequences * length * n + sequences * n * (n + 1))
    return Row(f"S={sequences} L={length} n={n} float32", *times, floor)


def main() -> None:
    """Runs all cases."""
    options = arguments(__doc__)
    machine = limits(options.device, torch.float32)
    report(__doc__.splitlines()[0], [measure(c, options.repeats, machine, options.device) for c in CASES], options)


if __name__ == "__main__":
    main()
