"""Scores: what a model made of each evaluation item, one line per item, kept for the gate.

Shapes: B = rows of a batch, S = padded length in tokens, V = vocabulary, T = scored tokens and P = KL positions of an
item.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.training.config import Task, TaskKind
from halfbyte.training.errors import UserError
from halfbyte.training.metrics import aggregate

OUTPUT_TOKENS = 64
"""Tokens of a model's own choices that are kept per item."""
ROWS = 1024
"""Distributions over the vocabulary that are computed at a time: 0.5 GB in FP32 for 128k tokens."""


@dataclass(frozen=True)
class Item:
    """One evaluation item.

    Attributes:
        index: 0-based place of its record in the file.
        tokens: Everything the model reads, the scored tokens last.
        first_target: Index into `tokens` of the first scored token; at least 1.
        bytes: UTF-8 bytes of the scored text.
        compared: Whether it is compared with the reference model (of a question's choices only the right one is).
    """

    index: int
    tokens: tuple[int, ...]
    first_target: int
    bytes: int
    compared: bool = True

    @property
    def content(self) -> str:
        """Digest of the tokens and of where the scored ones start: Score.content."""
        return digest([self.first_target, *self.tokens])


def digest(content: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of anything JSON can hold: equal for equal content."""
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Score:
    """What a model made of one item.

    Attributes:
        item: Item.index.
        loglikelihood: Sum over the scored tokens of the gold answer, nats; None where a task has no gold text.
        tokens: Scored tokens; None likewise.
        bytes: Scored bytes; None likewise.
        correct: Whether every scored token is the model's first choice; None for tasks with metrics of their own.
        content: Digest of what the model was asked and is judged by; models are compared on equal content only.
        kl: Mean over the KL positions of KL(reference || this), nats; None without a reference.
        agreement: Share of the KL positions where both models have the same first choice; None without a reference.
        kl_at: KL at each of the KL positions, nats, in the order of `kl_rows`; None without a reference.
        output: What the model says: the text it generated, or its first choices at the scored positions under the gold
            answer (the first OUTPUT_TOKENS of them).
        output_tokens: Length of a generated output; None if nothing was generated.
        cut: Whether the generation ended at its limit instead of a stop sequence; None if nothing was generated.
        metrics: A task's own metrics of this item (lm-eval's), by name: a number, or the numbers that a corpus metric
            is computed from (`metrics.py`). None for the built-in kinds.
    """

    item: int
    loglikelihood: float | None
    tokens: int | None
    bytes: int | None
    correct: bool | None
    content: str
    kl: float | None = None
    agreement: float | None = None
    kl_at: list[float] | None = None
    output: str | None = None
    output_tokens: int | None = None
    cut: bool | None = None
    metrics: dict[str, float | list[float]] | None = None


def kl_rows(item: Item, kl_positions: int) -> list[int]:
    """Which of an item's scored tokens (counted from 0) are compared with the reference model.

    Args:
        item: The item, with T scored tokens.
        kl_positions: At most this many.

    Returns:
        min(T, kl_positions) increasing positions, each in the middle of an equal share of the T tokens.
    """
    return kl_places(len(item.tokens) - item.first_target, kl_positions)


def kl_places(scored: int, kl_positions: int) -> list[int]:
    """As `kl_rows`, for an item of which only the number of scored tokens is known."""
    count = min(scored, kl_positions)
    return [(2 * i + 1) * scored // (2 * count) for i in range(count)]


def _rows(logits_BSV: torch.Tensor, batch: Sequence[tuple[int, Item]], places: Sequence[Sequence[int]]) -> torch.Tensor:
    """FP32 [R, V]: the logits that predict some scored tokens (they stand one position before them).

    Args:
        logits_BSV: Of the padded batch.
        batch: Rows of it, with their items.
        places: Per item, which of its scored tokens.
    """
    at = [
        (row, item.first_target - 1 + place) for (row, item), part in zip(batch, places, strict=True) for place in part
    ]
    rows, positions = torch.tensor(at, device=logits_BSV.device).reshape(-1, 2).unbind(dim=1)
    return logits_BSV[rows, positions].float()


def reference_rows(logits_BSV: torch.Tensor, batch: Sequence[Item], kl_positions: int) -> dict[int, torch.Tensor]:
    """The reference model's distributions at the KL positions, as small as they can be kept.

    Args:
        logits_BSV: Float [B, S, V] of `pad(batch, ...)`.
        batch: The items; those not to be compared are left out.
        kl_positions: As in `kl_rows`.

    Returns:
        {Item.index: FP16 [P, V] on the CPU}, each row shifted to maximum 0: FP16 is finest near 0, so the likely tokens
        keep the most digits and the first choice stays the first choice. `score_batch` normalises.
    """
    rows = {}
    compared = [(row, item) for row, item in enumerate(batch) if item.compared]
    for part in _pieces(compared):
        places = [kl_rows(item, kl_positions) for _, item in part]
        logits = _rows(logits_BSV, part, places)
        kept = (logits - logits.amax(dim=-1, keepdim=True)).half().cpu()
        for (_, item), piece in zip(part, kept.split([len(place) for place in places]), strict=True):
            rows[item.index] = piece
    return rows


def score_batch(
    logits_BSV: torch.Tensor,
    batch: Sequence[Item],
    *,
    reference: dict[int, torch.Tensor] | None,
    kl_positions: int,
    decode: Callable[[list[int]], str] | None = None,
) -> list[Score]:
    """Score items from logits; softmax in FP32, on the scored rows of a few items at a time.

    Args:
        logits_BSV: Float [B, S, V] of `pad(batch, ...)`.
        batch: The items.
        reference: {Item.index: FP16 [P, V]} from `reference_rows` with the same kl_positions, or None.
        kl_positions: As in `kl_rows`; 0 means no KL.
        decode: Token ids -> text, for Score.output; None leaves it out.

    Returns:
        One Score per item, in the batch's order.

    Raises:
        UserError: the reference lacks an item or was made with other kl_positions or another vocabulary.
    """
    scores = []
    for part in _pieces(list(enumerate(batch))):
        targets = [item.tokens[item.first_target :] for _, item in part]
        sizes = [len(target) for target in targets]
        logprobs_RV = _rows(logits_BSV, part, [range(size) for size in sizes]).log_softmax(dim=-1)
        flat = torch.tensor([token for target in targets for token in target], device=logits_BSV.device)
        picked = logprobs_RV.gather(-1, flat[:, None])[:, 0].double().tolist()
        choices = logprobs_RV.argmax(dim=-1).tolist()
        compared = {}
        if reference is not None and kl_positions:
            compared = _compare(logprobs_RV, part, reference, kl_positions)
        start = 0
        for (_, item), target, size in zip(part, targets, sizes, strict=True):
            end, mine = start + size, choices[start : start + size]
            kl_at, agreement = compared.get(item.index, (None, None))
            scores.append(
                Score(
                    item=item.index,
                    loglikelihood=math.fsum(picked[start:end]),
                    tokens=size,
                    bytes=item.bytes,
                    correct=tuple(mine) == target,
                    content=item.content,
                    kl=None if kl_at is None else math.fsum(kl_at) / len(kl_at),
                    agreement=agreement,
                    kl_at=kl_at,
                    output=decode(mine[:OUTPUT_TOKENS]) if decode else None,
                )
            )
            start = end
    return scores


def _pieces(batch: Sequence[tuple[int, Item]]) -> list[list[tuple[int, Item]]]:
    """Items in groups of at most ROWS scored tokens, or of one."""
    pieces: list[list[tuple[int, Item]]] = []
    room = 0
    for row, item in batch:
        scored = len(item.tokens) - item.first_target
        if not pieces or scored > room:
            pieces.append([])
            room = ROWS
        pieces[-1].append((row, item))
        room -= scored
    return pieces


def _compare(
    logprobs_RV: torch.Tensor,
    batch: Sequence[tuple[int, Item]],
    reference: dict[int, torch.Tensor],
    kl_positions: int,
) -> dict[int, tuple[list[float], float]]:
    """Item.index -> KL at each KL position in nats, and the share of equal first choices."""
    at, expected, items, start = [], [], [], 0
    for _, item in batch:
        if item.compared:
            places = kl_rows(item, kl_positions)
            rows, shape = reference.get(item.index), (len(places), logprobs_RV.shape[1])
            if rows is None or rows.shape != shape:
                kept = "missing" if rows is None else f"of shape {tuple(rows.shape)}, not {shape}"
                raise UserError(f"item {item.index}: its BF16 reference is {kept}; evaluate stage bf16 again")
            at += [start + place for place in places]
            expected.append(rows)
            items.append((item.index, len(places)))
        start += len(item.tokens) - item.first_target
    if not items:
        return {}
    mine_PV = logprobs_RV[torch.tensor(at, device=logprobs_RV.device)]
    expected_PV = torch.cat(expected).to(mine_PV.device).float().log_softmax(dim=-1)
    kl = (expected_PV.exp() * (expected_PV - mine_PV)).double().sum(dim=-1).tolist()
    same = (expected_PV.argmax(dim=-1) == mine_PV.argmax(dim=-1)).tolist()
    compared, start = {}, 0
    for index, size in items:
        end = start + size
        compared[index] = (kl[start:end], sum(same[start:end]) / size)
        start = end
    return compared


def summarize(task: Task, scores: Sequence[Score]) -> dict[str, float]:
    """A task's metrics from its items.

    Args:
        task: Decides the metrics.
        scores: One per item.

    Returns:
        n (items), perplexity, bits_per_byte; continuation tasks: accuracy in 0..1. perplexity is exp of the mean
        negative log-likelihood per item for continuation tasks (as LAMBADA reports it) and per token for texts.
        lm_eval tasks: their own metrics. With a reference: kl (nats) and agreement (0..1), means over items. Where
        text was generated: output_tokens (mean length) and cut (share of outputs that ended at the limit).

    Raises:
        UserError: no items, or a score that is not finite.
    """
    if not scores:
        raise UserError(f"task {task.name}: no scores; a task without items cannot be judged")
    for score in scores:
        values = [score.loglikelihood or 0.0, score.kl or 0.0, score.agreement or 0.0]
        if not all(math.isfinite(value) for value in values):
            raise UserError(
                f"task {task.name}: item {score.item} has loglikelihood {score.loglikelihood} and kl {score.kl}: the "
                "model gives non-finite logits; lower train.learning_rate or check the weights"
            )
    metrics: dict[str, float] = {"n": len(scores)}
    total = math.fsum(score.loglikelihood or 0.0 for score in scores)
    if task.kind == TaskKind.continuation:
        metrics["accuracy"] = sum(bool(score.correct) for score in scores) / len(scores)
        metrics["perplexity"] = _exp(-total / len(scores))
    elif task.kind == TaskKind.text:
        metrics["perplexity"] = _exp(-total / sum(score.tokens or 0 for score in scores))
    else:
        metrics |= _own_metrics(task, scores)
    scored_bytes = sum(score.bytes or 0 for score in scores)
    if scored_bytes:
        metrics["bits_per_byte"] = -total / math.log(2) / scored_bytes
    return metrics | _against_reference(task, scores) | _lengths(scores)


def _own_metrics(task: Task, scores: Sequence[Score]) -> dict[str, float]:
    names = list(scores[0].metrics or {})
    if not names or any(list(score.metrics or {}) != names for score in scores):
        raise UserError(f"task {task.name}: not every item has the metrics {names}; evaluate again")
    return {name: aggregate(name, [(score.metrics or {})[name] for score in scores]) for name in names}


def _against_reference(task: Task, scores: Sequence[Score]) -> dict[str, float]:
    compared = [score for score in scores if score.kl is not None]
    if not compared:
        return {}
    if len(compared) < len(scores):
        raise UserError(f"task {task.name}: only {len(compared)} of {len(scores)} items were compared with BF16")
    return {
        "kl": math.fsum(score.kl or 0.0 for score in compared) / len(compared),
        "agreement": math.fsum(score.agreement or 0.0 for score in compared) / len(compared),
    }


def _lengths(scores: Sequence[Score]) -> dict[str, float]:
    generated = [score.output_tokens for score in scores if score.output_tokens is not None]
    if not generated:
        return {}
    return {
        "output_tokens": sum(generated) / len(generated),
        "cut": sum(bool(score.cut) for score in scores) / len(generated),
    }


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # beyond FP64, which JSON could not hold; e^700 says the same


def write_scores(path: Path, scores: Sequence[Score]) -> None:
    """One JSON object per line and item, floats with all their digits.

    Raises:
        UserError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text("".join(json.dumps(asdict(score), allow_nan=False) + "\n" for score in scores))
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); free space or choose another run.dir"
        ) from error
