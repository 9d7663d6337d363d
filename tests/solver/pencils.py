"""Pencils of known spectrum and of planted faults, and the bars that every method must meet.

Generators are pure functions of their arguments and return float64 arrays, or tensors where they take a torch dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import mpmath
import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from sst_kernels.result import Status

METHODS = ["dense", "davidson"]  # whose results test_spectra.py and test_property.py hold to the bars


class Known(NamedTuple):
    """A v = λ B v and all its λ, descending."""

    a: np.ndarray
    b: np.ndarray
    values: np.ndarray


def orthogonal(n: int, rng: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((n, n)))[0]


def symmetric(x: np.ndarray) -> np.ndarray:
    return (x + x.T) / 2


def hermitian(x: Tensor) -> Tensor:
    return (x + x.mH) / 2


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def positive(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    x = draw(n, 2 * n, seed=seed, dtype=dtype)
    return x @ x.mH / n


def mikota(n: int) -> Known:
    """A chain of springs and masses with λ = n², …, 4, 1 (Mikota 2001)."""
    j = np.arange(1.0, n + 1)
    beside = np.diag(j[:-1] - n, 1)
    return Known(np.diag(2 * (n - j) + 1) + beside + beside.T, np.diag(1 / j), j[::-1] ** 2)


def sakurai(n: int) -> Known:
    """The square of the 1-D Laplacian, B = I: λ = 16 cos⁴(jπ / 2(n + 1)) (Sakurai et al. 2004)."""
    laplacian = 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    return Known(laplacian @ laplacian, np.eye(n), 16 * np.cos(np.arange(1, n + 1) * np.pi / (2 * n + 2)) ** 4)


def elastic_rod(n: int) -> Known:
    """Linear elements of a steel rod fixed at one end: λ_j = (6E/ρh²)(1 − c)/(2 + c), c = cos((j − ½)π/n)."""
    density, area, modulus, h = 7.85e3, 1e-4, 2.1e11, 1 / n
    near = np.eye(n, k=1) + np.eye(n, k=-1)
    end = np.diag([2.0] * (n - 1) + [1.0])
    c = np.cos((np.arange(n, 0, -1) - 0.5) * np.pi / n)
    values = 6 * modulus / (density * h**2) * (1 - c) / (2 + c)
    return Known(modulus * area / h * (end - near), density * area * h / 6 * (2 * end + near), values)


def laplacian(m: int) -> Known:
    """Five-point Laplacian on an m × m grid and B = diag(2 / log(i + 2)) (SLEPc, src/eps/tests/test1.c)."""
    line = 2 * np.eye(m) - np.eye(m, k=1) - np.eye(m, k=-1)
    a = np.kron(line, np.eye(m)) + np.kron(np.eye(m), line)
    d = 2 / np.log(np.arange(m * m) + 2)
    return Known(a, np.diag(d), np.linalg.eigvalsh(a / np.sqrt(np.outer(d, d)))[::-1])


def planted(values: np.ndarray | list[float], cond: float, seed: int = 0) -> Known:
    """These λ: A = C diag(λ) Cᵀ and B = C Cᵀ with random C of condition √cond."""
    rng = np.random.default_rng((len(values), seed))
    n = len(values)
    basis = orthogonal(n, rng) * np.logspace(0, -np.log10(cond) / 2, n) @ orthogonal(n, rng)
    return Known(symmetric(basis * values @ basis.T), symmetric(basis @ basis.T), np.sort(values)[::-1])


def kronecker(left: Known, right: Known) -> Known:
    """(A₁ ⊗ A₂) v = λ (B₁ ⊗ B₂) v: λ = α_i β_j."""
    products = np.outer(left.values, right.values).ravel()
    return Known(np.kron(left.a, right.a), np.kron(left.b, right.b), np.sort(products)[::-1])


def gram(n: int, gains: int, costs: int, damping: float, seed: int = 0) -> Known:
    """A = JᵀJ/N, B = KᵀK/M + γI for N < n gains J and M costs K.

    The nonzero λ are those of [JJᵀ − JKᵀ(MγI + KKᵀ)⁻¹KJᵀ] / γN.
    """
    rng = np.random.default_rng((n, seed))
    j, k = rng.standard_normal((gains, n)), rng.standard_normal((costs, n))
    inner = np.linalg.solve(costs * damping * np.eye(costs) + k @ k.T, k @ j.T)
    nonzero = np.linalg.eigvalsh(symmetric(j @ j.T - j @ k.T @ inner)) / (damping * gains)
    values = np.concatenate([nonzero[::-1], np.zeros(n - gains)])
    return Known(j.T @ j / gains, k.T @ k / costs + damping * np.eye(n), values)


def kfac(n: int, damping: float = 1e-3, seed: int = 0) -> Known:
    """Covariances Q diag(1/i) Qᵀ of independent Q; B damped by a share of its mean eigenvalue. λ are LAPACK's."""
    rng = np.random.default_rng((n, seed))
    power = 1 / np.arange(1.0, n + 1)
    a, b = (symmetric(q * power @ q.T) for q in (orthogonal(n, rng), orthogonal(n, rng)))
    b += damping * power.mean() * np.eye(n)
    return Known(a, b, scipy.linalg.eigvalsh(a, b)[::-1])


