"""LAPACK's xSYGVX and xSYGVD by way of scipy: larger dense pencils on the CPU; torch knows whole spectra alone."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .operators import Dense
from .pencil import Pencil
from .result import Spectrum, Status

_NORM_STEPS, _NORM_COLUMNS = 2, 4  # of the power iteration for ‖L⁻¹AL⁻ᴴ‖


@torch.no_grad()
def lapack(pencil: Pencil, k: int) -> Spectrum:
    """The k largest pairs of A v = λ B v, one pencil after the other: by xSYGVX, or xSYGVD for a quarter or more.

    Args:
        pencil: on the CPU; A and B are formed, of Dense ones only the lower triangles are read.
        k: number of pairs.

    Returns:
        k + 1 values (all, by xSYGVD) and k vectors; NaN and NON_FINITE for pencils that LAPACK does not
        solve, whatever their fault. 4n³ to 9n³ flops a pencil; three to five n² matrices.
    """
    n, batch = pencil.n, pencil.batch_shape
    measured = pencil.measured()
    finite = (measured[0].norm + measured[1].norm).isfinite().expand(batch).reshape(-1)  # else LAPACK may not end
    a, b = (x.matrix if isinstance(x, Dense) else x.to_dense() for x in (pencil.A, pencil.B))
    a, b = (x.broadcast_to(*batch, n, n).reshape(-1, n, n) for x in (a, b))
    known = k + 1 if k < max(n // 8, (5 * n - 1024) // 16) else n  # where xSYGVX is the faster, as measured
    values = torch.full((len(a), known), torch.nan, dtype=a.real.dtype)
    vectors = torch.full((len(a), k, n), torch.nan, dtype=a.dtype).mT  # columns, as LAPACK's
    size = torch.full((len(a),), torch.nan, dtype=values.dtype)
    for i, (one, other) in enumerate(zip(a, b, strict=True)):
        found = _solve(one, other, known) if finite[i] else None
        if found is not None:
            values[i], vectors[i], size[i] = found[0].flip(-1), found[1][:, -k:].flip(-1), found[2]
    uncertainty = n * torch.finfo(values.dtype).eps * torch.maximum(size, values.abs().amax(-1))
    status = torch.isnan(size) * int(Status.NON_FINITE)
    values, vectors = values.reshape(*batch, known), vectors.reshape(*batch, n, k)
    errors, orthogonality = pencil.certificates(values[..., :k], vectors, measured)
    return Spectrum(values, vectors, uncertainty.reshape(batch), status.reshape(batch), errors, orthogonality)


def _solve(a: Tensor, b: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The `count` largest values, ascending, with vectors (n, count), and about |λ|_max, or 0 where all are known.

    Returns:
        None where LAPACK fails.
    """
    from scipy.linalg import LinAlgError, eigh  # here, because it takes a tenth of a second

    n = len(a)
    # Their transposes are LAPACK's order of columns, and conjugates; B's becomes its factor U, B̄ = UᴴU.
    first, second = (_copy_by_columns(x) for x in (a, b))
    options = {"driver": "gvx", "subset_by_index": [n - count, n - 1]} if count < n else {"driver": "gvd"}
    try:
        values, vectors = eigh(
            first, second, lower=False, overwrite_a=True, overwrite_b=True, check_finite=False, **options
        )
    except LinAlgError:
        return None
    # the most negative λ may be larger than those found
    size = _norm_of_reduced(a, torch.from_numpy(second)) if count < n else torch.zeros(())
    return torch.from_numpy(values), torch.from_numpy(vectors).conj().resolve_conj(), size


def _copy_by_columns(x: Tensor) -> NDArray:
    """Transposed, as Fortran stores matrices."""
    return np.array(x.detach().resolve_conj().resolve_neg().numpy().T, order="F")


def _norm_of_reduced(a: Tensor, upper: Tensor) -> Tensor:
    """‖U⁻ᴴĀU⁻¹‖₂, which is |λ|_max, from below; 4n² flops a step and column."""
    conjugate = Dense(a.conj().resolve_conj())
    x = torch.randn(len(a), _NORM_COLUMNS, dtype=a.dtype, generator=torch.Generator().manual_seed(0))
    for _ in range(_NORM_STEPS):
        x = x / torch.linalg.vector_norm(x, dim=0)
        x = conjugate @ torch.linalg.solve_triangular(upper, x, upper=True)
        x = torch.linalg.solve_triangular(upper.mH, x, upper=False)
    return torch.linalg.vector_norm(x, dim=0).amax()
