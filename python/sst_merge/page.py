"""A report as one HTML page that needs nothing else: no network, no other file, in any browser."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from .outline import Section, columns_of, shown


def render_page(title: str, sections: Sequence[Section]) -> str:
    """The page. All text is escaped; its policy forbids whatever is not in the page, and any script but its own.

    Args:
        title: Heading, and title of the window.
        sections: From `outline`.

    Returns:
        HTML, in which pictures are `svg` elements and tables sort by a click on a column's head.
    """
    page, style, script = (
        files(__package__).joinpath("assets", name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", "page.js")
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"shown": shown, "columns": columns_of}
    digest = b64encode(sha256(script.encode()).digest()).decode()
    return environment.from_string(page).render(
        title=title, sections=sections, style=style, script=script, digest=digest
    )
