"""The merge configuration: mergekit-like YAML with named roles, checked key by key.

```yaml
base_model: path/to/base
models:
  - {model: adapters/helpful, role: utility}
  - {model: adapters/refuses, role: safety, parameters: {weight: 1.0}}
merge_method: sst            # or any other key of method_settings.METHOD_PARAMETERS
dtype: bfloat16
parameters:
  alpha: [0.5, 1.0]          # one number, or several for a sweep from one solve
calibration:
  harm: refusals.jsonl
  benign: answers.jsonl
```
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from .method_settings import AVERAGES, METHOD_PARAMETERS
from .settings import (
    KINDS,
    ROLES,
    Calibration,
    Config,
    FisherParameters,
    ModelRef,
    Output,
    SstParameters,
    TaskRef,
)

DTYPES = ("float32", "bfloat16", "float16", "float64")

_CHOICES = {
    "patch": ("additive", "interpolate"),
    "where": ("local", "path"),
    "point_weights": ("uniform", "linear"),
    "fisher": ("exact", "gram", "kfac", "ekfac", "diagonal"),
    "approximation": ("expand", "reduce"),
    "shrinkage": ("ledoit_wolf",),
    "shrinkage_target": ("diagonal", "kronecker"),
    "select": ("top_k", "soft", "dof", "budget", "signed"),
    "scope": ("global", "module"),
    "coordinates": ("weight", "core", "factor"),
    "mask": ("hard", "soft"),
    "projector": ("fast", "exact"),
    "dtype": DTYPES,
    "tokenizer": ("base", *ROLES),
    "quantization": ("4bit", "8bit"),
    "device_map": ("auto", "balanced", "sequential"),
}

_SIDED = ("fisher", "shrinkage", "shrinkage_target")
"""Keys that a mapping {harm: …, benign: …} gives each of the two Fishers apart."""

_RANGES = {  # name -> (low, high, low included, high included)
    "alpha": (0.0, 10.0, True, True),
    "weight": (0.0, 10.0, False, True),
    "density": (0.0, 1.0, False, True),
    "drop": (0.0, 1.0, True, False),
    "window": (0.0, 1.0, True, False),
    "common": (0.0, 1.0, True, True),
    "reduction": (0.0, 1.0, True, True),
    "threshold": (0.0, 1.0, True, True),
    "points": (0.0, 1.0, True, True),
    "samples": (1, math.inf, True, False),
    "seed": (0, 2**63, True, False),
    "shrinkage": (0.0, 1.0, True, True),
    "damping": (0.0, math.inf, False, False),
    "mu": (0.0, math.inf, False, False),
    "rho": (0.0, math.inf, False, False),
    "steps": (1, math.inf, True, False),
    "share": (0.0, 1.0, False, True),
    "epsilon": (0.0, math.inf, False, False),
    "beta": (0.0, 1.0, True, True),
    "batch_size": (1, math.inf, True, False),
    "max_length": (2, math.inf, True, False),
    "held_out": (0.0, 1.0, False, False),
    "max_new_tokens": (1, math.inf, True, False),
    "rank": (1, math.inf, True, False),
    "seeds": (1, math.inf, True, False),
    "confidence": (0.0, 1.0, False, False),
    "timeout": (0.0, math.inf, False, False),
}


_PLAIN = (
    "dtype",
    "quantization",
    "device",
    "device_map",
    "trust_remote_code",
    "download",
    "fisher_dir",
    "tune",
    "memory",
)


def load_config(source: str | Path | Mapping[str, Any] | Config, **overrides: Any) -> Config:
    """A configuration from YAML or a mapping, checked; relative paths are relative to the file.

    Args:
        source: Path of a YAML file, a mapping of the same form, or a `Config`, which is returned as it is.
        overrides: Top-level keys that replace the file's (device, dtype, …), paths relative to the working folder; None
            leaves the file's.

    Returns:
        The configuration.

    Raises:
        ValueError: Unknown key (with the nearest known one), wrong type, value out of range, missing role or file.

    Example:
        >>> models = [{"model": "helpful", "role": "utility"}, {"model": "refuses", "role": "safety"}]
        >>> load_config({"base_model": "base", "models": models, "merge_method": "tsv"}).parameters
        TsvParameters(alpha=1.0, share=0.5)
        >>> load_config({"base_model": "base", "models": models, "merge_method": "tvs"})
        Traceback (most recent call last):
        ValueError: merge_method: unknown method 'tvs'; did you mean 'tsv'?
    """
    if overrides.get("fisher_dir") is not None:
        overrides["fisher_dir"] = os.path.abspath(Path(overrides["fisher_dir"]).expanduser())
    if isinstance(source, Config):
        config = replace(source, **{key: value for key, value in overrides.items() if value is not None})
        _check(config)
        return config
    source, folder = read_tree(source)
    tree = {**source, **{key: value for key, value in overrides.items() if value is not None}}
    return config_from_tree(tree, folder)


def read_tree(source: str | Path | Mapping[str, Any]) -> tuple[Mapping[str, Any], Path]:
    """The top-level mapping of a configuration, unchecked, and the folder that its relative paths are relative to.

    Args:
        source: Path of a YAML file, or the mapping itself (relative to the working folder).

    Returns:
        Mapping and folder.

    Raises:
        ValueError: There is no such file, or it holds no mapping in YAML.
    """
    folder = Path()
    if not isinstance(source, Mapping):
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"config file {path} does not exist")
        folder = path.parent
        try:
            source = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"config file {path} is not valid YAML in UTF-8: {error}") from None
    if not isinstance(source, Mapping):
        raise ValueError("the config must be a mapping with base_model, models and merge_method")
    return source, folder


def sst_config(base_model: str, models: list[dict[str, Any]], settings: Mapping[str, Any], **top: Any) -> Config:
    """A configuration of one SST merge whose parameters and calibration are given in one flat mapping.

    Args:
        base_model: As in the YAML.
        models: As in the YAML.
        settings: Fields of `SstParameters` and of `Calibration`; `alpha` is one number.
        top: Other top-level keys.

    Returns:
        The configuration.

    Raises:
        ValueError: As `load_config`, or several strengths are given.
    """
    calibration = {f.name: settings[f.name] for f in fields(Calibration) if f.name in settings}
    parameters = {key: value for key, value in settings.items() if key not in calibration}
    tree = {"base_model": base_model, "models": models, "merge_method": "sst", **top}
    config = load_config({**tree, "parameters": parameters, "calibration": calibration or None})
    if len(config.alphas) > 1:
        raise ValueError(f"alpha: expected one strength for the one output, got {list(config.alphas)}")
    return config


def config_from_tree(tree: Mapping[str, Any], folder: Path) -> Config:
    """A configuration from the top-level mapping, checked; its section `compare` is another reader's.

    Args:
        tree: As in the YAML.
        folder: What relative paths are relative to.

    Returns:
        The configuration.

    Raises:
        ValueError: As `load_config`.
    """
    known = {f.name for f in fields(Config)} - set(ROLES) | {"models", "compare"}
    _refuse_unknown(tree, known, "the config")
    for key in ("base_model", "models"):
        if key not in tree:
            raise ValueError(f"the config lacks `{key}`")
    method = tree.get("merge_method", "sst")
    if not isinstance(method, str) or method not in METHOD_PARAMETERS:
        raise ValueError(f"merge_method: unknown method {method!r}{_nearest(method, METHOD_PARAMETERS)}")
    calibration = tree.get("calibration")
    parameters = METHOD_PARAMETERS[method]
    if issubclass(parameters, FisherParameters) and calibration is None and tree.get("fisher_dir") is None:
        raise ValueError(
            f"merge_method {method} needs `calibration` with the files `harm` and `benign`, or statistics "
            "collected before (--fisher)"
        )
    plain = {key: tree[key] for key in _PLAIN if key in tree}
    if plain.get("dtype") == "auto":  # the checkpoint's own; the output has no such choice
        del plain["dtype"]
    if isinstance(plain.get("fisher_dir"), str):
        plain["fisher_dir"] = os.path.abspath(folder / Path(plain["fisher_dir"]).expanduser())
    config = Config(
        base_model=_resolve(tree["base_model"], folder),
        **_models(tree["models"], folder),
        merge_method=method,
        parameters=_section(parameters, tree.get("parameters"), "parameters"),
        calibration=None if calibration is None else _section(Calibration, calibration, "calibration", folder),
        output=_section(Output, tree.get("output"), "output"),
        **{key: _checked(key, value, str(Config.__dataclass_fields__[key].type)) for key, value in plain.items()},
    )
    _check(config)
    return config


def _check(config: Config) -> None:
    """What no key shows by itself."""
    _check_k(config.parameters)
    _check_points(config.parameters)
    _check_rho(config.parameters)
    _check_shrinkage(config.parameters)
    _check_steps(config)
    if config.tune and (config.merge_method != "sst" or config.calibration is None):
        raise ValueError("tune: only merge_method sst is tuned, and on held-out sequences of `calibration`")
    if config.merge_method == "regmean" and config.calibration is None:
        raise ValueError("merge_method regmean needs `calibration` with the files `harm` and `benign`")
    if len(set(config.alphas)) < len(config.alphas):
        raise ValueError(f"alpha: every strength may be given once, got {list(config.alphas)}")
    if config.merge_method in AVERAGES and max(config.alphas) > 1:
        raise ValueError(f"alpha: {config.merge_method} needs alpha in [0, 1], got {max(config.alphas)}")
    _check_device(config.device)
    _ = config.memory_bytes
    _check_device_map(config.device_map)
    roles = [os.path.realpath(getattr(config, role).model) for role in ROLES]
    if roles[0] == roles[1]:
        raise ValueError(f"models: utility and safety must be two adapters, got {config.utility.model!r} for both")


def _models(entries: Any, folder: Path) -> dict[str, ModelRef]:
    """The two adapters by role."""
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise ValueError("models: expected a list of entries with `model` and `role`")
    refs: dict[str, ModelRef] = {}
    for entry in entries:
        _refuse_unknown(entry, {"model", "role", "parameters"}, "an entry of models")
        role = entry.get("role")
        if role not in ROLES:
            raise ValueError(
                f"models: role must be one of {', '.join(ROLES)}, got {role!r}{_did_you_mean(role, ROLES)}"
            )
        if role in refs:
            raise ValueError(f"models: two entries have the role {role!r}; exactly one of each role is merged")
        if "model" not in entry:
            raise ValueError(f"models: the entry with role {role!r} lacks `model`, the adapter's folder")
        given = entry.get("parameters") or {}
        if not isinstance(given, Mapping):
            raise ValueError(f"models ({role}): parameters must be a mapping such as {{weight: 1.0}}, got {given!r}")
        refs[role] = _section(ModelRef, {**given, "model": entry["model"]}, f"models ({role})", folder)
    for role in ROLES:
        if role not in refs:
            raise ValueError(f"models: no entry has the role {role!r}")
    return refs


def _section(kind: type, given: Any, where: str, folder: Path = Path()) -> Any:
    """A dataclass from a mapping, every value checked."""
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: expected a mapping, got {type(given).__name__}")
    known = {f.name: f for f in fields(kind)}
    _refuse_unknown(given, known, where)
    lists = {key: _tasks(key, given[key], folder) for key in ("harm", "benign") if isinstance(given.get(key), list)}
    plain = {key: value for key, value in given.items() if key not in lists}
    values = lists | {key: _checked(key, value, str(known[key].type)) for key, value in plain.items()}
    values |= {key: _resolve(values[key], folder) for key in ("model", "harm", "benign", "data") if key in plain}
    for f in fields(kind):
        if f.default is MISSING and f.name not in values:
            raise ValueError(f"{where} lacks `{f.name}`")
    return kind(**values)


def _tasks(kind: str, entries: list[Any], folder: Path) -> tuple[TaskRef, ...]:
    """The tasks of a kind of calibration data, each with its name."""
    where, tasks = f"calibration.{kind}", []
    if not entries:
        raise ValueError(f"{where}: the list is empty; give a path, or entries such as {{data: file.jsonl}}")
    for entry in entries:
        task = _section(TaskRef, entry, f"an entry of {where}", folder)
        name = re.sub(r"[^\w.-]+", "_", Path(task.data).stem) if task.name is None else task.name
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"{where}: name: expected letters, digits and any of _ . - alone, got {name!r}")
        tasks.append(replace(task, name=name))
    names, files = [task.name.casefold() for task in tasks], [os.path.realpath(task.data) for task in tasks]
    for what, keys, remedy in (("file", files, "once, with a larger weight"), ("name", names, "each its own `name`")):
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise ValueError(f"{where}: two entries have the {what} {twice!r}; give {remedy}")
    return tuple(tasks)


def _resolve(path: Any, folder: Path) -> str:
    """The absolute path, if there is something there, seen from the config's folder; otherwise as given."""
    if not isinstance(path, str):
        raise ValueError(f"expected a path or a model's name, got {path!r}")
    found = folder / Path(path).expanduser()
    return os.path.abspath(found) if found.exists() else path


