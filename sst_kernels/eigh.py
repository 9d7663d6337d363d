"""`eigh`: scipy.linalg.eigh's call for torch and numpy, batched, on any device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checks import check_matrix, promoted
from .eigh_grad import pairs
from .operators import Dense, check_alike

_STANDARD_DRIVERS = ("ev", "evd", "evr", "evx")
_GENERALIZED_DRIVERS = ("gv", "gvd", "gvx")
_SUBSET_DRIVERS = (None, "evr", "evx", "gvx")


def eigh(
    a: Any,
    b: Any = None,
    *,
    lower: bool = True,
    eigvals_only: bool = False,
    overwrite_a: bool = False,
    overwrite_b: bool = False,
    type: int = 1,
    check_finite: bool = True,
    subset_by_index: Sequence[int] | None = None,
    subset_by_value: Sequence[float] | None = None,
    driver: str | None = None,
) -> Any:
    """Eigenvalues w (ascending) and vectors v of a v = w b v; the call of scipy.linalg.eigh.

    `type` 1: a v = w b v, VᴴbV = I; 2: a b v = w v, VᴴbV = I; 3: b a v = w v, Vᴴb⁻¹V = I. In a
    batch, pencils that fail come back as NaN with one RuntimeWarning that names them. Beyond
    scipy: batches may be empty, and a float32 b that is positive definite only in float64 is
    solved.

    Derivatives, forward and reverse, of first and second order, flow to the triangle that is read.
    At equal eigenvalues first derivatives hold for symmetric functions of the eigenvalues and for
    projectors V Vᴴ on whole eigenspaces; what else would need the parts within an eigenspace, which
    are taken as 0, is told of by a RuntimeWarning (in reverse mode). Faulty pencils have derivative zero. Under
    `torch.vmap` the mapped pencils are a batch. Under `torch.compile` the same errors and warnings
    come at run time. `subset_by_value`, whose shape depends on data, works under neither.

    Args:
        a: (..., n, n) Hermitian: a tensor, or anything numpy reads. float32, float64, complex64,
            complex128; integers are promoted to float64.
        b: (..., n, n) Hermitian positive definite, batch dimensions broadcast with those of `a`;
            None for the identity. A tensor if and only if `a` is one.
        lower: whether the lower triangles hold the data, else the upper ones.
        eigvals_only: whether to return w alone.
        overwrite_a: accepted for scipy's sake; `a` is never changed.
        overwrite_b: accepted for scipy's sake; `b` is never changed.
        type: 1, 2 or 3; ignored without b.
        check_finite: whether to look for NaN and infinity in whole matrices; without it, only
            in the triangles that are read.
        subset_by_index: [lo, hi], first and last index of the pairs wanted.
        subset_by_value: [lo, hi], of the half-open interval lo < w <= hi of the pairs wanted; in
            a batch, every pencil must have equally many.
        driver: checked against scipy's names; one algorithm serves them all.

    Returns:
        w (..., m), real, and v (..., n, m), or w alone: tensors on the device of `a`, or numpy
        arrays. About 13n³ flops and nine n² matrices a pencil; w alone a third of it, unless a
        derivative is asked for; a gradient 8n³ more.

    Raises:
        LinAlgError: if a single pencil's b is not positive definite, or its data or results are
            not finite; numpy's, torch's and a ValueError at once.
        TypeError: for dtypes that cannot be factorised, or a tensor mixed with another type.
        ValueError: for wrong shapes and options.

    Example:
        >>> w, v = eigh(torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([4.0, 0.25])))
        >>> w
        tensor([0.5000, 4.0000])
        >>> v.abs()
        tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]])
        >>> eigh([[2.0, 0.0], [0.0, 3.0]], eigvals_only=True)
        array([2., 3.])
    """
    _check_options(b is not None, type, driver, subset_by_index, subset_by_value)
    as_numpy = not isinstance(a, Tensor)
    a, b = _as_pencil(a, b)
    n = a.shape[-1]
    wanted = _columns(n, subset_by_index)
    keep_all = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (a, b))
    columns = slice(0, n) if keep_all else wanted
    w, v, fault = pairs(
        *(x if x is None else _hermitian(x, lower, check_finite) for x in (a, b)),
        type if b is not None else 1,
        columns.start,
        columns.stop,
        eigvals_only and not keep_all,
        True,
    )
    w, v = w[..., wanted], v[..., wanted] if keep_all else v
    if subset_by_value is not None:
        w, v = _within(w, v, subset_by_value, fault)
    found = [w] if eigvals_only else [w, v]
    if as_numpy:
        found = [x.numpy() for x in found]
    return found[0] if eigvals_only else tuple(found)


def _check_options(
    generalized: bool,
    problem: int,
    driver: str | None,
    by_index: Sequence[int] | None,
    by_value: Sequence[float] | None,
) -> None:
    """Refuse what scipy refuses, with ValueError."""
    names = _GENERALIZED_DRIVERS if generalized else _STANDARD_DRIVERS
    if driver is not None and driver not in names:
        kind = "with" if generalized else "without"
        raise ValueError(f"eigh: driver must be None or one of {names} {kind} b, got {driver!r}")
    if generalized and problem not in (1, 2, 3):
        raise ValueError(f"eigh: type must be 1, 2 or 3, got {problem!r}")
    if by_index is not None and by_value is not None:
        raise ValueError("eigh: give subset_by_index or subset_by_value, not both")
    if (by_index is not None or by_value is not None) and driver not in _SUBSET_DRIVERS:
        raise ValueError(f"eigh: driver {driver!r} knows no subsets; use None, 'evr', 'evx', 'gvx'")
    if by_value is not None:
        lo, hi = by_value
        if not -math.inf <= lo < hi <= math.inf:
            raise ValueError(f"eigh: subset_by_value must be [lo, hi] with lo < hi, got {by_value}")


def _as_pencil(a: Any, b: Any) -> tuple[Tensor, Tensor | None]:
    """Tensors of one supported dtype and one device, square and of one order."""
    if b is not None and isinstance(a, Tensor) != isinstance(b, Tensor):
        raise TypeError(
            f"eigh: a and b must both be tensors or neither, got {type(a).__name__} and {type(b).__name__}; "
            "convert one with torch.as_tensor or .numpy()"
        )
    a = _as_matrix(a, "a")
    if b is None:
        return a, None
    b = _as_matrix(b, "b")
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(dtype), b.to(dtype)
    check_alike("eigh", ("a", Dense(a)), ("b", Dense(b)), same_order=True)
    return a, b


def _as_matrix(x: Any, name: str) -> Tensor:
    """Tensor of a supported dtype, square in its last two dimensions."""
    x = promoted(x) if isinstance(x, Tensor) else _from_numpy(x, name)
    check_matrix("eigh", name, x)
    return x


def _from_numpy(x: Any, name: str) -> Tensor:
    """Tensor from an array-like, integers promoted to float64."""
    if isinstance(x, np.ma.MaskedArray):
        raise ValueError(f"eigh: {name} must not be a masked array; fill it with .filled()")
    array = np.asarray(x)
    if array.dtype.kind not in "biufc":
        raise ValueError(
            f"eigh: {name} must be a numeric array, got {type(x).__name__} of dtype {array.dtype}; "
            "make sparse matrices dense with .toarray()"
        )
    if array.dtype.kind in "biu":
        array = array.astype(np.float64)
    elif array.dtype.itemsize not in (4, 8, 16) or array.dtype.char in "gG":
        raise TypeError(
            f"eigh: {name} must be float32, float64, complex64 or complex128, got {array.dtype}; "
            "convert with .astype(numpy.float64) (factorisations need the digits)"
        )
    plain = array.dtype.isnative and array.flags.behaved and min(array.strides, default=0) >= 0
    # shared, for nothing here writes to it; torch has no other byte orders, nor negative strides
    return torch.from_numpy(array if plain else np.array(array, dtype=array.dtype.newbyteorder("=")))


def _columns(n: int, by_index: Sequence[int] | None) -> slice:
    """Slice of the pairs wanted by index, all of them without one."""
    if by_index is None:
        return slice(0, n)
    lo, hi = (int(i) for i in by_index)
    if not 0 <= lo <= hi < n:
        raise ValueError(f"eigh: subset_by_index must be [lo, hi] with 0 <= lo <= hi < n = {n}, got [{lo}, {hi}]")
    return slice(lo, hi + 1)


def _hermitian(x: Tensor, lower: bool, check_finite: bool) -> Tensor:
    """Matrices with both triangles filled from one; NaN on the diagonal where the other holds NaN or infinity."""
    full = Dense(x if lower else x.mH).to_dense()
    if check_finite and x.shape[-1]:
        parts = torch.view_as_real(x.detach().resolve_conj()) if x.is_complex() else x.detach()
        parts = parts.flatten(x.dim() - 2)
        mark = 0 * parts.amax(-1) + 0 * parts.amin(-1)  # 0 or NaN
        full.diagonal(dim1=-2, dim2=-1).add_(mark[..., None])
    return full


def _within(w: Tensor, v: Tensor, bounds: Sequence[float], fault: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs with lo < w <= hi.

    Returns:
        Values (..., m) and vectors (..., n, m).

    Raises:
        ValueError: if pencils that did not fail differ in their number of pairs.
    """
    lo, hi = bounds
    first = (w <= lo).sum(-1, keepdim=True)
    counts = ((w <= hi).sum(-1, keepdim=True) - first)[fault == 0].unique()
    if len(counts) > 1:
        raise ValueError(
            f"eigh: subset_by_value must select equally many pairs of each pencil of a batch, got "
            f"{counts.tolist()}; use subset_by_index, or call once for each pencil"
        )
    order = first + torch.arange(int(counts.sum()), device=w.device)
    return w.gather(-1, order), v.take_along_dim(order[..., None, :], -1) if v.shape[-1] else v
