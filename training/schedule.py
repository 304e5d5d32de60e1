"""Megatron's pipeline schedule as two plain functions: train on, or collect from, a list of micro-batches.

Every pipeline stage walks the same micro-batches: data is a pure function of (seed, step), so each rank builds its own
copy and nothing but activations crosses a stage border. Shapes: B micro-batch rows, S sequence, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from halfbyte.training import typed
from halfbyte.training.data import MicroBatch

Loss = Callable[[torch.Tensor, MicroBatch, int], torch.Tensor]
"""(model output, its micro-batch, its index) -> loss per token [B, S]."""
Forward = Callable[[torch.nn.Module, MicroBatch, int], torch.Tensor]
"""(pipeline stage, micro-batch, its index) -> the stage's output."""


@dataclass(frozen=True)
class Part:
    """The loss of one micro-batch.

    Attributes:
        loss: [] sum over the tokens that carry loss; has the gradient.
        tokens: int32 [] how many they are.
        total: FP64 [] `loss`, without a gradient.
    """

    loss: torch.Tensor
    tokens: torch.Tensor
    total: torch.Tensor


def part_of(loss: torch.Tensor, batch: MicroBatch) -> Part:
    """Sum a loss per token [B, S] where the micro-batch carries loss."""
    masked = loss * batch.loss_mask
    return Part(masked.sum(), batch.loss_mask.sum().to(torch.int32), masked.detach().double().sum())


@dataclass(frozen=True)
class StepLoss:
    """The loss of one global batch, the same on every rank.

    Attributes:
        mean: Sum over tokens divided by their number, FP64 arithmetic.
        tokens: Tokens that carry loss.
        own: FP64 [] the sum over this rank's tokens, on the last pipeline stage; tells whose loss is not finite.
    """

    mean: float
    tokens: int
    own: torch.Tensor


def token_batch(tokens: torch.Tensor) -> MicroBatch:
    """A micro-batch for forward passes only: int64 [B, S] tokens, no labels worth the name."""
    return MicroBatch(tokens, tokens, torch.ones(tokens.shape, device=tokens.device), None)


def attention_mask(batch: MicroBatch) -> torch.Tensor | None:
    """None (causal) or bool [B, 1, S, S]: causal and inside one document, from the segment numbers [B, S]."""
    if batch.segments is None:
        return None
    same = batch.segments[:, None, :, None] == batch.segments[:, None, None, :]
    return same.tril()


def positions(batch: MicroBatch) -> torch.Tensor:
    """int64 [B, S]: 0, 1, 2... in every row."""
    return torch.arange(batch.tokens.shape[1], device=batch.tokens.device).expand_as(batch.tokens)


def forward(model: torch.nn.Module, batch: MicroBatch, labels: torch.Tensor | None) -> torch.Tensor:
    """What a pipeline stage makes of a micro-batch: logits [B, S, V/tp] or, with labels, the cross-entropy [B, S]."""
    return model(batch.tokens, positions(batch), attention_mask(batch), labels=labels)


def forward_only(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Logits [B, S, V/tp] of one micro-batch without a graph, where there is no pipeline: not through the schedule."""
    with torch.no_grad():
        return forward(model, batch, None)


def train_batch(
    model: torch.nn.Module,
    batches: Sequence[MicroBatch],
    loss: Loss,
    *,
    needs_logits: bool,
    call: Forward | None = None,
) -> StepLoss:
    """Forward and backward of one rank's share of a global batch; gradients are left in the DDP buffers.

    Args:
        model: The DDP-wrapped pipeline stage.
        batches: This data-parallel rank's micro-batches, equal shapes, on the model's device.
        loss: Loss per token on the last stage.
        needs_logits: Whether `loss` takes the logits [B, S, V/tp]; else the model's own cross-entropy [B, S].
        call: How a stage is called, where that was recorded (stage_graphs.py).

    Returns:
        The loss over all ranks' tokens.
    """

    def forward_step(data: Any, stage: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        index, batch = next(data)
        out = call(stage, batch, index) if call else forward(stage, batch, None if needs_logits else batch.labels)

        def reduce(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Part]:
            part = part_of(loss(output, batch, index), batch)
            return part.loss, part.tokens, Part(part.loss.detach(), part.tokens, part.total)

        return out, reduce

    done = _run(model, batches, forward_step, forward_only=False)
    total = torch.zeros(2, dtype=torch.float64, device=batches[0].tokens.device)
    for part in done:
        total += torch.stack([part.total, part.tokens.double()])
    return step_loss(total)


def step_loss(total: torch.Tensor) -> StepLoss:
    """The loss of a global batch from each rank's FP64 [2] sum of losses and number of tokens; collective.

    The last stage knows its own tokens: sum over data-parallel ranks, then tell the other stages.
    """
    own = total[0].clone()
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    group = typed.pipeline_group()
    dist.broadcast(total, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    if total[1] == 0:
        return StepLoss(float("nan"), 0, own)
    return StepLoss(float(total[0] / total[1]), int(total[1]), own)


def collect(
    model: torch.nn.Module,
    batches: Sequence[MicroBatch],
    take: Callable[[torch.Tensor, int], Any] | None,
    call: Forward | None = None,
) -> list[Any]:
    """Forward pass only; the last stage's logits go through `take`.

    Args:
        model: The pipeline stage, wrapped or not.
        batches: Micro-batches of equal shapes.
        take: (logits [B, S, V/tp], index of the micro-batch) -> anything; None drops the logits.
        call: How a stage is called, where plain calls will not do (decoding with a cache).

    Returns:
        What `take` returned, in order, on the last pipeline stage; an empty list elsewhere.
    """

    def forward_step(data: Any, stage: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        index, batch = next(data)
        out = call(stage, batch, index) if call else forward(stage, batch, None)
        return out, lambda logits, non_loss_data=True: take(logits, index) if take else None

    with torch.no_grad():
        return list(_run(model, batches, forward_step, forward_only=True, collect_non_loss_data=True))


def _run(model: torch.nn.Module, batches: Sequence[MicroBatch], forward_step: Callable, **mode: Any) -> list[Any]:
    rows, length = batches[0].tokens.shape
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(enumerate(batches)),
        model=[model],
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=rows,
        **mode,
    )
