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

import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import yaml

from .config_checks import check_config
from .config_values import checked, did_you_mean, nearest, refuse_unknown
from .method_settings import METHOD_PARAMETERS
from .settings import (
    ROLES,
    Calibration,
    Config,
    FisherParameters,
    ModelRef,
    Output,
    TaskRef,
)

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
        check_config(config)
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
    refuse_unknown(tree, known, "the config")
    for key in ("base_model", "models"):
        if key not in tree:
            raise ValueError(f"the config lacks `{key}`")
    method = tree.get("merge_method", "sst")
    if not isinstance(method, str) or method not in METHOD_PARAMETERS:
        raise ValueError(f"merge_method: unknown method {method!r}{nearest(method, METHOD_PARAMETERS)}")
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
        parameters=section(parameters, tree.get("parameters"), "parameters"),
        calibration=None if calibration is None else section(Calibration, calibration, "calibration", folder),
        output=section(Output, tree.get("output"), "output"),
        **{key: checked(key, value, str(Config.__dataclass_fields__[key].type)) for key, value in plain.items()},
    )
    check_config(config)
    return config


def _models(entries: Any, folder: Path) -> dict[str, ModelRef]:
    """The two adapters by role."""
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise ValueError("models: expected a list of entries with `model` and `role`")
    refs: dict[str, ModelRef] = {}
    for entry in entries:
        refuse_unknown(entry, {"model", "role", "parameters"}, "an entry of models")
        role = entry.get("role")
        if role not in ROLES:
            raise ValueError(f"models: role must be one of {', '.join(ROLES)}, got {role!r}{did_you_mean(role, ROLES)}")
        if role in refs:
            raise ValueError(f"models: two entries have the role {role!r}; exactly one of each role is merged")
        if "model" not in entry:
            raise ValueError(f"models: the entry with role {role!r} lacks `model`, the adapter's folder")
        given = entry.get("parameters") or {}
        if not isinstance(given, Mapping):
            raise ValueError(f"models ({role}): parameters must be a mapping such as {{weight: 1.0}}, got {given!r}")
        refs[role] = section(ModelRef, {**given, "model": entry["model"]}, f"models ({role})", folder)
    for role in ROLES:
        if role not in refs:
            raise ValueError(f"models: no entry has the role {role!r}")
    return refs


def section(kind: type, given: Any, where: str, folder: Path = Path()) -> Any:
    """A dataclass from a mapping, every value checked."""
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: expected a mapping, got {type(given).__name__}")
    known = {f.name: f for f in fields(kind)}
    refuse_unknown(given, known, where)
    lists = {key: _tasks(key, given[key], folder) for key in ("harm", "benign") if isinstance(given.get(key), list)}
    plain = {key: value for key, value in given.items() if key not in lists}
    values = lists | {key: checked(key, value, str(known[key].type)) for key, value in plain.items()}
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
        task = section(TaskRef, entry, f"an entry of {where}", folder)
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
