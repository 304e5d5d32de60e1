"""Two models' scores of the same items, lined up for the gate. Pure, and torch-free.

Whatever would make a comparison unfair or empty is an error here: other items, items scored twice or not at all,
numbers that are none. Never a pass for want of data.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.training.config import TaskKind
from halfbyte.training.errors import UserError
from halfbyte.training.metrics import BLEU_ORDER, METRICS, Statistic, aggregate

type Row = Mapping[str, Any]
"""Fields of scoring.Score of one item."""

FIELDS = ("item", "content", "tokens", "bytes", "loglikelihood", "correct", "kl", "agreement")
"""What every score must have; `metrics` as well for lm_eval tasks."""


@dataclass(frozen=True)
class Stage:
    """What one model made of every task.

    Attributes:
        name: What errors call it: the stage, with the run folder if it is another run's.
        rows: Task name -> its items.
        summary: Task name -> its entry of evaluate.json.
    """

    name: str
    rows: Mapping[str, Sequence[Row]]
    summary: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Metric:
    """One metric of a task as two models scored it, item by item.

    Attributes:
        statistic: Decides the interval. A `proportion` whose items are not all 0 or 1 (CoQA's exact match is a mean
            over annotators) becomes a `mean`.
        candidate, baseline: One value per item: 0 .. 1, ten counts (bleu), or a log-likelihood in nats (perplexity).
        weights: What perplexity is per: 1 per item, or the item's tokens.
    """

    statistic: Statistic
    candidate: list[Any]
    baseline: list[Any]
    weights: list[float]


@dataclass(frozen=True)
class Pair:
    """One task's items as two models scored them, in the same order.

    Attributes:
        task: Task name.
        items: How many.
        metrics: What is judged: accuracy and perplexity, or an lm_eval task's own metrics.
        kl: KL to BF16 of the candidate and of the baseline per item, nats; None for a model that has none.
        agreement: Top-1 agreement of the candidate with BF16 per item, or None.
        against: What reasons call the baseline.
    """

    task: str
    items: int
    metrics: dict[str, Metric]
    kl: tuple[list[float] | None, list[float] | None]
    agreement: list[float] | None
    against: str


def pair_up(candidate: Stage, baseline: Stage, kinds: Mapping[str, TaskKind], against: str) -> list[Pair]:
    """Line up two models' items.

    Args:
        candidate: The model judged.
        baseline: The model it is compared with.
        kinds: The recipe's tasks: all of them are judged, and no other.
        against: What reasons call the baseline.

    Returns:
        One Pair per task, in the order of `kinds`.

    Raises:
        UserError: tasks, items or metrics differ or are missing, an item was scored twice, or a score is not a finite
            number of its range.
    """
    if set(candidate.rows) != set(baseline.rows):
        raise UserError(
            f"gate: {candidate.name} was scored on {sorted(candidate.rows)}, {baseline.name} on "
            f"{sorted(baseline.rows)}; evaluate both with the same evaluate.tasks"
        )
    if set(candidate.rows) != set(kinds) or not kinds:
        raise UserError(
            f"gate: {candidate.name} was scored on {sorted(candidate.rows)}, evaluate.tasks are {sorted(kinds)}; "
            "evaluate again (halfbyte evaluate RUN_DIR)"
        )
    return [_pair(candidate, baseline, task, kind, against) for task, kind in kinds.items()]


def _pair(candidate: Stage, baseline: Stage, task: str, kind: TaskKind, against: str) -> Pair:
    ours, theirs = (_checked(stage, task, kind) for stage in (candidate, baseline))
    keys = [[(row["item"], row["content"], row["tokens"], row["bytes"]) for row in rows] for rows in (ours, theirs)]
    if keys[0] != keys[1]:
        first = [f", first item {min(one[0], other[0])}" for one, other in zip(*keys, strict=False) if one != other][:1]
        raise UserError(
            f"gate: task {task}: {candidate.name} and {baseline.name} were scored on different items "
            f"({len(ours)} and {len(theirs)}{''.join(first)}); evaluate both again"
        )
    values = [_metrics(rows, kind) for rows in (ours, theirs)]
    for stage, column, rows in zip((candidate, baseline), values, (ours, theirs), strict=True):
        _check_summary(stage, task, _summed(column, kind, rows))
    if set(values[0]) != set(values[1]):
        raise UserError(
            f"gate: task {task}: {candidate.name} has the metrics {sorted(values[0])}, {baseline.name} "
            f"{sorted(values[1])}; evaluate both again"
        )
    weights = [float(row["tokens"]) if kind == TaskKind.text else 1.0 for row in ours]
    metrics = {}
    for name in values[0]:
        statistic, columns = METRICS[name], [column[name] for column in values]
        if statistic is Statistic.proportion and any(value not in (0, 1) for column in columns for value in column):
            statistic = Statistic.mean
        metrics[name] = Metric(statistic, columns[0], columns[1], weights)
    kl = (_column(ours, candidate, task, "kl"), _column(theirs, baseline, task, "kl"))
    agreement = _column(ours, candidate, task, "agreement")
    return Pair(task, len(ours), metrics, kl, agreement, against)


def _metrics(rows: Sequence[Row], kind: TaskKind) -> dict[str, list[Any]]:
    """Metric -> one value per item; the rows were checked."""
    if kind == TaskKind.lm_eval:
        return {name: [row["metrics"][name] for row in rows] for name in rows[0]["metrics"]}
    perplexity = {"perplexity": [row["loglikelihood"] for row in rows]}
    if kind == TaskKind.text:
        return perplexity
    return {"accuracy": [float(row["correct"]) for row in rows]} | perplexity


def _column(rows: Sequence[Row], stage: Stage, task: str, field: str) -> list[float] | None:
    values = [row[field] for row in rows if row[field] is not None]
    if not values:
        return None
    if len(values) < len(rows):
        raise UserError(
            f"gate: only {len(values)} of {len(rows)} items of {stage.name}.{task} have {field}; evaluate again"
        )
    return values


def _summed(values: dict[str, list[Any]], kind: TaskKind, rows: Sequence[Row]) -> dict[str, float]:
    """What evaluate.json should say of these rows."""
    found = {name: aggregate(name, column) for name, column in values.items()}
    if kind == TaskKind.text:
        mean = math.fsum(values["perplexity"]) / sum(row["tokens"] for row in rows)
        found["perplexity"] = aggregate("perplexity", [mean])
    for name in ("kl", "agreement"):
        column = [row[name] for row in rows if row[name] is not None]
        if column:
            found[name] = math.fsum(column) / len(column)
    return found


def _check_summary(stage: Stage, task: str, found: Mapping[str, float]) -> None:
    """The table that people see and the scores that are judged are of one evaluation."""
    said = stage.summary[task]
    for name, value in found.items():
        if name in said and not (_number(said[name]) and math.isclose(said[name], value, rel_tol=1e-9, abs_tol=1e-12)):
            raise UserError(
                f"gate: evaluate.json says {name} = {said[name]!r} for {stage.name}.{task}, its items {value!r}; "
                "evaluate again"
            )


# Checks -----------------------------------------------------------------------------------------------------------


def _checked(stage: Stage, task: str, kind: TaskKind) -> list[Row]:
    """A stage's rows of a task, by item."""
    rows, where = stage.rows[task], f"{stage.name}.{task}"
    if not rows:
        raise UserError(f"gate: task {task} of stage {stage.name} has no items; a gate needs data")
    for row in rows:
        missing = [field for field in FIELDS if field not in row]
        if missing:
            raise UserError(f"gate: a score of {where} lacks {', '.join(missing)}; evaluate again")
        problem = _problem(row, kind)
        if problem:
            raise UserError(f"gate: item {row['item']} of {where}: {problem}; evaluate again")
    if kind == TaskKind.lm_eval and any(set(row["metrics"]) != set(rows[0]["metrics"]) for row in rows):
        raise UserError(f"gate: not every item of {where} has the metrics {sorted(rows[0]['metrics'])}; evaluate again")
    summary = stage.summary.get(task)
    if summary is None or summary.get("n") != len(rows):
        raise UserError(f"gate: evaluate.json does not match the {len(rows)} scores of {where}; evaluate again")
    if len({row["item"] for row in rows}) < len(rows):
        raise UserError(f"gate: an item of {where} was scored twice; evaluate again")
    return sorted(rows, key=lambda row: row["item"])


