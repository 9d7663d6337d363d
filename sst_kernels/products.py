"""Products of symmetric matrices with thin blocks of vectors: what every step of an eigensolver is made of.

As `ops.py`, but differentiable: the functions of a symmetric matrix are functions of its lower triangle.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ops import _library, _refuse_gradients, _require_one_device, _require_tensors


def symm_thin(A: Tensor, X: Tensor) -> Tensor:
    """Y = A X for symmetric A, of which only the lower triangle is read, and a thin block X.

    Args:
        A: (…, n, n) float32 or float64, rows of adjacent elements any distance apart. Above its diagonal it
            may hold anything, NaN included. The leading dimensions are X's, or none: one matrix for all.
        X: (…, n, m) in A's dtype, rows or columns of adjacent elements. A block of at most 32 columns or so is
            meant: wider ones are multiplied a group of columns at a time.

    Returns:
        (…, n, m) in X's order: column-major (``Y.mT`` contiguous) if X is, else row-major. On the CPU
        bit-identical whatever the number of threads.

    Raises:
        TypeError: An argument is not a tensor.

    Shapes, dtypes, devices and strides that do not fit raise ValueError naming the argument. Differentiable
    to any order: dX = A G and dA = the lower triangle of G Xᵀ + X Gᵀ, its diagonal halved. Cost: 2 n² m flops;
    reads half of A once.
    """
    _require_tensors("symm_thin", A=A, X=X)
    return torch.ops.sst_kernels.symm_thin.default(A, X)


def symm_thin_pair(A: Tensor, B: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """(A X, B X) for symmetric A and B, in one pass over X.

    Args:
        A: As in `symm_thin`.
        B: As A.
        X: As in `symm_thin`.

    Returns:
        Both products, each as `symm_thin` returns it.

    Raises:
        TypeError: An argument is not a tensor.

    What does not fit raises ValueError naming the argument. Differentiable as `symm_thin` is. Cost: 4 n² m
    flops; reads half of A and of B once.
    """
    _require_tensors("symm_thin_pair", A=A, B=B, X=X)
    return torch.ops.sst_kernels.symm_thin_pair.default(A, B, X)


def _empty_product(X: Tensor) -> Tensor:
    """A dense tensor in X's order, as the kernels return it."""
    if X.stride(-2) == 1 and X.stride(-1) != 1:
        return X.new_empty(X.mT.shape).mT
    return X.new_empty(X.shape)


@torch.library.register_fake("sst_kernels::symm_thin", lib=_library)
def _(A: Tensor, X: Tensor) -> Tensor:
    _require_one_device(A, X)
    return _empty_product(X)


@torch.library.register_fake("sst_kernels::symm_thin_pair", lib=_library)
def _(A: Tensor, B: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    _require_one_device(A, B, X)
    return _empty_product(X), _empty_product(X)


@torch.library.register_fake("sst_kernels::_residual", lib=_library)
def _(AX: Tensor, BX: Tensor, X: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    _require_one_device(AX, BX, X, theta)
    return X.new_empty(X.shape), X.new_empty((*X.shape[:-1], 4), dtype=torch.float64)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _matrix_gradient(A: Tensor, G: Tensor, X: Tensor) -> Tensor:
    """Of tr(Gᵀ A X) by A's lower triangle; where A serves a whole batch, summed over it."""
    if A.dim() == 2:
        G, X = (block.movedim(-2, 0).flatten(1) for block in (G, X))
    outer = G @ X.mT
    return outer.tril() + outer.mT.tril(-1)


def _gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Of the products of one or two matrices with one block: those of the matrices, then the block's."""
    *matrices, X = ctx.saved_tensors
    *needed, block_needed = ctx.needs_input_grad
    of_matrices = [
        _matrix_gradient(A, G, X) if wanted else None for A, G, wanted in zip(matrices, grads, needed, strict=True)
    ]
    # a gradient may come with any strides, of which the op takes a batch's only if they are even
    even = (G if G.dim() <= 3 else G.contiguous() for G in grads)
    products = (torch.ops.sst_kernels.symm_thin.default(A, G) for A, G in zip(matrices, even, strict=True))
    return *of_matrices, sum(products) if block_needed else None


def _vmap_product(A: Tensor, a_dim: int | None, X: Tensor, x_dim: int | None, size: int) -> tuple[Tensor, int]:
    """A X with A, X or both mapped over; a matrix that is not mapped takes all blocks as columns of one."""
    op = torch.ops.sst_kernels.symm_thin.default
    if a_dim is None:
        X = X.movedim(x_dim, -1)
        return op(A, X.flatten(-2)).unflatten(-1, X.shape[-2:]), X.dim() - 1
    A = A.movedim(a_dim, 0).contiguous()
    X = X.expand(size, *X.shape) if x_dim is None else X.movedim(x_dim, 0)
    if A.dim() == 3 and X.dim() > 3:  # one matrix, of each that is mapped over, for a batch
        X = X.movedim(-2, 1)
        return op(A, X.flatten(2)).unflatten(-1, X.shape[2:]).movedim(1, -2), 0
    return op(A, X.contiguous()), 0


@torch.library.register_vmap("sst_kernels::symm_thin", lib=_library)
def _(info: Any, in_dims: tuple[int | None, ...], A: Tensor, X: Tensor) -> tuple[Tensor, int]:
    return _vmap_product(A, in_dims[0], X, in_dims[1], info.batch_size)


@torch.library.register_vmap("sst_kernels::symm_thin_pair", lib=_library)
def _(info: Any, in_dims: tuple[int | None, ...], A: Tensor, B: Tensor, X: Tensor) -> tuple[Any, Any]:
    parts = [_vmap_product(M, dim, X, in_dims[2], info.batch_size) for M, dim in ((A, in_dims[0]), (B, in_dims[1]))]
    return tuple(part[0] for part in parts), tuple(part[1] for part in parts)


for _name in ("symm_thin", "symm_thin_pair"):
    torch.library.register_autograd(f"sst_kernels::{_name}", _gradients, setup_context=_save, lib=_library)
_refuse_gradients("_residual")
