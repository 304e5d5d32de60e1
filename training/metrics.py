"""Metrics that tasks bring along, by lm-eval's names: what an item's value is, and how items become one score.

Torch-free: the gate reads per-item values back from files.
"""

import math
from collections.abc import Sequence
from enum import StrEnum

import numpy as np

from halfbyte.training.errors import UserError

BLEU_ORDER = 4
"""Longest n-gram of BLEU; an item's value is [output length, reference length, 4 x matches, 4 x n-grams]."""

type Value = float | list[float]
"""One item's value of a metric."""


class Statistic(StrEnum):
    """What kind of number a metric is; it decides which paired interval is right."""

    proportion = "proportion"
    """0 or 1 per item; the score is the mean. Higher is better."""
    mean = "mean"
    """0 .. 1 per item; the score is the mean. Higher is better."""
    bleu = "bleu"
    """Counts per item, one score of the corpus, 0 .. 1. Higher is better."""
    perplexity = "perplexity"
    """Log-likelihood per item in nats; the score is exp of minus the mean. Lower is better."""


METRICS = {
    "accuracy": Statistic.proportion,
    "acc": Statistic.proportion,
    "acc_norm": Statistic.proportion,
    "exact_match": Statistic.proportion,
    "em": Statistic.proportion,
    "f1": Statistic.mean,
    "bleu": Statistic.bleu,
    "perplexity": Statistic.perplexity,
}
"""Metrics that can be judged; a task with another one is refused when the recipe is read."""


def aggregate(name: str, values: Sequence[Value]) -> float:
    """The score of a metric over items.

    Args:
        name: One of METRICS.
        values: One per item, as Score.metrics holds them.

    Returns:
        The score, in 0 .. 1 except for perplexity.

    Raises:
        UserError: there are no values, or the metric is not known.
    """
    if name not in METRICS:
        raise UserError(f"metric {name}: not known; use one of {', '.join(METRICS)}")
    if not values:
        raise UserError(f"metric {name}: no values; a task without items cannot be judged")
    if METRICS[name] is Statistic.bleu:
        return float(bleu(np.array([_counts(value) for value in values], dtype=np.float64).sum(axis=0)))
    mean = math.fsum(_number(value) for value in values) / len(values)
    return math.exp(min(-mean, 700.0)) if METRICS[name] is Statistic.perplexity else mean


def digits(value: float, pattern: str) -> str:
    """A score as text: by its pattern, or with an exponent from a million on, as of a model that knows nothing."""
    return f"{value:.3e}" if abs(value) >= 1e6 else pattern.format(value)


def bleu(counts: np.ndarray) -> np.ndarray:
    """Corpus BLEU from summed counts (Papineni et al. 2002, section 2.3: brevity penalty x geometric mean).

    Args:
        counts: Float [..., 10]: output length, reference length, matches of 1- to 4-grams, n-grams of the outputs of
            length 1 to 4, each summed over the items of a corpus.

    Returns:
        Float [...], 0 .. 1; 0 if an order has no match. sacrebleu smooths that case, so a corpus of a few items may
        differ from it.
    """
    output, reference = counts[..., 0], counts[..., 1]
    matches, totals = counts[..., 2 : 2 + BLEU_ORDER], counts[..., 2 + BLEU_ORDER : 2 + 2 * BLEU_ORDER]
    some = (matches.min(axis=-1) > 0) & (output > 0)
    safe_matches, safe_totals = np.where(some[..., None], matches, 1.0), np.where(some[..., None], totals, 1.0)
    precision = (np.log(safe_matches) - np.log(safe_totals)).mean(axis=-1)
    brevity = np.minimum(0.0, 1 - reference / np.where(some, output, 1.0))
    return np.where(some, np.exp(brevity + precision), 0.0)


def _counts(value: Value) -> list[float]:
    if not isinstance(value, list) or len(value) != 2 + 2 * BLEU_ORDER:
        raise UserError(f"bleu: an item's value is {value!r}, not {2 + 2 * BLEU_ORDER} counts; evaluate again")
    return value


def _number(value: Value) -> float:
    if isinstance(value, list):
        raise UserError(f"an item's value is {value!r}, not one number; evaluate again")
    return value
