"""The comparison written out: compare.json, compare.md with its figures, compare.html."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..outline import Section
from ..page import render_page
from ..rendering import render_markdown
from ..report import LIBRARIES
from . import figures
from .config import CompareSettings
from .summary import SAFETY_WANTED, Curve, Row, Standing, Summary, utility_where_safe
from .verdict import interval, p_value, verdict

_COLUMNS = {
    "area": "∫₀¹ max{utility : safety ≥ x} dx over all strengths, mean over replicates, confidence interval",
    "difference": "area minus the best one's, paired by replicate",
    "adjusted p": "of the difference, two-sided, adjusted for all variants (Holm)",
    "score": "on the test half of the prompts, at the strength that scores best on the validation half",
    "best on test": "score at the strength that scores best on the test half itself: flattered by that choice",
    "tuned": "score on the test half at the strength that was tuned on held-out calibration sequences",
    "alpha": "strengths chosen on the validation half: smallest – largest over replicates",
}
_NUMBERS = {
    "gain": "φᵀA_hφ of the step φ from the utility model, held-out Fisher of refusals, nats per sequence",
    "cost": "φᵀB_hφ, held-out true Fisher of benign text",
    "R": "gain/cost",
    "KL": "measured: KL of the merged model from the utility model, held-out benign sequences, nats each",
    "Δ log p": "measured: change of log p(refusal), held-out refusals, nats each",
}


def write_comparison(
    folder: Path, summary: Summary, settings: CompareSettings, configs: Mapping[str, Any], remarks: list[str]
) -> None:
    """compare.json, compare.md and compare.html with figures, into an existing folder.

    Args:
        folder: Where to write.
        summary: The numbers.
        settings: What was asked for.
        configs: Replicate -> its configuration, in the form of the YAML.
        remarks: What the user should know.
    """
    title, sections = "Comparison of merge methods", _sections(summary, settings, remarks)
    for section in sections:
        for drawn in section.pictures:
            (folder / f"{drawn.name}.png").write_bytes(drawn.png())
    tree = _tree(summary, settings, configs, remarks)
    (folder / "compare.json").write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    (folder / "compare.md").write_text(render_markdown(title, sections), encoding="utf-8")
    (folder / "compare.html").write_text(render_page(title, sections), encoding="utf-8")


def _sections(summary: Summary, settings: CompareSettings, remarks: list[str]) -> list[Section]:
    """What the page says."""
    pictures = figures.of_comparison(summary)
    mean = pictures[: -len(summary.replicates)]
    return [
        Section("Verdict", bullets=verdict(summary)),
        Section("Areas and scores", pictures=mean, rows=[_standing(s) for s in summary.standings], columns=_COLUMNS),
        Section(
            "At the chosen strength",
            text=["Means over replicates, at the strength chosen on the validation half; shares on the test half."],
            rows=[_at_chosen(s) for s in summary.standings],
            columns=_NUMBERS,
        ),
        Section("Models alone", rows=[_alone(name, rows) for name, rows in summary.references.items()]),
        Section("Frontiers", pictures=pictures[-len(summary.replicates) :]),
        Section("How it was judged", text=_rules(summary), facts=_axes(summary)),
        *([Section("Remarks", bullets=remarks)] if remarks else []),
        Section("Provenance", facts=_provenance()),
    ]


def _standing(s: Standing) -> dict[str, Any]:
    """A row of the main table."""
    alphas = sorted(float(c.alphas[c.chosen]) for c in s.curves)
    row = {
        "variant": s.label,
        "area": interval(s.area),
        "difference": "best" if s.difference is None else interval(s.difference),
        "adjusted p": None if s.p is None else p_value(s.p),
        "score": s.mean(lambda c: c.score),
        "alpha": f"{alphas[0]:g}" if alphas[0] == alphas[-1] else f"{alphas[0]:g} – {alphas[-1]:g}",
        "best on test": s.mean(lambda c: c.best_score),
        "tuned": s.mean(lambda c: c.tuned_score),
        f"utility at safety {SAFETY_WANTED:g}": s.mean(utility_where_safe),
    }
    reached = sum(utility_where_safe(c) is not None for c in s.curves)
    if 0 < reached < len(s.curves):
        key = f"utility at safety {SAFETY_WANTED:g}"
        row[key] = f"{row[key]:.3g} ({reached} of {len(s.curves)})"
    return row


def _at_chosen(s: Standing) -> dict[str, Any]:
    """A row of what the evaluators and the Fishers say."""

    def number(key: str) -> float | None:
        return s.mean(lambda c: c.rows[c.chosen][key])

    names = s.curves[0].tested
    row = {"variant": s.label, **{name: s.mean(lambda c, n=name: c.tested[n]) for name in names}}
    gain, cost = number("gain"), number("cost")
    row |= {"gain": gain, "cost": cost, "R": gain / cost if cost else None}
    return row | {"KL": number("kl"), "Δ log p": number("refusal_change")}


def _alone(name: str, rows: Any) -> dict[str, Any]:
    """Means over replicates of a model alone, on all prompts."""
    outcomes = [row["outcomes"] for row in rows]
    return {"model": name} | {key: sum(o[key].value for o in outcomes) / len(rows) for key in outcomes[0]}


def _rules(summary: Summary) -> list[str]:
    """Definitions, in words."""
    halves = (
        "Strengths of the scores are chosen on a random half of the prompts and scored on the other half."
        if summary.halved
        else "An evaluator on the axes gives one number and no prompts, so its number serves for choosing strengths "
        "and for scoring alike: its part of the scores is flattered."
    )
    return [
        "A variant's points are (safety, utility) at every strength and, at strength 0, the utility model's. Its "
        "frontier is U(x) = max{utility : safety ≥ x}, 0 where no strength is as safe; the area is ∫₀¹ U(x) dx: the "
        "utility left, on average over the safety asked for.",
        f"{halves} The area and the best on test take their maxima on the prompts they are measured on.",
        "Each axis is the geometric mean of its parts' goodness in [0, 1]; the score is that of the parts of both.",
        "Differences are to the variant with the largest mean area, which is known only from the same numbers.",
    ]


def _axes(summary: Summary) -> dict[str, str]:
    """The axes' parts and their scales."""
    sides = {"safety": summary.axes.safety, "utility": summary.axes.utility}
    return {side: ", ".join(f"{name} ({scale})" for name, scale in parts.items()) for side, parts in sides.items()}


