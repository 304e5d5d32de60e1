"""The gate: per-item scores of two models on the same items -> a verdict with its reasons. Pure, and torch-free.

`pairing` lines the items up, `measures` judges each quantity by its interval, and here they become one verdict: all
measures of all tasks must pass. Several intervals in one verdict are corrected (docs/decisions.md says why).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from halfbyte.training import config, measures
from halfbyte.training.config import Correction, GateRule, Inconclusive, Judges, Method, TaskKind
from halfbyte.training.errors import GATE_FAILED, GATE_INCONCLUSIVE, OK, USAGE, UserError
from halfbyte.training.measures import FAIL, INCONCLUSIVE, PASS, Measure
from halfbyte.training.metrics import Statistic
from halfbyte.training.pairing import Pair, Stage, pair_up

NOT_APPLICABLE = "not_applicable"
EXIT_CODES = {PASS: OK, NOT_APPLICABLE: OK, FAIL: GATE_FAILED, INCONCLUSIVE: GATE_INCONCLUSIVE}

type Question = Callable[[float], Measure]
"""A measure that waits for its level of confidence."""


def judge(
    gate: config.Gate,
    *,
    method: Method,
    kinds: Mapping[str, TaskKind],
    stages: Mapping[str, Stage],
    control: Stage | None = None,
) -> dict[str, Any]:
    """Judge a run.

    Rule `bf16`: against the BF16 model (the control if there is one, else the original), scores may fall by at most
    thresholds_pp or threshold_pp and perplexity grow to at most perplexity_ratio. Rule `better_than_ptq`: perplexity
    and KL to BF16 must be lower than the PTQ model's, and no other score significantly lower. Under both, gate.kl and
    gate.agreement bound the candidate. The verdicts against BF16 that do not count stand beside.

    Args:
        gate: Rule, thresholds, level, what is judged.
        method: With gate.judges it names the stage that is judged.
        kinds: The recipe's tasks.
        stages: The run's models by the names of evaluate.json.
        control: The BF16 model trained on the same data, if gate.control names one.

    Returns:
        The content of gate.json: the keys of `compare`, and rule, candidate (the method), judges (exported | trained),
        baseline (bf16 | control | ptq: which of the models the verdict is about), against_bf16 and against_control
        (verdict, reasons, tasks, levels as in `compare`; None without it). Infinite numbers are None.

    Raises:
        UserError: a stage or task has no items, stages were scored on different items, a score is not a finite
            number, or the rule does not apply to the method. Never a pass for want of data.
    """
    head: dict[str, Any] = {"rule": str(gate.rule), "candidate": str(method), "judges": str(gate.judges)}
    if method == Method.bf16:
        reason = "method bf16 quantizes nothing: there is no FP4 model to judge"
        empty = {"verdict": NOT_APPLICABLE, "release": True, "reasons": [reason], "tasks": {}}
        return empty | head | {"against_bf16": None, "against_control": None}
    if gate.rule == GateRule.better_than_ptq and method == Method.ptq:
        raise UserError("gate.rule = better_than_ptq with method = ptq compares a model with itself: use bf16", USAGE)
    candidate = _stage(stages, candidate_stage(method, gate.judges))
    rulings = {"bf16": _within(gate, kinds, candidate, _stage(stages, "bf16"), "BF16")}
    if control is not None:
        rulings["control"] = _within(gate, kinds, candidate, control, "the BF16 control")
    baseline = "bf16" if control is None else "control"
    if gate.rule == GateRule.better_than_ptq:
        baseline = "ptq"
        rulings["ptq"] = _better_than_ptq(gate, kinds, candidate, _stage(stages, "ptq"))
    beside = {"against_bf16": rulings["bf16"], "against_control": rulings.get("control")}
    return _released(gate, rulings[baseline]) | head | {"baseline": baseline} | beside


def compare(
    gate: config.Gate, kinds: Mapping[str, TaskKind], candidate: Stage, baseline: Stage, against: str
) -> dict[str, Any]:
    """Judge one model against another within the thresholds, whatever gate.rule is.

    Args:
        gate: Thresholds, level, and what inconclusive means.
        kinds: Tasks, all of which both models were scored on.
        candidate: The model judged.
        baseline: The model it is compared with.
        against: What reasons call the baseline.

    Returns:
        verdict (pass | fail | inconclusive), release (whether the recipe releases on it), reasons (one line per task
        and measure), tasks {task: {n, verdict, measures: {measure: verdict}, numbers: {measure: Measure.numbers}}},
        confidence, corrected_confidence, intervals (how many the verdict rests on).

    Raises:
        UserError: as `judge`.
    """
    return _released(gate, _within(gate, kinds, candidate, baseline, against))


def candidate_stage(method: Method, judges: Judges) -> str:
    """Which stage of evaluate.json is a run's result: the exported files, the trained model, or the BF16 control."""
    if method == Method.bf16:
        return "bf16_trained"
    return "exported" if judges == Judges.exported else str(method)


def exit_code(result: Mapping[str, Any]) -> int:
    """0, 3 (fail) or 4 (inconclusive, unless the recipe releases it) for the content of gate.json.

    Raises:
        KeyError: there is no verdict, or one that is not known.
    """
    released = result["verdict"] == INCONCLUSIVE and result["release"] is True
    return OK if released else EXIT_CODES[result["verdict"]]


