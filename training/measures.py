"""What the gate measures: one quantity of one task -> its interval, its verdict, one readable line. Pure, torch-free.

A measure passes when its whole interval is on the good side of the bound, fails when it is wholly on the bad side, and
is inconclusive otherwise, with the number of items that would decide.
"""

import math
from dataclasses import dataclass
from typing import Any

from halfbyte.training import metrics
from halfbyte.training.bootstrap import paired_bleu_bootstrap, paired_mean_bootstrap
from halfbyte.training.metrics import Statistic
from halfbyte.training.pairing import Metric, Pair
from halfbyte.training.statistics import (
    Interval,
    interval_to_decide,
    mcnemar,
    mean_to_decide,
    paired_proportions,
    shares_mean,
    skewed_ratio,
)

PASS, FAIL, INCONCLUSIVE = "pass", "fail", "inconclusive"


@dataclass(frozen=True)
class Measure:
    """One judged quantity of a task.

    Attributes:
        name: The metric's, or kl, kl_bound, agreement_bound.
        verdict: pass | fail | inconclusive.
        reason: One line.
        numbers: For gate.json: statistic, unit, candidate and baseline (as in evaluate.json), delta, interval and bound
            (in the unit), items_to_decide if inconclusive, and what is special to the statistic.
    """

    name: str
    verdict: str
    reason: str
    numbers: dict[str, Any]


def difference(pair: Pair, name: str, threshold_pp: float | None, confidence: float) -> Measure:
    """Change of a score of which more is better, in percentage points.

    Args:
        pair: The task's items.
        name: One of pair.metrics, of statistic proportion, mean or bleu.
        threshold_pp: Tolerated loss; None only fails what is significantly lower.
        confidence: Level of the interval.
    """
    metric = pair.metrics[name]
    interval, special, shown = _paired(metric, pair, confidence)
    percent = Interval(*(100 * value for value in (interval.estimate, interval.low, interval.high)))
    numbers = _numbers(pair, name, percent, unit="pp", bound=None if threshold_pp is None else -threshold_pp)
    numbers |= special
    line = (
        f"{pair.task}: {name} {percent.estimate:+.2f} pp [{percent.low:+.2f}, {percent.high:+.2f}] against "
        f"{pair.against} ({shown})"
    )
    if threshold_pp is None:
        verdict = FAIL if interval.high < 0 else PASS
        end = "significantly lower" if verdict == FAIL else "not significantly lower"
        return Measure(name, verdict, f"{line}: {end}", numbers)
    bound = -threshold_pp / 100
    verdict = _above(interval, bound, inclusive=True)
    needed = None
    if verdict == INCONCLUSIVE:
        needed = _to_decide(metric, interval, bound, confidence)
    return _measure(name, verdict, f"{line}, tolerated -{threshold_pp:g} pp", numbers, needed)


def _paired(metric: Metric, pair: Pair, confidence: float) -> tuple[Interval, dict[str, Any], str]:
    """The interval of a difference in 0 .. 1, its special numbers, and what the reason says of the items."""
    if metric.statistic is Statistic.proportion:
        gained, lost = _discordant(metric)
        interval = paired_proportions(gained, lost, pair.items, confidence)
        special = {"gained": gained, "lost": lost, "mcnemar_p": mcnemar(gained, lost)}
        return interval, special, f"{gained} items gained, {lost} lost of {pair.items}"
    if metric.statistic is Statistic.bleu:
        return paired_bleu_bootstrap(metric.candidate, metric.baseline, confidence), {}, f"{pair.items} items"
    changed = sum(a != b for a, b in zip(metric.candidate, metric.baseline, strict=True))
    interval = paired_mean_bootstrap(metric.candidate, metric.baseline, confidence)
    return interval, {"changed": changed}, f"{changed} items changed of {pair.items}"


def _discordant(metric: Metric) -> tuple[int, int]:
    pairs = list(zip(metric.candidate, metric.baseline, strict=True))
    return sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)


def _to_decide(metric: Metric, interval: Interval, bound: float, confidence: float) -> int | None:
    if metric.statistic is Statistic.bleu:
        return interval_to_decide(interval, len(metric.candidate), bound)
    changes = [a - b for a, b in zip(metric.candidate, metric.baseline, strict=True)]
    squares = math.fsum(change**2 for change in changes)
    return mean_to_decide(math.fsum(changes), squares, len(changes), bound, confidence)


def perplexity(pair: Pair, name: str, limit: float | None, confidence: float) -> Measure:
    """Ratio of perplexities.

    Args:
        pair: The task's items.
        name: One of pair.metrics, of statistic perplexity.
        limit: Tolerated ratio; None asks for less than 1.
        confidence: Level of the interval.
    """
    metric = pair.metrics[name]
    differences = [b - a for a, b in zip(metric.candidate, metric.baseline, strict=True)]
    nats = skewed_ratio(differences, metric.weights, confidence)
    ratio = Interval(*(_exp(value) for value in (nats.estimate, nats.low, nats.high)))
    numbers = _numbers(pair, name, ratio, unit="ratio", bound=1.0 if limit is None else limit)
    bound = 0.0 if limit is None else math.log(limit)
    verdict = _below(nats, bound, inclusive=limit is not None)
    line = (
        f"{pair.task}: {name} {ratio.estimate:.4f} x {pair.against}'s [{ratio.low:.4f}, {ratio.high:.4f}], "
        f"{'must be lower' if limit is None else f'tolerated {limit:g}'}"
    )
    needed = interval_to_decide(nats, pair.items, bound) if verdict == INCONCLUSIVE else None
    return _measure(name, verdict, line, numbers, needed)