SPECTRA = {
    "spread": lambda n, rng: 1 + np.arange(n) / n,
    "power law": lambda n, rng: 1 / np.arange(1.0, n + 1),
    "steep": lambda n, rng: np.logspace(0, -8, n),
    "uniform": lambda n, rng: rng.random(n),
    "clusters": lambda n, rng: 2.0 ** -(np.arange(n) // 4) * (1 + 1e-9 * rng.random(n)),
    "repeated": lambda n, rng: 2.0 ** -(np.arange(n) // 3),
    "low rank": lambda n, rng: np.where(np.arange(n) <= n // 4, 1 + rng.random(n), 0.0),
}

FAULTS = {
    "indefinite": Status.NOT_POSITIVE_DEFINITE,
    "singular": Status.NOT_POSITIVE_DEFINITE,
    "negative": Status.NOT_POSITIVE_DEFINITE,
    "nan in A": Status.NON_FINITE,
    "inf in B": Status.NON_FINITE,
}


def with_fault(fault: str, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Copies of A and B with this fault, one of FAULTS, in the lower triangle."""
    a, b = a.copy(), b.copy()
    i = len(a) // 2
    if fault == "indefinite":
        b[i, i] = -1e-3 * np.abs(b).max()
    elif fault == "singular":
        b[i, :] = b[:, i] = 0
    elif fault == "negative":
        b = -b
    elif fault == "nan in A":
        a[-1, i] = np.nan
    else:
        b[i, 0] = np.inf
    return a, b


def one_norm(x: np.ndarray) -> float:
    return np.abs(x).sum(0).max()


def errors(a: np.ndarray, b: np.ndarray, w: np.ndarray, v: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Residual, B-orthogonality and largest eigenvalue error relative to λ₁, computed in double."""
    a, b, w, v = (x.astype(np.promote_types(x.dtype, float)) for x in (a, b, w, v))
    size = (one_norm(a) + np.abs(w).max() * one_norm(b)) * one_norm(v)
    return np.array(
        [
            one_norm(a @ v - b @ v * w) / size,
            one_norm(v.conj().T @ b @ v - np.eye(v.shape[1])),
            np.abs(w - exact).max() / np.abs(exact).max(),
        ]
    )


def lapack_ratio(a: np.ndarray, b: np.ndarray, w: np.ndarray, v: np.ndarray) -> float:
    """‖AZ − BZΘ‖₁ / (‖A‖₁‖Z‖₁ n ulp), called a failure from 20 on (LAPACK, TESTING/EIG/dsgt01.f)."""
    ulp = np.finfo(a.dtype).eps
    a, b, w, v = (x.astype(float) for x in (a, b, w, v))
    return one_norm(a @ v - b @ v * w) / (one_norm(a) * one_norm(v) * len(a) * ulp)


def scipy_largest(a: np.ndarray, b: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest pairs by LAPACK in the dtype of A, descending."""
    n = len(a)
    w, v = scipy.linalg.eigh(a, b, subset_by_index=[n - k, n - 1])
    return w[::-1], v[:, ::-1]


def eigenvalues_in_50_digits(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Descending λ of the pencil as stored: double precision cannot judge itself at cond(B) = 1e12."""
    with mpmath.workdps(50):
        inverse = mpmath.inverse(mpmath.cholesky(mpmath.matrix(b.tolist())))
        c = inverse * mpmath.matrix(a.tolist()) * inverse.T
        return np.array(mpmath.eigsy(c, eigvals_only=True).T.tolist()[0], dtype=float)[::-1]
