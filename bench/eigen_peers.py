"""The peers of the eigensolver on the CPU, each called as its own documentation advises, all with a Cholesky of B.

A peer takes (a, b, k, tol), tol in its own meaning, and returns k values, descending, and vectors as columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.linalg import cho_solve, cholesky, eigh, solve_triangular
from scipy.sparse.linalg import LinearOperator

from eigen_pencils import backward_error

Pairs = tuple[NDArray, NDArray]
Peer = Callable[[NDArray, NDArray, int, float], Pairs]


def scipy_subset(a: NDArray, b: NDArray, k: int, tol: float) -> Pairs:
    """LAPACK's sygvx: tridiagonalisation, then the k wanted pairs; to working accuracy."""
    return _descending(*eigh(a, b, subset_by_index=[len(a) - k, len(a) - 1]), k)


def scipy_full(a: NDArray, b: NDArray, k: int, tol: float) -> Pairs:
    """LAPACK's sygvd: all pairs by divide and conquer, to working accuracy."""
    return _descending(*eigh(a, b), k)


def arpack(a: NDArray, b: NDArray, k: int, tol: float) -> Pairs:
    """Lanczos on L⁻¹AL⁻ᵀ, B = LLᵀ; twice as fast as ARPACK's own mode for M, which multiplies by B too."""
    factor, standard = _standard(a, b)
    start = np.random.default_rng(0).standard_normal(len(a)).astype(a.dtype)
    return _descending(*_from_standard(factor, *sparse.linalg.eigsh(standard, k, which="LA", tol=tol, v0=start)), k)


def lobpcg(a: NDArray, b: NDArray, k: int, tol: float) -> Pairs:
    """Blocks of k, preconditioned by B⁻¹ through its Cholesky factor."""
    factor = cholesky(b, lower=True, check_finite=False)
    inverse = partial(cho_solve, (factor, True), check_finite=False)
    preconditioner = LinearOperator(a.shape, matvec=inverse, matmat=inverse, dtype=a.dtype)
    start = np.random.default_rng(0).standard_normal((len(a), k)).astype(a.dtype)
    with warnings.catch_warnings():  # of residuals above tol: the backward error is looked at instead
        warnings.simplefilter("ignore")
        return _descending(
            *sparse.linalg.lobpcg(a, start, B=b, M=preconditioner, tol=tol, maxiter=200, largest=True), k
        )


def primme(a: NDArray, b: NDArray, k: int, tol: float) -> Pairs:
    """GD+k on L⁻¹AL⁻ᵀ in blocks of up to 16: a fifth of the products of PRIMME's own M with B⁻¹ as preconditioner."""
    import primme as package

    factor, standard = _standard(a, b)
    found = package.eigsh(
        standard, k, which="LA", tol=tol, maxBlockSize=min(k, 16), maxiter=2000, raise_for_unconverged=False
    )
    return _descending(*_from_standard(factor, *found), k)


def xitorch(a: NDArray, b: NDArray, k: int, tol: float) -> Pairs:
    """Davidson's method of xitorch, its M = B."""
    from xitorch import LinearOperator as Operator
    from xitorch.linalg import symeig

    operators = [Operator.m(torch.from_numpy(x)) for x in (a, b)]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        found = symeig(operators[0], k, "uppest", M=operators[1], method="davidson", min_eps=tol, max_niter=300)
    return _descending(*(x.detach().numpy() for x in found), k)


DIRECT: dict[str, Peer] = {"scipy subset": scipy_subset, "scipy full": scipy_full}
ITERATIVE: dict[str, Peer] = {"ARPACK": arpack, "lobpcg": lobpcg, "PRIMME": primme, "xitorch": xitorch}
_MODULES = {"PRIMME": "primme", "xitorch": "xitorch"}


def prepare(name: str, a: NDArray, b: NDArray, k: int, target: float) -> tuple[Callable[[], Pairs] | None, str]:
    """A call of the peer at the loosest tolerance, by decades, whose backward error is at most `target`.

    Returns:
        The call and a label; None and the reason if the peer is not installed or never gets there.
    """
    if name in DIRECT:
        return partial(DIRECT[name], a, b, k, 0.0), name
    if name in _MODULES and find_spec(_MODULES[name]) is None:
        return None, f"{name} not measured: not installed"
    error = float("nan")
    for decade in range(4, -4, -1):
        call = partial(ITERATIVE[name], a, b, k, target * 10.0**decade)
        try:
            error = backward_error(a, b, *call())
        except (ImportError, sparse.linalg.ArpackError) as failure:
            return None, f"{name} not measured: {failure}"
        if error <= target:
            return call, f"{name} tol={target * 10.0**decade:.0e}"
    return None, f"{name} not measured: backward error {error:.0e} at its tightest tolerance, {target:.0e} wanted"


def _standard(a: NDArray, b: NDArray) -> tuple[NDArray, LinearOperator]:
    """L, and L⁻¹AL⁻ᵀ as an operator."""
    factor = cholesky(b, lower=True, check_finite=False)

    def product(x: NDArray) -> NDArray:
        y = solve_triangular(factor, x, lower=True, trans=1, check_finite=False)
        return solve_triangular(factor, a @ y, lower=True, check_finite=False)

    return factor, LinearOperator(a.shape, matvec=product, matmat=product, dtype=a.dtype)


def _from_standard(factor: NDArray, w: NDArray, y: NDArray) -> Pairs:
    """Pairs of the pencil from those of L⁻¹AL⁻ᵀ."""
    return w, solve_triangular(factor, y, lower=True, trans=1, check_finite=False)


def _descending(w: NDArray, v: NDArray, k: int) -> Pairs:
    """The k largest pairs, descending."""
    order = np.argsort(w)[::-1][:k]
    return w[order], v[:, order]
