"""What a solver returns: eigenpairs with a certificate, and a status for each pencil."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag
from typing import NamedTuple

import numpy as np
from torch import Tensor


class Status(IntFlag):
    """Outcome of one pencil, as bits; `REMEDIES` says what to do about each.

    CONVERGED: every backward error is at most `tol`, or at most 10 `tol` with STAGNATED or MAX_ITERATIONS
        beside it.
    VERIFIED: besides, no eigenvalue above the returned ones is missing: k = n, a closed form,
        the inertia of A − tB with t between λ_k and λ_(k+1) (dense pencils, n <= 512, or on request), or by
        "subset" the inertia of T − tI, which bisection counts: up to rounding, which is below
        the gap at k, T is similar to B⁻¹A (Sylvester). Never set beside CLUSTER_AT_K.
    CLUSTER_AT_K: λ_k and λ_(k+1) are equal to working accuracy.
    NOT_POSITIVE_DEFINITE: B has no Cholesky factor, in float64.
    NON_FINITE: NaN or infinity in A or B, or a result that overflows.
    MAX_ITERATIONS: the iteration limit came before `tol`.
    STAGNATED: a backward error stays above `tol`.
    """

    CONVERGED = 1
    VERIFIED = 2
    CLUSTER_AT_K = 4
    NOT_POSITIVE_DEFINITE = 8
    NON_FINITE = 16
    MAX_ITERATIONS = 32
    STAGNATED = 64


def faults(infinite: Tensor, indefinite: Tensor) -> Tensor:
    """Status bits, int64, of bool tensors that say where A or B is not finite, and where B is not positive definite."""
    return infinite * int(Status.NON_FINITE) | indefinite * int(Status.NOT_POSITIVE_DEFINITE)


REMEDIES = {
    Status.CLUSTER_AT_K: "λ_k = λ_(k+1) to working accuracy, so the k-th vector is an arbitrary "
    "choice; take k up to the next gap in the spectrum",
    Status.NOT_POSITIVE_DEFINITE: "B is not positive definite; add damping, B + γI",
    Status.NON_FINITE: "NaN or infinity in A or B (or a result out of range); find its source, or rescale",
    Status.MAX_ITERATIONS: "the iteration limit was reached; raise it, or loosen tol",
    Status.STAGNATED: "a backward error stays above tol; use float64, a larger tol, or more damping of B, and "
    "make sure that callables are Hermitian",
}


class Counts(NamedTuple):
    """Columns that the solve and its certificate multiplied, per pencil still in the batch, and iterations.

    Of direct methods those of the certificate, one with A and B per returned pair; they never iterate.
    """

    a_products: int
    b_products: int
    preconditioner_products: int
    iterations: int


class Spectrum(NamedTuple):
    """What a method hands to `solve`, which judges it.

    Attributes:
        values: the eigenvalues it knows, (..., m), descending; m > k unless k = n.
        vectors: of the first k, (..., n, k).
        uncertainty: how far λ_k may be from the truth, (...,).
        status: fault bits, and VERIFIED if nothing is missing should the pairs hold; (...,).
        errors: backward errors of the k pairs, (..., k), where the method has computed them.
        orthogonality: max |VᴴBV − I|, (...,), where the method has computed it.
        counts: of the method, where it iterates.
        history: of the iteration, see `EigenResult`.
    """

    values: Tensor
    vectors: Tensor
    uncertainty: Tensor
    status: Tensor
    errors: Tensor | None = None
    orthogonality: Tensor | None = None
    counts: Counts | None = None
    history: Tensor | None = None


@dataclass(frozen=True, eq=False)
class EigenResult:
    """The k largest λ of A v = λ B v, with VᴴBV = I, for each pencil of a batch (...).

    Pencils that could not be solved have NaN values, vectors and certificates.

    Attributes:
        values: λ (..., k), real, descending.
        vectors: V (..., n, k), columns in the order of `values`.
        backward_errors: ‖Av − λBv‖ / ((‖A‖ + |λ|‖B‖) ‖v‖) of each pair, (..., k).
        b_orthogonality: max |VᴴBV − I|, (...,).
        status: `Status` bits, int64 (...,).
        method: name of the method that ran.
        counts: products and iterations.
        history: (steps, 3) float64 of the iteration, None for a direct method: pencils still in the batch, wanted
            pairs above tolerance in them, and the largest backward error. A step more than iterations for each
            time that it began anew, to judge what it began with.
    """

    values: Tensor
    vectors: Tensor
    backward_errors: Tensor
    b_orthogonality: Tensor
    status: Tensor
    method: str
    counts: Counts
    history: Tensor | None = None

    @property
    def converged(self) -> Tensor:
        """Bool (...,): the CONVERGED bit."""
        return (self.status & Status.CONVERGED) != 0

    def explain(self) -> list[str]:
        """One line for each pencil whose status asks for attention, with the remedy.

        Returns:
            Lines such as "pencil (0, 2): NOT_POSITIVE_DEFINITE: B is not …"; empty if all is well.
        """
        lines = []
        status = self.status.numpy(force=True)
        for index in np.ndindex(status.shape):
            code = int(status[index])
            faults = [f"{bit.name}: {text}" for bit, text in REMEDIES.items() if code & bit]
            if faults:
                lines.append(f"pencil {index or ''}".rstrip() + ": " + "; ".join(faults))
        return lines
