"""Whether a configuration merges full checkpoints, and whether it asks for what they have."""

from __future__ import annotations

from pathlib import Path

from ..adapters.peft_config import CONFIG_NAME
from ..settings import ROLES, Config, SstParameters
from .ratios import RATIOS

METHODS = ("sst", "diagonal_sst", "sst_v", "sst_m", "task_arithmetic", "interpolation")
"""Methods that merge full checkpoints."""


def are_full(config: Config) -> bool:
    """Whether both models are folders of full checkpoints, and not of adapters.

    Args:
        config: The checked configuration.

    Returns:
        Whether the merge is one of full checkpoints.

    Raises:
        ValueError: One is and the other is not, or the configuration asks for what full checkpoints have not.
    """
    folders = {role: Path(getattr(config, role).model) for role in ROLES}
    full = [role for role, f in folders.items() if (f / "config.json").is_file() and not (f / CONFIG_NAME).is_file()]
    if len(full) == 1:
        raise ValueError(
            f"models: {full[0]} is a full checkpoint and the other an adapter; give two of a kind, such as the adapter "
            "merged into its base by PEFT's merge_and_unload"
        )
    if full:
        _check_settings(config)
    elif config.merge_method in RATIOS and config.parameters.scope == "global":
        raise ValueError(f"scope: {config.merge_method} of adapters ranks in every module; use scope: module")
    return bool(full)


def _check_settings(config: Config) -> None:
    """ValueError for settings that only adapters have."""
    if config.merge_method not in METHODS:
        raise ValueError(
            f"merge_method: {config.merge_method} merges adapters; full checkpoints are merged by {', '.join(METHODS)}"
        )
    if isinstance(config.parameters, SstParameters):
        _check_kfac(config.parameters)
    if getattr(config.parameters, "coordinates", "weight") != "weight":
        raise ValueError("coordinates: full checkpoints have no core coordinates; leave the key out")
    if getattr(config.parameters, "steps", 1) > 1:
        raise ValueError("steps: full checkpoints are merged in one step; leave the key out")
    if config.tune:
        raise ValueError("tune: full checkpoints are not run on held-out data; choose the settings yourself")
    if config.output.rank is not None:
        raise ValueError("output.rank: a full checkpoint has no rank; leave the key out")


def _check_kfac(parameters: SstParameters) -> None:
    """ValueError for what K-FAC SST of whole weights does not do."""
    p = parameters
    for form in (p.form("harm"), p.form("benign")):
        if form.representation not in ("kfac_expand", "kfac_reduce"):
            raise ValueError(
                f"fisher: {form.representation} of whole weights is not offered; full checkpoints take kfac for both "
                "Fishers, or merge_method: diagonal_sst"
            )
        if form.shrinkage:
            raise ValueError(
                f"shrinkage: a shrunk Kronecker product is none any more; leave it at 0, got {form.shrinkage}"
            )
    if p.approximation == "reduce" and p.where == "path" and p.point_weights == "linear":
        raise ValueError("point_weights: linear weighs tokens, and reduce has none; use uniform, or expand")
    if p.select not in ("top_k", "soft"):
        raise ValueError(f"select: {p.select} needs the whole spectrum of a layer; use top_k or soft")
    if p.select == "soft" and p.mu is None:
        raise ValueError(
            "mu: the median λ of whole weights is not known, so soft needs mu; a run with select: top_k shows the "
            "largest λ of every layer"
        )
    if p.select == "top_k" and not isinstance(p.k, int):
        raise ValueError(
            f"k: a share of millions of directions cannot be solved for; give a count, such as 64, not {p.k}"
        )
    if p.select == "top_k" and p.scope == "global":
        raise ValueError("scope: one ranking over all layers would need every layer's spectrum; use scope: module")
