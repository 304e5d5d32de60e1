"""Losses per token: cross-entropy of QAT comes from Megatron; the divergences of QAD are here. Top-k: topk.py.

QAD trains the FP4 student (q) towards the BF16 teacher (p) over the full next-token distribution. Under tensor
parallelism every rank holds V/tp columns of both logits; only row maxima and sums cross ranks. With L = log p - log q
and z the student's logits divided by the temperature:

    divergence       value per token                           gradient by z
    forward_kl       sum p L                                   q - p
    reverse_kl       -sum q L                                  q (g - sum q g), g = -L
    jensen_shannon   b KL(p || m) + (1-b) KL(q || m)           q (g - sum q g), g = (1-b) log(q / m)
                     with m = b p + (1-b) q

forward_kl is arXiv 2601.20088; the generalised Jensen-Shannon divergence is arXiv 2306.13649, equation 1.
Shapes: B rows, S sequence, V vocabulary; R rows of one chunk, C columns of this rank.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from halfbyte.training.config_distill import Divergence
from halfbyte.training.data import MicroBatch

CHUNK = 1 << 25
"""Elements of one FP32 temporary (128 MiB): a micro-batch's logits may have twenty times as many."""

type Group = dist.ProcessGroup | None
"""The processes that share the columns; None if each has all of them."""
type Rule = Callable[[torch.Tensor, torch.Tensor, Group], tuple[torch.Tensor, torch.Tensor]]
"""(log q, log p, both [R, C] and free to be overwritten) -> value [R], gradient by z [R, C]."""


def cross_entropy(loss: torch.Tensor, batch: MicroBatch, index: int) -> torch.Tensor:
    """Megatron's output with labels is the cross-entropy per token already: [B, S] -> [B, S]."""
    return loss


def distillation(
    student: torch.Tensor,
    teacher: torch.Tensor,
    group: Group,
    temperature: float = 1.0,
    loss: Divergence = Divergence.forward_kl,
    beta: float = 0.5,
) -> torch.Tensor:
    """Divergence of student and teacher per token, in nats, times temperature^2 so that gradients keep their size.

    Args:
        student: [B, S, V/tp] logits, any float dtype, finite; carries the gradient.
        teacher: [B, S, V/tp] logits of the BF16 model, no gradient.
        group: Process group of the vocabulary shards; None if there is one shard.
        temperature: Divides both logits.
        loss: Which divergence.
        beta: The teacher's weight in jensen_shannon's mixture, between 0 and 1.

    Returns:
        FP32 [B, S]; FP64 for FP64 logits.
    """
    if student.is_cuda and group is not None and loss is Divergence.forward_kl:
        from halfbyte.training import fused_losses  # Triton comes with torch's CUDA builds only

        return fused_losses.divergence(student, teacher, group, temperature) * temperature**2
    rule = _RULES[loss] if loss is not Divergence.jensen_shannon else _jensen_shannon(beta)
    return _Divergence.apply(student, teacher, rule, temperature, group) * temperature**2


class _Divergence(torch.autograd.Function):
    """The value, and its gradient kept in the student's dtype for the backward pass."""

    @staticmethod
    def forward(ctx, student, teacher, rule: Rule, temperature: float, group: Group) -> torch.Tensor:
        value, slope = value_and_slope(student.flatten(0, -2), teacher.flatten(0, -2), rule, temperature, group)
        ctx.save_for_backward(slope.view(student.shape))
        return value.view(student.shape[:-1])

    @staticmethod
    def backward(ctx, grad: torch.Tensor):  # type: ignore[override]
        (slope,) = ctx.saved_tensors
        return grad.unsqueeze(-1).to(slope.dtype) * slope, None, None, None, None


def value_and_slope(
    student: torch.Tensor, teacher: torch.Tensor, rule: Rule, temperature: float, group: Group
) -> tuple[torch.Tensor, torch.Tensor]:
    """All arithmetic of a divergence over the full vocabulary, in one place that a fused kernel can take.

    Args:
        student: [T, V/tp] logits.
        teacher: [T, V/tp] logits.
        rule: The divergence of two distributions.
        temperature: Divides both logits.
        group: Process group of the vocabulary shards.

    Returns:
        Value [T] (FP32, or FP64 for FP64 logits) and its gradient by the student's logits, [T, V/tp], student's dtype.
    """
    slope = torch.empty_like(student)
    value = torch.empty(len(student), dtype=compute_dtype(student), device=student.device)
    for rows in row_chunks(student):
        log_q = _log_softmax(scaled(student[rows], temperature), group)
        log_p = _log_softmax(scaled(teacher[rows], temperature), group)
        value[rows], by_z = rule(log_q, log_p, group)
        slope[rows] = by_z if temperature == 1 else by_z.div_(temperature)
    return value, slope


def compute_dtype(logits: torch.Tensor) -> torch.dtype:
    """FP32, or FP64 for FP64 logits."""
    return torch.float64 if logits.dtype is torch.float64 else torch.float32


def row_chunks(logits: torch.Tensor) -> Iterator[slice]:
    """Slices of the first dimension of [T, C] logits with at most CHUNK elements each (and one row at least)."""
    step = max(1, CHUNK // logits.shape[-1])
    return (slice(start, start + step) for start in range(0, len(logits), step))


def scaled(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits divided by the temperature in the compute dtype; the logits themselves if nothing changes."""
    x = logits.to(compute_dtype(logits))
    return x if temperature == 1 else x / temperature


def all_reduce(x: torch.Tensor, group: Group, op=dist.ReduceOp.SUM) -> torch.Tensor:
    """Reduce over the ranks of the vocabulary, in place; x as it is without a group."""
    if group is not None:
        dist.all_reduce(x, op=op, group=group)
    return x


def _log_softmax(logits: torch.Tensor, group: Group) -> torch.Tensor:
    """Log-softmax of rows whose columns are spread over `group`; a new tensor."""
    top = all_reduce(logits.amax(-1, keepdim=True), group, dist.ReduceOp.MAX)
    shifted = logits - top
    total = all_reduce(shifted.exp().sum(-1, keepdim=True), group)
    return shifted.sub_(total.log_())


def _forward_kl(log_q: torch.Tensor, log_p: torch.Tensor, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    p = log_p.exp()
    value = all_reduce(log_p.sub_(log_q).mul_(p).sum(-1), group)
    return value, log_q.exp_().sub_(p)


def _reverse_kl(log_q: torch.Tensor, log_p: torch.Tensor, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    q = log_q.exp()
    value = all_reduce(log_q.sub_(log_p).mul_(q).sum(-1), group)  # log_q is q g from here on
    return value, log_q.sub_(q.mul_(value.unsqueeze(-1)))


def _jensen_shannon(beta: float) -> Rule:
    def rule(log_q: torch.Tensor, log_p: torch.Tensor, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        of_teacher = (log_p - log_m).mul_(log_p.exp_()).sum(-1).mul_(beta)
        q = log_q.exp()
        q_g = log_q.sub_(log_m).mul_(q).mul_(1 - beta)
        sums = all_reduce(torch.stack([of_teacher, q_g.sum(-1)]), group)
        return sums[0] + sums[1], q_g.sub_(q.mul_(sums[1].unsqueeze(-1)))

    return rule


_RULES: dict[Divergence, Rule] = {Divergence.forward_kl: _forward_kl, Divergence.reverse_kl: _reverse_kl}
