"""Scores per item of any stage's model, in place, under any layout; the same items for every stage.

passes.py brings items through the model, harness.py the tasks of lm-eval. The BF16 model's log-probabilities at the KL
positions are kept on disk, so that later stages (and later starts of the run) compare with the very same reference.
"""

import itertools
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from halfbyte.training import scoring, tasks
from halfbyte.training.config import Recipe, Task, TaskKind
from halfbyte.training.errors import UserError
from halfbyte.training.files import damage, read_json, write_json
from halfbyte.training.metrics import METRICS, digits
from halfbyte.training.passes import GROUP, Passes, Rows, scores_here
from halfbyte.training.runtime import Runtime, on_first_rank

__all__ = ["GROUP", "Examination", "evaluate", "headline", "item_limit", "score_items"]


@dataclass
class Examination:
    """The evaluation items of a run, loaded and tokenized once.

    Attributes:
        recipe: The recipe.
        runtime: This process.
        folder: Run folder; per-item scores go to <folder>/evaluate, reference log-probabilities to <folder>/cache.
        items: Task name -> items.
        pad_id: Token that fills the right end of short rows.
        tokenizer: The model's tokenizer.
        max_length: Tokens that the model takes.
        ends: Token ids that end a generated text: the tokenizer's EOS and those of generation_config.json.
        harness: Task name -> a task of lm-eval, on rank 0 (lm_load.LoadedTask).
        references: Task name -> the BF16 model's distributions, as far as they are in memory.
        notes: Task name -> what its evaluation had to do to its items, for the console.
    """

    recipe: Recipe
    runtime: Runtime
    folder: Path
    items: dict[str, list[scoring.Item]]
    pad_id: int
    tokenizer: Any
    max_length: int
    ends: frozenset[int]
    harness: dict[str, Any] = field(default_factory=dict)
    references: dict[str, Rows] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, recipe: Recipe, runtime: Runtime, folder: Path, tokenizer: Any, max_length: int) -> "Examination":
        """Read and tokenize every task's items (each rank by itself: they are few; lm-eval's are rank 0's).

        Raises:
            UserError: a task has no items, a bad line, or an item longer than `max_length` tokens.
        """
        items = {
            task.name: tasks.load_items(task, tokenizer, item_limit(task, recipe, max_length))
            for task in recipe.evaluate.tasks
            if task.kind != TaskKind.lm_eval
        }
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        ends = frozenset([tokenizer.eos_token_id, *_more_ends(Path(recipe.model.path))])
        exam = cls(recipe, runtime, folder, items, pad, tokenizer, max_length, ends)
        for task in recipe.evaluate.tasks:
            if task.kind == TaskKind.lm_eval:
                from halfbyte.training import lm_load  # seconds, for those who need it

                exam.harness[task.name] = on_first_rank_only(
                    runtime, lambda task=task: lm_load.load_task(task, folder / "cache")
                )
        return exam

    def check_vocabulary(self, vocab: int) -> None:
        """Refuse token ids that the model has no embedding for.

        Raises:
            UserError: an id is too large; the line names the item.
        """
        remedy = (
            f"outside the model's vocabulary of {vocab}; tokenizer and weights in model.path do not belong together"
        )
        if self.pad_id >= vocab:
            raise UserError(f"tokenizer: padding token id {self.pad_id} is {remedy}")
        for task, items in self.items.items():
            for item in items:
                if max(item.tokens) >= vocab:
                    raise UserError(f"task {task}, item {item.index}: token id {max(item.tokens)} is {remedy}")

    def passes(self, model: Any) -> Passes:
        """How items go through a model of this run."""
        parallel, evaluate = self.recipe.parallel, self.recipe.evaluate
        return Passes(
            model=model,
            device=self.runtime.device,
            tokenizer=self.tokenizer,
            pad_id=self.pad_id,
            multiple=parallel.tensor if parallel.sequence else 1,
            tokens_per_batch=evaluate.tokens_per_batch,
            kl_positions=evaluate.kl_positions,
            ends=self.ends,
            vocab=model.vocab_size,
        )


def _more_ends(model_dir: Path) -> list[int]:
    """eos_token_id of generation_config.json: chat models have several."""
    path = model_dir / "generation_config.json"
    if not path.exists():
        return []
    with damage(path):
        found = json.loads(path.read_text()).get("eos_token_id") or []
        return [int(token) for token in (found if isinstance(found, list) else [found])]


def on_first_rank_only[T](runtime: Runtime, work: Callable[[], T]) -> T | None:
    """Run `work` on rank 0 and keep its result there.

    Raises:
        UserError: on every rank, when `work` raised one.
    """
    kept: list[T] = []
    on_first_rank(runtime, lambda: kept.append(work()))
    return kept[0] if kept else None


def item_limit(task: Task, recipe: Recipe, max_length: int) -> int:
    """Text items are cut to max_tokens (default: the training length); others may use the model's whole context."""
    if task.kind == "text":
        scored = task.max_tokens or recipe.train.sequence_length
        return min(scored + 1, max_length)  # the prefix token that starts a text is not scored
    return max_length


