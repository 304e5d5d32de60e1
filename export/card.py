"""README.md of a released checkpoint: the model card, with what the gate measured and the commands that serve it."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from halfbyte.export.handoff import commands_text, needs_text, served_as, size_line, what_it_is
from halfbyte.export.verdict_text import BASELINES, beside, verdict_lines
from halfbyte.training.choices import Container
from halfbyte.training.config import Format, Recipe

SERVING, MADE = "## Serving", "Made with "
"""Where a card says how its files are served, and what comes after."""
CONVERTED = {
    Container.compressed_tensors: "vLLM and SGLang recognize compressed-tensors by config.json, without an option for"
    " the format: `vllm serve FOLDER`, with `--kv-cache-dtype fp8_e4m3` where the cache is FP8. transformers reads it"
    " with the package compressed-tensors.",
    Container.trtllm: "This is the input of `trtllm-build` up to TensorRT-LLM 1.2.1, on Blackwell: `halfbyte engine"
    " RUN_DIR` writes the whole command. Newer releases have no engines; they load the directory that this was made"
    " from.",
    Container.dequantized: "These are plain weights with the values of the quantized ones: whatever loads the original"
    " model loads them. Nothing rounds activations or a cache here, so where the format does, results differ from the"
    " ones above.",
}
"""How each other layout is served."""


def card_text(
    recipe: Recipe,
    formats: Iterable[Format],
    verdict: dict[str, Any],
    sizes: dict[str, Any],
    versions: dict[str, str],
    architecture: str,
    *,
    licensed: bool,
) -> str:
    """The card in Markdown, with the front matter that model hubs read.

    Args:
        recipe: The recipe of the run.
        formats: Of the quantized linears, one entry each; none for a BF16 checkpoint.
        verdict: Content of gate.json.
        sizes: What export.hf.write returned.
        versions: Package -> version.
        architecture: `architectures[0]` of config.json.
        licensed: Whether the source's LICENSE is among the files.
    """
    count, source = Counter(formats), Path(recipe.model.path).name
    served = served_as("FOLDER", recipe, count, architecture)
    lines = [
        "---",
        f"base_model: {source}",
        "tags:",
        *(f"- {tag}" for tag in ["halfbyte", *sorted(count)]),
        "---",
        "",
        f"# {recipe.run.name}",
        "",
        what_it_is(count),
        f"Made from `{source}` by `{recipe.method.value}`. {size_line(sizes)}",
        "",
        "## Accuracy gate",
        "",
        *verdict_lines(verdict),
        "",
        *_table(BASELINES.get(verdict.get("baseline", ""), ""), verdict["tasks"]),
        *(line for against, block in beside(verdict).items() for line in _table(against, block["tasks"])),
        SERVING,
        "",
        commands_text(served, recipe),
        "FOLDER is where these files are. No server was run where they were made.",
        "",
        needs_text(served),
        f"{MADE}{', '.join(f'{name} {version}' for name, version in sorted(versions.items()))}.",
        "`halfbyte.json` holds the whole verdict, the recipe, the versions and the SHA-256 of every file.",
        *(["", "The licence of the original model is in `LICENSE`."] if licensed else []),
    ]
    return "\n".join(lines) + "\n"


def converted_card(text: str, container: Container) -> str:
    """The card of a conversion: what was measured is its source's, how it is served is not."""
    before, _, after = text.partition(f"{SERVING}\n")
    made = after.partition(f"\n{MADE}")[2]
    return f"{before}{SERVING}\n\n{CONVERTED[container]}\n\n{MADE}{made}" if made else text


def _table(against: str, tasks: dict[str, Any]) -> list[str]:
    """One row per task and measure; the unit of the difference is the gate's: percentage points, a ratio, nats."""
    rows = []
    for task, result in tasks.items():
        for measure, numbers in result["numbers"].items():
            values = [_shown(numbers.get(key)) for key in ("baseline", "candidate", "delta")]
            difference = f"{values[2]} {numbers.get('unit', '')} {_interval(numbers)}"
            cells = [f"{task} ({result['n']})", measure, *values[:2], difference, result["measures"].get(measure, "-")]
            rows.append(f"| {' | '.join(cells)} |")
    heading = [f"| task (items) | measure | {against} | this checkpoint | difference | |", f"|{'---|' * 6}"]
    return [*heading, *rows, ""] if rows else []


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _interval(numbers: dict[str, Any]) -> str:
    interval = numbers.get("interval")
    return f"[{interval[0]:.4g}, {interval[1]:.4g}]" if interval else ""
