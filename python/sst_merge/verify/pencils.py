"""The pencils of a finished run, as matrices, with the pairs that the merge finds for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..directions import ALL_MODULES, Directions
from ..mixture import Statistics
from ..settings import KINDS, SstParameters
from .checks import Check
from .formed import FORMED_UP_TO, sides
from .solved import EPS, REASON, REASON_B, Solved

STORED_EPS = torch.finfo(torch.float32).eps
_SIX = "5·10⁻⁶ (six digits are kept) + 4δ"


def solved(
    statistics: Statistics, d: Directions, patch: Mapping[str, Tensor], parameters: SstParameters, gamma: float
) -> tuple[Solved | None, list[Check]]:
    """One pencil of the run with its pairs.

    A pencil too large to be formed is restricted to a subspace that loses nothing, where there is one: if A = JᵀJ and
    B = KᵀK + D, J and K rows and D blocks, to the span of D⁻¹Jᵀ, D⁻¹Kᵀ and φ. B⁻¹Jᵀ lies in it, so that off it, in the
    metric B, A is zero and nothing can be gained.

    Args:
        statistics: Fishers of the modules.
        d: The pencil's directions.
        patch: Module name -> core of τ.
        parameters: Form and shrinkage of either Fisher are used.
        gamma: γ.

    Returns:
        The pencil, on the CPU and in units of order 1, None where it is too large for both; and checks of what A and B
        are made of, and of the restriction where there was one.
    """
    name = d.names[0] if len(d.names) == 1 else f"{len(d.names)} modules"
    phi = torch.cat([patch[module].flatten() for module in d.names])
    parts = sides(statistics, d, patch, parameters, gamma)
    if parts is None:
        return None, []
    a, b, checks = parts
    vectors, restricted = d.vectors, len(phi) > FORMED_UP_TO
    if not restricted:
        a, b = a.dense(), b.dense()
    elif len(a.rows) + len(b.rows) >= FORMED_UP_TO:
        return None, checks
    else:
        columns = torch.cat([b.solve_blocks(a.rows.mT), b.solve_blocks(b.rows.mT), phi[:, None]], 1)
        basis = torch.linalg.qr(columns).Q
        a, b = (basis.mT @ (side @ basis) for side in (a, b))
        phi, vectors = basis.mT @ phi, basis.mT @ vectors
        outside = -float(((d.vectors - basis @ vectors).norm(dim=0) / d.vectors.norm(dim=0)).max())
        a, b = (a + a.mT) / 2, (b + b.mT) / 2
    s = Solved(name, *(x.cpu() for x in (a, b, d.values, vectors, phi)), stored_eps=STORED_EPS).normalised()
    if restricted:
        reason = "4p(n)ε κ(B): rounding of the solve with B"
        checks.append(Check("pencil", name, "v_i in the span of D⁻¹Jᵀ and D⁻¹Kᵀ", outside, s.tolerance_b, reason))
    return s, checks


def recorded(report: Mapping[str, Any], label: str, d: Directions, s: Solved | None) -> list[Check]:
    """λ, gain and cost of the whole patch as report.json has them, against those found anew.

    Args:
        report: The run's.
        label: Key of its directions.
        d: The directions found anew.
        s: The same pencil, for its tolerance; None if it was not formed.

    Returns:
        Checks; where the run has no such pencil, they fail.
    """
    unit = abs(float(d.values[0])) or 1.0
    values = torch.tensor(report["directions"].get(label, {"value": []})["value"], dtype=torch.float64)
    off = float((values - d.values.cpu()).abs().max()) / unit if len(values) == len(d.values) else float("nan")
    if s is None:
        return [Check("record", label, "λ in report.json = λ found anew", -off, 1e-5, "10⁻⁵: six digits are kept")]
    rows = [row for row in report["modules"] if row["module"] == label] if label != ALL_MODULES else [report["joint"]]
    known = {key: rows[0].get(key, float("nan")) if rows else float("nan") for key in ("gain_full", "cost_full")}
    gain = abs(known["gain_full"] - d.gain_full) / (unit * d.cost_full)
    cost = abs(known["cost_full"] - d.cost_full) / d.cost_full
    return [
        Check("record", s.name, "λ in report.json = λ found anew", -off, 5e-6 + s.tolerance, _SIX),
        Check("record", s.name, "φᵀAφ in report.json = found anew", -gain, s.tolerance, REASON),
        Check("record", s.name, "φᵀBφ in report.json = found anew", -cost, s.tolerance_b, REASON_B),
    ]


def shared(report: Mapping[str, Any], directions: Mapping[str, Directions], gamma: float, n: int) -> list[Check]:
    """What is one for all pencils: γ, and the least, mean and largest s of either Fisher.

    Args:
        report: The run's.
        directions: Found anew.
        gamma: γ by its definition.
        n: Coordinates of all modules.

    Returns:
        Three checks.
    """
    off = abs(report["gamma"] - gamma) / gamma
    reason = "4p(n)ε: rounding of a sum"
    checks = [Check("record", "run", "γ in report.json = ε Σ tr F_benign / Σ n", -off, 4 * max(n, 16) * EPS, reason)]
    for i, kind in enumerate(KINDS):
        found = [d.shrinkage[i] for d in directions.values()]
        said, known = report["fishers"][kind]["shrinkage"], {"least": min(found), "most": max(found)}
        known["mean"] = sum(found) / len(found)
        off = max(abs(said[key] - s) for key, s in known.items())
        reason = "10⁻⁹: of a quotient of sums on another machine"
        checks.append(Check("record", "run", f"s of F_{kind} in report.json = found anew", -off, 1e-9, reason))
    return checks