def kl_change(pair: Pair, confidence: float) -> Measure:
    """Change of the mean KL to BF16 between two models that both have one; must be below 0."""
    ours, theirs = (values or [] for values in pair.kl)
    interval = skewed_ratio([a - b for a, b in zip(ours, theirs, strict=True)], [1.0] * pair.items, confidence)
    verdict = _below(interval, 0.0, inclusive=False)
    mean, before = (math.fsum(values) / pair.items for values in (ours, theirs))
    line = (
        f"{pair.task}: KL to BF16 {mean:.4f} nats, {pair.against}'s {before:.4f}, change "
        f"{interval.estimate:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}], must be lower"
    )
    numbers = _entry("kl", "nats", mean, before, interval, 0.0)
    needed = interval_to_decide(interval, pair.items, 0.0) if verdict == INCONCLUSIVE else None
    return _measure("kl", verdict, line, numbers, needed)


def kl_bound(pair: Pair, bound: float, confidence: float) -> Measure:
    """The candidate's mean KL to BF16, which must lie below a bound in nats per token."""
    interval = skewed_ratio(pair.kl[0] or [], [1.0] * pair.items, confidence)
    interval = Interval(interval.estimate, max(0.0, interval.low), interval.high)
    verdict = _below(interval, bound, inclusive=True)
    line = (
        f"{pair.task}: KL to BF16 {interval.estimate:.4f} nats [{interval.low:.4f}, {interval.high:.4f}], "
        f"tolerated {bound:g}"
    )
    needed = interval_to_decide(interval, pair.items, bound) if verdict == INCONCLUSIVE else None
    return _measure("kl_bound", verdict, line, _entry("kl", "nats", interval.estimate, None, interval, bound), needed)


def agreement_bound(pair: Pair, bound: float, confidence: float) -> Measure:
    """The candidate's mean top-1 agreement with BF16, 0 .. 1, which must lie above a bound."""
    interval = shares_mean(pair.agreement or [], confidence)
    verdict = _above(interval, bound, inclusive=True)
    line = (
        f"{pair.task}: top-1 agreement {100 * interval.estimate:.2f} % [{100 * interval.low:.2f}, "
        f"{100 * interval.high:.2f}], tolerated {100 * bound:g} %"
    )
    numbers = _entry("agreement", "share", interval.estimate, None, interval, bound)
    needed = interval_to_decide(interval, pair.items, bound) if verdict == INCONCLUSIVE else None
    return _measure("agreement_bound", verdict, line, numbers, needed)


# Verdicts and numbers ---------------------------------------------------------------------------------------------


def _below(interval: Interval, bound: float, *, inclusive: bool) -> str:
    if interval.high < bound or (inclusive and interval.high == bound):
        return PASS
    return FAIL if interval.low > bound else INCONCLUSIVE


def _above(interval: Interval, bound: float, *, inclusive: bool) -> str:
    return _below(Interval(-interval.estimate, -interval.high, -interval.low), -bound, inclusive=inclusive)


def _measure(name: str, verdict: str, line: str, numbers: dict[str, Any], needed: int | None) -> Measure:
    if verdict == INCONCLUSIVE:
        numbers["items_to_decide"] = needed
        advice = f"about {needed:,} items would decide" if needed else "no number of items of this kind would decide"
        return Measure(name, verdict, f"{line}: {verdict}; {advice}", numbers)
    return Measure(name, verdict, f"{line}: {verdict}", numbers)


def _numbers(pair: Pair, name: str, interval: Interval, *, unit: str, bound: float | None) -> dict[str, Any]:
    metric = pair.metrics[name]
    candidate, baseline = (_score(name, metric, values) for values in (metric.candidate, metric.baseline))
    return _entry(str(metric.statistic), unit, candidate, baseline, interval, bound)


def _score(name: str, metric: Metric, values: list[Any]) -> float:
    if metric.statistic is Statistic.perplexity:
        return _exp(-math.fsum(values) / math.fsum(metric.weights))
    return metrics.aggregate(name, values)


def _entry(
    statistic: str, unit: str, candidate: float, baseline: float | None, interval: Interval, bound: float | None
) -> dict[str, Any]:
    return {
        "statistic": statistic,
        "unit": unit,
        "candidate": _finite(candidate),
        "baseline": None if baseline is None else _finite(baseline),
        "delta": _finite(interval.estimate),
        "interval": [_finite(interval.low), _finite(interval.high)],
        "bound": bound,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no infinity


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