def _problem(row: Row, kind: TaskKind) -> str | None:
    """What is wrong with one score."""
    if not isinstance(row["item"], int):
        return "its number is not a whole number"
    found = None
    if not isinstance(row["content"], str):
        found = "its content is no text"
    elif row["kl"] is not None and not _number(row["kl"]):
        found = f"kl = {row['kl']!r} is not a finite score"
    elif row["agreement"] is not None and not _number(row["agreement"], 0, 1):
        found = f"agreement = {row['agreement']!r} is not a score in 0 .. 1"
    elif kind == TaskKind.lm_eval:
        found = _metrics_problem(row.get("metrics"))
    elif not _number(row["loglikelihood"]):
        found = f"loglikelihood = {row['loglikelihood']!r} is not a finite score"
    elif not isinstance(row["tokens"], int) or row["tokens"] < 1:
        found = f"tokens = {row['tokens']!r} is not a number of tokens"
    elif kind == TaskKind.continuation and not isinstance(row["correct"], bool):
        found = f"correct = {row['correct']!r} is neither true nor false"
    return found


def _metrics_problem(metrics: Any) -> str | None:
    if not isinstance(metrics, Mapping) or not metrics:
        return "it has no metrics, which tasks of kind lm_eval are judged by"
    for name, value in metrics.items():
        if name not in METRICS:
            return f"metric {name} is not known; use one of {', '.join(METRICS)}"
        statistic = METRICS[name]
        if statistic is Statistic.bleu:
            counts = 2 + 2 * BLEU_ORDER
            if not isinstance(value, list) or len(value) != counts or not all(_number(v, 0) for v in value):
                return f"{name} = {value!r} is not {counts} counts"
            if any(
                match > total for match, total in zip(value[2 : 2 + BLEU_ORDER], value[2 + BLEU_ORDER :], strict=True)
            ):
                return f"{name} = {value!r} has more matches than n-grams"
        elif statistic is Statistic.perplexity:
            if not _number(value):
                return f"{name} = {value!r} is not a finite score"
        elif not _number(value, 0, 1) and not isinstance(value, bool):
            return f"{name} = {value!r} is not a score in 0 .. 1"
    return None


def _number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and math.isfinite(value) and low <= value <= high
