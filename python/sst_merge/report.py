"""The numbers of a merge's report."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from sst_kernels import Status
from sst_kernels.result import REMEDIES

from .counts import count_sequences, few_effective
from .directions import Directions
from .methods import Plan
from .pencils import ALL_MODULES, named
from .problem import Problem
from .select import filtered_cores
from .settings import KINDS, SstParameters

_EQUAL = 1e-9  # what is kept may be all there is, but for rounding
LIBRARIES = ("sst-merge", "torch", "transformers", "peft", "safetensors", "numpy")


def build_report(problem: Problem, plan: Plan, strengths: list[dict[str, Any]]) -> dict[str, Any]:
    """Every number of the report.

    Args:
        problem: The adapters.
        plan: The solved merge.
        strengths: Per α, what was written.

    Returns:
        JSON-ready. Units: gain, cost and slope are nats per sequence, of the filtered patch at α = 1 (they go with α²,
        α² and α); damping shares are in [0, 1]. Kept energy may exceed 1: the projector is orthogonal in the metric
        F_benign + γI, not in the Euclidean one. Modules and directions are those of the last α (only `budget` keeps
        other directions at another α), and of the first step where there are several.
    """
    alpha = strengths[-1]["alpha"]
    summaries = {s["alpha"]: _pencils(plan, s["alpha"]) for s in strengths} if plan.directions else {}
    report = {
        "versions": versions(),
        "base_model": problem.config.base_model,
        "utility": problem.config.utility.model,
        "safety": problem.config.safety.model,
        "merge_method": problem.config.merge_method,
        "modules": [_module(problem, plan, name, summaries.get(alpha, {})) for name in problem.names],
        "strengths": [{**s, **_predictions(plan, summaries.get(s["alpha"], {}), s["alpha"])} for s in strengths],
        "remarks": problem.remarks,
        "warnings": [],
        "not_covered": _not_covered(problem),
    }
    if plan.curvature is not None:
        statistics, names = plan.curvature.statistics, plan.curvature.patch
        report["sequences"] = {kind: count_sequences(statistics, kind) for kind in ("harm", "benign")}
        report["warnings"] += few_effective(report["sequences"])
        report["fisher_trace"] = {
            kind: sum(float(getattr(statistics, kind).diagonal_of(name).sum()) for name in names)
            for kind in ("harm", "benign")
        }
        report["fisher_dir"] = problem.config.fisher_dir
    if plan.walk is not None:
        report["steps"] = [row for s in strengths for row in plan.walk(s["alpha"]).rows]
    if plan.directions:
        pencils = summaries[alpha]
        report["gamma"] = plan.gamma
        report["fishers"] = {kind: _form(problem.config.parameters, plan, kind) for kind in KINDS}
        kept = plan.kept(alpha)
        report["directions"] = {label: _spectrum(d, kept[label]) for label, d in plan.directions.items()}
        report["survival"] = _survival(pencils)
        report["warnings"] += _not_surviving(report["survival"]) + _not_converged(plan.directions)
        if ALL_MODULES in pencils:
            report["joint"] = {
                key: value for key, value in pencils[ALL_MODULES].items() if key not in ("kept_energy", "held")
            }
    return report


def versions() -> dict[str, str]:
    """Of Python and of the libraries that a merge depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def _form(parameters: SstParameters, plan: Plan, kind: str) -> dict[str, Any]:
    """How one Fisher stands in the pencils; s is that of the formula where it was asked for, over the pencils."""
    form = parameters.form(kind)
    intensities = [d.shrinkage[KINDS.index(kind)] for d in plan.directions.values()]
    found = {"least": min(intensities), "mean": sum(intensities) / len(intensities), "most": max(intensities)}
    return {"representation": form.representation, "target": form.target, "shrinkage": found}


def _pencils(plan: Plan, alpha: float) -> dict[str, dict[str, Any]]:
    """What is kept of every pencil's patch at a strength, in numbers."""
    kept = plan.kept(alpha)
    cores = filtered_cores(plan.directions, kept, plan.curvature.patch)
    return {label: _pencil(plan, label, kept[label], cores) for label in plan.directions}


def _pencil(plan: Plan, label: str, kept: Tensor, cores: Mapping[str, Tensor]) -> dict[str, Any]:
    """One pencil: gain, cost, and how the kept part does on held-out sequences."""
    d, statistics, patch = plan.directions[label], plan.curvature.statistics, plan.curvature.patch
    tau = torch.cat([patch[name].flatten() for name in d.names])
    phi = torch.cat([cores[name].flatten() for name in d.names])
    both = torch.stack([phi, tau], 1)
    damping = plan.gamma * both.square().sum(0)
    gain_held = statistics.harm_held.quadratic(d.names, both)
    cost_held = statistics.benign_held.quadratic(d.names, both) + damping
    weight = kept.square()
    return {
        "n": len(tau),
        "kept": float(_factors(d, kept).clamp(0, 1).sum()),
        "kept_energy": {name: float(cores[name].square().sum() / patch[name].square().sum()) for name in d.names},
        "gain": float((d.values * weight).sum()),
        "gain_full": d.gain_full,
        "cost": float(weight.sum()),
        "cost_full": d.cost_full,
        "kl": 0.5 * float(weight.sum() - damping[0]),
        "kl_full": 0.5 * float(d.cost_full - damping[1]),
        "slope": float((kept * d.gradient).sum()),
        "ray": _mean(d.values, weight),
        "ray_held": _mean(d.ray_held, weight),
        "damping_share": _mean(d.damping_share, weight),
        "solver": d.status,
        "held": [float(x) for x in (gain_held[0], cost_held[0], gain_held[1], cost_held[1])],
    }


