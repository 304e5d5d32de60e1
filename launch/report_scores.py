"""The top of a report: the gate's verdict, the main figures, and the table of all scores with the gate's intervals."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halfbyte.launch.report_blocks import Block, Cell, Group, Head, Missing, Ruling, Table, Text
from halfbyte.launch.report_numbers import bytes_text, interval_text, metric_form, metric_text, stage_name
from halfbyte.launch.report_run import Absent, RunFiles
from halfbyte.training.config import GateRule, Judges
from halfbyte.training.errors import UserError
from halfbyte.training.files import damage, read_json

RULES = {
    GateRule.bf16: "every score within its threshold of BF16",
    GateRule.better_than_ptq: "better than PTQ on every task and measure",
}
VERDICTS = ("pass", "fail", "inconclusive", "not_applicable")


# Verdict ----------------------------------------------------------------------------------------------------------


def head(files: RunFiles) -> Head:
    """The verdict, what it is about, and the main figures."""
    tiles = list(_tiles(files))
    try:
        gate = files.gate()
        with damage(files.folder / "gate.json"):
            if gate["verdict"] not in VERDICTS:
                raise ValueError(f"verdict {gate['verdict']!r}")
            return Head(gate["verdict"], _facts(files, gate), tiles, list(_rulings(gate)))
    except UserError as error:
        missing = Missing("Verdict", files.local(str(error)), damaged=not isinstance(error, Absent))
        return Head("missing", [], tiles, missing=missing)


def _facts(files: RunFiles, gate: dict[str, Any]) -> list[tuple[str, str]]:
    rule = str(gate["rule"])
    facts = [("Rule", f"{rule}: {RULES.get(GateRule(rule), '')}")]
    judged = stage_name(str(gate["candidate"]))
    where = gate.get("judges")
    if where == Judges.exported:
        judged += ", decoded from the exported files"
    elif where == Judges.trained:
        judged += ", the model in training"
    if "checkpoint" in gate:
        judged += f" (checkpoint {gate['checkpoint']})"
    facts.append(("Judged", judged))
    facts.append(("Intervals", f"paired, {100 * files.recipe.gate.confidence:g} %"))
    return facts


def _rulings(gate: dict[str, Any]) -> Iterator[Ruling]:
    yield Ruling("Why", gate["verdict"], [_reason(line) for line in gate["reasons"]])
    beside = gate.get("against_bf16")
    if beside and gate["rule"] != GateRule.bf16:
        reasons = [_reason(line) for line in beside["reasons"]]
        yield Ruling("Within the thresholds of BF16", beside["verdict"], reasons)


def _reason(line: str) -> tuple[str, str]:
    """A reason and the verdict at its end; a reason without one carries none."""
    found = re.findall(r": (pass|fail|inconclusive|(?:not )?significantly lower)\b", line)
    words = {"significantly lower": "fail", "not significantly lower": "pass"}
    return line, words.get(found[-1], found[-1]) if found else ""


def _tiles(files: RunFiles) -> Iterator[tuple[str, str, str]]:
    for build in (_accuracy_tile, _kl_tile, _size_tile, _verified_tile):
        try:
            with damage(files.folder):
                yield build(files)
        except UserError:
            continue  # its section says what is wrong with the file; a tile only repeats what stands there


def _accuracy_tile(files: RunFiles) -> tuple[str, str, str]:
    tasks = against_bf16(files.gate())
    drops = {name: task for name, task in tasks.items() if "delta_pp" in task}
    if not drops:
        raise Absent("no task has an accuracy")
    worst = min(drops, key=lambda name: drops[name]["delta_pp"])
    low, high = drops[worst]["interval_pp"]
    change, _, ends = interval_text(drops[worst]["delta_pp"], [low, high], "{:+.2f}", " pp").partition(" [")
    label = "Accuracy against BF16" if len(drops) == 1 else "Largest accuracy change"
    return label, change, f"{worst} [{ends}"


def _kl_tile(files: RunFiles) -> tuple[str, str, str]:
    scores = files.evaluate()[files.judged()]
    found = {name: task["kl"] for name, task in scores.items() if "kl" in task}
    worst = max(found, key=lambda name: found[name])
    return (
        ("KL to BF16" if len(found) == 1 else "Largest KL to BF16"),
        f"{found[worst]:.3f} nats",
        f"per token, {worst}",
    )


def _size_tile(files: RunFiles) -> tuple[str, str, str]:
    sizes = files.sizes()["sizes"]
    before, after = sizes["bytes_before"], sizes["bytes_after"]
    return "Size", f"{before / after:.2f}× smaller", f"{bytes_text(before)} → {bytes_text(after)}"


def _verified_tile(files: RunFiles) -> tuple[str, str, str]:
    report = files.verify()
    state = "every byte verified" if report["ok"] else "NOT VERIFIED"
    return "Exported files", f"{report['mismatches']} mismatches", f"{report['tensors']} tensors compared, {state}"


# Scores -----------------------------------------------------------------------------------------------------------


def against_bf16(gate: dict[str, Any]) -> dict[str, Any]:
    """The gate's numbers per task against BF16, whatever its rule; empty if it judged nothing."""
    if gate["rule"] == GateRule.bf16:
        return gate["tasks"]
    return (gate.get("against_bf16") or {}).get("tasks", {})


