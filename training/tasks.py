"""Evaluation items: a data set becomes the very same tokens for every stage; scoring.py makes scores of them.

Shapes: B = rows of a batch, S = padded length in tokens.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from halfbyte.training.config import Task, TaskKind
from halfbyte.training.errors import UserError
from halfbyte.training.jsonl import read_jsonl, read_scores, text_field
from halfbyte.training.scoring import (
    Item,
    Score,
    kl_rows,
    reference_rows,
    score_batch,
    summarize,
    write_scores,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


__all__ = [
    "Item",
    "Score",
    "bucketed",
    "kl_rows",
    "load_items",
    "pad",
    "read_scores",
    "reference_rows",
    "score_batch",
    "summarize",
    "write_scores",
]


def load_items(task: Task, tokenizer: "PreTrainedTokenizerFast", max_length: int) -> list[Item]:
    """Read and tokenize a task's items, without special tokens.

    Continuations are encoded as lm-evaluation-harness does (its `_encode_pair`): spaces that end the context belong to
    the continuation, and the continuation's tokens are those of the whole beyond the context's own. An empty context
    and every text start with BOS (EOS if the tokenizer has none), which is not scored.

    Args:
        task: Where the records are, their keys, `first` and `limit`.
        tokenizer: Fast tokenizer of the model.
        max_length: Tokens that a row may have in all. Continuation items must fit; texts are cut to it, and to
            `task.max_tokens` scored tokens.

    Returns:
        Items in file order.

    Raises:
        UserError: the file or a line is unusable (named), an item is too long, or no items are left.
    """
    path = Path(task.data)
    stop = None if task.limit is None else task.first + task.limit
    encode = _text_item if task.kind == TaskKind.text else _continuation_item
    items = [
        encode(task, tokenizer, max_length, index, f"{path}:{line}", record)
        for index, (line, record) in islice(enumerate(read_jsonl(path)), task.first, stop)
    ]
    if not items:
        raise UserError(
            f"task {task.name}: no items (first={task.first}, limit={task.limit} of {path}); lower first or raise limit"
        )
    return items


def _continuation_item(
    task: Task,
    tokenizer: "PreTrainedTokenizerFast",
    max_length: int,
    index: int,
    where: str,
    record: dict[str, Any],
) -> Item:
    context = text_field(record, task.context_key, where)
    continuation = text_field(record, task.continuation_key, where)
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    whole = _encode(tokenizer, stripped + continuation)
    prompt = _encode(tokenizer, stripped)
    if not prompt:
        prompt = [prefix_token(tokenizer)]
        whole = prompt + whole
    if len(whole) <= len(prompt):
        raise UserError(f"{where}: {task.continuation_key!r} adds no token to the context; drop the line")
    if len(whole) > max_length:
        raise UserError(
            f"{where}: the item has {len(whole)} tokens, the model takes {max_length}; shorten its context or drop it"
        )
    return Item(index, tuple(whole), len(prompt), len(continuation.encode()))


def _text_item(
    task: Task,
    tokenizer: "PreTrainedTokenizerFast",
    max_length: int,
    index: int,
    where: str,
    record: dict[str, Any],
) -> Item:
    text = text_field(record, task.text_key, where)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    scored = max_length - 1 if task.max_tokens is None else min(task.max_tokens, max_length - 1)
    ids = encoding["input_ids"][:scored]
    if not ids:
        raise UserError(f"{where}: {task.text_key!r} is empty; drop the line")
    # Characters up to the end of the last scored token: decoding instead could change spaces or split characters.
    end = len(text) if len(ids) == len(encoding["input_ids"]) else encoding["offset_mapping"][len(ids) - 1][1]
    return Item(index, (prefix_token(tokenizer), *ids), 1, len(text[:end].encode()))


def _encode(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def prefix_token(tokenizer: "PreTrainedTokenizerFast") -> int:
    """What every text starts with: BOS, or EOS for a tokenizer without one."""
    found = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    assert isinstance(found, int)  # one token; fetch.load_tokenizer has checked that there is one
    return found


class Tokenized(Protocol):
    """What `bucketed` sorts: an Item or a generate.Prompt."""

    @property
    def index(self) -> int: ...
    @property
    def tokens(self) -> tuple[int, ...]: ...


def bucketed[T: Tokenized](items: Sequence[T], tokens_per_batch: int, room: int = 0) -> list[list[T]]:
    """Group items of like length, longest first (what does not fit in memory shows at once).

    Args:
        items: Any order.
        tokens_per_batch: Largest B x S of a batch; an item longer than it makes a batch of its own.
        room: Tokens that every row may grow by.

    Returns:
        Every item once.
    """
    batches: list[list[T]] = []
    for item in sorted(items, key=lambda item: (-len(item.tokens), item.index)):
        # The first item of a batch is its longest, so it sets S.
        if batches and (len(batches[-1]) + 1) * (len(batches[-1][0].tokens) + room) <= tokens_per_batch:
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches


def pad(batch: Sequence[Item], pad_id: int, multiple: int) -> torch.Tensor:
    """Rows of equal length: items from the left, `pad_id` after them.

    Args:
        batch: At least one item.
        pad_id: Any token; causal attention keeps it from the scored positions.
        multiple: S becomes a multiple of this (sequence parallelism splits S).

    Returns:
        int64 [B, S].
    """
    length = max(len(item.tokens) for item in batch)
    length = -(-length // multiple) * multiple
    rows = [[*item.tokens, *[pad_id] * (length - len(item.tokens))] for item in batch]
    return torch.tensor(rows, dtype=torch.int64)
