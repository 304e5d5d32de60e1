"""How a report writes numbers: labels, units and digits of scores, sizes, intervals."""

from collections.abc import Sequence

from halfbyte.launch.summary import METRICS as SHOWN
from halfbyte.training import metrics
from halfbyte.training.metrics import Statistic

STAGES = {
    "bf16": "BF16",
    "ptq": "PTQ",
    "qat": "QAT",
    "qad": "QAD",
    "exported": "exported",
    "bf16_trained": "BF16 trained",
}
_LENGTHS = {
    "output_tokens": ("mean output length, tokens", 1.0, "{:.1f}"),
    "cut": ("outputs cut at the limit, %", 100.0, "{:.2f}"),
}


def stage_name(stage: str) -> str:
    """A stage as a heading."""
    return STAGES.get(stage, stage.upper().replace("_", " "))


def metric_form(metric: str) -> tuple[str, float, str]:
    """(label with unit, factor, format) of a metric in evaluate.json."""
    for table in (SHOWN, _LENGTHS):
        if metric in table:
            return table[metric]
    if metrics.METRICS.get(metric) is Statistic.perplexity:
        return metric, 1.0, "{:.2f}"
    return (f"{metric}, %", 100.0, "{:.2f}") if metric in metrics.METRICS else (metric, 1.0, "{:.4g}")


def metric_text(metric: str, value: float) -> str:
    """A score with its digits; the perplexity of a model that knows nothing gets an exponent."""
    _, factor, pattern = metric_form(metric)
    return number(value * factor, pattern)


def number(value: float, pattern: str) -> str:
    """A number, with a true minus sign."""
    shown = f"{value:.3e}" if abs(value) >= 1e6 else pattern.format(value)
    return shown.replace("-", "\N{MINUS SIGN}")


def interval_text(estimate: float, ends: Sequence[float | None], pattern: str, unit: str = "") -> str:
    """`estimate unit [low, high]`; an end that is None is infinite."""
    low, high = ends
    shown = [
        "\N{MINUS SIGN}∞" if low is None else number(low, pattern),
        "∞" if high is None else number(high, pattern),
    ]
    return f"{number(estimate, pattern)}{unit} [{', '.join(shown)}]"


def bytes_text(count: float) -> str:
    """Bytes in decimal units."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"
