"""The table that ends a run: scores of every stage, the gate's verdict, sizes, and where the checkpoint is."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from halfbyte.export import serving
from halfbyte.export.record import RECORD
from halfbyte.export.verdict_text import beside, waived
from halfbyte.training import metrics
from halfbyte.training.config import Format, Recipe
from halfbyte.training.files import damage, read_json
from halfbyte.training.kv_format import KVCache
from halfbyte.training.model_config import read_config

SHOWN = {
    "accuracy": ("accuracy, %", 100.0, "{:.2f}"),
    "perplexity": ("perplexity", 1.0, "{:.2f}"),
    "bits_per_byte": ("bits per byte", 1.0, "{:.4f}"),
    "kl": ("KL to BF16, nats", 1.0, "{:.4f}"),
    "agreement": ("top-1 agreement, %", 100.0, "{:.2f}"),
    "output_tokens": ("mean output length, tokens", 1.0, "{:.1f}"),
    "cut": ("outputs cut at the limit, %", 100.0, "{:.2f}"),
}
"""Metric in evaluate.json -> label with unit, factor, format; a task's own metrics go by their names."""


def metric_form(metric: str) -> tuple[str, float, str]:
    """(label with unit, factor, format) of a metric in evaluate.json."""
    if metric in SHOWN:
        return SHOWN[metric]
    return (f"{metric}, %", 100.0, "{:.2f}") if metric in metrics.METRICS else (metric, 1.0, "{:.4g}")


def columns(rows: list[list[str]]) -> Iterable[str]:
    """Rows of cells, the first one a heading, as aligned lines; the first two columns are text, the others numbers."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for number, row in enumerate(rows):
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        yield "  " + "  ".join(cells).rstrip()
        if number == 0:
            yield "  " + "  ".join("-" * w for w in widths)


def score_rows(scores: dict[str, dict[str, dict[str, float]]]) -> list[list[str]]:
    """Table of evaluate.json: one row per task and metric, one column per stage."""
    stages = list(scores)
    rows = [["task", "score", *(stage.upper().replace("_", " ") for stage in stages)]]
    for task, first in scores[stages[0]].items():
        found = dict.fromkeys(metric for stage in stages for metric in scores[stage].get(task, {}) if metric != "n")
        for metric in found:
            label, factor, pattern = metric_form(metric)
            values = [scores[stage].get(task, {}).get(metric) for stage in stages]
            shown = ["-" if value is None else metrics.digits(value * factor, pattern) for value in values]
            rows.append([f"{task} ({int(first['n'])})", label, *shown])
    return rows


def summary_text(recipe: Recipe, folder: Path) -> str:
    """Everything a reader wants to see after a run.

    Args:
        recipe: The recipe.
        folder: The run folder, with evaluate.json and gate.json; export.json and verify.json where they exist.
    """
    lines = ["", f"{recipe.run.name}: {recipe.method.value}, {_formats(recipe)}", ""]
    if (folder / "evaluate.json").exists():
        with damage(folder / "evaluate.json"):
            lines += [*columns(score_rows(read_json(folder / "evaluate.json"))), ""]
    verdict = read_json(folder / "gate.json")
    with damage(folder / "gate.json"):
        lines.append(f"  gate ({verdict['rule']}): {verdict['verdict'].upper()}{waived(verdict)}")
        lines += [f"    {reason}" for reason in verdict["reasons"]]
        lines += _beside(verdict)
    with damage(folder / "export" / "export.json"):
        lines += _shipped(folder)
    lines.append(f"  report:     {folder / 'report.html'}")
    return "\n".join(lines)


def _formats(recipe: Recipe) -> str:
    others = sorted({*recipe.quantize.layers.values()} - {recipe.quantize.format})
    cache = recipe.quantize.kv_cache
    stored = "" if cache is KVCache.none else f", {cache} cache"
    return recipe.quantize.format.value + (f" with {', '.join(others)} layers" if others else "") + stored


def _beside(verdict: dict[str, Any]) -> list[str]:
    """The verdicts that do not count, and how a control differs from what it should be."""
    lines = []
    for against, block in beside(verdict).items():
        lines.append(f"  within the thresholds of {against}: {block['verdict'].upper()}")
        lines += [f"    {reason}" for reason in block["reasons"]]
    control = verdict["control"] or {"differs": []}
    return lines + [f"  note: the BF16 control was trained otherwise: {line}" for line in control["differs"]]


def _served(out: Path) -> str:
    """The command of the first server that reads the release."""
    record = read_json(out / RECORD)
    used = frozenset(Format(name) for name in record["format"].split("+") if name != "bf16")
    architecture = read_config(out / "config.json")["architectures"][0]
    served = serving.Served(str(out.resolve()), used, KVCache(record["kv_cache"]), architecture)
    return next(iter(serving.commands(served, serving.Load()).values()))


def _shipped(folder: Path) -> list[str]:
    record, out = folder / "export" / "export.json", folder / "export" / "hf"
    if not record.exists() or not out.exists():
        kept = folder / "export" / "candidate"
        return ["", f"  nothing released{f' (the candidate stays at {kept})' if kept.exists() else ''}"]
    sizes = read_json(record)["sizes"]
    before, after = sizes["bytes_before"], sizes["bytes_after"]
    lines = ["", f"  size: {before / 1e6:.1f} MB in BF16 -> {after / 1e6:.1f} MB ({before / after:.2f}x smaller)"]
    if (folder / "verify.json").exists():
        report = read_json(folder / "verify.json")
        state = "every byte verified" if report["ok"] else "NOT VERIFIED"
        lines.append(f"  {state}: {report['tensors']} tensors compared, {report['mismatches']} mismatches")
    return [
        *lines,
        f"  checkpoint: {out.resolve()}",
        f"  serve it:   {_served(out)}",
        f"  more:       {folder / 'export' / 'HANDOFF.md'}",
    ]
