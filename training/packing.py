"""Documents to training windows: text is cut into windows, conversations are packed whole.

Shapes: L = sequence length in tokens, n = windows. A window holds L+1 tokens, so that inputs (the first L) and labels
(the last L) come from one row.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import batched, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from halfbyte.training import config
from halfbyte.training.config import DataFormat, TooLong
from halfbyte.training.environment import tokenizer_threads
from halfbyte.training.errors import UserError
from halfbyte.training.jsonl import read_jsonl, text_field

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_BATCH = 64
"""Documents per tokenizer call: enough for its threads to share the work, few enough to bound memory."""
OPEN_WINDOWS = 32
"""Chat windows that are filled at the same time; more of them waste less padding and shuffle the order further."""


@dataclass(frozen=True)
class Window:
    """One packed row.

    Attributes:
        tokens: int32 [L+1].
        loss_mask: uint8 [L]; 1 where label t (= token t+1) carries loss.
        segments: int32 [L]; index inside the window of the document that input t belongs to; padding has its own.
        lines: Of the file, from 1: the records that its tokens come from, rising.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    segments: np.ndarray
    lines: tuple[int, ...]


@dataclass
class PackingReport:
    """What happened to the documents of one corpus.

    Attributes:
        documents: Records read.
        tokens: Tokens before packing, end-of-document tokens included.
        dropped: Records without anything to learn from (empty text) or skipped as too long.
        truncated: Conversations cut to one window.
        largest_token: Largest token id of the documents.
        largest_token_line: The first line that has it.
    """

    documents: int = 0
    tokens: int = 0
    dropped: int = 0
    truncated: int = 0
    largest_token: int = -1
    largest_token_line: int = 0


