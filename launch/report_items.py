"""The evaluation items that quantization harmed most, with what BF16 and the judged model said."""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from halfbyte.launch.report_blocks import Block, Example, Examples, Text
from halfbyte.launch.report_numbers import number, stage_name
from halfbyte.launch.report_run import Absent, RunFiles
from halfbyte.training.config import Task, TaskKind
from halfbyte.training.errors import UserError
from halfbyte.training.jsonl import read_jsonl, text_field

WORST = 20
"""Items shown."""
LONGEST = 400
"""Characters shown of a prompt (its end) and of every other text (its start)."""


@dataclass(frozen=True)
class Harm:
    """One item of a task: how far the judged model is from BF16, and both rows of scores.

    Attributes:
        task: The task's name.
        item: Index of its record.
        amount: KL to BF16 per token, or the loss of log-likelihood, nats.
        lost: Loss of log-likelihood of the gold answer against BF16, nats; None without a gold text.
        before, after: Fields of scoring.Score, of BF16 and of the judged model.
    """

    task: str
    item: int
    amount: float
    lost: float | None
    before: dict[str, Any]
    after: dict[str, Any]


def worst_items(files: RunFiles) -> list[Block]:
    """The WORST items of all tasks, by KL to BF16; where no task has it, by loss of log-likelihood."""
    judged, summaries = files.judged(), files.evaluate()
    if "bf16" not in summaries:
        raise Absent("evaluate.json has no BF16 scores to compare with")
    tasks = [task for task in summaries[judged] if task in summaries["bf16"]]
    pairs = {task: list(_pairs(files, judged, task)) for task in tasks}
    by_kl = any(after.get("kl") is not None for rows in pairs.values() for _, after in rows)
    harms: list[Harm] = []
    left_out = []
    for task, rows in pairs.items():
        found = [_harm(task, before, after, by_kl=by_kl) for before, after in rows]
        harms += [harm for harm in found if harm is not None]
        if None in found:
            left_out.append(task)
    worst = heapq.nsmallest(WORST, harms, key=lambda harm: (-harm.amount, harm.task, harm.item))
    if not worst:
        raise Absent("no item has a KL to BF16 or a log-likelihood")
    measure = "KL to BF16, mean over the item's positions" if by_kl else "loss of log-likelihood against BF16"
    text = f"The {len(worst)} of {len(harms):,} items with the largest {measure}."
    if left_out:
        text += f" Not ranked, for want of it: {', '.join(left_out)}."
    text += " Outputs: the generated text, or the first choice at every scored position given the gold text before it."
    texts = {task.name: _texts(task, {harm.item for harm in worst if harm.task == task.name}) for task in _tasks(files)}
    return [Text(text), Examples([_example(harm, judged, texts.get(harm.task, {})) for harm in worst])]


def _tasks(files: RunFiles) -> list[Task]:
    return files.recipe.evaluate.tasks


def _pairs(files: RunFiles, judged: str, task: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    before = {row["item"]: row for row in files.rows("bf16", task)}
    for row in files.rows(judged, task):
        if row["item"] not in before:
            raise UserError(f"evaluate/{judged}.{task}.jsonl: item {row['item']} has no BF16 score; evaluate again")
        yield before[row["item"]], row


def _harm(task: str, before: dict[str, Any], after: dict[str, Any], *, by_kl: bool) -> Harm | None:
    lost = None
    if before["loglikelihood"] is not None and after["loglikelihood"] is not None:
        lost = float(before["loglikelihood"]) - float(after["loglikelihood"])
    amount = after.get("kl") if by_kl else lost
    return None if amount is None else Harm(task, int(after["item"]), float(amount), lost, before, after)


def _example(harm: Harm, judged: str, texts: dict[int, list[tuple[str, str]]]) -> Example:
    facts = []
    if harm.after.get("kl") is not None:
        facts.append(("KL to BF16", f"{number(harm.after['kl'], '{:.4f}')} nats"))
    if harm.lost is not None:
        facts.append(("log-likelihood lost", f"{number(harm.lost, '{:+.3f}')} nats"))
    if harm.before.get("correct") or harm.after.get("correct"):  # of a long text, no model gets every token right
        words = {True: "right", False: "wrong"}
        states = [words[bool(row["correct"])] for row in (harm.before, harm.after)]
        facts.append(("whole answer", f"BF16 {states[0]}, {stage_name(judged)} {states[1]}"))
    for name, value in (harm.after.get("metrics") or {}).items():
        first = (harm.before.get("metrics") or {}).get(name)
        if isinstance(value, int | float) and isinstance(first, int | float):
            facts.append((name, f"BF16 {number(first, '{:.4g}')}, {stage_name(judged)} {number(value, '{:.4g}')}"))
    if harm.after.get("cut"):
        facts.append(("output", "cut at the limit"))
    shown = list(texts.get(harm.item, [("Prompt", "(made by lm-eval from the task's data)")]))
    for name, row in (("BF16", harm.before), (stage_name(judged), harm.after)):
        output = row.get("output")
        shown.append((name, "(not kept)" if output is None else _start(str(output))))
    return Example(f"{harm.task}, item {harm.item}", facts, shown)


def _texts(task: Task, wanted: set[int]) -> dict[int, list[tuple[str, str]]]:
    """Prompt and gold answer of the wanted items, as the task's data hold them."""
    if not wanted or task.kind is TaskKind.lm_eval:
        return {}  # the harness makes those prompts
    try:
        records = islice(enumerate(read_jsonl(Path(task.data))), max(wanted) + 1)
        return {
            index: _record(task, record, f"{task.data}:{line}") for index, (line, record) in records if index in wanted
        }
    except UserError as error:
        return {index: [("Prompt", f"(not to be had: {error})")] for index in wanted}


def _record(task: Task, record: dict[str, Any], where: str) -> list[tuple[str, str]]:
    if task.kind is TaskKind.text:
        return [("Text", _start(text_field(record, task.text_key, where)))]
    prompt = text_field(record, task.context_key, where)
    gold = text_field(record, task.continuation_key, where)
    return [("Prompt", prompt if len(prompt) <= LONGEST else f"…{prompt[-LONGEST:]}"), ("Gold", _start(gold))]


def _start(text: str) -> str:
    text = text.strip(" ")  # a continuation starts with the space that ends its context
    if not text:
        return "(empty)"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
