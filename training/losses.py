"""Losses per token: cross-entropy comes from Megatron; the distillation loss of QAD is here.

QAD trains the FP4 student towards the BF16 model's distribution: forward KL(teacher || student) of the full next-token
distribution (arXiv 2601.20088). Under tensor parallelism every rank holds V/tp columns of both logits; only the row
maxima and sums cross ranks. Shapes: B rows, S sequence, V vocabulary.
"""

import torch
import torch.distributed as dist

from halfbyte.training.data import MicroBatch


def cross_entropy(loss: torch.Tensor, batch: MicroBatch, index: int) -> torch.Tensor:
    """Megatron's output with labels is the cross-entropy per token already: [B, S] -> [B, S]."""
    return loss


class _VocabParallelKL(torch.autograd.Function):
    """KL per token over vocabulary shards; its gradient is (softmax(student) - softmax(teacher)) / T."""

    @staticmethod
    def forward(ctx, student: torch.Tensor, teacher: torch.Tensor, group, temperature: float) -> torch.Tensor:
        log_s = _log_softmax(student.float() / temperature, group)
        log_t = _log_softmax(teacher.float() / temperature, group)
        p_t = log_t.exp()
        kl = (p_t * (log_t - log_s)).sum(-1)
        dist.all_reduce(kl, group=group)
        ctx.save_for_backward(log_s.exp_().sub_(p_t).div_(temperature).to(student.dtype))
        return kl

    @staticmethod
    def backward(ctx, grad: torch.Tensor):  # type: ignore[override]
        (slope,) = ctx.saved_tensors
        return grad.unsqueeze(-1).to(slope.dtype) * slope, None, None, None


def _log_softmax(logits: torch.Tensor, group) -> torch.Tensor:
    """Log-softmax of rows whose columns are spread over `group`."""
    top = logits.amax(-1, keepdim=True)
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    shifted = logits - top
    total = shifted.exp().sum(-1, keepdim=True)
    dist.all_reduce(total, group=group)
    return shifted - total.log()


def distillation(student: torch.Tensor, teacher: torch.Tensor, group, temperature: float = 1.0) -> torch.Tensor:
    """Forward KL(teacher || student) per token, in nats, scaled by temperature^2 so that gradients keep their size.

    Args:
        student: [B, S, V/tp] logits, any float dtype; carries the gradient.
        teacher: [B, S, V/tp] logits of the BF16 model, no gradient.
        group: Process group of the vocabulary shards.
        temperature: Divides both logits.

    Returns:
        FP32 [B, S].
    """
    if student.is_cuda:
        from halfbyte.training import fused_losses  # Triton comes with torch's CUDA builds only

        return fused_losses.divergence(student, teacher, group, temperature) * temperature**2
    return _VocabParallelKL.apply(student, teacher, group, temperature) * temperature**2
