"""docs/keys.md from the settings' docstrings: `python docs/keys.py > docs/keys.md`."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, fields

import yaml

from sst_merge.method_settings import METHOD_PARAMETERS
from sst_merge.settings import ROLES, AlphaParameters, Calibration, Config, ModelRef, Output, TaskRef

_HEAD = """\
# Keys of the configuration

Made by `python docs/keys.py > docs/keys.md`; a test compares. What has no default must be given. Paths are relative to
the file. A key that is not here is an error, and so is a value out of range; the message says what was expected.
"""


def described(kind: type) -> dict[str, str]:
    """Attribute -> its text in the docstring's section Attributes."""
    lines = inspect.getdoc(kind).partition("Attributes:\n")[2]
    entries = re.split(r"^ {4}(?=\w)", lines, flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()) for name, _, text in (entry.partition(": ") for entry in entries)}


def table(kind: type, without: tuple[str, ...] = ()) -> list[str]:
    """A row for each key that the class itself defines."""
    texts = described(kind)
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for f in fields(kind):
        if f.name in inspect.get_annotations(kind) and f.name not in without:
            rows.append(f"| `{f.name}` | {_default(f.default)} | {texts[f.name].replace('|', chr(92) + '|')} |")
    return [*rows, ""]


def _default(value: object) -> str:
    """As it is written in YAML."""
    if value is MISSING:
        return ""
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True).splitlines()[0]
    return f"`{text}`"


def page() -> str:
    """The whole page."""
    lines = [_HEAD, "## At the top", ""]
    lines += table(Config, without=(*ROLES, "parameters", "calibration", "output"))
    lines += [
        "`models` is a list with an entry for each role: `model`, `role` and `parameters`. `compare` is a section of",
        "`sst-merge compare` alone; its keys are in [compare.md](compare.md).",
        "",
    ]
    lines += ["## `parameters` of an entry of `models`", "", *table(ModelRef, without=("model",))]
    lines += ["## `calibration`", "", *table(Calibration)]
    lines += ["### An entry of `harm` or `benign`, where that is a list", "", *table(TaskRef)]
    lines += ["## `output`", "", *table(Output)]
    lines += ["## `parameters`", "", *table(AlphaParameters)]
    for kind in dict.fromkeys(c for m in METHOD_PARAMETERS.values() for c in reversed(m.__mro__) if c is not object):
        if kind is not AlphaParameters:
            names = ", ".join(f"`{name}`" for name, own in METHOD_PARAMETERS.items() if issubclass(own, kind))
            lines += [f"### {names}", "", f"{inspect.getdoc(kind).splitlines()[0]}", "", *table(kind)]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(page(), end="")
