"""What a report is made of, before it becomes HTML or Markdown: plain text and numbers, nothing escaped yet."""

import unicodedata
from dataclasses import dataclass, field
from typing import ClassVar

from halfbyte.launch.report_plots import Figure


@dataclass(frozen=True)
class Cell:
    """A cell of a table: what is shown, the exact number behind it, and a verdict beside it."""

    text: str
    value: float | None = None
    verdict: str = ""


@dataclass(frozen=True)
class Group:
    """Rows that belong together under one heading; the first cell of a row is its heading."""

    title: str
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Table:
    """Columns after the first one hold numbers if `numbers`; `strong` is the column to look at."""

    kind: ClassVar[str] = "table"
    caption: str
    head: list[str]
    groups: list[Group]
    strong: int | None = None
    numbers: bool = True


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Missing:
    """A part that is not there, and why."""

    kind: ClassVar[str] = "missing"
    what: str
    reason: str
    damaged: bool = False


@dataclass(frozen=True)
class Figures:
    """Plots side by side, with what they have in common."""

    kind: ClassVar[str] = "figures"
    title: str
    text: str
    figures: list[Figure]


@dataclass(frozen=True)
class Example:
    """An evaluation item with what two models made of it.

    Attributes:
        title: Task and item.
        facts: (label, value) pairs.
        texts: (label, text) pairs: prompt, gold answer, outputs.
    """

    title: str
    facts: list[tuple[str, str]]
    texts: list[tuple[str, str]]


@dataclass(frozen=True)
class Examples:
    """Evaluation items, the worst first."""

    kind: ClassVar[str] = "examples"
    examples: list[Example]


@dataclass(frozen=True)
class Code:
    """Commands or a file, word for word; folded away if it has a `summary`."""

    kind: ClassVar[str] = "code"
    text: str
    language: str
    summary: str = ""


Block = Table | Text | Missing | Figures | Examples | Code


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: list[Block]

    @property
    def anchor(self) -> str:
        """Its name in links."""
        return self.title.lower().replace(" ", "-")


@dataclass(frozen=True)
class Ruling:
    """A verdict under one rule, with its reasons as (line, verdict of the line) pairs."""

    title: str
    verdict: str
    reasons: list[tuple[str, str]]


@dataclass(frozen=True)
class Head:
    """The top of the report.

    Attributes:
        verdict: pass | fail | inconclusive | not_applicable | missing.
        facts: (label, text) pairs: the rule, what was judged.
        tiles: (label, number, small print) of the main figures.
        rulings: The gate's verdict, then others that stand beside it.
    """

    verdict: str
    facts: list[tuple[str, str]]
    tiles: list[tuple[str, str, str]] = field(default_factory=list)
    rulings: list[Ruling] = field(default_factory=list)
    missing: Missing | None = None

    @property
    def word(self) -> str:
        """The verdict as it is shown."""
        return {"not_applicable": "not applicable", "missing": "no verdict"}.get(self.verdict, self.verdict)


@dataclass(frozen=True)
class Report:
    """The whole report."""

    name: str
    subtitle: str
    head: Head
    sections: list[Section]

    def missing(self) -> list[Missing]:
        """Every part that is not there, the verdict first."""
        parts = [self.head.missing] if self.head.missing else []
        return parts + [block for section in self.sections for block in section.blocks if isinstance(block, Missing)]

    def figures(self) -> list[Figure]:
        """Every plot, in order."""
        groups = [block for section in self.sections for block in section.blocks if isinstance(block, Figures)]
        return [figure for group in groups for figure in group.figures]


def visible(text: str) -> str:
    """Text in which nothing hides: control, formatting and private characters by name, line ends as they are.

    A model's output may hold anything; a right-to-left override, say, would turn the rest of the line around.
    """
    return "".join(map(_shown, text.replace("\r\n", "\n")))


def _shown(char: str) -> str:
    if char in "\n\t" or unicodedata.category(char)[0] != "C":
        return char
    if ord(char) < 0x20:
        return chr(0x2400 + ord(char))  # the control pictures
    return f"⟨U+{ord(char):04X}⟩"
