"""The numbers of a merge's report."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from torch import Tensor

from .methods import Plan
from .problem import Problem

LIBRARIES = ("sst-merge", "torch", "transformers", "peft", "safetensors", "numpy")


def build_report(problem: Problem, plan: Plan, strengths: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Every number of the report.

    Args:
        problem: The adapters.
        plan: The solved merge.
        strengths: Per α, what was written.
        seconds: Wall time so far.

    Returns:
        JSON-ready. Units: gain, cost and slope are nats per sequence (∝ α², α², α); damping shares are in [0, 1]. Kept
        energy may exceed 1: the projector is orthogonal in the metric F_benign + γI, not in the Euclidean one.
    """
    modules = [_module(problem, plan, name) for name in problem.names]
    report = {
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in LIBRARIES},
        },
        "base_model": problem.config.base_model,
        "utility": problem.config.utility.model,
        "safety": problem.config.safety.model,
        "merge_method": problem.config.merge_method,
        "seconds": round(seconds, 1),
        "modules": modules,
        "strengths": [{**s, **_predictions(modules, s["alpha"])} for s in strengths] if plan.directions else strengths,
        "remarks": problem.remarks,
        "not_covered": _not_covered(problem),
    }
    if plan.curvature is not None:
        statistics = plan.curvature.statistics
        report["sequences"] = {
            kind: {part: len(problem.calibration[kind][i]) for i, part in enumerate(("found", "held_out"))}
            for kind in ("harm", "benign")
        }
        report["fisher_trace"] = {
            kind: sum(float(sums.diagonal_of(name).sum()) for name in plan.curvature.patch)
            for kind, sums in (("harm", statistics.harm), ("benign", statistics.benign))
        }
    if plan.directions:
        report["gamma"] = plan.gamma
        report["directions"] = {name: _spectrum(plan, name) for name in plan.directions}
    return report


def _module(problem: Problem, plan: Plan, name: str) -> dict[str, Any]:
    """One row of the module table."""
    utility, safety = problem.updates(name)
    row = {
        "module": name,
        "shape": list(utility.shape),
        "rank_utility": utility.rank,
        "rank_safety": safety.rank,
    }
    if name not in plan.directions:
        return row
    d, f = plan.directions[name], plan.factors[name]
    tau = plan.curvature.patch[name]
    kept = d.vectors @ (f * d.coefficients)
    gain, cost = d.values * d.coefficients**2, d.coefficients**2
    weight = f * f * cost
    return row | {
        "n": len(f),
        "kept": float(f.sum()),
        "kept_energy": float(kept.square().sum() / tau.square().sum()),
        "gain": float((f * f * gain).sum()),
        "gain_full": float(gain.sum()),
        "cost": float(weight.sum()),
        "cost_full": float(cost.sum()),
        "kl": 0.5 * float(weight.sum() - plan.gamma * kept.square().sum()),
        "kl_full": 0.5 * float(cost.sum() - plan.gamma * tau.square().sum()),
        "slope": float((f * d.slope).sum()),
        "ray": _mean(d.values, weight),
        "ray_held": _mean(d.ray_held, weight),
        "damping_share": _mean(d.damping_share, weight),
        "solver": d.status,
    }


def _mean(values: Tensor, weight: Tensor) -> float | None:
    """Σ w x / Σ w; None where nothing is kept."""
    total = float(weight.sum())
    return float((weight * values).sum()) / total if total > 0 else None


def _predictions(modules: Iterable[dict[str, Any]], alpha: float) -> dict[str, float]:
    """What the quadratic model says a strength does, in nats per sequence."""
    rows = [m for m in modules if "kl" in m]
    return {
        "predicted_kl": alpha**2 * sum(m["kl"] for m in rows),
        "predicted_kl_unfiltered": alpha**2 * sum(m["kl_full"] for m in rows),
        "refusal_slope": alpha * sum(m["slope"] for m in rows),
    }


def _spectrum(plan: Plan, name: str) -> dict[str, list[float]]:
    """Per direction of one module, λ descending, six digits."""
    d = plan.directions[name]
    columns = {
        "value": d.values,
        "ray_held": d.ray_held,
        "damping_share": d.damping_share,
        "cost": d.coefficients**2,
        "factor": plan.factors[name],
    }
    return {key: [float(f"{x:.6g}") for x in column.tolist()] for key, column in columns.items()}


def _not_covered(problem: Problem) -> list[str]:
    """What the merge carries along without curvature, each with how."""
    lines = [f"{name}: whole parameter (modules_to_save), copied" for name in problem.saved]
    biased = sorted({*problem.utility.biases, *problem.safety.biases})
    lines += [f"{name}: LoRA bias, merged by the method's formula, unfiltered" for name in biased]
    return lines
