"""Distillation on the teacher's k likeliest tokens, and one bucket for the probability of all others.

The k tokens are the same on both sides, and the rest is one event, so student and teacher are both whole distributions
over k + 1 events and any divergence between them is a true one (by the data-processing inequality at most that of the
full distributions). Plain top-k losses drop the rest or normalize it away, and have their minimum elsewhere.

Events are held as logits: those of the k tokens, and log-sum-exp of the others. Under tensor parallelism every rank
holds C = V/tp columns and gets all k + 1 events. Shapes: T rows (tokens), R rows of a chunk, k tokens.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from halfbyte.training.config_distill import Divergence
from halfbyte.training.losses import Group, all_reduce, compute_dtype, distillation, row_chunks, scaled

NOTHING = -1e30
"""Logit of an event that cannot happen: finite, so that zero times it is zero."""


@dataclass(frozen=True)
class TopK:
    """What is kept of a teacher's logits.

    Attributes:
        values: [..., k] its logits of the k likeliest tokens, not divided by the temperature, dtype of the logits.
        indices: int32 [..., k] which tokens they are, in the whole vocabulary; the same on every rank.
        tail: FP32 (FP64 for FP64 logits) [...] log-sum-exp of all other logits divided by the temperature.
    """

    values: torch.Tensor
    indices: torch.Tensor
    tail: torch.Tensor


def top_k(teacher: torch.Tensor, k: int, temperature: float, group: Group) -> TopK:
    """Reduce logits to their k likeliest tokens and the rest.

    Args:
        teacher: [..., V/tp] logits, no gradient.
        k: 1 to V. Which of several equal logits are taken is not defined.
        temperature: Divides the logits in the tail.
        group: Process group of the vocabulary shards; None if there is one shard.

    Returns:
        The same on every rank of the group.
    """
    rows = teacher.flatten(0, -2)
    values, indices = rows.topk(min(k, rows.shape[-1]), dim=-1)
    indices = indices + _first_column(rows, group)
    if group is not None:
        candidates = [torch.cat(_all_gather(x, group), dim=-1) for x in (values, indices)]
        values, places = candidates[0].topk(k, dim=-1)
        indices = candidates[1].gather(-1, places)
    tail = torch.cat([_tail(scaled(rows[part], temperature), indices[part], group) for part in row_chunks(rows)])
    shape = teacher.shape[:-1]
    return TopK(values.view(*shape, k), indices.int().view(*shape, k), tail.view(shape))


def top_k_distillation(
    student: torch.Tensor, teacher: TopK, group: Group, temperature: float, loss: Divergence, beta: float
) -> torch.Tensor:
    """losses.distillation over the teacher's k likeliest tokens and the rest.

    Args:
        student: [..., V/tp] logits, any float dtype; carries the gradient.
        teacher: From `top_k` at the same temperature.
        group: Process group of the vocabulary shards; None if there is one shard.
        temperature: Divides both logits.
        loss: Which divergence.
        beta: The teacher's weight in jensen_shannon's mixture, between 0 and 1.

    Returns:
        FP32 [...], in nats times temperature^2; FP64 for FP64 logits.
    """
    events_q = events(student, teacher.indices, temperature, group)
    events_p = torch.cat([scaled(teacher.values, temperature).to(teacher.tail), teacher.tail.unsqueeze(-1)], dim=-1)
    return distillation(events_q, events_p, None, 1.0, loss, beta) * temperature**2


def label_cross_entropy(student: torch.Tensor, labels: torch.Tensor, group: Group) -> torch.Tensor:
    """-log q(label) over vocabulary shards: a distribution over two events, the label and the rest.

    Unlike Megatron's own it keeps no FP32 softmax for the backward pass, only the logits that are there already.

    Args:
        student: [..., V/tp] logits; carries the gradient.
        labels: int64 [...] in the whole vocabulary.
        group: Process group of the vocabulary shards; None if there is one shard.

    Returns:
        FP32 [...], nats; FP64 for FP64 logits.
    """
    return -events(student, labels.unsqueeze(-1), 1.0, group).log_softmax(-1)[..., 0]


def events(student: torch.Tensor, indices: torch.Tensor, temperature: float, group: Group) -> torch.Tensor:
    """Logits of the chosen tokens and of the rest, differentiable; nothing of size V is kept but `student` itself.

    Args:
        student: [..., V/tp] logits.
        indices: int [..., k], distinct in every row, the same on every rank.
        temperature: Divides the logits.
        group: Process group of the vocabulary shards; None if there is one shard.

    Returns:
        FP32 [..., k + 1], the same on every rank; FP64 for FP64 logits.
    """
    return _Events.apply(student, indices, temperature, group)


class _Events(torch.autograd.Function):
    """d event_i / d z_i = 1 for a chosen token, d tail / d z_j = softmax over the others; both divided by T."""

    @staticmethod
    def forward(ctx, student, indices, temperature: float, group: Group) -> torch.Tensor:
        rows, wanted = student.flatten(0, -2), indices.flatten(0, -2)
        out = torch.empty(len(rows), wanted.shape[-1] + 1, dtype=compute_dtype(rows), device=rows.device)
        for part in row_chunks(rows):
            x = scaled(rows[part], temperature)
            local, mine = _columns(x, wanted[part], group)
            out[part, :-1] = all_reduce(x.gather(-1, local).masked_fill_(~mine, 0.0), group)
            out[part, -1] = _tail(x, wanted[part], group)
        ctx.save_for_backward(student, wanted, out)
        ctx.temperature, ctx.group = temperature, group
        return out.view(*student.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):  # type: ignore[override]
        student, wanted, out = ctx.saved_tensors
        rows, by_event = student.flatten(0, -2), grad.flatten(0, -2) / ctx.temperature
        slope = torch.empty_like(rows)
        for part in row_chunks(rows):
            x = scaled(rows[part], ctx.temperature)
            local, mine = _columns(x, wanted[part], ctx.group)
            share = _without(x, local, mine).sub_(out[part, -1:]).exp_().mul_(by_event[part, -1:])
            slope[part] = share.scatter_add_(-1, local, by_event[part, :-1].masked_fill(~mine, 0.0))
        return slope.view(student.shape), None, None, None


def _tail(x: torch.Tensor, indices: torch.Tensor, group: Group) -> torch.Tensor:
    """Log-sum-exp of a row without the chosen tokens: [R] of x [R, C] and indices [R, k]."""
    rest = _without(x, *_columns(x, indices, group))
    # A maximum of its own: next to a likely token the rest may underflow, and its logarithm must not.
    top = all_reduce(rest.amax(-1, keepdim=True).clamp_(min=NOTHING), group, dist.ReduceOp.MAX)
    total = all_reduce(rest.sub_(top).exp_().sum(-1), group)
    return total.log_().add_(top.squeeze(-1)).clamp_(min=NOTHING)


def _without(x: torch.Tensor, local: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
    """A copy of x with -inf at the chosen columns that are this rank's.

    The smaller of x and +inf for all others: they stand at column 0, and a plain scatter would overwrite it.
    """
    infinite = torch.full(local.shape, torch.inf, dtype=x.dtype, device=x.device)
    return x.scatter_reduce(-1, local, infinite.masked_fill_(mine, -torch.inf), "amin")


def _columns(x: torch.Tensor, indices: torch.Tensor, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [R, k] columns of this rank's x [R, C], 0 for those of other ranks, and bool [R, k] which are its own."""
    local = indices.long() - _first_column(x, group)
    mine = (local >= 0) & (local < x.shape[-1])
    return local.masked_fill_(~mine, 0), mine


def _first_column(x: torch.Tensor, group: Group) -> int:
    return 0 if group is None else dist.get_rank(group) * x.shape[-1]


def _all_gather(x: torch.Tensor, group: Group) -> list[torch.Tensor]:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts
