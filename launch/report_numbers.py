"""How a report writes numbers: labels, units and digits of scores, sizes, intervals."""

from collections.abc import Sequence

from halfbyte.launch.summary import metric_form
from halfbyte.training.metrics import digits

STAGES = {
    "bf16": "BF16",
    "ptq": "PTQ",
    "qat": "QAT",
    "qad": "QAD",
    "exported": "exported",
    "bf16_trained": "BF16 trained",
}


def stage_name(stage: str) -> str:
    """A stage as a heading."""
    return STAGES.get(stage, stage.upper().replace("_", " "))


def metric_text(metric: str, value: float) -> str:
    """A score with its digits; the perplexity of a model that knows nothing gets an exponent."""
    _, factor, pattern = metric_form(metric)
    return number(value * factor, pattern)


def number(value: float, pattern: str) -> str:
    """A number, with a true minus sign."""
    return digits(value, pattern).replace("-", "\N{MINUS SIGN}")


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
