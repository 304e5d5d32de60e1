"""A report as one HTML file: everything inline, no script, light or dark as the reader's system is."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from halfbyte.launch.report_blocks import Report, visible

OPEN_EXAMPLES = 5
"""Items that are not folded away."""


def html(report: Report) -> str:
    """The page; every text of the run is escaped."""
    folder = Path(__file__).parent
    # Whatever the template prints is escaped: only the style sheet and matplotlib's drawings are marked as safe.
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["shown"] = lambda text: escape(visible(text))
    environment.filters["svg"] = Markup
    style = Markup((folder / "report.css").read_text())
    template = environment.get_template("report.html.j2")
    page = template.render(report=report, head=report.head, style=style, open_examples=OPEN_EXAMPLES)
    return page.lstrip() + "\n"
