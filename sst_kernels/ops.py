"""The compiled ops: typed wrappers, and what torch must know of them beyond their kernels.

An op lives in three places: its kernel and argument checks in ``csrc``, its slow float64 meaning in
`reference.py`, and here. Importing this module registers, for each op, a fake implementation (shape
and dtype only, for ``torch.compile`` and meta tensors) and an autograd kernel that refuses inputs
which require a gradient: without it, gradients through the op would be silently zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _C  # noqa: F401  (registers torch.ops.sst_kernels)

_library = torch.library.Library("sst_kernels", "FRAGMENT")


def khatri_rao_rows(a: Tensor, b: Tensor, cu_seqlens: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum of outer products over each sequence: out[s] = vec(Σ_{t∈s} w_t b_t a_tᵀ), vec row-major.

    With a the input of a linear layer and b the gradient of its output, out[s] is sequence s's
    gradient of the layer's weight (r_b, r_a), flattened as ``weight.reshape(-1)`` is.

    Args:
        a: (T, r_a) float32, float64, bfloat16 or float16; any row stride, adjacent elements.
        b: (T, r_b), dtype and device of a.
        cu_seqlens: (S + 1,) int32 or int64 on a's device; sequence s is the tokens
            cu_seqlens[s] … cu_seqlens[s + 1] - 1. Not read back to the host. Offsets are clamped
            into [0, T]; a decreasing pair means an empty sequence, whose row is 0.
        weight: (T,) in the dtype of the result, or None for ones. A token of weight 0 is not read:
            it may hold NaN. A boolean mask is passed as ``mask.to(torch.float32)``.

    Returns:
        (S, r_b · r_a) float32, or float64 for float64 data. Bit-identical between runs.

    Raises:
        TypeError: An argument is not a tensor.

    Shapes, dtypes, devices and strides that do not fit raise ValueError naming the argument.
    Cost: 2 T r_a r_b flops; reads a and b, writes the result.
    """
    _require_tensors("khatri_rao_rows", a=a, b=b, cu_seqlens=cu_seqlens, weight=weight)
    return torch.ops.sst_kernels.khatri_rao_rows.default(a, b, cu_seqlens, weight)


def syrk_accumulate_(
    S: Tensor,
    X: Tensor,
    weight: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    *,
    precision: str = "ieee",
    deterministic: bool = True,
) -> None:
    """Lower triangle of S ← β S + α Xᵀ diag(w) X, in place, batched over leading dimensions.

    Args:
        S: (…, d, d) float32 (float64 for float64 X), rows of adjacent elements, no shared memory
            with X or weight; only its lower triangle, diagonal included, is read or written. Or
            (…, d (d + 1) / 2), that triangle packed row by row (`pack_lower`).
        X: (…, T, d) float32, float64, bfloat16 or float16; S's leading dimensions, any row stride,
            adjacent elements.
        weight: (…, T) in S's dtype, or None for ones. A row of weight 0 is not read: it may hold
            NaN. A boolean mask is passed as ``mask.to(S.dtype)``.
        alpha: Factor of the new part.
        beta: Factor of the old part; 0 overwrites S whatever it holds, NaN included.
        precision: For float32 X, the least precise arithmetic that will do: "ieee" (float32),
            "tf32" or "bf16x3" (each element as the sum of two bfloat16). The CPU computes in float32
            in every case. bfloat16 and float16 products are exact, summed in float32.
        deterministic: Whether two runs must agree bit for bit. The kernels always do.

    Raises:
        TypeError: S, X or weight is not a tensor.

    Shapes, dtypes, devices, strides and overlaps that do not fit raise ValueError naming the
    argument, before anything is written. Cost: T d (d + 1) flops for each member of the batch; reads
    X, reads and writes S's lower triangle.
    """
    _require_tensors("syrk_accumulate_", S=S, X=X, weight=weight)
    torch.ops.sst_kernels.syrk_accumulate_.default(
        S, X, weight, alpha, beta, precision=precision, deterministic=deterministic
    )


