"""What a merge report says, section by section, whatever it is written in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import heat_map, plots
from .atomic import OUTPUT_MARK
from .picture import Picture

COLUMNS = {
    "shape": "rows × columns of the weight",
    "rank_utility": "rank of the utility adapter's update",
    "rank_safety": "rank of the safety adapter's update",
    "entries": "entries of the tensor",
    "kept_entries": "Σ m of its entries; the mask m is 0 or 1, or between them",
    "n": "directions of the module's core coordinates",
    "kept": "Σ f, directions kept; f is the filter's factor in [0, 1]",
    "kept_energy": "squared norm of the kept patch over the whole one's; may exceed 1",
    "gain": "Σ f²λc² of the kept patch, nats per sequence; gain_full of the whole",
    "cost": "Σ f²c² of the kept patch, damping included, nats per sequence; cost_full of the whole",
    "kl": "½(cost − damping) at α = 1, nats per sequence; kl_full of the whole patch",
    "slope": "first-order change of log p(refusal) at α = 1, nats per sequence",
    "ray": "mean λ of the kept directions, weighted by kept cost",
    "ray_held": "the same directions' quotient on held-out sequences",
    "damping_share": "share of the kept cost that is damping; near 1, benign data say nothing",
    "largest_value": "λ of the first direction that is kept, of its layer's pencil",
    "smallest_kept_value": "λ of the last one",
    "solver": "what the eigensolver says of its result",
}
"""What the columns of the module table mean."""

LONG = 20
"""A table of more rows than this stands apart: folded in the page, at the end in Markdown."""

SELECTED = (
    "The settings were chosen by what they do on the held-out sequences: the figures of the chosen candidate were "
    "selected, so they flatter it."
)


@dataclass(frozen=True)
class Section:
    """A part of the report; what is empty is left out.

    Attributes:
        title: Heading.
        text: Paragraphs.
        facts: Name -> value.
        bullets: A list of remarks.
        pictures: Figures.
        alternatives: Whether the pictures show the same thing in different quantities, so that one at a time will do.
        rows: A table; its columns are all keys of all rows.
        columns: Column -> meaning, of those that need it.
    """

    title: str
    text: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    bullets: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    alternatives: bool = False
    rows: Sequence[Mapping[str, Any]] = ()
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_long(self) -> bool:
        """Whether the table stands apart."""
        return len(self.rows) > LONG


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """All keys of all rows, in the order they come."""
    return list(dict.fromkeys(key for row in rows for key in row))


def shown(value: Any) -> str:
    """A number, text, shape or nothing, as it is read: four digits, a × b, –."""
    if value is None:
        return "–"
    if isinstance(value, (list, tuple)):
        return " × ".join(map(shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def outline(report: Mapping[str, Any]) -> list[Section]:
    """The sections of a report that have something to say.

    Args:
        report: From `build_report`; any key but "modules" and "strengths" may be absent.

    Returns:
        Sections in the order of reading.
    """
    present = columns_of(report["modules"])
    covered = "every changed parameter is." if "sequences" in report else "this method uses none."
    sections = [
        Section("Summary", facts=_summary(report)),
        Section("Warnings", bullets=report.get("warnings", ())),
        _held_out(report),
        _tasks(report),
        _strengths(report),
        _steps(report),
        _tuning(report),
        Section("Directions", pictures=plots.of_directions(report)),
        Section("All modules together", rows=[report["joint"]] if "joint" in report else (), columns=COLUMNS),
        Section(
            "Modules",
            pictures=heat_map.of_modules(report),
            alternatives=True,
            rows=report["modules"],
            columns={key: meaning for key, meaning in COLUMNS.items() if key in present},
        ),
        Section("Remarks", bullets=report.get("remarks", ())),
        Section(
            "Not covered by curvature",
            text=() if report.get("not_covered") else [f"Nothing to name: {covered}"],
            bullets=report.get("not_covered", ()),
        ),
        Section("Versions", facts=report.get("versions", {})),
    ]
    return [s for s in sections if s.text or s.facts or s.bullets or s.pictures or s.rows]


def _summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """What came of it; then what was merged, from which data."""
    survival = report.get("survival", {})
    facts = {
        **_measured(report),
        "warnings": f"{len(report['warnings'])}, below" if report.get("warnings") else "none",
        "share of the kept cost that is damping": survival.get("damping_share_kept"),
        "held-out gain per cost of what is kept": survival.get("ray_held_kept"),
        "held-out gain per cost of the whole patch": survival.get("ray_held_whole_patch"),
        "base": report.get("base_model"),
        "utility": report.get("utility"),
        "safety": report.get("safety"),
        "method": report.get("merge_method"),
        "settings": OUTPUT_MARK,
        "statistics": report.get("fisher_dir"),
        "seconds": report.get("seconds"),
        "shared damping γ": report.get("gamma"),
        "damping ε of the ratio": report.get("epsilon"),
        "share of entries kept": report.get("kept_share"),
        "least ratio kept": report.get("threshold"),
    }
    for kind, form in report.get("fishers", {}).items():
        facts[f"{kind} Fisher"] = _form(form)
    for kind, count in report.get("sequences", {}).items():
        facts[f"{kind} sequences"] = _counts(count)
        for task, own in count.get("tasks", {}).items():
            facts[f"{kind} sequences of {task}, weight {own['weight']:g}"] = _counts(own)
    for kind, trace in report.get("fisher_trace", {}).items():
        facts[f"trace of the {kind} Fisher"] = trace
    return {name: value for name, value in facts.items() if value is not None}


def _form(form: Mapping[str, Any]) -> str:
    """How a Fisher stands in the pencils."""
    name, s = form["representation"].replace("_", ", "), form["shrinkage"]
    if not s["most"]:
        return name
    target = {"diagonal": "its diagonal", "kronecker": "its nearest Kronecker product"}[form["target"]]
    amount = shown(s["mean"]) if s["least"] == s["most"] else f"{shown(s['least'])} to {shown(s['most'])}"
    return f"{name}; shrunk by {amount} towards {target}"


def _counts(count: Mapping[str, Any]) -> str:
    """Numbers of sequences in words; effective ones where examples have weights."""
    sides = {"found": "to find directions", "held_out": "held out"}
    effective = {
        side: f" (effective {count[f'effective_{side}']:.3g})" for side in sides if f"effective_{side}" in count
    }
    return ", ".join(f"{count[side]} {what}{effective.get(side, '')}" for side, what in sides.items())


def _measured(report: Mapping[str, Any]) -> dict[str, str]:
    """What every strength does to held-out sequences, in words."""
    rows = report.get("held_out", ())
    if not rows:
        return {"measured": report.get("measured", "nothing: no calibration data were given")}
    return {
        f"measured at α {row['alpha']:g}": f"KL {_with_error(row, 'measured_kl')}, change of log p(refusal) "
        f"{_with_error(row, 'measured_refusal')} nats per sequence"
        for row in rows
    }


def _with_error(row: Mapping[str, Any], key: str) -> str:
    """A measured number ± its standard error where that is known."""
    error = row.get(f"{key}_se")
    return shown(row.get(key)) + ("" if error is None else f" ± {error:.2g}")


def _held_out(report: Mapping[str, Any]) -> Section:
    """Measured against predicted, and the frontier."""
    text = (
        "Measured on sequences that were not used to find the directions, in nats per sequence: KL from the utility "
        "model and the change of log p(refusal)."
    )
    rows = report.get("held_out", ())
    paragraphs = [text, *([SELECTED] if "tuning" in report else ())]
    return Section("Held out", text=paragraphs if rows else (), pictures=plots.of_held_out(report), rows=rows)


def _tasks(report: Mapping[str, Any]) -> Section:
    """Which task pays, which gains."""
    text = "The same, task by task: means of one task each; the figures above are their sums, each times its weight."
    rows = report.get("held_out_tasks", ())
    return Section("Held out, by task", text=[text] if rows else (), rows=rows)


def _steps(report: Mapping[str, Any]) -> Section:
    """A row for every step of every strength."""
    text = (
        "Every step as the quadratic model where it begins predicts it, by Fishers taken there: KL and change of log "
        "p(refusal) in nats per sequence, and of the patch that remained the shares of gain and squared norm that were "
        "kept. Predictions of the strengths above are those of the whole way: lengths √(2 KL) add up, and so do "
        "changes of log p. Directions and modules below are those of the first step."
    )
    rows = report.get("steps", ())
    return Section("Steps", text=[text] if rows else (), rows=rows)


def _strengths(report: Mapping[str, Any]) -> Section:
    """What was written, a row an α."""
    text = (
        "Predicted by the quadratic model, nats per sequence: KL of the kept patch from the utility model, the same of "
        "the whole patch (both without damping), and the first-order change of log p(refusal). They hold for small "
        "steps only."
    )
    return Section("Strengths", text=[text] if "gamma" in report else (), rows=report["strengths"])


def _tuning(report: Mapping[str, Any]) -> Section:
    """The rule, what it chose, and among what."""
    tuning = report.get("tuning")
    if not tuning:
        return Section("Tuning")
    return Section(
        "Tuning",
        text=[f"Rule: {tuning['rule']}", SELECTED],
        facts={f"chosen {name}": value for name, value in tuning["chosen"].items()},
        pictures=plots.of_tuning(report),
        rows=tuning["candidates"],
    )
