"""Paired intervals for the gate, in plain Python, with the source of every formula."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

EXACT_T_UP_TO = 300
"""Degrees of freedom beyond which the expansion of the t quantile is better than 1e-9 (the closed form costs more)."""
MOST_ITEMS = 10**9
"""The two `..._to_decide` functions look no further."""


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval around an estimate, all in the same unit; the ends may be infinite."""

    estimate: float
    low: float
    high: float


def normal_quantile(probability: float) -> float:
    """The value below which a standard normal variable lies with this probability (0 < probability < 1)."""
    return NormalDist().inv_cdf(probability)


def t_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t distribution.

    Up to EXACT_T_UP_TO degrees of freedom by bisection on the closed-form distribution (Abramowitz and Stegun,
    Handbook of Mathematical Functions, 26.7.3 and 26.7.4), beyond it by the expansion 26.7.5.

    Args:
        probability: 0 < probability < 1.
        freedom: Degrees of freedom, at least 1.

    Raises:
        ValueError: an argument is out of range.
    """
    if freedom < 1 or not 0 < probability < 1:
        raise ValueError(f"t_quantile({probability}, {freedom}): needs 0 < probability < 1 and freedom >= 1")
    if probability < 0.5:
        return -t_quantile(1 - probability, freedom)
    if freedom > EXACT_T_UP_TO:
        return _t_expansion(normal_quantile(probability), freedom)
    central = 2 * probability - 1
    # t = sqrt(freedom) tan(theta): the bracket 0 .. pi/2 holds every t.
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        if _t_central(middle, freedom) < central:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _t_central(theta: float, freedom: int) -> float:
    """P(|t| < sqrt(freedom) tan(theta)): a finite sum of powers of the cosine."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


def _t_expansion(x: float, freedom: int) -> float:
    """Abramowitz and Stegun 26.7.5: the t quantile as a series in 1/freedom around the normal quantile x."""
    return (
        x
        + (x**3 + x) / (4 * freedom)
        + (5 * x**5 + 16 * x**3 + 3 * x) / (96 * freedom**2)
        + (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / (384 * freedom**3)
        + (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / (92160 * freedom**4)
    )


def paired_ratio(differences: Sequence[float], weights: Sequence[float], confidence: float) -> Interval:
    """Interval of sum(differences) / sum(weights) over the population that the items are a sample of.

    The estimate is a ratio of two random sums, so its standard error is that of its linearisation: with residuals
    e_i = d_i - R w_i, se = sqrt(n / (n - 1) sum(e_i^2)) / sum(w_i) (Cochran, Sampling Techniques, 3rd ed., 2.11); the
    quantile is t with n - 1 degrees of freedom. Equal weights give the ordinary paired t interval of the mean.

    Args:
        differences: One per item, e.g. nats of one model minus nats of the other.
        weights: One per item, positive, e.g. its scored tokens.
        confidence: Two-sided level, e.g. 0.95.

    Returns:
        The interval, in differences per unit of weight; one item has an infinite one.

    Raises:
        ValueError: no items, or unequal lengths.
    """
    n = len(differences)
    if not n or n != len(weights):
        raise ValueError(f"paired_ratio: {n} differences and {len(weights)} weights")
    total = math.fsum(weights)
    ratio = math.fsum(differences) / total
    if n == 1:
        return Interval(ratio, -math.inf, math.inf)
    squares = math.fsum((d - ratio * w) ** 2 for d, w in zip(differences, weights, strict=True))
    error = math.sqrt(n / (n - 1) * squares) / total
    half = t_quantile((1 + confidence) / 2, n - 1) * error
    return Interval(ratio, ratio - half, ratio + half)


def paired_proportions(gained: float, lost: float, items: float, confidence: float) -> Interval:
    """Interval of the change of a proportion between two measurements of the same items.

    The adjusted Wald interval of Bonett and Price (2012), Journal of Educational and Behavioral Statistics 37(4),
    479-488: one item is added to each discordant cell, so that the interval keeps its level with few discordant items
    and does not shrink to nothing with none. It is cut to -1 .. 1.

    Args:
        gained: Items that are right only after (fractions are for planning).
        lost: Items that were right only before.
        items: All items, at least 1.
        confidence: Two-sided level.

    Returns:
        The interval of P(right after) - P(right before). The estimate is the plain (gained - lost) / items.

    Raises:
        ValueError: no items, or more discordant items than items.
    """
    if items < 1 or gained < 0 or lost < 0 or gained + lost > items:
        raise ValueError(f"paired_proportions: {gained} gained and {lost} lost of {items} items")
    up, down = (gained + 1) / (items + 2), (lost + 1) / (items + 2)
    half = normal_quantile((1 + confidence) / 2) * math.sqrt((up + down - (up - down) ** 2) / (items + 2))
    return Interval((gained - lost) / items, max(-1.0, up - down - half), min(1.0, up - down + half))


def proportions_to_decide(gained: int, lost: int, items: int, bound: float, confidence: float) -> int | None:
    """Items at which `paired_proportions` leaves `bound` outside, if the rates stay what they are.

    Args:
        gained: Items that are right only after.
        lost: Items that were right only before.
        items: All items, at least 1.
        bound: The value that the interval must not contain.
        confidence: Two-sided level.

    Returns:
        The smallest number up to rounding, or None beyond MOST_ITEMS.
    """

    def decided(n: float) -> bool:
        interval = paired_proportions(gained / items * n, lost / items * n, n, confidence)
        return not interval.low < bound < interval.high

    low, high = items, items
    while not decided(high):
        low, high = high, high * 2
        if high > MOST_ITEMS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decided(middle) else (middle, high)
    return high


def ratio_to_decide(interval: Interval, items: int, bound: float) -> int | None:
    """Items at which an interval of `paired_ratio` leaves `bound` outside, as its width falls with 1/sqrt(items).

    Args:
        interval: From `items` items.
        items: At least 1.
        bound: The value that the interval must not contain.

    Returns:
        The number, or None if the interval is infinite, the estimate is the bound, or beyond MOST_ITEMS.
    """
    distance = abs(interval.estimate - bound)
    half = (interval.high - interval.low) / 2
    if not distance or math.isinf(half):
        return None
    needed = math.ceil(items * (half / distance) ** 2)
    return needed if needed <= MOST_ITEMS else None