def _factors(directions: Directions, kept: Tensor) -> Tensor:
    """F_i = s_i/c_i; 0 where the patch has nothing."""
    c = directions.coefficients
    return torch.where(c != 0, kept / c, 0.0)


def _module(problem: Problem, plan: Plan, name: str, pencils: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """One row of the module table."""
    utility, safety = problem.updates(name)
    row = {
        "module": name,
        "shape": list(utility.shape),
        "rank_utility": utility.rank,
        "rank_safety": safety.rank,
    }
    label = name if name in pencils else ALL_MODULES
    if label not in pencils or name not in plan.curvature.patch:
        return row
    pencil = pencils[label]
    row["kept_energy"] = pencil["kept_energy"][name]
    if label != ALL_MODULES:
        row |= {key: value for key, value in pencil.items() if key not in ("kept_energy", "held")}
    return row


def _mean(values: Tensor, weight: Tensor) -> float | None:
    """Σ w x / Σ w; None where nothing is kept."""
    total = float(weight.sum())
    return float((weight * values).sum()) / total if total > 0 else None


def _predictions(plan: Plan, pencils: Mapping[str, dict[str, Any]], alpha: float) -> dict[str, float]:
    """What the quadratic model says a strength does, in nats per sequence; of several steps, those along the way."""
    if not pencils:
        return {}

    def total(key: str) -> float:
        return sum(pencil[key] for pencil in pencils.values())

    predictions = {
        "predicted_kl": alpha**2 * total("kl"),
        "predicted_kl_unfiltered": alpha**2 * total("kl_full"),
        "predicted_refusal": alpha * total("slope"),
    }
    return predictions if plan.walk is None else predictions | plan.walk(alpha).predictions


def _survival(pencils: Mapping[str, dict[str, Any]]) -> dict[str, float | None]:
    """Held-out gain per cost of what is kept and of the whole patch, and the share of the kept cost that is damping."""
    gain, cost, gain_full, cost_full = (sum(p["held"][i] for p in pencils.values()) for i in range(4))
    spent = sum(p["cost"] for p in pencils.values())
    damping = spent - 2 * sum(p["kl"] for p in pencils.values())
    return {
        "ray_held_kept": gain / cost if cost > 0 else None,
        "ray_held_whole_patch": gain_full / cost_full,
        "damping_share_kept": damping / spent if spent > 0 else None,
    }


def _not_surviving(survival: dict[str, float | None]) -> list[str]:
    """A warning where the kept directions are no better than the whole patch on sequences they were not found with."""
    kept, whole = survival["ray_held_kept"], survival["ray_held_whole_patch"]
    if kept is None or kept >= whole * (1 - _EQUAL):
        return []
    return [
        f"the kept directions do not survive: on held-out sequences their gain per cost is {kept:.3g}, that of the "
        f"whole patch {whole:.3g}. They are noise of the sequences they were found with: give more calibration "
        "examples, keep more (k, mu), or shrink (`shrinkage`)"
    ]


def _not_converged(directions: Mapping[str, Directions]) -> list[str]:
    """A warning where the solver did not reach its tolerance."""
    poor = {label: d.status for label, d in directions.items() if Status.CONVERGED.name not in d.status.split(", ")}
    if not poor:
        return []
    label, status = next(iter(poor.items()))
    reasons = "; ".join(text for bit, text in REMEDIES.items() if bit.name in status.split(", "))
    return [
        f"{len(poor)} of {len(directions)} pencils did not converge, first that of {named(label)} "
        f"({status or 'no status'}): {reasons or 'their directions are approximate'}"
    ]


def _spectrum(d: Directions, kept: Tensor) -> dict[str, list[float]]:
    """Per direction of one pencil, λ descending, six digits."""
    columns = {
        "value": d.values,
        "ray_held": d.ray_held,
        "damping_share": d.damping_share,
        "cost": d.coefficients**2,
        "factor": _factors(d, kept),
    }
    return {key: [float(f"{x:.6g}") for x in column.tolist()] for key, column in columns.items()}


def _not_covered(problem: Problem) -> list[str]:
    """What the merge carries along without curvature, each with how."""
    lines = [f"{name}: whole parameter (modules_to_save), copied" for name in problem.saved]
    biased = sorted({*problem.utility.biases, *problem.safety.biases})
    lines += [f"{name}: LoRA bias, merged by the method's formula, unfiltered" for name in biased]
    return lines