def score_blocks(files: RunFiles) -> list[Block]:
    """The table of all scores: a column per stage, then the gate's paired comparisons.

    Raises:
        UserError: evaluate.json or gate.json is damaged.
    """
    scores = dict(files.evaluate())
    if not scores:
        raise ValueError("no stage")
    notes: list[Block] = []
    comparisons: dict[str, dict[str, Any]] = {}
    try:
        gate = files.gate()
    except Absent:
        gate = {}
    if gate:
        comparisons["against BF16"] = against_bf16(gate)
        if gate["rule"] == GateRule.better_than_ptq:
            comparisons["against PTQ"] = gate["tasks"]
        notes += _control(files, gate, scores)
    comparisons = {name: tasks for name, tasks in comparisons.items() if tasks}
    stages = list(scores)
    level = f"{100 * files.recipe.gate.confidence:g} %"
    table = Table(
        f"Scores of every stage on the same items; in brackets the paired {level} interval of a change",
        ["score", *map(stage_name, stages), *comparisons],
        [group for task in scores[stages[0]] for group in _task_rows(task, scores, comparisons)],
        strong=1 + stages.index(files.judged()) if len(stages) > 1 else None,
    )
    if not comparisons:
        notes.append(Text("No intervals: the gate compared nothing."))
    return [table, *notes]


def _task_rows(task: str, scores: dict[str, Any], comparisons: dict[str, dict[str, Any]]) -> Iterator[Group]:
    measured = list(dict.fromkeys(m for stage in scores.values() for m in stage.get(task, {}) if m != "n"))
    rows = []
    for metric in measured:
        row = [Cell(metric_form(metric)[0])]
        for stage in scores.values():
            value = stage.get(task, {}).get(metric)
            row.append(Cell("–") if value is None else Cell(metric_text(metric, value), value))
        row += [_change(tasks.get(task, {}), metric) for tasks in comparisons.values()]
        rows.append(row)
    counts = sorted({int(stage[task]["n"]) for stage in scores.values() if task in stage})
    yield Group(f"{task} ({' or '.join(f'{count:,}' for count in counts)} items)", rows)


CHANGES = {
    "accuracy": ("delta_pp", "interval_pp", "{:+.2f}", " pp"),
    "perplexity": ("perplexity_ratio", "perplexity_interval", "{:.4f}", " ×"),
    "kl": ("kl_delta", "kl_interval", "{:+.4f}", ""),
}
"""Metric -> where gate.json keeps the estimate and its interval, and how they are written."""


def _change(numbers: dict[str, Any], metric: str) -> Cell:
    """The gate's comparison of one metric of a task."""
    if metric not in CHANGES or CHANGES[metric][0] not in numbers:
        return Cell("")
    estimate, ends, pattern, unit = CHANGES[metric]
    verdict = numbers.get("measures", {}).get(metric, "")
    value = numbers[estimate]
    shown = "∞" if value is None else interval_text(value, numbers[ends], pattern, unit)
    return Cell(shown, value, verdict)


def _control(files: RunFiles, gate: dict[str, Any], scores: dict[str, Any]) -> list[Block]:
    """Put the scores of a BF16 model trained on the same data beside the others, if the gate names such a run."""
    control = gate.get("control") or files.recipe.gate.control
    if not control or "bf16_trained" in scores:
        return []
    path = Path(str(control)) / "evaluate.json"
    try:
        with damage(path):
            trained = read_json(path)["bf16_trained"]
            scores["bf16_trained"] = {task: trained[task] for task in scores["bf16"] if task in trained}
    except UserError as error:
        return [Missing("Scores of the BF16 control", str(error), damaged=True)]
    return [Text(f"BF16 trained is the control: {control}, trained on the same data and not quantized.")]
