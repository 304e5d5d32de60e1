"""The top of a report: the gate's verdict, the main figures, and the table of all scores with the gate's intervals."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halfbyte.export.verdict_text import RULES
from halfbyte.launch.report_blocks import Block, Cell, Group, Head, Missing, Ruling, Table, Text
from halfbyte.launch.report_numbers import bytes_text, interval_text, metric_text, stage_name
from halfbyte.launch.report_run import Absent, RunFiles
from halfbyte.launch.summary import metric_form
from halfbyte.training.config import GateRule, Judges
from halfbyte.training.errors import UserError
from halfbyte.training.files import damage, read_json

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
    rule = GateRule(gate["rule"])
    facts = [("Rule", f"{rule}: {RULES[rule]}")]
    judged = stage_name(str(gate["candidate"]))
    where = gate.get("judges")
    if where == Judges.exported:
        judged += ", decoded from the exported files"
    elif where == Judges.trained:
        judged += ", the model in training"
    if "checkpoint" in gate:
        judged += f" (checkpoint {gate['checkpoint']})"
    facts.append(("Judged", judged))
    level = f"paired, {100 * gate.get('confidence', files.recipe.gate.confidence):g} %"
    if gate.get("intervals", 1) > 1 and gate["corrected_confidence"] != gate["confidence"]:
        level += f" for all {gate['intervals']} together, {100 * gate['corrected_confidence']:.3f} % each"
    facts.append(("Intervals", level))
    if gate["verdict"] == "inconclusive" and gate.get("release"):
        facts.append(("Released", "although inconclusive (gate.inconclusive = release)"))
    control = gate.get("control")
    if control:
        otherwise = f"; trained otherwise: {', '.join(control['differs'])}" if control["differs"] else ""
        facts.append(("Control", f"{control['run']}{otherwise}"))
    return facts


def _rulings(gate: dict[str, Any]) -> Iterator[Ruling]:
    yield Ruling("Why", gate["verdict"], [_reason(line) for line in gate["reasons"]])
    for baseline, name in (("control", "the BF16 control"), ("bf16", "BF16")):
        beside = gate.get(f"against_{baseline}")
        if beside and _baseline(gate) != baseline:
            reasons = [_reason(line) for line in beside["reasons"]]
            yield Ruling(f"Within the thresholds of {name}", beside["verdict"], reasons)


def _baseline(gate: dict[str, Any]) -> str:
    """Which model the verdict compares with: bf16, control or ptq."""
    return gate.get("baseline", "ptq" if gate["rule"] == GateRule.better_than_ptq else "bf16")


def _reason(line: str) -> tuple[str, str]:
    """A reason and the verdict at its end; a reason without one carries none."""
    found = re.findall(r": (pass|fail|inconclusive|(?:not )?significantly lower)\b", line)
    words = {"significantly lower": "fail", "not significantly lower": "pass"}
    last = str(found[-1]) if found else ""
    return line, words.get(last, last)


def _tiles(files: RunFiles) -> Iterator[tuple[str, str, str]]:
    for build in (_change_tile, _kl_tile, _size_tile, _verified_tile):
        try:
            with damage(files.folder):
                yield build(files)
        except UserError:
            continue  # its section says what is wrong with the file; a tile only repeats what stands there


def _change_tile(files: RunFiles) -> tuple[str, str, str]:
    tasks = (files.gate().get("against_bf16") or {}).get("tasks", {})
    found = [
        (float(numbers["delta"]), task, metric, numbers)
        for task, content in tasks.items()
        for metric, numbers in content["numbers"].items()
        if numbers["unit"] == "pp"
    ]
    if not found:
        raise Absent("no score in percentage points")
    _, task, metric, numbers = min(found, key=lambda entry: entry[:3])
    change, _, ends = _change_text(numbers).partition(" [")
    label = f"{metric.capitalize()} against BF16" if len(found) == 1 else "Worst score against BF16"
    return label, change, f"{task if len(found) == 1 else f'{task} {metric}'} [{ends}"


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


def score_blocks(files: RunFiles) -> list[Block]:
    """The table of all scores: a column per stage, then the gate's paired comparisons.

    Raises:
        UserError: evaluate.json or gate.json is damaged.
    """
    scores = dict(files.evaluate())
    if not scores:
        raise ValueError("no stage")
    comparisons: dict[str, dict[str, Any]] = {}
    notes: list[Block] = []
    try:
        gate = files.gate()
        with damage(files.folder / "gate.json"):
            comparisons = _comparisons(gate)
            notes += _control(gate, scores)
    except UserError as error:
        damaged = not isinstance(error, Absent)
        notes.append(Missing("The gate's intervals", files.local(str(error)), damaged=damaged))
    stages = list(scores)
    table = Table(
        "Scores of every stage on the same items; in brackets the gate's paired intervals",
        ["score", *map(stage_name, stages), *comparisons],
        [group for task in scores[stages[0]] for group in _task_rows(task, scores, comparisons)],
        strong=1 + stages.index(files.judged()) if len(stages) > 1 else None,
    )
    return [table, *notes]


def _comparisons(gate: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Heading of a column -> the gate's content per task, every cell of which can be shown."""
    found = {"against BF16": gate.get("against_bf16"), "against the control": gate.get("against_control")}
    if _baseline(gate) == "ptq":
        found["against PTQ"] = gate
    comparisons = {name: ruling["tasks"] for name, ruling in found.items() if ruling and ruling["tasks"]}
    for tasks in comparisons.values():
        for content in tasks.values():
            for name in content.get("numbers", {}):
                _change(content, name)
    return comparisons


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


FORMS = {"pp": ("{:+.2f}", " pp", 1.0), "ratio": ("{:.4f}", " ×", 1.0), "share": ("{:.2f}", " %", 100.0)}
"""Unit in gate.json -> format, how the unit is written, factor."""


def _change(content: dict[str, Any], metric: str) -> Cell:
    """The gate's comparison of one metric of a task, or the bound that the gate holds it to."""
    for name in (metric, f"{metric}_bound"):
        if name in content.get("numbers", {}):
            numbers = content["numbers"][name]
            return Cell(_change_text(numbers), numbers["delta"], content["measures"][name])
    return Cell("")


def _change_text(numbers: dict[str, Any]) -> str:
    if numbers["delta"] is None:
        return "∞"
    signed = "{:+.4f}" if numbers["baseline"] is not None else "{:.4f}"
    pattern, unit, factor = FORMS.get(numbers["unit"], (signed, "", 1.0))
    ends = [None if end is None else factor * end for end in numbers["interval"]]
    return interval_text(factor * numbers["delta"], ends, pattern, unit)


def _control(gate: dict[str, Any], scores: dict[str, Any]) -> list[Block]:
    """Put the scores of a BF16 model trained on the same data beside the others, if the gate names such a run."""
    if not gate.get("control") or "bf16_trained" in scores:
        return []
    run = str(gate["control"]["run"])
    path = Path(run) / "evaluate.json"
    try:
        with damage(path):
            trained = read_json(path)["bf16_trained"]
            scores["bf16_trained"] = {task: trained[task] for task in scores["bf16"] if task in trained}
    except UserError as error:
        return [Missing("Scores of the BF16 control", str(error), damaged=True)]
    return [Text(f"BF16 trained is the control: {run}, trained on the same data and not quantized.")]