@dataclass
class Packer:
    """Tokenizes one corpus and packs it; `windows()` streams, `report` is complete when the stream has ended.

    Attributes:
        path: JSONL or JSONL.gz.
        tokenizer: A fast tokenizer (character offsets are needed for chat).
        data: The recipe's data section.
        sequence_length: L, tokens.
    """

    path: Path
    tokenizer: "PreTrainedTokenizerFast"
    data: config.Data
    sequence_length: int
    report: PackingReport = field(default_factory=PackingReport)

    def windows(self) -> Iterator[Window]:
        """Stream the packed windows in file order (chat: in the order in which windows fill up).

        Raises:
            UserError: the file or one of its lines is unusable (named with its number), the tokenizer does not fit
                the data or the model, or the corpus is smaller than one window.
        """
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no eos_token, which separates documents; set it in tokenizer_config.json"
            )
        records = read_jsonl(self.path)
        first = next(records)
        self._note_tokens([self.tokenizer.eos_token_id, self.tokenizer.pad_token_id or 0], first[0])  # they are added
        records = chain([first], records)
        windows = self._pack_chat(records) if is_chat(first[1], self.data) else self._pack_text(records)
        count = 0
        for window in windows:
            count += 1
            yield window
        if not count:
            raise UserError(
                f"{self.path}: {self.report.tokens} usable tokens are less than one window of "
                f"{self.sequence_length + 1}; give more text or a smaller train.sequence_length"
            )

    # Text ---------------------------------------------------------------------------------------------------------

    def _pack_text(self, records: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[Window]:
        """Join documents with EOS and cut every L tokens; a rest shorter than a window is left out."""
        size, eos = self.sequence_length, self.tokenizer.eos_token_id
        tokens, owners = np.empty(0, np.int32), np.empty(0, np.int64)  # owners: the line of each token
        for batch in batched(records, TOKENIZER_BATCH):
            texts = [text_field(record, self.data.text_key, f"{self.path}:{line}") for line, record in batch]
            pieces, owner_pieces = [tokens], [owners]
            with tokenizer_threads():
                encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            for (line, _), ids in zip(batch, encoded, strict=True):
                self.report.documents += 1
                if not ids:
                    self.report.dropped += 1
                    continue
                self._note_tokens(ids, line)
                self.report.tokens += len(ids) + 1
                pieces.append(np.array([*ids, eos], np.int32))
                owner_pieces.append(np.full(len(ids) + 1, line))
            tokens, owners, start = np.concatenate(pieces), np.concatenate(owner_pieces), 0
            while start + size < len(tokens):
                yield self._text_window(tokens[start : start + size + 1], owners[start : start + size + 1])
                start += size  # the last label of a window is the first input of the next
            tokens, owners = tokens[start:], owners[start:]

    def _text_window(self, tokens: np.ndarray, owners: np.ndarray) -> Window:
        boundary = owners[1:] != owners[:-1]
        # An isolated document knows nothing of the next one, so its EOS is not asked to predict its first token.
        mask = ~boundary if self.data.isolate_documents else np.ones_like(boundary)
        segments = np.concatenate([[0], np.cumsum(boundary)])[:-1]
        return Window(tokens, mask.astype(np.uint8), segments.astype(np.int32), tuple(np.unique(owners).tolist()))

    # Chat ---------------------------------------------------------------------------------------------------------

    def _pack_chat(self, records: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[Window]:
        """Best fit: a conversation goes into the fullest open window that has room for all of it."""
        if self.tokenizer.chat_template is None:
            raise UserError(f"{self.path}: chat data, but the tokenizer has no chat template; use an instruct model")
        capacity = self.sequence_length + 1
        open_windows: list[list[tuple[int, np.ndarray, np.ndarray]]] = []

        def filled(window: list[tuple[int, np.ndarray, np.ndarray]]) -> int:
            return sum(len(tokens) for _, tokens, _ in window)

        for line, record in records:
            self.report.documents += 1
            conversation = self._conversation(line, record)
            if conversation is None:
                self.report.dropped += 1
                continue
            self.report.tokens += len(conversation[0])
            fitting = [w for w in open_windows if filled(w) + len(conversation[0]) <= capacity]
            if fitting:
                max(fitting, key=filled).append((line, *conversation))
                continue
            open_windows.append([(line, *conversation)])
            if len(open_windows) > OPEN_WINDOWS:
                fullest = max(range(len(open_windows)), key=lambda i: filled(open_windows[i]))
                yield self._chat_window(open_windows.pop(fullest))
        yield from (self._chat_window(window) for window in open_windows)

    def _chat_window(self, conversations: list[tuple[int, np.ndarray, np.ndarray]]) -> Window:
        capacity = self.sequence_length + 1
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        tokens = np.full(capacity, eos if pad is None else pad, np.int32)
        learned = np.zeros(capacity, np.uint8)
        segments = np.full(capacity, len(conversations), np.int32)
        start = 0
        for index, (_, ids, mask) in enumerate(conversations):
            stop = start + len(ids)
            tokens[start:stop], learned[start:stop], segments[start:stop] = ids, mask, index
            start = stop
        return Window(tokens, learned[1:], segments[:-1], tuple(line for line, *_ in conversations))

    def _conversation(self, line: int, record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
        """Token ids and a mask of those that carry loss; None when there is nothing to learn or it is skipped."""
        where = f"{self.path}:{line}"
        messages = turns_of(record, self.data.chat_key, where)
        text, answers = render_chat(self.tokenizer, messages, where, answer_only=self.data.answer_only)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = np.array(encoding["input_ids"], np.int32)
        if not len(ids):
            return None
        self._note_tokens(ids, line)
        begin, end = np.array(encoding["offset_mapping"]).T
        mask = np.zeros(len(ids), np.uint8)
        for first, last in answers:
            mask |= (begin < last) & (end > first)
        mask[0] = 0  # nothing of this conversation stands before it, so nothing predicts it
        limit = self.sequence_length + 1
        if len(ids) > limit:
            if self.data.too_long == TooLong.error:
                raise UserError(
                    f"{where}: the conversation has {len(ids)} tokens, a window {limit} (train.sequence_length + 1); "
                    "raise train.sequence_length or set data.too_long to truncate or skip"
                )
            if self.data.too_long == TooLong.skip:
                return None
            ids, mask = ids[:limit], mask[:limit]
            self.report.truncated += 1
        return (ids, mask) if mask.any() else None

    def _note_tokens(self, ids: Any, line: int) -> None:
        if (largest := int(np.max(ids))) > self.report.largest_token:
            self.report.largest_token, self.report.largest_token_line = largest, line


def render_chat(
    tokenizer: "PreTrainedTokenizerFast", messages: list[dict[str, str]], where: str, *, answer_only: bool
) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation with the tokenizer's chat template and find what the assistant wrote in it.

    An answer is what the template adds between the prompt that serving sends (the turns so far plus the generation
    prompt) and the conversation with that turn, so it ends with the template's end-of-turn marker and needs no
    generation tags in the template.

    Args:
        tokenizer: Has a chat template.
        messages: Turns with `role` and `content`.
        where: `file:line` for the error.
        answer_only: False marks the whole text.

    Returns:
        (text, [(first character, one past the last)] of the parts that carry loss).

    Raises:
        UserError: the template rejects the turns, or rewrites earlier turns when later ones follow, so that no part
            of the text can be told to be an answer.
    """

    def render(turns: int, prompt: bool = False) -> str:
        try:
            text = tokenizer.apply_chat_template(messages[:turns], tokenize=False, add_generation_prompt=prompt)
        except TemplateError as error:
            raise UserError(f"{where}: the chat template rejects the conversation ({error}); fix its turns") from error
        return str(text)

    text = render(len(messages))
    if not answer_only:
        return text, [(0, len(text))]
    answers = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if turn == 0:
            raise UserError(f"{where}: the conversation starts with an assistant turn; put the user's turn before it")
        prompt, answered = render(turn, prompt=True), render(turn + 1)
        if not (answered.startswith(prompt) and text.startswith(answered)):
            raise UserError(
                f"{where}: the chat template changes earlier text at turn {turn + 1}, so its answer cannot be told "
                "apart; split the conversation or set data.answer_only=false"
            )
        answers.append((len(prompt), len(answered)))
    if not answers:
        raise UserError(f"{where}: no assistant turn, so nothing to learn; drop it or set data.answer_only=false")
    return text, answers


def is_chat(first: dict[str, Any], data: config.Data) -> bool:
    """Whether a file is chat or text, from its first record where data.format is auto."""
    return data.format == DataFormat.chat or (
        data.format == DataFormat.auto and isinstance(first.get(data.chat_key), list)
    )


def turns_of(record: dict[str, Any], key: str, where: str) -> list[dict[str, str]]:
    """The turns of a conversation, each with a `role` and a `content`.

    Args:
        record: One parsed line.
        key: Key of the list of turns.
        where: `file:line` for the error.

    Raises:
        UserError: there is no such list, or a turn lacks one of the two.
    """
    if not isinstance(messages := record.get(key), list):
        raise UserError(f"{where}: {key!r} is not a list of turns (keys: {', '.join(record)}); set data.chat_key")
    if not messages:
        raise UserError(f"{where}: {key!r} is empty; take the line out")
    for turn, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise UserError(f"{where}: turn {turn} is a {type(message).__name__}, not an object; fix the line")
        for part in ("role", "content"):
            text_field(message, part, f"{where}: turn {turn}")
    return messages
