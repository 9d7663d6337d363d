"""Operators written down for the compiled solver: lists of codes, and the tensors and callables that they name.

The codes are those of csrc/solver/operator.h. There a vector is a row, (N, m, n), N the size of the pencil's batch.
"""

from __future__ import annotations

import math
from functools import singledispatchmethod
from itertools import count

import torch
from torch import Tensor

from .combined import Damped, Scaled, Sum
from .operators import Dense, Diagonal, Kronecker, Operator
from .structured import EKFAC, FunctionOperator, Gram, LowRankPlusDiagonal

_DENSE, _MATRIX, _DIAGONAL, _KRONECKER, _SUM, _SCALED, _LOW_RANK, _OUTER, _EIGENBASIS, _FUNCTION = range(10)

_library = torch.library.Library("sst_kernels", "FRAGMENT")
_library.define("_apply(Tensor x, int handle) -> Tensor")
_callbacks: dict[int, Program] = {}
_handles = count()


class Program:
    """The operators of one call of the solver.

    Attributes:
        tensors: what the codes name, each (N, …).
        calls_python: whether a Python callable is among the operators.
        error: what a callable has raised, None if nothing.
    """

    def __init__(self, batch_shape: torch.Size) -> None:
        """Start without operators.

        Args:
            batch_shape: of the pencil, which those of its operators are broadcast to.
        """
        self.tensors: list[Tensor] = []
        self.error: BaseException | None = None
        self._batch_shape = batch_shape
        self._functions: list[FunctionOperator] = []
        self._handle = next(_handles)

    calls_python = property(lambda self: bool(self._functions))

    def __enter__(self) -> Program:
        """Let the solver call the Python callables."""
        _callbacks[self._handle] = self
        return self

    def __exit__(self, *_: object) -> None:
        """Forget them."""
        del _callbacks[self._handle]

    @singledispatchmethod
    def encode(self, op: Operator) -> list[int]:
        """Code of an operator whose batch shape broadcasts to that of the pencil.

        Raises:
            TypeError: for a class of operators that is not known here.
        """
        raise TypeError(f"solve: method 'davidson' does not know {type(op).__name__}; wrap it in a FunctionOperator")

    @encode.register
    def _(self, op: Dense) -> list[int]:
        matrix = op.matrix if op.matrix.stride(-1) == 1 else op.matrix.contiguous()
        return [_DENSE, self._place(matrix, 2)]

    @encode.register
    def _(self, op: Diagonal) -> list[int]:
        return [_DIAGONAL, self._place(op.entries[..., None, :], 2)]

    @encode.register
    def _(self, op: Kronecker) -> list[int]:
        return [_KRONECKER, op.left.n, op.right.n, *self._factor(op.left), *self._factor(op.right)]

    @encode.register
    def _(self, op: Sum) -> list[int]:
        return [_SUM, len(op.terms), *(code for term in op.terms for code in self.encode(term))]

    @encode.register
    def _(self, op: Scaled) -> list[int]:
        return [_SCALED, self._place(op.scale[..., None, None], 2), *self.encode(op.operator)]

    @encode.register
    def _(self, op: Damped) -> list[int]:
        return [_SUM, 2, *self.encode(op.operator), _DIAGONAL, self._place(op.damping[..., None, None], 2)]

    @encode.register
    def _(self, op: Gram) -> list[int]:
        return [_SCALED, self._place(op.count.reciprocal()[..., None, None], 2), _OUTER, self._place(op.rows, 2)]

    @encode.register
    def _(self, op: LowRankPlusDiagonal) -> list[int]:
        rows = self._place(op.factor.mT, 2)
        low = [_OUTER, rows] if op.core is None else [_LOW_RANK, rows, self._place(op.core, 2)]
        return [_SUM, 2, *low, _DIAGONAL, self._place(op.entries[..., None, :], 2)]

    @encode.register
    def _(self, op: EKFAC) -> list[int]:
        n1, n2 = op.entries.shape[-2:]
        places = [self._place(x, 2) for x in (op.left_vectors, op.right_vectors, op.entries.flatten(-2)[..., None, :])]
        return [_EIGENBASIS, n1, n2, *places]

    @encode.register
    def _(self, op: FunctionOperator) -> list[int]:
        self._functions.append(op)
        return [_FUNCTION, self._handle * 2**16 + len(self._functions) - 1]

    def _factor(self, op: Operator) -> list[int]:
        """Code of a Kronecker factor: a small matrix is stored whole, for it meets wide blocks."""
        return [_MATRIX, self._place(op.to_dense(), 2)] if isinstance(op, Dense) else self.encode(op)

    def _place(self, x: Tensor, dims: int) -> int:
        """Number of the tensor x, its leading dimensions expanded and made one, (N, …)."""
        shape = x.shape[x.dim() - dims :]
        batch = math.prod(self._batch_shape)
        if x.dim() == dims:
            self.tensors.append(x.detach().expand(batch, *shape))
        else:
            self.tensors.append(x.detach().expand(*self._batch_shape, *shape).reshape(batch, *shape))
        return len(self.tensors) - 1

    def apply(self, rows: Tensor, index: int) -> Tensor:
        """Rows (N, m, n) ↦ rows, by the callable of that number.

        Returns:
            Rows (N, m, n).

        Raises:
            BaseException: what the callable raises; kept in `error` too, for it does not survive the way back.
        """
        try:
            x = rows.mT.reshape(*self._batch_shape, rows.shape[-1], rows.shape[-2])
            return (self._functions[index] @ x).mT.reshape(rows.shape).contiguous()
        except BaseException as error:
            self.error = error
            raise


def _apply(x: Tensor, handle: int) -> Tensor:
    program, index = divmod(handle, 2**16)
    return _callbacks[program].apply(x, index)


_library.impl("_apply", _apply, "CompositeExplicitAutograd")


@torch.library.register_fake("sst_kernels::_apply", lib=_library)
def _(x: Tensor, handle: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