def evaluate(exam: Examination, model: torch.nn.Module, stage: str) -> dict[str, dict[str, float]]:
    """Score every task and write <run>/evaluate/<stage>.<task>.jsonl and the stage's entry of evaluate.json.

    Args:
        exam: The items.
        model: This rank's GPTModel (not wrapped in DDP).
        stage: "bf16", "ptq", "qat" ... ; "bf16" also records the KL reference.

    Returns:
        {task: {metric: value, "n": items}} on every rank.

    Raises:
        UserError: no items, or a score that is not finite.
    """
    if not exam.recipe.evaluate.tasks:
        raise UserError("evaluate.tasks is empty: name at least one data set; a gate needs scores")
    was_training = model.training
    model.eval()
    summary: list[Any] = [None]
    try:
        scores = {task.name: _score_task(exam, model, task, stage) for task in exam.recipe.evaluate.tasks}
    finally:
        model.train(was_training)
    if exam.runtime.first:
        summary[0] = _write(exam, stage, scores)
    dist.broadcast_object_list(summary, src=0)
    if isinstance(summary[0], UserError):
        raise summary[0]
    return summary[0]


def headline(scores: dict[str, float]) -> str:
    """A task's two metrics that say most, for the console."""
    own = [name for name in scores if name in METRICS and name != "perplexity"]
    first = own[0] if own else "bits_per_byte"
    second = [name for name in ("perplexity", *own[1:], "bits_per_byte", "output_tokens") if name in scores]
    shown = [f"{first} {scores[first]:.4f}"] if first in scores else []
    patterns = {"perplexity": "{:.2f}", "output_tokens": "{:.2f}"}
    shown += [f"{name} {digits(scores[name], patterns.get(name, '{:.4f}'))}" for name in second[:1]]
    return ", ".join(shown)


def _write(exam: Examination, stage: str, scores: dict[str, list[scoring.Score]]) -> Any:
    try:
        summary = {task.name: scoring.summarize(task, scores[task.name]) for task in exam.recipe.evaluate.tasks}
        for name, rows in scores.items():
            scoring.write_scores(exam.folder / "evaluate" / f"{stage}.{name}.jsonl", rows)
        path = exam.folder / "evaluate.json"
        write_json(path, (read_json(path) if path.exists() else {}) | {stage: summary})
    except UserError as error:  # every rank must hear of it, or the others wait for ever
        return error
    return summary


def _score_task(exam: Examination, model: torch.nn.Module, task: Task, stage: str) -> list[scoring.Score]:
    """Scores of all items, in item order; of lm-eval's tasks on rank 0 only."""
    if task.kind == TaskKind.lm_eval:
        from halfbyte.training import lm_tasks

        passes = exam.passes(model)

        def score(items: list[scoring.Item]) -> list[scoring.Score]:
            for item in items:
                passes.check_vocabulary(f"task {task.name}, request {item.index}", item.tokens)
            return score_items(exam, passes, task, items, stage)

        setting = lm_tasks.Setting(
            runtime=exam.runtime,
            folder=exam.folder,
            tokenizer=exam.tokenizer,
            max_length=exam.max_length,
            compared=exam.recipe.evaluate.kl_positions > 0,
            seed=exam.recipe.train.seed,
            score=score,
            generate=passes.generate,
        )
        scores, note = lm_tasks.score_task(exam.harness[task.name], task, stage, setting)
        if note:
            exam.notes[task.name] = note
        return scores
    return score_items(exam, exam.passes(model), task, exam.items[task.name], stage)


def score_items(
    exam: Examination, passes: Passes, task: Task, items: list[scoring.Item], stage: str
) -> list[scoring.Score]:
    """Score items and compare them with the BF16 model, whose own stage leaves the reference; collective.

    Returns:
        One Score per item, by Item.index, on every rank.
    """
    compared = exam.recipe.evaluate.kl_positions > 0
    reference = _reference(exam, task, items) if compared and stage != "bf16" else None
    scores, kept = passes.score(items, reference=reference, keep=compared and stage == "bf16")
    if kept:
        exam.references[task.name] = kept
        _save_reference(exam, task, kept)
    return scores


def _reference_file(exam: Examination, task: Task, rank: int) -> Path:
    return exam.folder / "cache" / f"reference.{task.name}.{rank}.pt"


def _save_reference(exam: Examination, task: Task, rows: dict[int, torch.Tensor]) -> None:
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    path = _reference_file(exam, task, rank)
    temporary = path.with_suffix(".tmp")
    later = itertools.takewhile(Path.exists, (_reference_file(exam, task, rank + n * size) for n in itertools.count(1)))
    for stale in list(later):  # of an earlier start with more ranks: readers take all files
        stale.unlink()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({key: value.cpu() for key, value in rows.items()}, temporary)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch's file writer raises the latter when the disk is full
        reason = (str(error).splitlines() or ["?"])[0]
        raise UserError(f"{path}: cannot be written ({reason}); free space or choose another run.dir") from error


def _reference(exam: Examination, task: Task, items: list[scoring.Item]) -> Rows:
    """The BF16 rows of this task: from memory, or from the files of an earlier start (whatever its layout was)."""
    wanted = {item.index for item in items if item.compared}
    if task.name not in exam.references:
        rows: Rows = {}
        for file in sorted((exam.folder / "cache").glob(f"reference.{task.name}.*.pt")):
            with damage(file):
                try:
                    rows |= torch.load(file, weights_only=True)
                except (EOFError, OSError, pickle.UnpicklingError) as error:
                    raise ValueError(error) from error
        exam.references[task.name] = rows
    if scores_here() and parallel_state.get_data_parallel_world_size() == 1:
        missing = wanted - exam.references[task.name].keys()
        if missing:
            raise UserError(
                f"evaluate: no BF16 reference for {len(missing)} items of {task.name}; run stage bf16 again"
            )
    return exam.references[task.name]