_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "dict": (dict,),
}


def _checked(key: str, value: Any, annotation: str) -> Any:
    """The value of one key: type, choice and range."""
    annotation = annotation.replace("tuple[TaskRef, ...]", "list of {data, weight, name}")
    names = [name.strip() for name in annotation.split("|")]
    if value is None and "None" in names:
        return None
    if key in _SIDED and isinstance(value, Mapping):
        _refuse_unknown(value, KINDS, key)
        plain = annotation.removesuffix(" | dict")
        return {kind: _checked(key, own, plain) for kind, own in value.items()}
    if names == ["tuple[float, ...]"] and not isinstance(value, list):
        raise ValueError(f"{key}: expected a list of numbers, got {value!r}")
    if isinstance(value, list) and "tuple[float, ...]" in names:
        if not value:
            raise ValueError(f"{key}: the list is empty")
        return tuple(_checked(key, item, "float") for item in value)
    if isinstance(value, str) and "float" in names:
        value = _as_float(value)
    allowed = tuple(t for name in names for t in _TYPES.get(name, ()))
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise ValueError(f"{key}: expected {annotation}, got {value!r}")
    if key in _CHOICES and isinstance(value, str) and value not in _CHOICES[key]:
        near = _did_you_mean(value, _CHOICES[key])
        raise ValueError(f"{key}: expected one of {', '.join(_CHOICES[key])}, got {value!r}{near}")
    if key in _RANGES and not isinstance(value, str):
        low, high, low_in, high_in = _RANGES[key]
        if not ((low <= value if low_in else low < value) and (value <= high if high_in else value < high)):
            interval = f"{'[' if low_in else '('}{low}, {high}{']' if high_in else ')'}"
            raise ValueError(f"{key}: expected a number in {interval}, got {value!r}")
    return float(value) if names == ["float"] else value


