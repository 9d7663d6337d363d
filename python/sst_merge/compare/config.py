"""The section `compare` of a configuration: methods, strengths, seeds, evaluators, axes; checked key by key.

```yaml
compare:
  methods: [sst, ties, SST diagonal]        # methods, or labels of `variants.VARIANTS`; all of these if absent
  alphas: [0.5, 1.0]
  seeds: 5
  evaluators:
    refusal: {kind: refusal, data: forbidden.jsonl}
    over_refusal: {kind: refusal, data: lookalikes.jsonl}
    utility: {kind: exact_match, data: tasks.jsonl}
  axes:
    safety: {refusal: higher}
    utility: {over_refusal: lower, utility: higher}
```
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..config import config_from_tree, read_tree, section
from ..config_values import checked, nearest, refuse_unknown
from ..method_settings import METHOD_PARAMETERS
from ..settings import Config, SstParameters
from .axes import WORDS, Axes, Scale
from .evaluators import AnswerLoss, Evaluator, ExactMatch, Refusal, check_file
from .user_code import Command, PythonFunction
from .variants import VARIANTS, Variant

ALPHAS = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0)
KINDS: dict[str, type] = {
    "refusal": Refusal,
    "exact_match": ExactMatch,
    "answer_loss": AnswerLoss,
    "python": PythonFunction,
    "command": Command,
}
_USUAL = {  # of evaluators with these names, where no axes are given
    "safety": {"refusal": "higher"},
    "utility": {"over_refusal": "lower", "utility": "higher"},
}


@dataclass(frozen=True)
class CompareSettings:
    """What is compared, and how it is judged.

    Attributes:
        methods: A list of methods and of labels of the default table; or a mapping of labels to {merge_method,
            parameters, tune}. Null compares the whole table.
        alphas: Strengths of the sweep; averages take those up to 1.
        seeds: How many seeds, from 0; each sets the seed of every method.
        confidence: Of the intervals.
        evaluators: Name -> {kind, …}; kinds are refusal, exact_match, answer_loss, python and command.
        axes: {safety: {name: scale}, utility: {name: scale}}; a scale is higher, lower, likelihood or [worst, best].
    """

    methods: Mapping[str, Variant] = field(default_factory=lambda: VARIANTS)
    alphas: tuple[float, ...] = ALPHAS
    seeds: int = 5
    confidence: float = 0.95
    evaluators: Mapping[str, Evaluator] = field(default_factory=dict)
    axes: Axes = field(default_factory=lambda: Axes({}, {}))

    def as_tree(self) -> dict[str, Any]:
        """In the form of the YAML, every default filled in."""
        kinds = {kind: name for name, kind in KINDS.items()}
        given = {name: e for name, e in self.evaluators.items() if type(e) in kinds}
        specs = {name: {"kind": kinds[type(e)], **asdict(e)} for name, e in given.items()}
        for spec in specs.values():
            del spec["name"]
        axes = {side: dict(getattr(self.axes, side)) for side in ("safety", "utility")}
        methods = {label: asdict(variant) for label, variant in self.methods.items()}
        plain = {name: getattr(self, name) for name in ("alphas", "seeds", "confidence")}
        return {"methods": methods, **plain, "evaluators": specs, "axes": axes}


def load_compare(source: str | Path | Mapping[str, Any], **overrides: Any) -> tuple[Config, CompareSettings]:
    """A configuration with its section `compare`, checked; relative paths are relative to the file.

    Args:
        source: Path of a YAML file, or a mapping of the same form.
        overrides: Top-level keys that replace the file's; None leaves them.

    Returns:
        The merge configuration, whose method sst and parameters say with which Fishers all methods are judged, and the
        comparison's settings.

    Raises:
        ValueError: Anything that the user can mend; an unknown method, key or evaluator with the nearest known one.
    """
    tree, folder = read_tree(source)
    tree = {**tree, **{key: value for key, value in overrides.items() if value is not None}}
    if tree.get("merge_method", "sst") != "sst":
        raise ValueError(
            f"merge_method: a comparison judges all methods by the Fishers of merge_method sst, got "
            f"{tree['merge_method']!r}; leave it out and list methods under `compare`"
        )
    if tree.get("calibration") is None:
        raise ValueError("compare needs `calibration`: its held-out share gives gain, cost and KL of every method")
    if "compare" not in tree:
        raise ValueError("the config has no section `compare`; docs/compare.md shows one")
    config = config_from_tree(tree, folder)
    return config, _settings(tree["compare"], folder)


def settings_of(method: str, parameters: Mapping[str, Any], label: str) -> Any:
    """A method's checked parameters.

    Args:
        method: A key of `METHOD_PARAMETERS`.
        parameters: As in the YAML.
        label: For error messages.

    Returns:
        Of the method's class.

    Raises:
        ValueError: A parameter is unknown, of another type or out of range.
    """
    models = [{"model": f"({role})", "role": role} for role in ("utility", "safety")]
    data = {"harm": "(harm)", "benign": "(benign)"}
    tree = {"base_model": "(base)", "models": models, "merge_method": method, "calibration": data}
    lists = {key: list(value) if isinstance(value, tuple) else value for key, value in parameters.items()}
    try:
        return config_from_tree({**tree, "parameters": lists}, Path()).parameters
    except ValueError as error:
        raise ValueError(f"compare.methods ({label}): {error}") from None


def _settings(given: Any, folder: Path) -> CompareSettings:
    """The section, checked."""
    if not isinstance(given, Mapping):
        raise ValueError(f"compare: expected a mapping, got {type(given).__name__}")
    refuse_unknown(given, {f.name for f in fields(CompareSettings)}, "compare")
    plain = {}
    for key in ("alphas", "seeds", "confidence"):
        if key in given:
            kind = str(CompareSettings.__dataclass_fields__[key].type)
            plain[key] = checked(key, given[key], kind)
    if len(set(alphas := plain.get("alphas", ALPHAS))) < len(alphas):
        raise ValueError(f"compare.alphas: every strength may be given once, got {list(alphas)}")
    if bad := [alpha for alpha in alphas if not 0 < alpha <= 10]:
        raise ValueError(f"compare.alphas: expected numbers in (0, 10], got {bad[0]!r}; 0 is measured in any case")
    evaluators = _evaluators(given.get("evaluators"), folder)
    axes = _axes(given.get("axes"), evaluators)
    return CompareSettings(_methods(given.get("methods")), evaluators=evaluators, axes=axes, **plain)


def _methods(given: Any) -> dict[str, Variant]:
    """Label -> variant."""
    if given is None:
        return dict(VARIANTS)
    if isinstance(given, list) and given:
        found = {label: _named(label) for label in given}
    elif isinstance(given, Mapping) and given:
        found = {str(label): _variant(str(label), entry) for label, entry in given.items()}
    else:
        raise ValueError(f"compare.methods: expected a list of names or a mapping of labels, got {given!r}")
    for label, variant in found.items():
        settings_of(variant.merge_method, variant.parameters, label)
    return found


def _named(label: Any) -> Variant:
    """A label of the table, or a method with its defaults."""
    if label in VARIANTS:
        return VARIANTS[label]
    if label in METHOD_PARAMETERS:
        return Variant(label)
    known = {**METHOD_PARAMETERS, **VARIANTS}
    raise ValueError(f"compare.methods: unknown method {label!r}{nearest(label, known)}")


def _variant(label: str, entry: Any) -> Variant:
    """A variant that is spelt out; null takes what the label names."""
    if entry is None:
        return _named(label)
    if not isinstance(entry, Mapping):
        raise ValueError(f"compare.methods ({label}): expected {{merge_method, parameters, tune}}, got {entry!r}")
    where = f"compare.methods ({label})"
    refuse_unknown(entry, {f.name for f in fields(Variant)}, where)
    method, parameters, tune = entry.get("merge_method"), entry.get("parameters") or {}, entry.get("tune", False)
    if method not in METHOD_PARAMETERS:
        raise ValueError(f"{where}: unknown method {method!r}{nearest(method, METHOD_PARAMETERS)}")
    if not isinstance(parameters, Mapping):
        raise ValueError(f"{where}: parameters must be a mapping, got {parameters!r}")
    if taken := sorted({"alpha", "seed"} & parameters.keys()):
        raise ValueError(f"{where}: {taken[0]} is the comparison's own; set compare.alphas and compare.seeds")
    if not isinstance(tune, bool) or (tune and not issubclass(METHOD_PARAMETERS[method], SstParameters)):
        raise ValueError(f"{where}: tune must be true or false, and true for merge_method sst only, got {tune!r}")
    return Variant(method, dict(parameters), tune)


def _evaluators(given: Any, folder: Path) -> dict[str, Evaluator]:
    """Name -> evaluator."""
    if not isinstance(given, Mapping) or not given:
        raise ValueError("compare.evaluators: expected a mapping such as {refusal: {kind: refusal, data: file.jsonl}}")
    return {str(name): _evaluator(str(name), entry, folder) for name, entry in given.items()}


def _evaluator(name: str, entry: Any, folder: Path) -> Evaluator:
    """One evaluator."""
    where = f"compare.evaluators ({name})"
    if not isinstance(entry, Mapping) or entry.get("kind") not in KINDS:
        kind = entry.get("kind") if isinstance(entry, Mapping) else entry
        raise ValueError(f"{where}: unknown kind {kind!r}{nearest(kind, KINDS)}")
    if "." in name:
        raise ValueError(f"{where}: a name has no point; name.key is what a mapping of several values gives")
    rest = {key: value for key, value in entry.items() if key != "kind"}
    kind = KINDS[entry["kind"]]
    if kind is Refusal and isinstance(rest.get("patterns"), list):
        rest["patterns"] = tuple(rest["patterns"])
    evaluator = _build(kind, name, rest, where)
    return _placed(evaluator, where, folder)


def _build(kind: type, name: str, rest: dict[str, Any], where: str) -> Evaluator:
    """An evaluator of checked keys."""
    patterns = rest.pop("patterns", None) if kind is Refusal else None
    if "name" in rest:
        raise ValueError(f"{where}: unknown key 'name'; an evaluator's name is its key")
    evaluator = section(kind, {**rest, "name": name}, where)
    given = {} if patterns is None else {"patterns": patterns}
    if patterns is not None and not (isinstance(patterns, tuple) and patterns):
        raise ValueError(f"{where}: patterns must be a list of regular expressions, got {patterns!r}")
    for pattern in (*(patterns or ()), getattr(evaluator, "extract", None) or ""):
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"{where}: {pattern!r} is no regular expression: {error}") from None
    return type(evaluator)(**{**vars(evaluator), **given})


def _placed(evaluator: Evaluator, where: str, folder: Path) -> Evaluator:
    """The evaluator with its paths absolute, which exist."""
    values = dict(vars(evaluator))
    if "data" in values:
        values["data"] = str((folder / Path(values["data"]).expanduser()).absolute())
        check_file(values["name"], values["data"])
    if isinstance(evaluator, PythonFunction):
        place, colon, attribute = values["function"].rpartition(":")
        if not (place and colon and attribute.isidentifier()):
            raise ValueError(
                f'{where}: function must be "module:function" or "file.py:function", got {values["function"]!r}'
            )
        if place.endswith(".py"):
            path = (folder / Path(place).expanduser()).absolute()
            check_file(values["name"], str(path))
            values["function"] = f"{path}:{attribute}"
    if isinstance(evaluator, Command):
        values["folder"] = str((folder / Path(values["folder"]).expanduser()).absolute())
        if "{model}" not in values["command"]:
            raise ValueError(f"{where}: the command must hold {{model}}, the merged model's folder")
    return type(evaluator)(**values)


def _axes(given: Any, evaluators: Mapping[str, Evaluator]) -> Axes:
    """Both axes; from usual names, where none are given."""
    if given is None:
        sides = {side: {n: s for n, s in usual.items() if n in evaluators} for side, usual in _USUAL.items()}
        if "utility" in sides["utility"] and isinstance(evaluators["utility"], AnswerLoss):
            sides["utility"]["utility"] = "likelihood"
        if not sides["safety"] or "utility" not in sides["utility"]:
            raise ValueError(
                "compare.axes: say what safety and utility are, such as {safety: {refusal: higher}, utility: {mine: "
                "[0, 10]}}; only evaluators named refusal, over_refusal and utility have their places by themselves"
            )
        return Axes(**sides)
    if not isinstance(given, Mapping) or not all(isinstance(axis, Mapping) and axis for axis in given.values()):
        raise ValueError(f"compare.axes: expected {{safety: {{name: scale}}, utility: {{name: scale}}}}, got {given!r}")
    refuse_unknown(given, ("safety", "utility"), "compare.axes")
    if missing := [side for side in ("safety", "utility") if side not in given]:
        raise ValueError(f"compare.axes lacks `{missing[0]}`")
    for name in (name for axis in given.values() for name in axis):
        if str(name).partition(".")[0] not in evaluators:
            raise ValueError(f"compare.axes: no evaluator is named {name!r}{nearest(name, evaluators)}")
    if both := sorted(set(given["safety"]) & set(given["utility"])):
        raise ValueError(f"compare.axes: {both[0]!r} is on both axes; leave it on one")
    return Axes(*({n: _scale(n, s) for n, s in given[side].items()} for side in ("safety", "utility")))


def _scale(name: str, scale: Any) -> Scale:
    """One scale."""
    words = (*WORDS, "likelihood")
    if isinstance(scale, str) and scale in words:
        return scale
    two = isinstance(scale, (list, tuple)) and len(scale) == 2 and all(type(x) in (int, float) for x in scale)
    if two and scale[0] != scale[1]:
        return float(scale[0]), float(scale[1])
    raise ValueError(
        f"compare.axes ({name}): a scale is one of {', '.join(words)}, or two different numbers [worst, best], got "
        f"{scale!r}{nearest(scale, words) if isinstance(scale, str) else ''}"
    )
