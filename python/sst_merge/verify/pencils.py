"""The pencils of a finished run, as matrices, with the pairs that the merge finds for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sst_kernels import Gram, LowRankPlusDiagonal, Pencil

from ..directions import ALL_MODULES, Directions
from ..mixture import Statistics
from ..settings import SstParameters
from .checks import Check
from .solved import REASON, REASON_B, Solved

STORED_EPS = torch.finfo(torch.float32).eps
_SIX = "5·10⁻⁶ (six digits are kept) + 4δ"


def pencil(statistics: Statistics, names: Sequence[str], parameters: SstParameters, gamma: float) -> Pencil:
    """(F_harm, F_benign + γI), shrunk: the definition of `directions`, written down a second time.

    Args:
        statistics: Fishers of the modules.
        names: The modules whose coordinates follow one another: one, or with "gram" all.
        parameters: Representation and shrinkage are used.
        gamma: γ.

    Returns:
        The pencil, float64.
    """
    s, harm, benign = parameters.shrinkage, statistics.harm, statistics.benign
    if parameters.fisher == "gram":
        entries = gamma + s * torch.cat([benign.diagonal_of(name) for name in names])
        factor = benign.joint_rows(names).mT * ((1 - s) / benign.count) ** 0.5
        return Pencil(Gram(harm.joint_rows(names), harm.count), LowRankPlusDiagonal(factor, entries))
    (name,) = names
    a, b = (sums.diagonal_of(name).diag() for sums in (harm, benign))
    if parameters.fisher != "diagonal":
        a, b = s * a + (1 - s) * harm.fisher(name), s * b + (1 - s) * benign.fisher(name)
    return Pencil(a, b + gamma * torch.eye(len(b), dtype=b.dtype, device=b.device))


def solved(
    statistics: Statistics, d: Directions, patch: Mapping[str, Tensor], parameters: SstParameters, gamma: float
) -> tuple[Solved, list[Check]]:
    """One pencil of the run with its pairs.

    A pencil over all modules is restricted to the span of D⁻¹Jᵀ, D⁻¹Kᵀ and φ, J and K the rows of A and B and D the
    diagonal part of B: B⁻¹Jᵀ lies in it, so that off it, in the metric B, A is zero and nothing can be gained.

    Args:
        statistics: Fishers of the modules.
        d: The pencil's directions.
        patch: Module name -> core of τ.
        parameters: As for `pencil`.
        gamma: γ.

    Returns:
        The pencil, on the CPU and in units of order 1, and a check of the restriction where there was one.
    """
    name = d.names[0] if len(d.names) == 1 else f"{len(d.names)} modules"
    phi = torch.cat([patch[module].flatten() for module in d.names])
    whole = pencil(statistics, d.names, parameters, gamma)
    vectors, checks = d.vectors, []
    if isinstance(whole.A, Gram):
        d_b = whole.B.entries[:, None]
        parts = (whole.A.rows.mT / d_b, whole.B.factor / d_b, phi[:, None])
        basis = torch.linalg.qr(torch.cat(parts, 1)).Q
        a, b = (basis.mT @ (side @ basis) for side in (whole.A, whole.B))
        phi, vectors = basis.mT @ phi, basis.mT @ vectors
        outside = -float(((d.vectors - basis @ vectors).norm(dim=0) / d.vectors.norm(dim=0)).max())
        a, b = (a + a.mT) / 2, (b + b.mT) / 2
    else:
        a, b = whole.dense()
    s = Solved(name, *(x.cpu() for x in (a, b, d.values, vectors, phi)), stored_eps=STORED_EPS).normalised()
    if isinstance(whole.A, Gram):
        reason = "4p(n)ε κ(B): rounding of the solve with B"
        checks.append(Check("pencil", name, "v_i in the span of D⁻¹Jᵀ and D⁻¹Kᵀ", outside, s.tolerance_b, reason))
    return s, checks


def recorded(report: Mapping[str, Any], label: str, d: Directions, s: Solved) -> list[Check]:
    """λ, gain and cost of the whole patch as report.json has them, against those found anew.

    Args:
        report: The run's.
        label: Key of its directions.
        d: The directions found anew.
        s: The same pencil, for its tolerance.

    Returns:
        Checks; where the run has no such pencil, they fail.
    """
    unit = abs(float(d.values[0])) or 1.0
    values = torch.tensor(report["directions"].get(label, {"value": []})["value"], dtype=torch.float64)
    same = len(values) == s.m
    off = float((values - d.values.cpu()).abs().max()) / unit if same else float("nan")
    rows = [row for row in report["modules"] if row["module"] == label] if label != ALL_MODULES else [report["joint"]]
    known = {key: rows[0].get(key, float("nan")) if rows else float("nan") for key in ("gain_full", "cost_full")}
    gain = abs(known["gain_full"] - d.gain_full) / (unit * d.cost_full)
    cost = abs(known["cost_full"] - d.cost_full) / d.cost_full
    return [
        Check("record", s.name, "λ in report.json = λ found anew", -off, 5e-6 + s.tolerance, _SIX),
        Check("record", s.name, "φᵀAφ in report.json = found anew", -gain, s.tolerance, REASON),
        Check("record", s.name, "φᵀBφ in report.json = found anew", -cost, s.tolerance_b, REASON_B),
    ]
