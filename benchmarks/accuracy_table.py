"""The accuracy table from what the runs scored: means over seeds, their spread, and the share of the gap closed."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from halfbyte.bench.arms import ROWS, Row

COLUMNS = (
    ("lambada", "perplexity", "LAMBADA perplexity", 1.0, 1),
    ("lambada", "acc", "LAMBADA acc %", 100.0, 2),
    ("lambada", "kl", "LAMBADA KL", 1.0, 3),
    ("piqa", "acc", "PIQA acc %", 100.0, 2),
    ("sciq", "acc", "SciQ acc %", 100.0, 2),
    ("english", "bits_per_byte", "text bits/byte", 1.0, 4),
    ("english", "kl", "text KL", 1.0, 4),
    ("english", "agreement", "text top-1 %", 100.0, 2),
)
"""Task, metric, heading, factor, digits."""
REFERENCE = {"nvfp4": "nvfp4_max", "mxfp4": "mxfp4_max"}
"""Format -> the PTQ row whose distance from BF16 is the gap."""


def gap_closed(perplexity: float, ptq: float, bf16: float) -> float:
    """Share of the log-perplexity gap between PTQ and BF16 that a model closes: 0 is PTQ, 1 is BF16.

    (ln ptq - ln p) / (ln ptq - ln bf16); negative where the model is worse than PTQ.
    """
    return (math.log(ptq) - math.log(perplexity)) / (math.log(ptq) - math.log(bf16))


def cell(values: Sequence[float], factor: float, digits: int) -> str:
    """A mean, with the standard deviation over seeds where there are several."""
    text = f"{factor * mean(values):.{digits}f}"
    return f"{text} ± {factor * stdev(values):.{digits}f}" if len(values) > 1 else text


def table(results: Mapping[str, Any]) -> str:
    """Markdown.

    Args:
        results: Job key -> what accuracy.result returned.
    """
    if not results:
        return "nothing measured\n"
    heads = ["row", "seeds", *(heading for _, _, heading, _, _ in COLUMNS), "gap closed %", "M tokens", "tokens/s"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    bf16 = next(iter(results.values()))["bf16"]
    scores = [cell([bf16[task][name]], f, d) if name in bf16.get(task, {}) else "" for task, name, _, f, d in COLUMNS]
    lines.append(f"| {' | '.join(['BF16', '', *scores, '100', '', ''])} |")
    lines += [_line(row, found, results) for row in ROWS if (found := _runs(row, results))]
    return "\n".join(lines) + "\n"


def _runs(row: Row, results: Mapping[str, Any]) -> list[Any]:
    return [found for found in results.values() if found["row"] == row.name]


def _line(row: Row, runs: list[Any], results: Mapping[str, Any]) -> str:
    cells = [row.title, str(len(runs)) if row.trained else ""]
    for task, name, _, factor, digits in COLUMNS:
        values = [run["scores"][task][name] for run in runs if name in run["scores"].get(task, {})]
        cells.append(cell(values, factor, digits) if values else "")
    reference = results.get(REFERENCE["mxfp4" if "mxfp4" in row.name else "nvfp4"])
    if reference is not None:
        ptq, bf16 = (reference[stage]["lambada"]["perplexity"] for stage in ("scores", "bf16"))
        closed = [gap_closed(run["scores"]["lambada"]["perplexity"], ptq, bf16) for run in runs]
        cells.append(cell(closed, 100.0, 1))
    else:
        cells.append("")
    tokens = runs[0].get("tokens")
    rates = [run["tokens_per_second"] for run in runs if "tokens_per_second" in run]
    cells += [f"{tokens / 1e6:.1f}" if tokens else "", f"{mean(rates):,.0f}" if rates else ""]
    return f"| {' | '.join(cells)} |"