def _provenance() -> dict[str, str]:
    """Versions, machine and date."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}",
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }


def _tree(
    summary: Summary, settings: CompareSettings, configs: Mapping[str, Any], remarks: list[str]
) -> dict[str, Any]:
    """Everything, JSON-ready."""
    return {
        "verdict": verdict(summary),
        "replicates": dict(configs),
        "compare": settings.as_tree(),
        "provenance": _provenance(),
        "remarks": remarks,
        "references": {
            name: dict(zip(summary.replicates, map(_row, rows), strict=True))
            for name, rows in summary.references.items()
        },
        "variants": {
            s.label: {
                "area": asdict(s.area),
                "difference": None if s.difference is None else asdict(s.difference),
                "adjusted_p": s.p,
                "replicates": {name: _curve(curve) for name, curve in zip(summary.replicates, s.curves, strict=True)},
            }
            for s in summary.standings
        },
    }


def _curve(curve: Curve) -> dict[str, Any]:
    """One variant on one replicate."""
    points = zip(curve.rows, curve.safety[1:], curve.utility[1:], strict=True)
    alphas = curve.alphas
    return {
        "area": curve.area,
        "chosen_alpha": float(alphas[curve.chosen]),
        "score": curve.score,
        "best_on_test_alpha": float(alphas[curve.best]),
        "best_on_test": curve.best_score,
        "tuned_alpha": None if curve.tuned is None else float(alphas[curve.tuned]),
        "tuned_score": curve.tuned_score,
        "rows": [{**_row(row), "safety": float(s), "utility": float(u)} for row, s, u in points],
    }


def _row(row: Row) -> dict[str, Any]:
    """A measured row; of what each prompt gave, the mean."""
    return {**row, "outcomes": {name: outcome.value for name, outcome in row["outcomes"].items()}}
