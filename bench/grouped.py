"""One step's factors of a Llama-shaped model: grouped_syrk_accumulate_ against a loop of products.

    python bench/grouped.py [--device cuda] [--repeats 10] [--out FILE.json]

Per layer, inputs of q/k/v (one for the three), o, gate/up (one for the two) and down; gradients at the outputs of all
seven. The peer is what a loop over the layers does today: S.addmm_(X.T, X), on X.float() where X is bfloat16; on CUDA
S.add_(torch.mm(X.T, X, out_dtype=torch.float32)). Σ T d (d + 1) flops; bytes Σ T d · size + 4 d (d + 1).
CUDA: the shape of Llama-8B, 32 layers, 4096 tokens, bfloat16. CPU: an eighth of its widths, 4 layers, 1024 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness import Limits, Row, arguments, interleaved, limits, report
from sst_kernels import grouped_syrk_accumulate_


@dataclass(frozen=True)
class Case:
    """A model's shape and a step's tokens."""

    hidden: int
    keys: int
    intermediate: int
    layers: int
    tokens: int
    dtype: torch.dtype

    def widths(self) -> list[int]:
        """Columns of every X of one layer."""
        inputs = [self.hidden, self.hidden, self.hidden, self.intermediate]
        gradients = [self.hidden, self.keys, self.keys, self.hidden, self.intermediate, self.intermediate, self.hidden]
        return inputs + gradients


CPU_CASES = [Case(512, 128, 1792, 4, 1024, torch.float32), Case(512, 128, 1792, 4, 1024, torch.bfloat16)]
CUDA_CASES = [Case(4096, 1024, 14336, 32, 4096, torch.bfloat16)]


def by_loop(S: list[Tensor], X: list[Tensor]) -> None:
    """One product after the other, the whole square of each."""
    for s, x in zip(S, X, strict=True):
        if x.is_cuda and x.dtype == torch.bfloat16:
            s.add_(torch.mm(x.T, x, out_dtype=torch.float32))
        else:
            wide = x.to(s.dtype)
            s.addmm_(wide.T, wide)


def measure(case: Case, repeats: int, machine: Limits, device: torch.device) -> Row:
    """Checks and times one step. Layers read the same data, but have sums of their own where memory allows."""
    kinds = [torch.randn(case.tokens, d, device=device).to(case.dtype) for d in case.widths()]
    X = kinds * case.layers
    sums = [torch.zeros(x.shape[1], x.shape[1], device=device) for x in X]
    grouped_syrk_accumulate_(sums, X)
    for s, x in zip(sums[: len(kinds)], kinds, strict=True):
        exact = (x[:, :64].double().T @ x[:, :64].double()).tril()
        torch.testing.assert_close(s[:64, :64].tril().double(), exact, rtol=1e-4, atol=1e-4 * case.tokens**0.5)
    times = interleaved([lambda: grouped_syrk_accumulate_(sums, X), lambda: by_loop(sums, X)], repeats, device)
    moved = sum(x.numel() * x.element_size() + 4 * x.shape[1] * (x.shape[1] + 1) for x in X)
    floor = machine.floor(moved, sum(case.tokens * x.shape[1] * (x.shape[1] + 1) for x in X))
    dtype = str(case.dtype).removeprefix("torch.")
    return Row(f"{case.layers} layers of width {case.hidden}, {case.tokens} tokens, {dtype}", *times, floor)


def main() -> None:
    """Runs all cases."""
    options = arguments(__doc__)
    cuda = options.device.type == "cuda"
    machine = limits(options.device, torch.bfloat16 if cuda else torch.float32)
    cases = CUDA_CASES if cuda else CPU_CASES
    report(__doc__.splitlines()[0], [measure(c, options.repeats, machine, options.device) for c in cases], options)


if __name__ == "__main__":
    main()
