"""Certificates of the pairs themselves: residuals, B-orthonormality, inertia, and that other solvers say the same."""

from __future__ import annotations

import scipy.linalg
import torch
from torch import Tensor

from sst_kernels import Pencil, Status, solve

from .checks import Check
from .solved import EPS, REASON, REASON_B, Solved

_FEW = 8  # pairs that the methods for few pairs are asked for
_ITERATED_FROM = 64  # order from which the iteration is asked too
_COUNTED = "none: a count; t is 4δλ₁ beside λ_k, and λ nearer to t than 2δλ₁ may fall on either side"
METHODS = ("dense", "lapack", "scipy.linalg.eigh", "auto", "davidson")
"""Solvers that are compared; the last two for few pairs."""


def assumptions(s: Solved) -> list[Check]:
    """A ⪰ 0 and B ≻ 0, which the theorems ask for.

    Args:
        s: The pencil.

    Returns:
        Two checks.

    Cost: O(n³) flops.
    """
    norm_a, norm_b, _ = s.norms
    lowest = float(torch.linalg.eigvalsh(s.a)[0]) / norm_a if norm_a else 0.0
    positive = float(torch.linalg.eigvalsh(s.b)[0]) / norm_b
    summed = "p(n)u: rounding of sums of g gᵀ in the precision u that they are kept in"
    return [
        Check("pencil", s.name, "A ⪰ 0: least eigenvalue over ‖A‖", lowest, s.p * s.stored_eps, summed),
        Check("pencil", s.name, "B ≻ 0: least eigenvalue over ‖B‖", positive, s.p * EPS, "p(n)ε: of the eigenvalue"),
    ]


def pairs(s: Solved) -> list[Check]:
    """VᵀBV = I, and residuals in the norm that bounds the error of λ: ‖L⁻¹(Av − λBv)‖, B = LLᵀ.

    Args:
        s: The pencil and its pairs.

    Returns:
        Three checks.

    Cost: O(n²m) flops.
    """
    b_v = s.b @ s.vectors
    gram = s.vectors.mT @ b_v
    apart = float((gram - torch.eye(s.m, dtype=gram.dtype)).abs().max())
    residual = s.dual_norm(s.a @ s.vectors - b_v * s.values) / s.scale
    order = float((s.values[:-1] - s.values[1:]).min()) / s.scale if s.m > 1 else 0.0
    return [
        Check("pairs", s.name, "VᵀBV = I", -apart, s.tolerance_b, REASON_B),
        Check("pairs", s.name, "Av = λBv: ‖Av − λBv‖ in the norm of B⁻¹", -residual, s.tolerance, REASON),
        Check("pairs", s.name, "λ_i ≥ λ_{i+1}", order, 0.0, "none"),
    ]


def inertia(s: Solved) -> list[Check]:
    """As many eigenvalues above t as there are λ_i > t, by A − tB = LDLᵀ (Sylvester): none is missing.

    Args:
        s: The pencil and its pairs.

    Returns:
        For λ₁ and the last of every k of `Solved.ranks`, a count just above and one just below.

    Cost: n³/3 flops for each.
    """
    pencil, width = Pencil(s.a, s.b), s.tolerance * s.scale
    checks = []
    for k in (*s.ranks(), s.m):
        for side, t in (("above", float(s.values[k - 1]) + width), ("below", float(s.values[k - 1]) - width)):
            if t <= width and s.m < s.n:
                continue  # the eigenvalues that are left out are zero
            counted = int(pencil.count_above(t))
            least, most = (int((s.values > t + x).sum()) for x in (width / 2, -width / 2))
            off = min(counted - least, most - counted, 0)
            checks.append(Check("inertia", f"{s.name}, k = {k}", _counts(side), off, _undecidable(s), _COUNTED))
    return checks


def _counts(side: str) -> str:
    """The statement of a count."""
    return f"eigenvalues of A − tB > 0: as many as λ_i > t, t just {side} λ_k"


def _undecidable(s: Solved) -> float:
    """A count has no tolerance; but where δ decides nothing, nor does the count."""
    return 0.0 if s.tolerance < 0.1 else s.n


def agreement(s: Solved) -> tuple[list[Check], list[str]]:
    """Other solvers, and LAPACK by way of scipy, find the same eigenvalues and the same leading space.

    The space is that of the first k, k at the widest gap among the first n/4; by Davis and Kahan (1970) two of
    perturbation δλ₁ are at most 4δλ₁/(λ_k − λ_{k+1}) apart, as the sine of the largest angle in the metric B.

    Args:
        s: The pencil and its pairs.

    Returns:
        Checks for every solver, and a line for each that says that it did not converge.

    Cost: 10n³ to 30n³ flops for each.
    """
    checks, notes = [], []
    for method in METHODS:
        few = method in ("auto", "davidson")
        k = min(_FEW, s.m) if few else s.n
        if method == "davidson" and s.n < _ITERATED_FROM:
            continue
        found, note = _solved_by(method, s, k)
        if found is None:
            notes.append(f"{s.name}: {method} says {note}")
            continue
        checks += _compared(s, method, *found)
    return checks, notes


def _solved_by(method: str, s: Solved, k: int) -> tuple[tuple[Tensor, Tensor] | None, str]:
    """Pairs, descending; or None and the status."""
    if method == "scipy.linalg.eigh":
        values, vectors = scipy.linalg.eigh(s.a.numpy(), s.b.numpy())
        return (torch.from_numpy(values).flip(0), torch.from_numpy(vectors).flip(1)), ""
    result = solve(Pencil(s.a, s.b), k, method=method)
    if bool(result.converged):
        return (result.values, result.vectors), ""
    return None, ", ".join(bit.name for bit in Status if int(result.status) & bit) or "nothing"


def _compared(s: Solved, method: str, values: Tensor, vectors: Tensor) -> list[Check]:
    """Eigenvalues, and the leading space where a gap sets one apart."""
    claimed = torch.cat([s.values, s.values.new_zeros(s.n - s.m)])[: len(values)]
    off = float((values - claimed).abs().max()) / s.scale
    checks = [Check("solvers", s.name, f"λ by {method}", -off, s.tolerance, REASON)]
    most = min(max(1, s.n // 4), len(values) - 1, s.m - 1)
    if most >= 1:
        gaps = s.values[:most] - s.values[1 : most + 1]
        k = int(gaps.argmax()) + 1
        gap = float(gaps[k - 1])
        inside = vectors[:, :k] - s.vectors[:, :k] @ (s.vectors[:, :k].mT @ (s.b @ vectors[:, :k]))
        sine = float((s.factor.mT @ inside).norm(2))
        tolerance = s.tolerance * s.scale / gap + s.tolerance_b if gap > 0 else float("inf")
        reason = "4δλ₁/(λ_k − λ_{k+1}) + 4p(n)ε κ(B): Davis and Kahan, and rounding"
        checks.append(Check("solvers", f"{s.name}, k = {k}", f"span V_k by {method}", -sine, tolerance, reason))
    return checks
