"""torch.library.opcheck of the ops behind `solve`."""

from __future__ import annotations

import torch

from sst_kernels import FunctionOperator
from sst_kernels.program import Program

F64 = torch.float64


def test_leading_eigh() -> None:
    a = torch.diag(torch.arange(1.0, 9, dtype=F64)).expand(2, 8, 8).contiguous()
    torch.library.opcheck(torch.ops.sst_kernels._leading_eigh.default, (a, a + torch.eye(8, dtype=F64), 3, 1e-14))


def test_apply() -> None:
    program = Program(torch.Size())
    _, handle = program.encode(FunctionOperator(lambda x: 2 * x, (6, 6), F64))
    with program:
        torch.library.opcheck(torch.ops.sst_kernels._apply.default, (torch.ones(1, 3, 6, dtype=F64), handle))


def test_davidson() -> None:
    n, matrix = 40, 0  # operator.h: Code::dense
    a = torch.diag(torch.arange(1.0, n + 1, dtype=F64))[None].contiguous()
    b = torch.eye(n, dtype=F64)[None] * 2
    rows, fresh = torch.randn(2, 1, 4, n, dtype=F64)
    options = [2, 4, 6, 18, 2, 100, 8, 0, 0]
    arguments = ([a, b], [matrix, 0], [matrix, 1], [], rows, fresh, options, [1e-13, 1e-8])
    torch.library.opcheck(torch.ops.sst_kernels._davidson.default, arguments)
