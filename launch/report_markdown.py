"""A report as Markdown (GitHub's), with the plots as PNG files beside it."""

import re
from collections.abc import Sequence

from halfbyte.launch.report_blocks import (
    Block,
    Cell,
    Code,
    Examples,
    Figures,
    Missing,
    Report,
    Section,
    Table,
    Text,
    visible,
)

_SPECIAL = re.compile(r"([\\`*_\[\]<>|~#!$])")


def inline(text: str) -> str:
    """Text that may stand anywhere in a line or a table's cell and means only itself.

    Line ends become a visible sign; backslashes keep a pipe from ending the cell and a URL from becoming a link.
    """
    text = visible(text).replace("\n", "⏎ ").replace("\t", " ")
    text = _SPECIAL.sub(r"\\\1", text.replace("&", "&amp;"))
    text = text.replace("://", ":\\/\\/").replace("@", "\\@")
    text = re.sub(r"(?i)\bwww\.", lambda match: f"{match[0][:-1]}\\.", text)
    text = re.sub(r"^(\s*)([-+=])(?=[-+=\s]|$)", r"\1\\\2", text)  # a list or a rule at the start of a line
    return re.sub(r"^(\s*\d+)([.)])(?=\s|$)", r"\1\\\2", text).strip()


def markdown(report: Report, pictures: str) -> str:
    """The whole report.

    Args:
        report: What to write.
        pictures: Folder of the plots, relative to the file.
    """
    head = report.head
    lines = [f"# {inline(report.name)}", inline(report.subtitle), f"## Gate: {head.word.upper()}"]
    if head.missing:
        lines.append(_missing(head.missing))
    lines.append("\n".join(f"- {label}: {inline(text)}" for label, text in head.facts))
    lines.append(
        "\n".join(f"- {inline(label)}: **{inline(value)}** ({inline(small)})" for label, value, small in head.tiles)
    )
    for ruling in head.rulings:
        lines.append(f"## {ruling.title}: {ruling.verdict.upper().replace('_', ' ')}")
        lines.append("\n".join(f"- {inline(line)}" for line, _ in ruling.reasons))
    if report.missing():
        lines.append("## Not in this report")
        lines.append("\n".join(f"- {_missing(part)}" for part in report.missing()))
    for section in report.sections:
        lines += _section(section, pictures)
    return "\n\n".join(line for line in lines if line) + "\n"


def _section(section: Section, pictures: str) -> list[str]:
    return [f"## {inline(section.title)}", *(_block(block, pictures) for block in section.blocks)]


def _block(block: Block, pictures: str) -> str:
    match block:
        case Text():
            return inline(block.text)
        case Missing():
            return _missing(block)
        case Table():
            return _table(block)
        case Figures():
            images = [f"![{inline(f.title)}: {inline(f.description)}]({pictures}/{f.name}.png)" for f in block.figures]
            return "\n\n".join([f"### {inline(block.title)}", inline(block.text), *images])
        case Examples():
            return _examples(block)
        case Code():
            return _code(block)
    raise TypeError(f"not a block of a report: {block!r}")


def _missing(part: Missing) -> str:
    return f"**{inline(part.what)}: missing.** {inline(part.reason)}"


def _table(table: Table) -> str:
    grouped = any(group.title for group in table.groups)
    head = [*([""] if grouped else []), *table.head]
    rows = [
        [*([group.title if number == 0 else ""] if grouped else []), *map(_cell, row)]
        for group in table.groups
        for number, row in enumerate(group.rows)
    ]
    left = 2 if grouped else 1
    rule = ["---" if i < left or not table.numbers else "---:" for i in range(len(head))]
    return f"{inline(table.caption)}:\n\n{_rows(head, rule, rows)}"


def _cell(cell: Cell) -> str:
    return f"{cell.text} ({cell.verdict.replace('_', ' ')})" if cell.verdict else cell.text


def _rows(head: Sequence[str], rule: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[inline(cell) for cell in head], list(rule), *([inline(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _examples(block: Examples) -> str:
    """One row per item; a column for every kind of fact and text that any of them has."""
    labels = list(dict.fromkeys(label for example in block.examples for label, _ in (*example.facts, *example.texts)))
    rows = []
    for number, example in enumerate(block.examples, start=1):
        there = dict((*example.facts, *example.texts))
        rows.append([str(number), example.title, *(there.get(label, "") for label in labels)])
    return _rows(["", "item", *labels], ["---:"] + ["---"] * (1 + len(labels)), rows)


def _code(code: Code) -> str:
    longest = max((len(run) for run in re.findall(r"`+", code.text)), default=0)
    fence = "`" * max(3, longest + 1)
    block = f"{fence}{code.language}\n{visible(code.text)}\n{fence}"
    return f"{inline(code.summary)}:\n\n{block}" if code.summary else block
