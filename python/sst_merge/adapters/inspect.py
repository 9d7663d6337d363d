"""What is in an adapter, and what a merge would cover."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .lowrank import RANK_TOLERANCE
from .peft_config import locate, rank_and_scale, read_config
from .read import Adapter, read_adapter


def inspect_adapter(path: str | Path) -> dict[str, Any]:
    """What is in an adapter folder; whatever keeps it from being merged becomes a reason.

    Args:
        path: As for `read_adapter`.

    Returns:
        JSON-ready: path, base_model, revision, task_type, peft_type; refusals (reasons, empty when
        it can be merged); modules, each with module, kind, shape (d_out, d_in), rank,
        numerical_rank (singular values above RANK_TOLERANCE of the largest), scale and norm
        (‖ΔW‖_F); biases and saved, the names of what a merge carries along without curvature.

    Raises:
        ValueError: There is no adapter folder, or its adapter_config.json is broken.

    Cost: O((d_out + d_in) r²) flops a module; no ΔW is formed.
    """
    folder = locate(path)
    config = read_config(folder)
    report = {
        "path": str(folder),
        "base_model": config.get("base_model_name_or_path") or None,
        "revision": config.get("revision"),
        "task_type": config.get("task_type"),
        "peft_type": config.get("peft_type"),
        "refusals": [],
        "modules": [],
        "biases": [],
        "saved": [],
    }
    try:
        adapter = read_adapter(folder)
    except ValueError as error:
        return report | {"refusals": [str(error)]}
    return report | {
        "modules": [_module(adapter, name) for name in adapter.updates],
        "biases": sorted(adapter.biases),
        "saved": sorted(adapter.saved),
    }


def _module(adapter: Adapter, name: str) -> dict[str, Any]:
    """The row of one module."""
    update = adapter.updates[name]
    sigma = update.singular_values()
    return {
        "module": name,
        "kind": adapter.kind(name),
        "shape": list(update.shape),
        "rank": update.rank,
        "numerical_rank": int((sigma > RANK_TOLERANCE * sigma[:1]).sum()),
        "scale": rank_and_scale(adapter.config, name)[1],
        "norm": float(torch.linalg.vector_norm(sigma)),
    }


def render_inspection(report: dict[str, Any]) -> str:
    """The report of `inspect_adapter` as text, one line for each module.

    Args:
        report: As `inspect_adapter` gives it.

    Returns:
        Lines for a terminal, without a newline at the end.
    """
    revision = f", revision {report['revision']}" if report["revision"] else ""
    lines = [
        f"adapter     {report['path']}",
        f"base model  {report['base_model'] or 'not named'}{revision}",
        f"type        {report['peft_type']}, task {report['task_type'] or 'not named'}",
    ]
    if report["refusals"]:
        return "\n".join([*lines, "", "cannot be merged:", *(f"  {r}" for r in report["refusals"])])
    modules = report["modules"]
    width = max(len(row["module"]) for row in modules)
    lines += ["", f"{'module':{width}}  {'d_out × d_in':>15}  rank (numerical)    scale    ‖ΔW‖_F"]
    for row in modules:
        shape = "{} × {}".format(*row["shape"])
        ranks = f"{row['rank']} ({row['numerical_rank']})"
        lines.append(f"{row['module']:{width}}  {shape:>15}  {ranks:>16}  {row['scale']:7.4g}  {row['norm']:8.3g}")
    lines += ["", f"a merge covers  {len(modules)} modules by curvature"]
    lines += [f"carried over    {name} (whole parameter, no curvature)" for name in report["saved"]]
    lines += [f"added           {name} (lora_bias, no curvature)" for name in report["biases"]]
    return "\n".join(lines)
