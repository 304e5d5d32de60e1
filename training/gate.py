"""The gate: per-item scores of two models on the same items -> a verdict with its reasons. Pure, and torch-free.

A measure passes when the whole confidence interval of its paired difference is on the good side, fails when it is
wholly on the bad side, and is inconclusive otherwise. All measures of all tasks must pass; requiring all of them keeps
the level of a false pass at that of one interval (an intersection-union test), so no correction is made.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.training import config
from halfbyte.training.config import GateRule, Method
from halfbyte.training.errors import USAGE, UserError
from halfbyte.training.statistics import (
    Interval,
    paired_proportions,
    paired_ratio,
    proportions_to_decide,
    ratio_to_decide,
)

PASS, FAIL, INCONCLUSIVE, NOT_APPLICABLE = "pass", "fail", "inconclusive", "not_applicable"

Scores = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]
"""{stage: {task: [fields of scoring.Score]}}"""
Summaries = Mapping[str, Mapping[str, Mapping[str, float]]]
"""{stage: {task: {metric: value}}}; a task whose summary has an accuracy has continuations, else texts."""


@dataclass(frozen=True)
class Pair:
    """One task's items as two models scored them, in the same order.

    Attributes:
        task: Task name.
        candidate, baseline: Fields of Score per item, of the model judged and of the one it is compared with.
        has_accuracy: Whether the task has a right and a wrong.
        against: What the baseline is called in reasons.
    """

    task: str
    candidate: Sequence[Mapping[str, Any]]
    baseline: Sequence[Mapping[str, Any]]
    has_accuracy: bool
    against: str


@dataclass(frozen=True)
class Measure:
    """One judged quantity of a task: its name, verdict, one readable line, and its numbers for gate.json."""

    name: str
    verdict: str
    reason: str
    numbers: dict[str, Any]


def judge(gate: config.Gate, *, method: str, stages: Scores, summaries: Summaries) -> dict[str, Any]:
    """Judge a run.

    Rule `bf16`: against the BF16 model, accuracy may fall by at most threshold_pp and perplexity grow to at most
    perplexity_ratio. Rule `better_than_ptq`: perplexity and KL to BF16 must be lower than the PTQ model's, and accuracy
    must not be significantly lower; the bf16 verdict stands beside it.

    Args:
        gate: Rule, thresholds and confidence level.
        method: ptq, qat, qad or bf16; names the stage that is judged.
        stages: Per-item scores of every stage.
        summaries: Metrics of every stage, as in evaluate.json.

    Returns:
        The content of gate.json: verdict (pass | fail | inconclusive | not_applicable), rule, candidate, reasons (one
        line per task and measure), tasks {task: numbers}, against_bf16 {verdict, reasons, tasks}. Infinite numbers are
        None.

    Raises:
        UserError: a stage or task has no items, stages were scored on different items, a score is not a finite
            number, or the rule does not apply to the method. Never a pass for want of data.
    """
    if method == Method.bf16:
        reason = "method bf16 quantizes nothing: there is no FP4 model to judge"
        head = {"verdict": NOT_APPLICABLE, "rule": str(gate.rule), "candidate": "bf16", "reasons": [reason]}
        return head | {"tasks": {}, "against_bf16": None}
    against_bf16 = _collect(
        [_against_bf16(gate, pair) for pair in _pairs(stages, summaries, candidate=method, baseline="bf16")]
    )
    chosen = against_bf16
    if gate.rule == GateRule.better_than_ptq:
        if method == Method.ptq:
            raise UserError(
                "gate.rule = better_than_ptq with method = ptq compares a model with itself: use bf16", USAGE
            )
        chosen = _collect(
            [_better_than_ptq(gate, pair) for pair in _pairs(stages, summaries, candidate=method, baseline="ptq")]
        )
    head = {"verdict": chosen["verdict"], "rule": str(gate.rule), "candidate": str(method)}
    return head | {"reasons": chosen["reasons"], "tasks": chosen["tasks"], "against_bf16": against_bf16}


# Rules ------------------------------------------------------------------------------------------------------------


def _against_bf16(gate: config.Gate, pair: Pair) -> tuple[Pair, list[Measure]]:
    measures = []
    if pair.has_accuracy:
        measures.append(_accuracy(pair, gate, threshold_pp=gate.threshold_pp))
    return pair, [*measures, _perplexity(pair, gate, limit=gate.perplexity_ratio)]


def _better_than_ptq(gate: config.Gate, pair: Pair) -> tuple[Pair, list[Measure]]:
    measures = []
    if pair.has_accuracy:
        measures.append(_accuracy(pair, gate, threshold_pp=None))
    return pair, [*measures, _perplexity(pair, gate, limit=None), _kl(pair, gate)]


def _collect(tasks: list[tuple[Pair, list[Measure]]]) -> dict[str, Any]:
    result: dict[str, Any] = {"verdict": PASS, "reasons": [], "tasks": {}}
    for pair, measures in tasks:
        numbers: dict[str, Any] = {
            "n": len(pair.candidate),
            "verdict": _worst([measure.verdict for measure in measures]),
            "measures": {measure.name: measure.verdict for measure in measures},
        }
        for measure in measures:
            numbers |= measure.numbers
        result["tasks"][pair.task] = numbers
        result["reasons"] += [measure.reason for measure in measures]
    result["verdict"] = _worst([task["verdict"] for task in result["tasks"].values()])
    return result


def _worst(verdicts: list[str]) -> str:
    return next(verdict for verdict in (FAIL, INCONCLUSIVE, PASS) if verdict in verdicts)


# Measures ---------------------------------------------------------------------------------------------------------


def _accuracy(pair: Pair, gate: config.Gate, *, threshold_pp: float | None) -> Measure:
    """Change of accuracy; without a threshold it only fails when it is significantly lower."""
    gained = sum(a["correct"] and not b["correct"] for a, b in zip(pair.candidate, pair.baseline, strict=True))
    lost = sum(b["correct"] and not a["correct"] for a, b in zip(pair.candidate, pair.baseline, strict=True))
    n = len(pair.candidate)
    interval = _scaled(paired_proportions(gained, lost, n, gate.confidence), 100.0)
    numbers: dict[str, Any] = {
        "delta_pp": interval.estimate,
        "interval_pp": [interval.low, interval.high],
        "threshold_pp": threshold_pp,
        "gained": gained,
        "lost": lost,
    }
    shown = (
        f"{pair.task}: accuracy {interval.estimate:+.2f} pp [{interval.low:+.2f}, {interval.high:+.2f}] against "
        f"{pair.against} ({gained} items gained, {lost} lost of {n})"
    )
    if threshold_pp is None:
        verdict = FAIL if interval.high < 0 else PASS
        end = "significantly lower" if verdict == FAIL else "not significantly lower"
        return Measure("accuracy", verdict, f"{shown}: {end}", numbers)
    verdict = PASS if interval.low >= -threshold_pp else FAIL if interval.high < -threshold_pp else INCONCLUSIVE
    shown += f", tolerated -{threshold_pp:g} pp: {verdict}"
    if verdict == INCONCLUSIVE:
        needed = proportions_to_decide(gained, lost, n, -threshold_pp / 100, gate.confidence)
        numbers["accuracy_items_to_decide"] = needed
        shown += _advice(needed)
    return Measure("accuracy", verdict, shown, numbers)


def _perplexity(pair: Pair, gate: config.Gate, *, limit: float | None) -> Measure:
    """Ratio of perplexities, per item for continuations and per token for texts; without a limit it must be below 1."""
    rows = list(zip(pair.candidate, pair.baseline, strict=True))
    differences = [b["loglikelihood"] - a["loglikelihood"] for a, b in rows]
    weights = [1.0] * len(rows) if pair.has_accuracy else [float(a["tokens"]) for a, _ in rows]
    nats = paired_ratio(differences, weights, gate.confidence)
    ratio = Interval(*(_exp(value) for value in (nats.estimate, nats.low, nats.high)))
    numbers: dict[str, Any] = {
        "perplexity_ratio": _finite(ratio.estimate),
        "perplexity_interval": _ends(ratio),
        "perplexity_limit": 1.0 if limit is None else limit,
    }
    bound = 0.0 if limit is None else math.log(limit)
    verdict = _below(nats, bound, inclusive=limit is not None)
    shown = (
        f"{pair.task}: perplexity {ratio.estimate:.4f} x {pair.against}'s [{ratio.low:.4f}, {ratio.high:.4f}], "
        f"{'must be lower' if limit is None else f'tolerated {limit:g}'}: {verdict}"
    )
    if verdict == INCONCLUSIVE:
        needed = ratio_to_decide(nats, len(rows), bound)
        numbers["perplexity_items_to_decide"] = needed
        shown += _advice(needed)
    return Measure("perplexity", verdict, shown, numbers)


def _kl(pair: Pair, gate: config.Gate) -> Measure:
    """Difference of the mean KL to BF16; must be below 0."""
    values = [(a["kl"], b["kl"]) for a, b in zip(pair.candidate, pair.baseline, strict=True)]
    if any(a is None or b is None for a, b in values):
        raise UserError(
            f"gate: task {pair.task} has no KL to BF16, which gate.rule = better_than_ptq compares; "
            "set evaluate.kl_positions above 0 and evaluate again"
        )
    interval = paired_ratio([a - b for a, b in values], [1.0] * len(values), gate.confidence)
    verdict = _below(interval, 0.0, inclusive=False)
    mean, before = (math.fsum(column) / len(values) for column in zip(*values, strict=True))
    numbers: dict[str, Any] = {
        "kl": mean,
        "kl_baseline": before,
        "kl_delta": interval.estimate,
        "kl_interval": _ends(interval),
    }
    shown = (
        f"{pair.task}: KL to BF16 {mean:.4f} nats, {pair.against}'s {before:.4f}, change {interval.estimate:+.4f} "
        f"[{interval.low:+.4f}, {interval.high:+.4f}], must be lower: {verdict}"
    )
    if verdict == INCONCLUSIVE:
        needed = ratio_to_decide(interval, len(values), 0.0)
        numbers["kl_items_to_decide"] = needed
        shown += _advice(needed)
    return Measure("kl", verdict, shown, numbers)


def _below(interval: Interval, bound: float, *, inclusive: bool) -> str:
    if interval.high < bound or (inclusive and interval.high == bound):
        return PASS
    return FAIL if interval.low > bound else INCONCLUSIVE


def _advice(needed: int | None) -> str:
    return f"; about {needed:,} items would decide" if needed else "; no number of items of this kind would decide"


def _scaled(interval: Interval, factor: float) -> Interval:
    return Interval(interval.estimate * factor, interval.low * factor, interval.high * factor)


def _ends(interval: Interval) -> list[float | None]:
    return [_finite(interval.low), _finite(interval.high)]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no infinity


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


# Input ------------------------------------------------------------------------------------------------------------


def _pairs(stages: Scores, summaries: Summaries, *, candidate: str, baseline: str) -> list[Pair]:
    """Line up two stages' items, refusing whatever would make the comparison unfair or empty."""
    for stage in (candidate, baseline):
        if not stages.get(stage):
            there = ", ".join(sorted(stages)) or "none"
            raise UserError(f"gate: stage {stage} has no scores (there: {there}); run halfbyte evaluate RUN_DIR")
    if set(stages[candidate]) != set(stages[baseline]):
        raise UserError(
            f"gate: {candidate} was scored on {sorted(stages[candidate])}, {baseline} on {sorted(stages[baseline])}; "
            "evaluate both stages with the same evaluate.tasks"
        )
    pairs = []
    for task in stages[candidate]:
        rows = {stage: _checked(stages, summaries, stage, task) for stage in (candidate, baseline)}
        if [(r["item"], r["tokens"]) for r in rows[candidate]] != [(r["item"], r["tokens"]) for r in rows[baseline]]:
            raise UserError(
                f"gate: task {task}: {candidate} and {baseline} were scored on different items "
                f"({len(rows[candidate])} and {len(rows[baseline])}); evaluate both stages again"
            )
        has_accuracy = "accuracy" in summaries[candidate][task]
        pairs.append(Pair(task, rows[candidate], rows[baseline], has_accuracy, baseline.upper()))
    return pairs


def _checked(stages: Scores, summaries: Summaries, stage: str, task: str) -> list[Mapping[str, Any]]:
    """A stage's rows of a task by item."""
    rows = stages[stage][task]
    if not rows:
        raise UserError(f"gate: task {task} of stage {stage} has no items; a gate needs data")
    for row in rows:
        missing = {"item", "tokens", "loglikelihood", "correct", "kl"} - row.keys()
        if missing:
            raise UserError(f"gate: a score of {stage}.{task} lacks {', '.join(sorted(missing))}; evaluate again")
        if not math.isfinite(row["loglikelihood"]) or not math.isfinite(row["kl"] or 0.0) or row["tokens"] < 1:
            raise UserError(f"gate: item {row['item']} of {stage}.{task} is not a finite score; evaluate again")
    summary = summaries.get(stage, {}).get(task)
    if summary is None or summary.get("n") != len(rows):
        raise UserError(f"gate: evaluate.json does not match the {len(rows)} scores of {stage}.{task}; evaluate again")
    ordered = sorted(rows, key=lambda row: row["item"])
    if len({row["item"] for row in rows}) < len(rows):
        raise UserError(f"gate: an item of {stage}.{task} was scored twice; evaluate again")
    return ordered
