"""A picture of a report: PNG beside report.md, SVG inside report.html.

Pictures are small, so that each fits a phone at its own size, and their colours are legible on white and on black;
what is drawn in `INK` takes the text's colour inside a page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any
from xml.etree import ElementTree

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

INK, BLUE, ORANGE, GREY = "#1f2328", "#3b82c4", "#d9730d", "#868c93"
WIDTH = 3.5  # inches: 336 CSS pixels
STYLE = {
    "font.size": 8,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "text.parse_math": False,  # names are names, whatever signs they hold
    "svg.fonttype": "none",
    "svg.hashsalt": "sst-merge",  # the same picture has the same ids
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Picture:
    """A figure of the report.

    Attributes:
        name: File name without suffix; unique in a report.
        title: A few words.
        caption: What is drawn.
        figure: As drawn.
    """

    name: str
    title: str
    caption: str
    figure: Figure

    def png(self) -> bytes:
        """The picture on white."""
        return self._saved("png", dpi=160)

    def svg(self) -> str:
        """An `svg` element for a page: no address, no id that another picture has, INK is the text's colour."""
        root = ElementTree.fromstring(self._saved("svg", transparent=True, metadata=_NO_METADATA))
        for parent in list(root.iter()):
            for child in parent.findall("{*}style"):  # its rules would hold for the whole page
                parent.remove(child)
        for element in root.iter():
            element.tag = _local(element.tag)
            element.attrib = {_local(key): self._adapted(_local(key), text) for key, text in element.attrib.items()}
        root.set("style", f"--width: {root.attrib.pop('width')}")  # the page scales it; viewBox has its proportions
        del root.attrib["height"]
        root.attrib |= {"role": "img", "aria-label": self.title}
        return ElementTree.tostring(root, encoding="unicode")

    def _saved(self, kind: str, **options: Any) -> bytes:
        """The figure as a file's content."""
        with rc_context(STYLE), BytesIO() as file:
            self.figure.savefig(file, format=kind, **options)
            return file.getvalue()

    def _adapted(self, key: str, text: str) -> str:
        """An attribute's text, its ids prefixed with the picture's name."""
        if key == "id":
            return f"{self.name}-{text}"
        if key == "href":
            return text.replace("#", f"#{self.name}-", 1)
        return text.replace("url(#", f"url(#{self.name}-").replace(INK, "currentColor")


def _local(name: str) -> str:
    """A tag's or attribute's name without its namespace, as HTML writes it."""
    return name.rpartition("}")[2]


def picture(
    name: str, title: str, caption: str, draw: Callable[[Axes], None], size: tuple[float, float] = (WIDTH, 2.6)
) -> Picture:
    """A picture of one pair of axes, `size` in inches."""
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                axis.set_major_formatter(lambda x, _: _power_of_ten(x))
                axis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.0, 0.4)))
        if axes.get_legend() is None and axes.get_legend_handles_labels()[0]:
            axes.legend()
    return Picture(name, title, caption, figure)


def _power_of_ten(x: float) -> str:
    """A logarithmic axis' label, short: 0.01 … 1000, else 10ⁿ."""
    exponent = round(np.log10(x))
    return f"{x:g}" if -3 < exponent < 4 else "10" + str(exponent).translate(_SUPERSCRIPTS)


def numbers(rows: Iterable[Mapping[str, Any]], key: str) -> np.ndarray:
    """A column, NaN where there is no finite number."""
    column = np.array([np.nan if row.get(key) is None else row[key] for row in rows], dtype=float)
    return np.where(np.isfinite(column), column, np.nan)