def _as_float(text: str) -> Any:
    """The number in a string, if it is one: YAML 1.1 reads 1e-3 as text."""
    try:
        return float(text)
    except ValueError:
        return text


def _check_k(parameters: Any) -> None:
    """K is a count of at least one, or a share."""
    k = getattr(parameters, "k", 1)
    if not (k >= 1 if isinstance(k, int) else 0 < k <= 1):
        raise ValueError(
            f"k: expected an integer >= 1 (a count) or a number in (0, 1] with a point (a share), got {k!r}"
        )


def _check_rho(parameters: Any) -> None:
    """Rules that work to a budget have one."""
    if getattr(parameters, "select", None) in ("budget", "signed") and parameters.rho is None:
        raise ValueError(
            f"rho: select: {parameters.select} needs rho, what the merge may cost in nats per sequence (½φᵀBφ); the "
            "report of another selection says what the whole patch costs"
        )


def _check_shrinkage(parameters: Any) -> None:
    """The formula for s needs the spread of the sequences."""
    for kind in KINDS if isinstance(parameters, SstParameters) else ():
        form = parameters.form(kind)
        if form.shrinkage == "ledoit_wolf" and form.representation not in ("exact", "gram"):
            raise ValueError(
                f"shrinkage: ledoit_wolf is for fisher: exact or gram, and that of {kind} is "
                f"{form.representation.partition('_')[0]}, whose spread is not known; give a number in [0, 1]"
            )


