"""adapter_config.json: which settings keep ΔW = scale · lora_B · lora_A, and each module's scale.

Every field of PEFT's LoraConfig is in one of three tables: `REFUSED` (what is stored is not ΔW of
the base model), `USED` (read here), `HARMLESS` (the stored weights mean the same whatever it says).
"""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

CONFIG_NAME = "adapter_config.json"

_RETRAIN = "train without it"
REFUSED = {
    "use_dora": f"DoRA rescales the base weight: not linear in ΔW; {_RETRAIN}",
    "kasa_config": f"KaSA truncates the base weight: not linear in ΔW; {_RETRAIN}",
    "alora_invocation_tokens": f"aLoRA acts on a part of the tokens only; {_RETRAIN}",
    "arrow_config": "Arrow routes each token between adapters; merge the single adapters",
    "monteclora_config": f"MonteCLoRA samples its weights; {_RETRAIN}",
    "use_qalora": f"QALoRA pools the inputs before lora_A; {_RETRAIN}",
    "use_bdlora": f"BD-LoRA stores block-diagonal factors, not read here; {_RETRAIN}",
    "layer_replication": "the adapter belongs to a base with repeated layers; save that model as "
    "a base of its own and train on it",
    "target_parameters": "updates of single parameters (fused experts) are not read yet; train with target_modules",
    "trainable_token_indices": "trained token embeddings are not read yet; "
    "train the whole embedding through modules_to_save or target_modules",
    "megatron_config": "Megatron's parallel layers are not read here; convert to plain layers",
}
"""Settings that, when set, change what the stored weights mean: why, and what to do instead."""

_RESIDUAL_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

USED = frozenset(
    {"peft_type", "base_model_name_or_path", "revision", "task_type", "auto_mapping"}
    | {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"}
    | {"modules_to_save", "lora_bias", "bias", "init_lora_weights"}
)

HARMLESS = frozenset(
    # Which modules are wrapped: the stored names say it exactly.
    {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
    # Training only: dropout, VeLoRA's backward pass, the data from which A and B began.
    | {"lora_dropout", "velora_config"}
    | {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}
    # Tied adapters are stored once for each of their modules.
    | {"ensure_weight_tying"}
    # Where and by what it ran; parameters of a setting that is off.
    | {"inference_mode", "runtime_config", "peft_version", "megatron_core", "qalora_group_size"}
)


def locate(path: str | Path) -> Path:
    """The folder that holds the adapter: `path`, or its only subfolder with an adapter.

    PEFT saves an adapter that is not called "default" into a subfolder of its name.

    Args:
        path: A folder.

    Returns:
        The folder with adapter_config.json.

    Raises:
        ValueError: There is no such folder, no adapter in it, or more than one to choose from.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(
            f"adapter {path}: expected a local folder with {CONFIG_NAME}, "
            f"got {'a file' if path.exists() else 'no such folder'}; "
            "an adapter on the Hub has to be downloaded first"
        )
    if (path / CONFIG_NAME).is_file():
        return path
    inside = sorted(config.parent for config in path.glob(f"*/{CONFIG_NAME}"))
    if len(inside) > 1:
        names = ", ".join(str(folder) for folder in inside)
        raise ValueError(f"adapter {path}: holds several adapters; name one of them: {names}")
    if not inside:
        raise ValueError(
            f"adapter {path}: {CONFIG_NAME} is missing, here and in every subfolder; "
            "name the folder that PEFT's save_pretrained wrote"
        )
    return inside[0]


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json as stored, its types checked.

    Args:
        folder: As `locate` gives it.

    Returns:
        The settings by name.

    Raises:
        ValueError: It is not a JSON object, or a setting that is used has the wrong type.
    """
    file = folder / CONFIG_NAME
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error}); save the adapter again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(config).__name__}")
    _check_ranks_and_alphas(file, config)
    saved = config.get("modules_to_save")
    if saved is not None and not (isinstance(saved, list) and all(isinstance(entry, str) for entry in saved)):
        raise ValueError(f"{file}: modules_to_save must be a list of names or null, got {saved!r}")
    return config


def _check_ranks_and_alphas(file: Path, config: dict[str, Any]) -> None:
    """Raise ValueError unless ranks are positive integers, alphas finite, patterns expressions."""

    def is_rank(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    def is_alpha(value: object) -> bool:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and math.isfinite(value)

    tables = (
        ("r", "rank_pattern", is_rank, "a positive integer"),
        ("lora_alpha", "alpha_pattern", is_alpha, "a finite number"),
    )
    for name, pattern_name, is_valid, expected in tables:
        patterns = config.get(pattern_name) or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{file}: {pattern_name} must be an object, got {patterns!r}")
        values = {name: config.get(name, 8)}
        values |= {f"{pattern_name}[{key!r}]": value for key, value in patterns.items()}
        for where, value in values.items():
            if not is_valid(value):
                raise ValueError(f"{file}: {where} must be {expected}, got {value!r}")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{file}: {pattern_name} {pattern!r} is no regular expression ({error})") from None


def refusals(config: dict[str, Any]) -> list[str]:
    """Why an adapter cannot be merged as ΔW = scale · lora_B · lora_A, going by its settings.

    A setting that no table knows is warned about and otherwise ignored, as PEFT does.

    Args:
        config: As `read_config` gives it.

    Returns:
        One reason with its remedy for each setting in the way; empty when there is none.
    """
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        return [f"peft_type is {peft_type!r}; only LORA adapters can be merged"]
    reasons = [f"{name} is set: {why}" for name, why in REFUSED.items() if config.get(name)]
    if config.get("bias", "none") != "none":
        reasons.append(
            f"bias is {config['bias']!r}: trained biases of the base model are not read; train with bias='none'"
        )
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(_RESIDUAL_INITS):
        reasons.append(
            f"init_lora_weights is {init!r}: it changed the base weights when training began, so "
            "lora_B·lora_A is not the change of the base; save it again with save_pretrained(…, "
            "path_initial_model_for_weight_conversion=…)"
        )
    unknown = sorted(name for name in config.keys() - REFUSED.keys() - USED - HARMLESS if config[name])
    if unknown:
        warnings.warn(
            f"{CONFIG_NAME} has settings unknown here, taken not to change ΔW: {unknown}",
            stacklevel=2,
        )
    return reasons


def _matched(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of `module` from a dot (PEFT's rule)."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def rank_and_scale(config: dict[str, Any], module: str) -> tuple[int, float]:
    """Rank r and scale α/r (rsLoRA: α/√r) of a module, r and α through their patterns.

    Args:
        config: As `read_config` gives it.
        module: Name in the base model.

    Returns:
        The rank that the file should hold, and the factor of lora_B · lora_A.

    Source: PEFT, get_pattern_key and LoraLayer.update_layer; rsLoRA: Kalajdzievski, 2023.
    """
    rank = _matched(config.get("rank_pattern"), module, config.get("r", 8))
    alpha = _matched(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def module_to_save(config: dict[str, Any], parameter: str) -> str | None:
    """The outermost module above `parameter` that modules_to_save names, by PEFT's suffix rule.

    Args:
        config: As `read_config` gives it.
        parameter: Name in the base model.

    Returns:
        The module's name in the base model; None when modules_to_save does not cover it.
    """
    parts = parameter.split(".")
    for depth in range(1, len(parts)):
        module = ".".join(parts[:depth])
        if any(module.endswith(entry) for entry in config.get("modules_to_save") or ()):
            return module
    return None
