r"""A merge in several small steps, with Fishers taken afresh where each begins.

θ_{j+1} = θ_j + α/(n−j) · Filter_j(τ_j),   τ_j = τ − (θ_j − θ_ft)/α,   j = 0, …, n−1.

τ_j is what remains of the patch: what a filter left out is offered again, to Fishers of a place nearer to where it
would lead, and without a filter n steps end at θ_ft + ατ. Points of the path lie on the way from θ_j along τ_j, labels
are sampled from the model there, and ḡ is that at θ_j. The quadratic model has to hold for a step only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .directions import Directions, find_directions
from .problem import Curvature, Problem
from .select import filtered_cores, kept_coefficients
from .settings import SstParameters


@dataclass(frozen=True)
class Walk:
    """The way from θ_ft to a merge of one strength.

    Attributes:
        cores: Module name -> core of θ_n − θ_0, for the modules of the patch.
        rows: A row of the report for every step: "predicted_kl", ½φᵀF_benignφ, and "predicted_refusal", ḡᵀφ, of the
            step φ; "gain_kept", φᵀAφ of the kept over that of the remaining patch, and "kept_energy", the same of
            squared norms.
    """

    cores: Mapping[str, Tensor]
    rows: list[dict[str, Any]]

    @property
    def predictions(self) -> dict[str, float]:
        """What the quadratic models say of the whole way, nats per sequence.

        KL ≈ ½d² for points at a distance d in the metric of the Fisher, and d is at most the length of the way:
        "predicted_kl" is ½(Σ_j √(φ_jᵀF_jφ_j))². Changes of log p(refusal) add up.
        """
        length = sum(math.sqrt(2 * max(row["predicted_kl"], 0.0)) for row in self.rows)
        return {
            "predicted_kl": 0.5 * length**2,
            "predicted_refusal": sum(row["predicted_refusal"] for row in self.rows),
        }


def walk(
    problem: Problem,
    parameters: SstParameters,
    alpha: float,
    first: tuple[Curvature, Mapping[str, Directions]],
) -> Walk:
    """Every step of a merge.

    Args:
        problem: Models and data.
        parameters: `steps` = n; the rest as for one step. The budget ρ is divided by n²: n steps of one direction, each
            of 1/n of the length, then cost ρ together.
        alpha: α.
        first: Statistics at θ_ft, and the directions of their pencils.

    Returns:
        Where it ends, and what it passed.

    Cost: n − 1 collections, unless they are in the folder of statistics.
    """
    curvature, directions = first
    n = parameters.steps if alpha else 1
    if parameters.rho is not None:
        parameters = replace(parameters, rho=parameters.rho / n**2)
    start, tau, rows = curvature.origin, curvature.patch, []
    here = {name: start[name] for name in tau}
    for j in range(n):
        if j:
            left = {name: tau[name] - (here[name] - start[name]) / alpha for name in tau}
            curvature = problem.curvature_at(parameters, j, {**start, **here}, left)
            directions, _ = find_directions(curvature.statistics, curvature.patch, parameters)
        share = alpha / (n - j)
        kept = kept_coefficients(directions, parameters, share)
        cores = filtered_cores(directions, kept, curvature.patch)
        rows.append({"alpha": alpha, "step": j + 1, **_row(curvature, directions, kept, cores, share)})
        here = {name: core + share * cores[name] for name, core in here.items()}
    return Walk(here, rows)


def _row(
    curvature: Curvature,
    directions: Mapping[str, Directions],
    kept: Mapping[str, Tensor],
    cores: Mapping[str, Tensor],
    share: float,
) -> dict[str, float | None]:
    """What the quadratic model where a step begins says of it, nats per sequence; gain and squared norm as shares."""
    statistics, patch = curvature.statistics, curvature.patch
    kl = slope = gain = gain_full = 0.0
    for label, d in directions.items():
        phi = share * torch.cat([cores[name].flatten() for name in d.names])
        kl += 0.5 * float(statistics.benign.quadratic(d.names, phi[:, None]))
        slope += sum(
            float(statistics.gradient(name) @ part)
            for name, part in zip(d.names, phi.split([patch[name].numel() for name in d.names]), strict=True)
        )
        gain += float((d.values * kept[label].square()).sum())
        gain_full += d.gain_full
    energy, whole = (sum(float(c[name].square().sum()) for name in patch) for c in (cores, patch))
    return {
        "predicted_kl": kl,
        "predicted_refusal": slope,
        "gain_kept": gain / gain_full if gain_full else None,
        "kept_energy": energy / whole if whole else None,
    }
