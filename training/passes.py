"""Items through the model under any layout: every rank walks its batches, the first tensor-parallel ranks score.

Every pipeline stage walks the same padded batches; on the last stage the vocabulary shards are gathered and the first
tensor-parallel rank scores. Batches go round the data-parallel ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

from halfbyte.training import scoring, tasks
from halfbyte.training.data import MicroBatch
from halfbyte.training.errors import UserError
from halfbyte.training.generate import Decoder, Output, Prompt
from halfbyte.training.schedule import collect, token_batch

GROUP = 16
"""Most batches that go through the pipeline in one schedule, to fill it; all are padded to one size."""

type Rows = dict[int, torch.Tensor]
"""Item.index -> the reference model's distributions, as `scoring.reference_rows` makes them."""


@dataclass(frozen=True)
class Passes:
    """A model and how items go through it.

    Attributes:
        model: This rank's GPTModel, in evaluation mode.
        device: Where it is.
        tokenizer: The model's tokenizer.
        pad_id: Token that fills the right end of short rows.
        multiple: Padded lengths are multiples of this (sequence parallelism).
        tokens_per_batch: Padded tokens of one forward pass.
        kl_positions: As in `scoring.kl_rows`.
        ends: Token ids that end a generated text.
        vocab: Token ids must lie below it.
    """

    model: torch.nn.Module
    device: torch.device
    tokenizer: Any
    pad_id: int
    multiple: int
    tokens_per_batch: int
    kl_positions: int
    ends: frozenset[int]
    vocab: int

    def score(
        self, items: Sequence[scoring.Item], *, reference: Rows | None, keep: bool
    ) -> tuple[list[scoring.Score], Rows]:
        """Score items; collective over all ranks.

        Args:
            items: The same on every rank.
            reference: The rows to compare with, or None; used on the ranks that score.
            keep: Whether the model's distributions shall become the reference.

        Returns:
            One Score per item, in the order of Item.index, on every rank; the rows to keep of the items scored here.
        """
        kept: Rows = {}
        scores: list[scoring.Score] = []
        decode: Callable[[list[int]], str] = self.tokenizer.decode
        mine = _share(tasks.bucketed(items, self.tokens_per_batch))
        for group in grouped(mine, parallel_state.get_pipeline_model_parallel_world_size()):

            def take(logits: torch.Tensor, index: int, group: list = group) -> None:
                whole = gather_from_tensor_model_parallel_region(logits)
                if scores_here():
                    rows, batch = whole[: len(group[index])], group[index]
                    positions = self.kl_positions
                    scores.extend(
                        scoring.score_batch(rows, batch, reference=reference, kl_positions=positions, decode=decode)
                    )
                    if keep and positions:
                        kept.update(scoring.reference_rows(rows, batch, positions))

            collect(self.model, self._pad(group), take)
        return sorted(_together(scores), key=lambda score: score.item), kept

    def generate(self, prompts: Sequence[Prompt]) -> list[Output]:
        """Continue prompts; collective over all ranks.

        Args:
            prompts: The same on every rank.

        Returns:
            One Output per prompt, in the order of Prompt.index, on every rank.
        """
        for prompt in prompts:
            self.check_vocabulary(f"prompt {prompt.index}", prompt.tokens)

        def decode(ids: list[int]) -> str:
            return self.tokenizer.decode(ids, skip_special_tokens=True)

        decoder = Decoder(self.model, self.device, self.ends, decode)
        room = max((prompt.limit for prompt in prompts), default=0)
        outputs = [o for batch in _share(tasks.bucketed(prompts, self.tokens_per_batch, room)) for o in decoder(batch)]
        speaks = parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.is_pipeline_last_stage()
        return sorted(_together(outputs if speaks else []), key=lambda output: output.index)

    def check_vocabulary(self, what: str, tokens: Sequence[int]) -> None:
        """Refuse token ids that the model has no embedding for.

        Raises:
            UserError: an id is too large; the line names `what`.
        """
        if max(tokens) >= self.vocab:
            raise UserError(
                f"{what}: token id {max(tokens)} is outside the model's vocabulary of {self.vocab}; tokenizer and "
                "weights in model.path do not belong together"
            )

    def _pad(self, group: Sequence[list[scoring.Item]]) -> list[MicroBatch]:
        """Equal [B, S] for all batches of a group: pipeline stages exchange tensors of one size per schedule."""
        rows = max(len(batch) for batch in group)
        padded = [tasks.pad(batch, self.pad_id, self.multiple) for batch in group]
        length = max(tokens.shape[1] for tokens in padded)
        out = []
        for tokens in padded:
            full = torch.full((rows, length), self.pad_id, dtype=torch.int64)
            full[: tokens.shape[0], : tokens.shape[1]] = tokens
            out.append(token_batch(full.to(self.device)))
        return out


def grouped[T: tasks.Tokenized](batches: Sequence[list[T]], stages: int) -> list[list[list[T]]]:
    """Cut a list of batches into groups that go through the pipeline together, for the least time.

    A group of n batches takes the time of (n + stages - 1) B S tokens per stage, B and S being its fullest batch's rows
    and its longest row. The sum is minimal over all ways to cut the list into groups of up to GROUP (by dynamic
    programming); without a pipeline every batch is a group.

    Args:
        batches: From tasks.bucketed.
        stages: Pipeline stages.
    """
    rows = [len(batch) for batch in batches]
    lengths = [max(len(item.tokens) for item in batch) for batch in batches]
    least, cut = [0], [0]  # of the first j batches: their time, and where the last of their groups begins
    for end in range(1, len(batches) + 1):
        times = {
            begin: least[begin] + (end - begin + stages - 1) * max(rows[begin:end]) * max(lengths[begin:end])
            for begin in reversed(range(max(0, end - GROUP), end))
        }
        cut.append(min(times, key=times.__getitem__))  # the smallest group of those that take the same
        least.append(times[cut[-1]])
    groups, end = [], len(batches)
    while end:
        groups.append(list(batches[cut[end] : end]))
        end = cut[end]
    return groups[::-1]


def scores_here() -> bool:
    """Whether this rank holds complete logits and scores them: last pipeline stage, first tensor-parallel rank."""
    return parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0


def _share[X](batches: list[X]) -> list[X]:
    return batches[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]


def _together[X](mine: list[X]) -> list[X]:
    parts: list[list[X]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, mine)
    return [x for part in parts for x in part]
