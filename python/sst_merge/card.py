"""The model card of a merged adapter: README.md with the front matter that PEFT writes, for PEFT and hubs to read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from .adapters.peft_config import CONFIG_NAME
from .rendering import markdown_table
from .settings import Config

_TEXT = """\
# {title}

A LoRA adapter for `{base}`, merged by sst-merge with the method `{method}` at strength α = {alpha:g}.

## What was merged

- utility: `{utility}`, whose abilities were to be kept
- safety: `{safety}`, whose refusals were wanted

## How

{how}

```yaml
{settings}
```

## Numbers

{numbers}

## How to load it

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base_literal})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

## Limits

{limits}

### Framework versions

{versions}
"""

_CURVATURE = "The Fisher matrices of refusals and of the model's own behaviour were estimated from {sequences}."
_KEPT = " Of the safety patch, what moves refusals most per unit of change elsewhere was kept."
_NO_CURVATURE = "No data were used: the method sees the adapters alone."
_QUADRATIC = "Predictions are those of a quadratic model, which holds for small steps only."
_UNMEASURED = (
    "Refusals and abilities of the merged model were not measured by generation or on benchmarks: do so first."
)


def write_cards(folder: Path, report: Mapping[str, Any], config: Config) -> None:
    """README.md beside every adapter of an output.

    Args:
        folder: The output, with its adapters written.
        report: From `build_report`.
        config: The configuration that was run.
    """
    for strength in report["strengths"]:
        if "adapter" not in strength:  # a full checkpoint, which is the base's own kind of folder
            continue
        home = folder / strength["adapter"]
        stored = json.loads((home / CONFIG_NAME).read_text(encoding="utf-8"))
        base = stored["base_model_name_or_path"] or report["base_model"]
        (home / "README.md").write_text(render_card(base, strength, report, config), encoding="utf-8")


def render_card(base: str, strength: Mapping[str, Any], report: Mapping[str, Any], config: Config) -> str:
    """The card of one adapter.

    Args:
        base: The base model as adapter_config.json names it.
        strength: The adapter's row of `report["strengths"]`.
        report: From `build_report`.
        config: The configuration that was run.

    Returns:
        Front matter and Markdown. Of local folders only names are told, not where they lie, but for the base, which
        PEFT loads from there.
    """
    front = {
        "base_model": base,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": sorted([f"base_model:adapter:{base}", "lora", "merge", "sst-merge", "transformers"]),
    }
    utility, safety = (Path(report[role]).name for role in ("utility", "safety"))
    text = _TEXT.format(
        title=f"{utility} + {safety}",
        base=base,
        base_literal=json.dumps(base, ensure_ascii=False),
        method=report["merge_method"],
        alpha=strength["alpha"],
        utility=utility,
        safety=safety,
        how=_how(report),
        settings=_settings(strength["alpha"], config),
        numbers=_numbers(strength, report),
        limits=_limits(report),
        versions=_versions(report["versions"]),
    )
    return f"---\n{yaml.safe_dump(front, allow_unicode=True)}---\n{text}"


def _how(report: Mapping[str, Any]) -> str:
    """What the method looked at."""
    if "sequences" not in report:
        return _NO_CURVATURE
    counts = (
        f"{n['found']} {kind} sequences ({n['held_out']} more held out)" for kind, n in report["sequences"].items()
    )
    return _CURVATURE.format(sequences=" and ".join(counts)) + (_KEPT if "gamma" in report else "")


def _settings(alpha: float, config: Config) -> str:
    """Weights and parameters, as YAML."""
    parameters = json.loads(json.dumps(asdict(config.parameters)))  # tuples as lists
    weights = {"utility": config.utility.weight, "safety": config.safety.weight}
    tree = {"merge_method": config.merge_method, "parameters": {**parameters, "alpha": alpha}, "weights": weights}
    return yaml.safe_dump(tree, sort_keys=False).rstrip()


def _numbers(strength: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """The report's rows of this strength, transposed: first what was written, then what was measured."""
    measured = [row for row in report.get("held_out", ()) if row["alpha"] == strength["alpha"]]
    rows = {key: value for row in (strength, *measured) for key, value in row.items()}
    shown = [{"quantity": key, "value": value} for key, value in rows.items() if key not in ("alpha", "adapter")]
    lines = [*markdown_table(shown), "", "KL divergences and changes of log p(refusal) are in nats per sequence."]
    if not measured:
        lines += ["What the merge does on held-out sequences was not measured."]
    return "\n".join(lines)


def _limits(report: Mapping[str, Any]) -> str:
    """What the report warns of and does not cover, and what holds for every merge."""
    lines = [*report.get("warnings", ()), *(f"Not covered by curvature: {line}." for line in report["not_covered"])]
    if "sequences" in report:
        lines.append(_QUADRATIC)
    return "\n".join(f"- {line}" for line in [*lines, _UNMEASURED])


def _versions(versions: Mapping[str, str]) -> str:
    """A list in PEFT's form, which it extends by its own version when it saves the adapter again."""
    names = {"peft": "PEFT"}
    return "\n".join(f"- {names.get(name, name)} {version}" for name, version in versions.items())
