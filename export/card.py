"""README.md of a released checkpoint: the model card, with what the gate measured."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from halfbyte.export.handoff import size_line, what_it_is
from halfbyte.training.config import Format, Recipe


def card_text(
    recipe: Recipe,
    formats: Iterable[Format],
    verdict: dict[str, Any],
    sizes: dict[str, Any],
    *,
    licensed: bool,
) -> str:
    """The card in Markdown, with the front matter that model hubs read.

    Args:
        recipe: The recipe of the run.
        formats: Of the quantized linears, one entry each; none for a BF16 checkpoint.
        verdict: Content of gate.json.
        sizes: What export.hf.write returned.
        licensed: Whether the source's LICENSE is among the files.
    """
    count, source = Counter(formats), Path(recipe.model.path).name
    tags = ["halfbyte", *sorted(count)]
    lines = [
        "---",
        f"base_model: {source}",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
        "",
        f"# {recipe.run.name}",
        "",
        what_it_is(count),
        f"Made from `{source}` by `{recipe.method.value}`. {size_line(sizes)}",
        "",
        f"## Accuracy gate: {verdict['verdict']}",
        "",
        *_table(verdict),
        *(f"- {reason}" for reason in verdict.get("reasons", [])),
        "",
        "`halfbyte.json` holds the whole verdict, the recipe, the versions and the SHA-256 of every file.",
        *(["", "The licence of the original model is in `LICENSE`."] if licensed else []),
    ]
    return "\n".join(lines) + "\n"


def _table(verdict: dict[str, Any]) -> list[str]:
    """One row per task and measure; the unit of the difference is the gate's: percentage points, a ratio, nats."""
    rows = []
    for task, result in verdict.get("tasks", {}).items():
        for measure, numbers in result.get("numbers", {}).items():
            values = [_shown(numbers.get(key)) for key in ("baseline", "candidate", "delta")]
            difference = f"{values[2]} {numbers.get('unit', '')} {_interval(numbers)}"
            cells = [f"{task} ({result['n']})", measure, *values[:2], difference, result["measures"].get(measure, "-")]
            rows.append(f"| {' | '.join(cells)} |")
    heading = ["| task (items) | measure | compared with | this checkpoint | difference | |", f"|{'---|' * 6}"]
    return [*heading, *rows, ""] if rows else []


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _interval(numbers: dict[str, Any]) -> str:
    interval = numbers.get("interval")
    return f"[{interval[0]:.4g}, {interval[1]:.4g}]" if interval else ""