def _released(gate: config.Gate, ruling: dict[str, Any]) -> dict[str, Any]:
    waved = ruling["verdict"] == INCONCLUSIVE and gate.inconclusive == Inconclusive.release
    return {"verdict": ruling["verdict"], "release": ruling["verdict"] == PASS or waved} | ruling


def _stage(stages: Mapping[str, Stage], name: str) -> Stage:
    if name in stages and stages[name].rows:
        return stages[name]
    there = ", ".join(sorted(stages)) or "none"
    remedy = "run halfbyte evaluate RUN_DIR"
    if name == "exported":
        remedy += ", or set gate.judges=trained to judge the model in training"
    raise UserError(f"gate: stage {name} has no scores (there: {there}); {remedy}")


# Rules ------------------------------------------------------------------------------------------------------------


def _within(
    gate: config.Gate, kinds: Mapping[str, TaskKind], candidate: Stage, baseline: Stage, against: str
) -> dict[str, Any]:
    """The verdict within the thresholds, as `compare`, without `release`."""
    pairs = pair_up(candidate, baseline, kinds, against)
    asked: list[tuple[Pair, list[Question]]] = []
    for pair in pairs:
        threshold = gate.thresholds_pp.get(pair.task, gate.threshold_pp)
        asked.append((pair, list(_metrics(pair, threshold, gate.perplexity_ratio))))
    return _collect(gate, asked, _bounds(gate, pairs, kinds))


def _better_than_ptq(gate: config.Gate, kinds: Mapping[str, TaskKind], candidate: Stage, ptq: Stage) -> dict[str, Any]:
    pairs = pair_up(candidate, ptq, kinds, "PTQ")
    asked: list[tuple[Pair, list[Question]]] = []
    improves = False
    for pair in pairs:
        questions = list(_metrics(pair, None, None))
        if None not in pair.kl:
            questions.append(partial(measures.kl_change, pair))
        elif kinds[pair.task] != TaskKind.lm_eval or pair.kl != (None, None):
            raise _no_kl(pair, "gate.rule = better_than_ptq compares")
        has_perplexity = any(metric.statistic is Statistic.perplexity for metric in pair.metrics.values())
        improves = improves or has_perplexity or None not in pair.kl
        asked.append((pair, questions))
    if not improves:
        raise UserError(
            "gate.rule = better_than_ptq: no task has a perplexity or KL that could be better than PTQ's; "
            "add a task that has one, or set gate.rule=bf16"
        )
    return _collect(gate, asked, _bounds(gate, pairs, kinds))


def _metrics(pair: Pair, threshold_pp: float | None, ratio: float | None) -> Iterator[Question]:
    for name, metric in pair.metrics.items():
        if metric.statistic is Statistic.perplexity:
            yield partial(measures.perplexity, pair, name, ratio)
        else:
            yield partial(measures.difference, pair, name, threshold_pp)


def _bounds(gate: config.Gate, pairs: Sequence[Pair], kinds: Mapping[str, TaskKind]) -> dict[str, list[Question]]:
    """gate.kl and gate.agreement for every task that has them: built-in kinds must, of the others at least one."""
    asked: dict[str, list[Question]] = {pair.task: [] for pair in pairs}
    for key, bound, measure in (
        ("gate.kl", gate.kl, measures.kl_bound),
        ("gate.agreement", gate.agreement, measures.agreement_bound),
    ):
        if bound is None:
            continue
        have = [pair for pair in pairs if (pair.kl[0] if key == "gate.kl" else pair.agreement) is not None]
        for pair in pairs:
            if pair in have:
                asked[pair.task].append(partial(measure, pair, bound))
            elif kinds[pair.task] != TaskKind.lm_eval or not have:
                raise _no_kl(pair, f"{key} bounds")
    return asked


def _no_kl(pair: Pair, who: str) -> UserError:
    return UserError(
        f"gate: task {pair.task} has no KL to BF16, which {who}; set evaluate.kl_positions above 0 and evaluate again"
    )


# Verdict ----------------------------------------------------------------------------------------------------------


def _collect(
    gate: config.Gate, asked: list[tuple[Pair, list[Question]]], bounds: dict[str, list[Question]]
) -> dict[str, Any]:
    """Ask every question at the corrected level and put the answers together."""
    asked = [(pair, questions + bounds[pair.task]) for pair, questions in asked]
    count = sum(len(questions) for _, questions in asked)
    level = gate.confidence
    if gate.correction == Correction.bonferroni:
        level = 1 - (1 - gate.confidence) / count
    reasons: list[str] = []
    tasks: dict[str, Any] = {}
    for pair, questions in asked:
        answers = [question(level) for question in questions]
        reasons += [answer.reason for answer in answers]
        tasks[pair.task] = {
            "n": pair.items,
            "verdict": _worst([answer.verdict for answer in answers]),
            "measures": {answer.name: answer.verdict for answer in answers},
            "numbers": {answer.name: answer.numbers for answer in answers},
        }
    return {
        "verdict": _worst([task["verdict"] for task in tasks.values()]),
        "reasons": reasons,
        "tasks": tasks,
        "confidence": gate.confidence,
        "corrected_confidence": level,
        "intervals": count,
    }


def _worst(verdicts: list[str]) -> str:
    return next(verdict for verdict in (FAIL, INCONCLUSIVE, PASS) if verdict in verdicts)
