"""Plots of a report, by matplotlib: SVG that takes the page's colours and fonts, and PNG for everything else.

The same data give the same bytes: a fixed salt for matplotlib's ids, no date, ids that carry the plot's name.
"""

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, MaxNLocator

SIZE = (4.2, 2.7)
"""Inches; at 72 points each the width of the SVG's coordinate system."""
PAPER = {"text": "#1d2430", "grid": "#d9dee6", "before": "#b35900", "after": "#0067a5"}
"""Colours of the PNG: orange and blue, which the common kinds of colour blindness keep apart."""
PAGE = {"text": "currentColor", "grid": "var(--grid)", "before": "var(--before)", "after": "var(--after)"}
"""Colours of the SVG, defined by the page."""
_MARKS = {"text": "#010203", "grid": "#010204", "before": "#010205", "after": "#010206"}
"""What matplotlib is told instead: colours that stand for PAGE's until the SVG is rewritten."""

_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


@dataclass(frozen=True)
class Series:
    """One curve, or one histogram.

    Attributes:
        label: Its name in the legend; empty for none.
        x: Positions; for steps the edges, one more than y.
        y: Values.
        tone: Key of PAPER: "before" and "after" for the two things compared.
        style: line | thin (a line behind another one) | steps (a filled histogram).
        low, high: Ends of a band around y, or empty.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    tone: str = "after"
    style: str = "line"
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Plot:
    """What to draw: a name for files and ids, a title, a sentence for who cannot see it, axis titles with units.

    powers: x holds exponents of two and is labelled so. limits: (low, high) of y; none fits the data.
    """

    name: str
    title: str
    description: str
    x_label: str
    y_label: str
    series: list[Series]
    powers: bool = False
    limits: tuple[float, float] | None = None


@dataclass(frozen=True)
class Figure:
    """A drawn plot.

    Attributes:
        name: File name without suffix.
        title: Heading.
        description: What it shows, in words.
        svg: An <svg> element for a page that defines --grid, --before and --after.
        png: The same on white.
    """

    name: str
    title: str
    description: str
    svg: str
    png: bytes


def draw(plot: Plot) -> Figure:
    """Draw a plot twice: for the page and for files."""
    plot = replace(plot, name=re.sub(r"[^a-z0-9]+", "-", plot.name.lower()).strip("-"))
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": plot.name,
        "font.size": 8.5,
        "text.parse_math": False,  # a task's name may hold a dollar sign
        "axes.unicode_minus": True,
    }
    with mpl.rc_context(settings):
        page, paper = io.BytesIO(), io.BytesIO()
        _canvas(plot, _MARKS).savefig(page, format="svg", transparent=True, metadata={"Date": None})
        canvas = _canvas(plot, PAPER)
        FigureCanvasAgg(canvas)
        canvas.savefig(paper, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return Figure(plot.name, plot.title, plot.description, _themed(page.getvalue(), plot), paper.getvalue())


def _canvas(plot: Plot, colors: dict[str, str]) -> Canvas:
    canvas = Canvas(figsize=SIZE)
    axes = canvas.add_axes((0.15, 0.165, 0.83, 0.735))
    for series in plot.series:
        _draw_series(axes, series, colors[series.tone])
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(colors["grid"])
    axes.tick_params(length=0, colors=colors["text"])
    axes.grid(axis="y", color=colors["grid"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(plot.x_label, color=colors["text"])
    axes.set_ylabel(plot.y_label, color=colors["text"])
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if plot.powers:
        axes.xaxis.set_major_formatter(FuncFormatter(_power))
    if plot.limits:
        axes.set_ylim(*plot.limits)
    if any(series.label for series in plot.series):
        legend = axes.legend(
            loc="lower right",
            bbox_to_anchor=(1.0, 0.98),
            ncols=len(plot.series),
            frameon=False,
            labelcolor=colors["text"],
            handlelength=1.4,
            borderaxespad=0.0,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    return canvas


def _draw_series(axes: Axes, series: Series, color: str) -> None:
    if series.style == "steps":
        axes.stairs(series.y, series.x, fill=True, color=color, alpha=0.35, linewidth=0)
        axes.stairs(series.y, series.x, color=color, linewidth=1.1, label=series.label or None)
        return
    if series.style == "thin":
        axes.plot(series.x, series.y, color=color, linewidth=0.7, alpha=0.45)
        return
    if len(series.low):
        axes.fill_between(series.x, series.low, series.high, color=color, alpha=0.18, linewidth=0)
    few = {"marker": "o" if series.tone == "after" else "s", "markersize": 3.2} if len(series.x) <= 40 else {}
    dash = "-" if series.tone == "after" else (0, (4, 1.5))  # told apart without colour, too
    axes.plot(series.x, series.y, color=color, linewidth=1.5, linestyle=dash, label=series.label or None, **few)


def _power(value: float, _position: int | None = None) -> str:
    digits = str(round(value)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"2{digits}"


# SVG --------------------------------------------------------------------------------------------------------------


def _themed(raw: bytes, plot: Plot) -> str:
    """Matplotlib's file as an element of a page: named, no namespaces, the page's colours and fonts, ids of its own."""
    svg = ET.fromstring(raw)
    metadata = svg.find(f"{_SVG}metadata")
    if metadata is not None:
        svg.remove(metadata)
    referenced = set(re.findall(r'(?:url\(#|href="#)([^")]+)', raw.decode()))
    for element in svg.iter():
        element.tag = element.tag.removeprefix(_SVG)
        if element.tag == "style":  # matplotlib's one rule, which would reach the whole page: the page has it
            element.text = None
        element.attrib = {
            key.removeprefix(_XLINK): _attribute(key, value, plot.name)
            for key, value in element.attrib.items()
            if key != "id" or value in referenced
        }
    for defs in [parent for parent in svg.iter() if parent.find("style") is not None]:
        defs.remove(defs.find("style"))  # type: ignore[arg-type]
    for key in ("width", "height", "version"):
        svg.attrib.pop(key, None)
    title, description = ET.Element("title"), ET.Element("desc")
    for element, part, text in ((title, "title", plot.title), (description, "desc", plot.description)):
        element.set("id", f"{plot.name}-{part}")
        element.text = text
    svg.insert(0, description)
    svg.insert(0, title)
    svg.set("role", "img")
    svg.set("aria-labelledby", f"{plot.name}-title {plot.name}-desc")
    return ET.tostring(svg, encoding="unicode", short_empty_elements=False)


def _attribute(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key.endswith("href"):
        return f"#{name}-{value.removeprefix('#')}"
    value = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", value)
    if key == "style":
        value = re.sub(r"font-family: [^;]+;? ?", "", value)
        for tone, mark in _MARKS.items():
            value = value.replace(mark, PAGE[tone])
    return value


def moving_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of each value and the `width` - 1 before it (fewer at the start)."""
    windows = [values[max(0, end - width) : end] for end in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]
