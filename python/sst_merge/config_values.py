"""Values of single keys of a configuration: type, choice, range, and the nearest of the known words."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from .method_settings import METHOD_PARAMETERS
from .settings import KINDS, ROLES

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

_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "dict": (dict,),
}


def checked(key: str, value: Any, annotation: str) -> Any:
    """The value of one key: type, choice and range."""
    annotation = annotation.replace("tuple[TaskRef, ...]", "list of {data, weight, name}")
    names = [name.strip() for name in annotation.split("|")]
    if value is None and "None" in names:
        return None
    if key in _SIDED and isinstance(value, Mapping):
        refuse_unknown(value, KINDS, key)
        plain = annotation.removesuffix(" | dict")
        return {kind: checked(key, own, plain) for kind, own in value.items()}
    if names == ["tuple[float, ...]"] and not isinstance(value, list):
        raise ValueError(f"{key}: expected a list of numbers, got {value!r}")
    if isinstance(value, list) and "tuple[float, ...]" in names:
        if not value:
            raise ValueError(f"{key}: the list is empty")
        return tuple(checked(key, item, "float") for item in value)
    if isinstance(value, str) and "float" in names:
        value = _as_float(value)
    allowed = tuple(t for name in names for t in _TYPES.get(name, ()))
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise ValueError(f"{key}: expected {annotation}, got {value!r}")
    if key in _CHOICES and isinstance(value, str) and value not in _CHOICES[key]:
        near = did_you_mean(value, _CHOICES[key])
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


def refuse_unknown(given: Mapping[str, Any], known: Any, where: str) -> None:
    """Raise for the first unknown key, with the nearest known one."""
    for key in given:
        if key not in known:
            if where == "the config" and any(key in f.__dataclass_fields__ for f in METHOD_PARAMETERS.values()):
                raise ValueError(f"{where}: unknown key {key!r}; it belongs under `parameters`")
            raise ValueError(f"{where}: unknown key {key!r}{nearest(key, known)}")


def nearest(word: Any, known: Any) -> str:
    """' (did you mean …?)', or the known words where nothing is near."""
    return did_you_mean(word, known) or f"; known: {', '.join(sorted(known))}"


def did_you_mean(word: Any, known: Any) -> str:
    """The known word that is near, if one is."""
    folded = {str(name).lower(): name for name in known}
    near = difflib.get_close_matches(str(word).lower(), folded, n=1)
    return f"; did you mean {folded[near[0]]!r}?" if near else ""
