"""Scores per item of any stage's model, in place, under any layout; the same items for every stage.

Every pipeline stage walks the same padded batches; on the last stage the vocabulary shards are gathered and the first
tensor-parallel rank scores. The BF16 model's log-probabilities at the KL positions are kept on disk, so that later
stages (and later starts of the run) compare with the very same reference.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

from halfbyte.training import scoring, tasks
from halfbyte.training.config import Recipe, Task
from halfbyte.training.data import MicroBatch
from halfbyte.training.errors import UserError
from halfbyte.training.files import damage, read_json, write_json
from halfbyte.training.runtime import Runtime
from halfbyte.training.schedule import collect, token_batch

GROUP = 16
"""Batches of equal padded size that go through the pipeline in one schedule, to fill it."""


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
    """

    recipe: Recipe
    runtime: Runtime
    folder: Path
    items: dict[str, list[scoring.Item]]
    pad_id: int
    tokenizer: Any
    references: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def load(cls, recipe: Recipe, runtime: Runtime, folder: Path, tokenizer: Any, max_length: int) -> "Examination":
        """Read and tokenize every task's items (each rank by itself: they are few).

        Raises:
            UserError: a task has no items, a bad line, or an item longer than `max_length` tokens.
        """
        items = {
            task.name: tasks.load_items(task, tokenizer, item_limit(task, recipe, max_length))
            for task in recipe.evaluate.tasks
        }
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return cls(recipe, runtime, folder, items, pad, tokenizer)

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

    @property
    def scores_here(self) -> bool:
        """Whether this rank holds complete logits and scores them: last pipeline stage, first tensor-parallel rank."""
        return parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0


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
    if not exam.items:
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
    """Scores of all items on rank 0 (an empty list elsewhere), in item order."""
    positions = exam.recipe.evaluate.kl_positions
    batches = tasks.bucketed(exam.items[task.name], exam.recipe.evaluate.tokens_per_batch)
    mine = batches[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]
    reference = None if stage == "bf16" or not positions else _reference(exam, task)
    kept: dict[int, torch.Tensor] = {}
    scores: list[scoring.Score] = []
    for start in range(0, len(mine), GROUP):
        group = mine[start : start + GROUP]

        def take(logits: torch.Tensor, index: int, group: list = group) -> None:
            whole = gather_from_tensor_model_parallel_region(logits)
            if exam.scores_here:
                rows = whole[: len(group[index])]
                decode = exam.tokenizer.decode
                scores.extend(
                    scoring.score_batch(rows, group[index], reference=reference, kl_positions=positions, decode=decode)
                )
                if stage == "bf16" and positions:
                    kept.update(scoring.reference_rows(rows, group[index], positions))

        collect(model, _pad(exam, group), take)
    if kept:
        exam.references[task.name] = kept
        _save_reference(exam, task, kept)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, scores)
    return sorted((score for part in parts for score in part), key=lambda score: score.item)


def _pad(exam: Examination, group: Sequence[list[scoring.Item]]) -> list[MicroBatch]:
    """Equal [B, S] for all batches of a group: pipeline stages exchange tensors of one size per schedule."""
    rows = max(len(batch) for batch in group)
    multiple = exam.recipe.parallel.tensor if exam.recipe.parallel.sequence else 1
    padded = [tasks.pad(batch, exam.pad_id, multiple) for batch in group]
    length = max(tokens.shape[1] for tokens in padded)
    out = []
    for tokens in padded:
        full = torch.full((rows, length), exam.pad_id, dtype=torch.int64)
        full[: tokens.shape[0], : tokens.shape[1]] = tokens
        out.append(token_batch(full.to(exam.runtime.device)))
    return out


def _reference_file(exam: Examination, task: Task, rank: int) -> Path:
    return exam.folder / "cache" / f"reference.{task.name}.{rank}.pt"


def _save_reference(exam: Examination, task: Task, rows: dict[int, torch.Tensor]) -> None:
    path = _reference_file(exam, task, parallel_state.get_data_parallel_rank())
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({key: value.cpu() for key, value in rows.items()}, temporary)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch's file writer raises the latter when the disk is full
        reason = (str(error).splitlines() or ["?"])[0]
        raise UserError(f"{path}: cannot be written ({reason}); free space or choose another run.dir") from error


def _reference(exam: Examination, task: Task) -> dict[int, torch.Tensor]:
    """The BF16 rows of this task: from memory, or from the files of an earlier start (whatever its layout was)."""
    wanted = {item.index for item in exam.items[task.name]}
    if task.name not in exam.references:
        rows: dict[int, torch.Tensor] = {}
        for file in sorted((exam.folder / "cache").glob(f"reference.{task.name}.*.pt")):
            with damage(file):
                try:
                    rows |= torch.load(file, weights_only=True)
                except (EOFError, OSError, pickle.UnpicklingError) as error:
                    raise ValueError(error) from error
        exam.references[task.name] = rows
    if exam.scores_here and parallel_state.get_data_parallel_world_size() == 1:
        missing = wanted - exam.references[task.name].keys()
        if missing:
            raise UserError(
                f"evaluate: no BF16 reference for {len(missing)} items of {task.name}; run stage bf16 again"
            )
    return exam.references[task.name]
