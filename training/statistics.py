"""Paired intervals for the gate, in plain Python, with the source of every formula."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

EXACT_T_UP_TO = 300
"""Degrees of freedom beyond which the expansion of the t quantile is better than 1e-9 (the closed form costs more)."""
MOST_ITEMS = 10**9
"""The two `..._to_decide` functions look no further."""
LEAST_SPREAD = 0.1
"""Nats per unit of weight by which one item may always have come out otherwise: see `skewed_ratio`."""


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval around an estimate, all in the same unit; the ends may be infinite."""

    estimate: float
    low: float
    high: float


def normal_quantile(probability: float) -> float:
    """The value below which a standard normal variable lies with this probability (0 < probability < 1)."""
    return NormalDist().inv_cdf(probability)


@lru_cache(maxsize=256)
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


def skewed_ratio(differences: Sequence[float], weights: Sequence[float], confidence: float) -> Interval:
    """As `paired_ratio`, for what the gate lets pass: honest also when few items carry the damage, or none does.

    Damage is skewed: most items lose little and some lose much, and the t interval of such data lies too low (at the
    threshold it passed 6 to 10 % of candidates instead of 2.5 %). So each end is the outer one of the t interval and of
    Hall's skewness-corrected interval (Hall 1992, Journal of the Royal Statistical Society B 54(1), 221-228: the cubic
    transformation of the t statistic, inverted), with the residuals' skewness and the t quantile. Without skewness the
    two are equal.

    Items that all differ by the same amount show no spread, which with few items is luck. The standard error is
    therefore at least LEAST_SPREAD / n: as if one item differed from the others by LEAST_SPREAD.

    Args:
        differences: One per item, nats.
        weights: One per item, positive, e.g. its scored tokens.
        confidence: Two-sided level.

    Returns:
        The interval, in nats per unit of weight; one item has an infinite one.

    Raises:
        ValueError: no items, or unequal lengths.
    """
    plain = paired_ratio(differences, weights, confidence)
    n = len(differences)
    if n == 1:
        return plain
    quantile = t_quantile((1 + confidence) / 2, n - 1)
    error = max((plain.high - plain.estimate) / quantile, LEAST_SPREAD / n)
    mean_weight = math.fsum(weights) / n
    residuals = [(d - plain.estimate * w) / mean_weight for d, w in zip(differences, weights, strict=True)]
    skewness = math.fsum(e**3 for e in residuals) / n / (error * math.sqrt(n - 1)) ** 3
    up, down = -_hall(-quantile, skewness, n), _hall(quantile, skewness, n)
    return Interval(
        plain.estimate,
        plain.estimate - error * max(quantile, down),
        plain.estimate + error * max(quantile, up),
    )


def _hall(quantile: float, skewness: float, n: int) -> float:
    """The t statistic, in standard errors, whose skewness-corrected value is `quantile`."""
    if abs(skewness) < 1e-6:  # the limit; the formula divides by the skewness
        return quantile
    inner = 1 + skewness * (quantile / math.sqrt(n) - skewness / (6 * n))
    return 3 * math.sqrt(n) / skewness * (math.cbrt(inner) - 1)


def fictitious(confidence: float) -> float:
    """Items to add at either end of a bounded scale before an interval of its mean is taken: z^2 / 2.

    The choice of Agresti and Coull (1998), The American Statistician 52(2), 119-126, for a proportion. It keeps the
    interval from shrinking to nothing when all items agree: n agreeing items then leave room for a share of about
    z^2 / n that does not, at any level.
    """
    return normal_quantile((1 + confidence) / 2) ** 2 / 2


def paired_mean(total: float, squares: float, items: float, confidence: float) -> Interval:
    """Interval of the mean of paired differences that lie in -1 .. 1.

    An adjusted Wald interval: `fictitious` items with the difference +1 and as many with -1 are added, which with
    differences of -1, 0, 1 is the interval of Bonett and Price (2012), Journal of Educational and Behavioral Statistics
    37(4), 479-488, except that they add one item each way at every level. One is too few where losses are rare and at
    the levels of a corrected interval: with losses only, 0.2 pp and 3,000 items, a candidate exactly at the threshold
    passed in 6.5 % of simulated runs at 95 %, and in 1.7 instead of 0.25 % at 99.5 %; with z^2 / 2 in 1.9 and 0.0 %.

    Args:
        total: Sum of the differences.
        squares: Sum of their squares.
        items: All items, at least 1 (fractions are for planning).
        confidence: Two-sided level.

    Returns:
        The interval, cut to -1 .. 1; the estimate is the plain total / items.
    """
    extra = fictitious(confidence)
    n = items + 2 * extra
    middle = total / n
    half = normal_quantile((1 + confidence) / 2) * math.sqrt(((squares + 2 * extra) / n - middle**2) / n)
    return Interval(total / items, max(-1.0, middle - half), min(1.0, middle + half))


def shares_mean(values: Sequence[float], confidence: float) -> Interval:
    """Interval of the mean of values in 0 .. 1 (not paired): Agresti and Coull's, see `fictitious`.

    Args:
        values: One per item.
        confidence: Two-sided level.

    Returns:
        The interval, cut to 0 .. 1; the estimate is the plain mean.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("shares_mean: no values")
    centred = [2 * value - 1 for value in values]  # -1 .. 1, as paired_mean wants them
    wide = paired_mean(math.fsum(centred), math.fsum(value**2 for value in centred), len(values), confidence)
    return Interval(math.fsum(values) / len(values), (wide.low + 1) / 2, (wide.high + 1) / 2)


def paired_proportions(gained: float, lost: float, items: float, confidence: float) -> Interval:
    """Interval of the change of a proportion between two measurements of the same items: see `paired_mean`.

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
    return paired_mean(gained - lost, gained + lost, items, confidence)


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact two-sided p-value: the sign test on the discordant items (McNemar 1947, Psychometrika 12).

    Args:
        gained: Items that are right only after.
        lost: Items that were right only before.

    Returns:
        Twice the smaller binomial tail at 1/2, at most 1; 1 without a discordant item.
    """
    n, k = gained + lost, min(gained, lost)
    # Logarithms: the binomials of thousands of items have thousands of digits.
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in logs))


def mean_to_decide(total: float, squares: float, items: int, bound: float, confidence: float) -> int | None:
    """Items at which `paired_mean` leaves `bound` outside, if the items to come are like those there are.

    Args:
        total: Sum of the differences.
        squares: Sum of their squares.
        items: All items, at least 1.
        bound: The value that the interval must not contain.
        confidence: Two-sided level.

    Returns:
        The smallest number up to rounding, or None beyond MOST_ITEMS.
    """

    def decided(n: float) -> bool:
        interval = paired_mean(total / items * n, squares / items * n, n, confidence)
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


def interval_to_decide(interval: Interval, items: int, bound: float) -> int | None:
    """Items at which an interval leaves `bound` outside, as its width falls with 1/sqrt(items).

    Args:
        interval: From `items` items.
        items: At least 1.
        bound: The value that the interval must not contain.

    Returns:
        The number, or None if the interval is infinite, the estimate is the bound, or beyond MOST_ITEMS.
    """
    distance = abs(interval.estimate - bound)
    side = interval.estimate - interval.low if bound < interval.estimate else interval.high - interval.estimate
    if not distance or math.isinf(side):
        return None
    needed = max(items, math.ceil(items * (side / distance) ** 2))
    return needed if needed <= MOST_ITEMS else None