def grouped_syrk_accumulate_(
    S: Sequence[Tensor],
    X: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    *,
    precision: str = "ieee",
    deterministic: bool = True,
) -> None:
    """Lower triangles of S_i ← β S_i + α X_iᵀ diag(w_i) X_i for many layers of any sizes, in one call.

    Args:
        S: As in `syrk_accumulate_`, each apart from all other tensors.
        X: As many, of one dtype and on one device; T and d may differ.
        weights: As many, or None for ones.
        alpha: Factor of the new parts.
        beta: Factor of the old parts; 0 overwrites.
        precision: As in `syrk_accumulate_`.
        deterministic: As in `syrk_accumulate_`.

    Raises:
        TypeError: S, X or weights is no list, or an element of it no tensor.

    What does not fit raises ValueError naming the argument and its index, before anything is written.
    Cost: Σ T_i d_i (d_i + 1) flops. The order of sums, not their value, depends on the whole group.
    """
    for name, tensors in (("S", S), ("X", X), ("weights", () if weights is None else weights)):
        if not isinstance(tensors, Sequence):
            raise TypeError(f"grouped_syrk_accumulate_: {name} must be a list of tensors, got {type(tensors).__name__}")
        _require_tensors("grouped_syrk_accumulate_", **{f"{name}[{i}]": t for i, t in enumerate(tensors)})
    if not (S or X or weights):
        return  # without a tensor there is no device to ask
    torch.ops.sst_kernels.grouped_syrk_accumulate_.default(
        S, X, weights, alpha, beta, precision=precision, deterministic=deterministic
    )


def kron_accumulate_(
    input_factor: Tensor,
    grad_factor: Tensor,
    counts: Tensor,
    x: Tensor,
    delta: Tensor,
    mask: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    *,
    shared_input: bool = False,
    precision: str = "ieee",
    deterministic: bool = True,
) -> None:
    """Both Kronecker factors of a layer: A ← β A + Σ_t w_t x_t x_tᵀ, G ← β G + α Σ_t w_t δ_t δ_tᵀ.

    Their quotients by the counts are the factors of K-FAC (Martens and Grosse 2015): vec row-major, the
    Fisher of the layer's weight (d_out, d_in) is about G ⊗ A.

    Args:
        input_factor: A, (d_in, d_in) or packed (d_in (d_in + 1) / 2,), float32 (float64 for float64 x);
            its lower triangle is updated in place.
        grad_factor: G, (d_out, d_out) or packed, likewise.
        counts: (2,) float64, of A and of G: each ← β · it + Σ_t w_t.
        x: (…, d_in) inputs of the layer; all leading dimensions are tokens.
        delta: (…, d_out) gradients at its outputs, in x's dtype, with x's leading dimensions.
        mask: Those leading dimensions, bool, or weights w in A's dtype; None for ones. A token of
            weight 0 is not read: it may hold NaN.
        alpha: Factor of the new part of G alone: 1 / s² undoes a loss that was scaled by s.
        beta: Factor of the old parts, counts included; 0 overwrites.
        shared_input: Another layer's call has already put this x into this A (q, k and v share one):
            leave A as it is.
        precision: As in `syrk_accumulate_`.
        deterministic: As in `syrk_accumulate_`.

    Raises:
        TypeError: An argument is not a tensor.

    What does not fit raises ValueError naming the argument, before anything is written. Cost:
    T (d_in (d_in + 1) + d_out (d_out + 1)) flops.
    """
    _require_tensors(
        "kron_accumulate_",
        input_factor=input_factor,
        grad_factor=grad_factor,
        counts=counts,
        x=x,
        delta=delta,
        mask=mask,
    )
    torch.ops.sst_kernels.kron_accumulate_.default(
        input_factor,
        grad_factor,
        counts,
        x,
        delta,
        mask,
        alpha,
        beta,
        shared_input=shared_input,
        precision=precision,
        deterministic=deterministic,
    )


