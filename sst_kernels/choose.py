"""Which method of `solve` takes a pencil: what each can do, and which is fastest."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from .dense import fused_can, fused_is_slow, subset_can
from .operators import Dense, Diagonal, Kronecker
from .pencil import Pencil
from .preconditioners import has_inverse
from .simplify import simplified
from .structured import EKFAC, FunctionOperator, Gram

METHODS = ("diagonal", "kronecker", "gram", "fused", "subset", "lapack", "dense", "davidson")
_CLOSED = METHODS[:3]
_LAPACK_FROM = 1024, 1280  # orders from which LAPACK is faster than "subset", for more than n / 8 pairs, and for fewer


def choose(pencil: Pencil, k: int, method: str) -> tuple[Pencil, str]:
    """The simplified pencil and the name of the method that will run, after checking the caller's arguments.

    Returns:
        A pencil of equal matrices, and one of METHODS.

    Raises:
        TypeError: if `pencil` is no Pencil or k no integer.
        ValueError: if k is out of range, the method unknown or unfit for the pencil, or its device meta.
    """
    if not isinstance(pencil, Pencil):
        raise TypeError(f"solve: pencil must be a Pencil, got {type(pencil).__name__}; write Pencil(A, B)")
    check_count(k, pencil.n)
    if pencil.device.type == "meta":
        raise ValueError("solve: A and B are on device meta, where nothing can be computed; move them with .to(device)")
    a, b = simplified(pencil.A), simplified(pencil.B)
    structure = pencil if a is pencil.A and b is pencil.B else Pencil(a, b)
    if method == "auto":
        return structure, _fastest(structure, k)
    if method not in METHODS:
        raise ValueError(f"solve: method must be one of {['auto', *METHODS]}, got {method!r}")
    if not fits(structure, method):
        kinds = f"{type(pencil.A).__name__} and {type(pencil.B).__name__}"
        raise ValueError(
            f"solve: method {method!r} does not fit A and B, which are {kinds} of {pencil.dtype}; "
            "use method='auto', or see the table in solve's documentation"
        )
    return structure, method


def check_count(k: int, n: int) -> None:
    """Check that k pairs can be asked of order n.

    Raises:
        TypeError: if k is no integer.
        ValueError: if it is out of range.
    """
    if isinstance(k, bool) or not isinstance(k, Integral):
        raise TypeError(f"solve: k must be an int, got {type(k).__name__}")
    if not 1 <= k <= n:
        raise ValueError(f"solve: k must be in 1..n with n = {n}, got k = {k}")


def fits(pencil: Pencil, method: str) -> bool:
    """Whether `method` can solve a pencil of this structure."""
    a, b = pencil.A, pencil.B
    if method == "diagonal":
        return isinstance(a, Diagonal) and isinstance(b, Diagonal)
    if method == "kronecker":
        if isinstance(a, EKFAC) and isinstance(b, EKFAC):
            return a.left_vectors is b.left_vectors and a.right_vectors is b.right_vectors
        both = isinstance(a, Kronecker) and isinstance(b, Kronecker)
        return both and a.left.n == b.left.n
    if method == "gram":
        few = isinstance(a, Gram) and 0 < a.rows.shape[-2] < a.n
        return few and bool((a.count > 0).all()) and has_inverse(b)
    if method in ("fused", "subset"):
        like = torch.empty(0, dtype=pencil.dtype, device=pencil.device)
        can = fused_can if method == "fused" else subset_can
        return not _calls_python(pencil) and can(pencil.n, [like, *_tensors(pencil)])
    if method == "lapack":
        return pencil.device.type == "cpu" and not _wants_gradient(pencil)
    return method == "dense" or not (pencil.dtype.is_complex or _wants_gradient(pencil))


def _fastest(pencil: Pencil, k: int) -> str:
    """Name of the method that `auto` takes."""
    for method in () if type(pencil.A) is type(pencil.B) is Dense else _CLOSED:
        if fits(pencil, method):
            return method
    real = not (pencil.dtype.is_complex or _wants_gradient(pencil))
    if real and _iteration_pays(pencil, k):
        return "davidson"
    if pencil.n >= _LAPACK_FROM[8 * k <= pencil.n] and fits(pencil, "lapack"):
        return "lapack"
    # 4k: whatever the batch, so that its parts solved apart have the same bits
    if real and 4 * k <= pencil.n and fits(pencil, "subset"):
        return "subset"
    slow = fused_is_slow(pencil.n, pencil.batch_shape.numel(), pencil.device)
    return "fused" if not slow and fits(pencil, "fused") else "dense"


def _iteration_pays(pencil: Pencil, k: int) -> bool:
    """Whether iterating beats the direct methods, as measured by bench/eigensolver.py."""
    dense = isinstance(pencil.A, Dense) and isinstance(pencil.B, Dense)
    share = 40 if dense and pencil.device.type == "cpu" else 16
    return pencil.n >= (1024 if dense else 512) and share * k <= pencil.n


def _tensors(pencil: Pencil) -> list[Tensor]:
    """What A and B are made of."""
    parts = (op for side in (pencil.A, pencil.B) for op in side.parts())
    return [x for op in parts for x in vars(op).values() if isinstance(x, Tensor)]


def _wants_gradient(pencil: Pencil) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in _tensors(pencil))


def _calls_python(pencil: Pencil) -> bool:
    return any(isinstance(op, FunctionOperator) for side in (pencil.A, pencil.B) for op in side.parts())
