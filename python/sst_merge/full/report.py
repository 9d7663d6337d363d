"""The numbers of the report of a merge of full checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..report import versions
from .elementwise import Elementwise
from .fishers import DiagonalFishers
from .kronecker import KroneckerSst
from .models import UTILITY, Models

if TYPE_CHECKING:
    from .merging import Tally


def build_full_report(
    models: Models,
    method: Elementwise | KroneckerSst,
    tallies: Mapping[str, Tally],
    strengths: list[dict[str, Any]],
    fishers: DiagonalFishers | None,
) -> dict[str, Any]:
    """Every number of the report.

    Args:
        models: The three checkpoints.
        method: That was run.
        tallies: Name -> sums over the tensor's entries.
        strengths: Per α, what was written.
        fishers: The statistics, if any.

    Returns:
        JSON-ready, in the form that `report.build_report` gives; "modules" are tensors.
    """
    config = models.config
    report = {
        "versions": versions(),
        "base_model": config.base_model,
        "utility": config.utility.model,
        "safety": config.safety.model,
        "merge_method": config.merge_method,
        "modules": [
            _row(models, name, tally) | method.rows.get(name, {"kept_entries": tally.kept})
            for name, tally in tallies.items()
        ],
        "strengths": strengths,
        "remarks": [*models.remarks, *([] if fishers is None else fishers.remarks)],
        "warnings": list(method.warnings),
        "not_covered": [
            *method.not_covered,
            *(f"{models.of[UTILITY].places[name].key}: copied from the utility model" for name in models.copied),
        ],
        "measured": "nothing: full checkpoints are merged from files, and the merged model was not run",
    }
    if method.epsilon is not None:
        report["epsilon"] = method.epsilon
        report["kept_share"] = sum(t.kept for t in tallies.values()) / sum(row["entries"] for row in report["modules"])
    if method.threshold is not None and method.parameters.scope == "global":
        report["threshold"] = method.threshold
    if isinstance(method, KroneckerSst):
        report["fisher_dir"], report["gamma"] = config.fisher_dir, method.gamma
    if fishers is not None:
        report["fisher_dir"] = config.fisher_dir
        report["sequences"] = {kind: {"found": round(n), "held_out": 0} for kind, n in fishers.counts.items()}
        report["fisher_trace"] = dict(fishers.sums)
    return report


def _row(models: Models, name: str, tally: Tally) -> dict[str, Any]:
    """One row of the module table."""
    place = models.of[UTILITY].places[name]
    return {
        "module": place.key,
        "shape": list(place.shape),
        "entries": place.numel,
        "kept_energy": tally.filtered / tally.patch if tally.patch else None,
    }