def _check_steps(config: Config) -> None:
    """Several steps go neither with tuning nor with `signed`."""
    if getattr(config.parameters, "steps", 1) == 1:
        return
    if config.tune:
        raise ValueError("tune: every candidate of several steps needs Fishers of its own; tune with steps: 1")
    if config.parameters.select == "signed":
        raise ValueError("steps: select: signed takes no part of the patch, so that none remains; use steps: 1")


def _check_points(parameters: Any) -> None:
    """Points of a path are distinct, and not all of weight zero."""
    points = getattr(parameters, "points", ())
    if len(set(points)) < len(points):
        raise ValueError(f"points: every point may be given once, got {list(points)}")
    if points and parameters.point_weights == "linear" and set(points) == {1.0}:
        raise ValueError("points: with linear weights, 1 - t, a point below 1 is needed, got [1.0]")


def _check_device(device: str) -> None:
    """The device exists here."""
    try:
        kind = torch.device(device).type
        available = kind == "cpu" or (kind == "cuda" and torch.cuda.is_available())
    except RuntimeError:
        raise ValueError(f"device: {device!r} is no torch device; use cpu, cuda or cuda:N") from None
    if not available:
        raise ValueError(
            f"device: {device!r} is not available or not supported here; use cpu, or cuda with a GPU and its torch"
        )


def _check_device_map(device_map: Any) -> None:
    """A map names modules and devices that exist here."""
    for module, device in device_map.items() if isinstance(device_map, dict) else ():
        if not isinstance(module, str) or isinstance(device, bool) or not isinstance(device, (str, int)):
            raise ValueError(f"device_map: expected {{module: device}}, got {module!r}: {device!r}")
        if device != "disk":
            _check_device(f"cuda:{device}" if isinstance(device, int) else device)


def _refuse_unknown(given: Mapping[str, Any], known: Any, where: str) -> None:
    """Raise for the first unknown key, with the nearest known one."""
    for key in given:
        if key not in known:
            if where == "the config" and any(key in f.__dataclass_fields__ for f in METHOD_PARAMETERS.values()):
                raise ValueError(f"{where}: unknown key {key!r}; it belongs under `parameters`")
            raise ValueError(f"{where}: unknown key {key!r}{_nearest(key, known)}")


def _nearest(word: Any, known: Any) -> str:
    """' (did you mean …?)', or the known words where nothing is near."""
    return _did_you_mean(word, known) or f"; known: {', '.join(sorted(known))}"


def _did_you_mean(word: Any, known: Any) -> str:
    """The known word that is near, if one is."""
    folded = {str(name).lower(): name for name in known}
    near = difflib.get_close_matches(str(word).lower(), folded, n=1)
    return f"; did you mean {folded[near[0]]!r}?" if near else ""