def khatri_rao_syrk_accumulate_(
    F: Tensor,
    a: Tensor,
    b: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    *,
    precision: str = "ieee",
    deterministic: bool = True,
) -> None:
    """Lower triangle of F ← β F + α Σ_s g_s g_sᵀ with g_s = Σ_{t∈s} w_t b_t⊗a_t, vec row-major.

    The exact Fisher matrix of a layer's weight (r_b, r_a). Only a few megabytes of the rows g exist at a
    time.

    Args:
        F: (n, n) with n = r_b · r_a, or packed (n (n + 1) / 2,), float32 (float64 for float64 data);
            its lower triangle is updated in place.
        a: As in `khatri_rao_rows`.
        b: As in `khatri_rao_rows`.
        cu_seqlens: As in `khatri_rao_rows`.
        weight: As in `khatri_rao_rows`.
        alpha: Factor of the new part.
        beta: Factor of the old part; 0 overwrites.
        precision: Of the product of the rows, as in `syrk_accumulate_`.
        deterministic: As in `syrk_accumulate_`.

    Raises:
        TypeError: An argument is not a tensor.

    What does not fit raises ValueError naming the argument, before anything is written. Cost:
    2 T n + S n (n + 1) flops for S sequences.
    """
    _require_tensors("khatri_rao_syrk_accumulate_", F=F, a=a, b=b, cu_seqlens=cu_seqlens, weight=weight)
    torch.ops.sst_kernels.khatri_rao_syrk_accumulate_.default(
        F, a, b, cu_seqlens, weight, alpha, beta, precision=precision, deterministic=deterministic
    )


def fused_eigh(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of A v = λ B v for a batch of small symmetric pencils, in one call: λ ascending, VᵀBV = I.

    What `eigh` and `solve`, which take any size, refine and differentiate, are built on.

    Args:
        A: (…, n, n) float32 or float64, any strides; only its lower triangle is read.
        B: A's shape and dtype, positive definite, likewise; only its lower triangle is read.

    Returns:
        Values (…, n), vectors as columns (…, n, n), and info (…,) int32: 0, or why a pencil's values and vectors are
        NaN: 1, B has no Cholesky factor; 2, something is not finite; 3, no convergence. No pencil affects another.

    Raises:
        TypeError: An argument is not a tensor.

    Shapes, dtypes, devices and, on CUDA, n beyond `fused_eigh_limit` raise ValueError. Not differentiable. Cost: about
    10 n³ flops a pencil on the CPU, one launch with a block of threads a pencil on CUDA.
    """
    _require_tensors("fused_eigh", A=A, B=B)
    return torch.ops.sst_kernels.fused_eigh.default(A, B)


def fused_eigh_limit(like: Tensor) -> int:
    """Largest n that `fused_eigh` takes for tensors of this dtype on this device.

    Args:
        like: float32 or float64, any shape.

    Returns:
        On CUDA, what a block's shared memory holds: float32 169, float64 119 for 227 KiB; 143 and 101 for 163 KiB.
        On the CPU, 2⁶³ − 1.
    """
    return torch.ops.sst_kernels.fused_eigh_limit.default(like)


def symmetrize_(S: Tensor) -> None:
    """S[j, i] ← S[i, j] for j < i, in place: the upper triangle is overwritten unread.

    Args:
        S: (…, d, d) float32 or float64, rows of adjacent elements.

    Raises:
        TypeError: S is not a tensor.
    """
    _require_tensors("symmetrize_", S=S)
    torch.ops.sst_kernels.symmetrize_.default(S)


def pack_lower(S: Tensor) -> Tensor:
    """P[i (i + 1) / 2 + j] = S[i, j] for j ≤ i: half the memory of a symmetric matrix.

    Args:
        S: (…, d, d) float32 or float64, rows of adjacent elements; the upper triangle is not read.

    Returns:
        (…, d (d + 1) / 2) in S's dtype.

    Raises:
        TypeError: S is not a tensor.
    """
    _require_tensors("pack_lower", S=S)
    return torch.ops.sst_kernels.pack_lower.default(S)


def unpack_lower(P: Tensor) -> Tensor:
    """The symmetric S with S[i, j] = P[i (i + 1) / 2 + j] for j ≤ i: what `pack_lower` packed.

    Args:
        P: (…, d (d + 1) / 2) float32 or float64, adjacent elements.

    Returns:
        (…, d, d) in P's dtype.

    Raises:
        TypeError: P is not a tensor.
    """
    _require_tensors("unpack_lower", P=P)
    return torch.ops.sst_kernels.unpack_lower.default(P)


def _require_tensors(op: str, **arguments: Tensor | None) -> None:
    for name, value in arguments.items():
        if not isinstance(value, Tensor) and not (value is None and name in ("weight", "mask")):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")


@torch.library.register_fake("sst_kernels::khatri_rao_rows", lib=_library)
def _(a: Tensor, b: Tensor, cu_seqlens: Tensor, weight: Tensor | None = None) -> Tensor:
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    return a.new_empty((cu_seqlens.shape[0] - 1, b.shape[1] * a.shape[1]), dtype=dtype)


@torch.library.register_fake("sst_kernels::pack_lower", lib=_library)
def _(S: Tensor) -> Tensor:
    d = S.shape[-1]
    return S.new_empty((*S.shape[:-2], d * (d + 1) // 2))


@torch.library.register_fake("sst_kernels::unpack_lower", lib=_library)
def _(P: Tensor) -> Tensor:
    d = (math.isqrt(8 * int(P.shape[-1]) + 1) - 1) // 2
    return P.new_empty((*P.shape[:-1], d, d))


@torch.library.register_fake("sst_kernels::fused_eigh", lib=_library)
def _(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return A.new_empty(A.shape[:-1]), A.new_empty(A.shape).mT, A.new_empty(A.shape[:-2], dtype=torch.int32)


@torch.library.register_vmap("sst_kernels::fused_eigh", lib=_library)
def _(info: Any, in_dims: tuple[int | None, int | None], A: Tensor, B: Tensor) -> tuple[Any, tuple[int, int, int]]:
    pencil = [
        x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip((A, B), in_dims, strict=True)
    ]
    return torch.ops.sst_kernels.fused_eigh.default(*pencil), (0, 0, 0)


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of an argument: itself, or those of a list."""
    return [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, Tensor)]


