"""A report written out: report.json, report.md with its pictures, report.html."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .atomic import OUTPUT_MARK
from .outline import Section, columns_of, outline, shown
from .page import render_page
from .settings import Config


def write_report(folder: Path, report: Mapping[str, Any], config: Config) -> None:
    """report.html, report.md with its pictures, report.json and the resolved configuration, into an existing folder.

    Args:
        folder: Where to write.
        report: From `build_report`.
        config: The configuration that was run.
    """
    title, sections = f"Merge report: {report['merge_method']}", outline(report)
    for section in sections:
        for picture in section.pictures:
            (folder / f"{picture.name}.png").write_bytes(picture.png())
    (folder / OUTPUT_MARK).write_text(config.to_yaml(), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(render_markdown(title, sections), encoding="utf-8")
    (folder / "report.html").write_text(render_page(title, sections), encoding="utf-8")


def render_markdown(title: str, sections: Sequence[Section]) -> str:
    """The report as Markdown, long tables last; its pictures are files beside it, `NAME.png`."""
    lines = [f"# {_escaped(title)}", ""]
    last = []
    for section in sections:
        lines += [f"## {section.title}", ""]
        for paragraph in section.text:
            lines += [_escaped(paragraph), ""]
        for items in (
            [f"{_escaped(name)}: {_code(value)}" for name, value in section.facts.items()],
            [_escaped(bullet) for bullet in section.bullets],
        ):
            lines += [*(f"- {item}" for item in items), ""] if items else []
        for picture in section.pictures:
            lines += [f"![{picture.title}]({picture.name}.png)", "", f"{picture.title}: {picture.caption}", ""]
        if section.is_long:
            lines += [f"The table of {len(section.rows)} rows is at the end.", ""]
            last += [f"## {section.title}: table", "", *markdown_table(section.rows), ""]
        elif section.rows:
            lines += [*markdown_table(section.rows), ""]
        if section.columns:
            lines += [*(f"- `{key}`: {meaning}" for key, meaning in section.columns.items()), ""]
    return "\n".join(lines + last)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A Markdown table; a column for every key of any row."""
    keys = columns_of(rows)
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    return lines + ["| " + " | ".join(_cell(row.get(key)) for key in keys) + " |" for row in rows]


def _cell(value: Any) -> str:
    """A value as a table cell."""
    return _escaped(shown(value)).replace("|", "\\|")


def _code(value: Any) -> str:
    """A value between backticks."""
    return f"`{shown(value)}`".replace("\n", " ")


def _escaped(text: str) -> str:
    """Text on one line that starts no HTML element."""
    return text.replace("<", "&lt;").replace("\n", " ")
