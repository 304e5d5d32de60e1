"""Paired bootstrap intervals of scores that are no plain mean of 0 and 1: F1 and other means, and BLEU.

Items are drawn with replacement, an item's two models together (Koehn 2004, Statistical Significance Tests for Machine
Translation Evaluation), and the ends are percentiles of the resampled differences. Before that, as for proportions
(`statistics.fictitious`), items are added that only the candidate gets fully right, and as many that only the baseline
does: a sample without a difference, or without one of the rare large ones, must not look certain. With 100 items of
which 1 % change, the plain percentile and BCa intervals miss the truth in 52 % of simulated samples, this one in none;
where changes are common, BCa is no better than percentiles (docs/decisions.md, tests/test_statistics.py).
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from halfbyte.training.metrics import BLEU_ORDER, bleu
from halfbyte.training.statistics import Interval, fictitious

SEED = 20_260_101
"""Fixed: the same scores always get the same verdict."""
LEAST_RESAMPLES = 10_000
BEYOND = 50
"""Resamples that lie beyond each end, at least: a corrected interval needs more resamples."""
CHUNK = 4_000_000
"""Drawn items that are in memory at once (8 bytes each, three times)."""

type Statistic = Callable[[np.ndarray], np.ndarray]
"""Sums over items, [R, K] -> the difference that they make, [R]."""


def paired_mean_bootstrap(candidate: Sequence[float], baseline: Sequence[float], confidence: float) -> Interval:
    """Interval of the difference of two means of scores in 0 .. 1.

    Args:
        candidate: One score per item.
        baseline: Of the same items, in the same order.
        confidence: Two-sided level.

    Returns:
        mean(candidate) - mean(baseline) with its interval.

    Raises:
        ValueError: no items, or unequal lengths.
    """
    _same_length(candidate, baseline)
    rows = np.array([candidate, baseline], dtype=np.float64).T
    extremes = np.array([[1.0, 0.0], [0.0, 1.0]])
    count = len(rows) + len(extremes) * _extra(confidence)
    ends = _ends(rows, extremes, lambda sums: (sums[:, 0] - sums[:, 1]) / count, confidence)
    return Interval(float(rows[:, 0].mean() - rows[:, 1].mean()), *ends)


def paired_bleu_bootstrap(
    candidate: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]], confidence: float
) -> Interval:
    """Interval of the difference of two corpus BLEUs, 0 .. 1.

    The added items have the mean reference length; one model repeats the reference, the other matches nothing.

    Args:
        candidate: Counts per item, as `metrics.bleu` takes their sums.
        baseline: Of the same items, in the same order.
        confidence: Two-sided level.

    Returns:
        bleu(candidate) - bleu(baseline) with its interval.

    Raises:
        ValueError: no items, or unequal lengths.
    """
    _same_length(candidate, baseline)
    rows = np.hstack([np.array(candidate, dtype=np.float64), np.array(baseline, dtype=np.float64)])
    width = rows.shape[1] // 2
    length = rows[:, 1].mean()
    grams = [max(0.0, length - order) for order in range(BLEU_ORDER)]
    right, wrong = [length, length, *grams, *grams], [length, length, *[0.0] * BLEU_ORDER, *grams]
    extremes = np.array([right + wrong, wrong + right])

    def difference(sums: np.ndarray) -> np.ndarray:
        return bleu(sums[:, :width]) - bleu(sums[:, width:])

    return Interval(float(difference(rows.sum(axis=0)[None])[0]), *_ends(rows, extremes, difference, confidence))


def _same_length(candidate: Sequence, baseline: Sequence) -> None:
    if not len(candidate) or len(candidate) != len(baseline):
        raise ValueError(f"paired bootstrap: {len(candidate)} and {len(baseline)} items")


def _extra(confidence: float) -> int:
    return math.ceil(fictitious(confidence))


def _ends(rows_NK: np.ndarray, extremes_EK: np.ndarray, statistic: Statistic, confidence: float) -> tuple[float, float]:
    """Percentiles of the statistic over resamples of the items and the added ones, rounded outwards."""
    rows_NK = np.vstack([rows_NK, np.repeat(extremes_EK, _extra(confidence), axis=0)])
    tail = (1 - confidence) / 2
    resamples = max(LEAST_RESAMPLES, math.ceil(BEYOND / tail))
    values = statistic(resampled_sums(rows_NK, resamples))
    low, high = np.quantile(values, tail, method="lower"), np.quantile(values, 1 - tail, method="higher")
    return max(-1.0, float(low)), min(1.0, float(high))


def resampled_sums(rows_NK: np.ndarray, resamples: int, seed: int = SEED) -> np.ndarray:
    """Sums over items drawn with replacement.

    Args:
        rows_NK: Float64 [N, K], one row per item.
        resamples: R, how many times N items are drawn.
        seed: Of the generator.

    Returns:
        Float64 [R, K].
    """
    generator = np.random.default_rng(seed)
    n = len(rows_NK)
    chunk = max(1, CHUNK // n)
    parts = []
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        # How often each item was drawn: a product of matrices is faster than gathering the rows.
        drawn = generator.integers(0, n, size=(size, n)) + n * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        parts.append(counts.astype(np.float64) @ rows_NK)
    return np.concatenate(parts)