def _refuse_gradients(name: str, remedy: str = "") -> None:
    """Registers an autograd kernel that raises if an input requires a gradient, else passes on."""
    op = getattr(torch.ops.sst_kernels, name).default
    written = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None]

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            for argument, value in zip(op._schema.arguments, args, strict=False):
                if any(tensor.requires_grad for tensor in _tensors(value)):
                    raise ValueError(
                        f"{name}: {argument.name} requires a gradient, but the op is not differentiable; "
                        f"{remedy}pass {argument.name}.detach() or call it under torch.no_grad()"
                    )
        with torch._C._AutoDispatchBelowAutograd():
            out = op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)
        for i in written:
            for tensor in _tensors(args[i]):
                torch.autograd.graph.increment_version(tensor)
        return out

    _library.impl(name, kernel, "Autograd", with_keyset=True)


def _require_one_device(*args: Any, **kwargs: Any) -> None:
    """What an op that only writes into its arguments does with fake tensors: a real one among them would be lost."""
    devices = sorted({str(tensor.device) for value in args for tensor in _tensors(value)})
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {' and '.join(devices)}; move them with .to(device)")


for _name in (
    "syrk_accumulate_",
    "grouped_syrk_accumulate_",
    "kron_accumulate_",
    "khatri_rao_syrk_accumulate_",
    "symmetrize_",
):
    torch.library.register_fake(f"sst_kernels::{_name}", _require_one_device, lib=_library)
    _refuse_gradients(_name)
for _name in ("khatri_rao_rows", "pack_lower", "unpack_lower"):
    _refuse_gradients(_name)
_refuse_gradients("fused_eigh", "use sst_kernels.eigh or sst_kernels.solve, which are, or ")
