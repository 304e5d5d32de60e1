"""Cross-entropy and KL divergence over vocabulary shards as one Triton pass forward and one backward.

The forward pass reads every logit once (an online softmax: running maximum and sum), the backward pass reads it again
and writes the gradient in the logits' own type; no FP32 copy of [T, V] exists. Under tensor parallelism a row's maxima
and sums are combined over the ranks in between. Shapes: T tokens, V columns of this rank's vocabulary shard.
"""

# pyright: reportIndexIssue=false

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl

from halfbyte.training import kernels

COLUMNS = 4096
"""Logits per step of a row's loop."""
_LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _entropy_forward(logits_ptr, label_ptr, out_ptr, T, V, COLUMNS: tl.constexpr):
    """Of one row: maximum, sum of exp(x - maximum), and the label's logit (0 where another rank has it)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    top = tl.full((COLUMNS,), _LOWEST, tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, V, COLUMNS):
        at = start + column
        x = tl.load(logits_ptr + row * V + at, mask=at < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, x)
        total = total * tl.exp(top - higher) + tl.exp(x - higher)
        top = higher
    label = tl.load(label_ptr + row)
    inside = (label >= 0) & (label < V)
    picked = tl.load(logits_ptr + row * V + tl.where(inside, label, 0)).to(tl.float32)
    highest = tl.max(top, axis=0)
    tl.store(out_ptr + row, highest)
    tl.store(out_ptr + T + row, tl.sum(total * tl.exp(top - highest), axis=0))
    tl.store(out_ptr + 2 * T + row, tl.where(inside, picked, 0.0))


@triton.jit
def _entropy_backward(logits_ptr, label_ptr, norm_ptr, grad_ptr, out_ptr, V, COLUMNS: tl.constexpr):
    """(softmax - one-hot) times the row's gradient; norm is the row's log of the sum of exponentials."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    x = tl.load(logits_ptr + row * V + at, mask=at < V, other=float("-inf")).to(tl.float32)
    slope = tl.exp(x - tl.load(norm_ptr + row)) - tl.where(at == tl.load(label_ptr + row), 1.0, 0.0)
    slope = slope * tl.load(grad_ptr + row)
    tl.store(out_ptr + row * V + at, slope.to(out_ptr.dtype.element_ty), mask=at < V)


@triton.jit
def _divergence_forward(student_ptr, teacher_ptr, out_ptr, inverse, T, V, COLUMNS: tl.constexpr):
    """Of one row: maximum and sum of both, and the sum of exp(t - maximum) (t - s)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    top_s, top_t = tl.full((COLUMNS,), _LOWEST, tl.float32), tl.full((COLUMNS,), _LOWEST, tl.float32)
    total_s, total_t = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    cross = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, V, COLUMNS):
        at = start + column
        s = tl.load(student_ptr + row * V + at, mask=at < V, other=_LOWEST).to(tl.float32) * inverse
        t = tl.load(teacher_ptr + row * V + at, mask=at < V, other=_LOWEST).to(tl.float32) * inverse
        higher = tl.maximum(top_s, s)
        total_s = total_s * tl.exp(top_s - higher) + tl.where(at < V, tl.exp(s - higher), 0.0)
        top_s = higher
        higher = tl.maximum(top_t, t)
        shrink, weight = tl.exp(top_t - higher), tl.where(at < V, tl.exp(t - higher), 0.0)
        total_t = total_t * shrink + weight
        cross = cross * shrink + tl.where(weight > 0, weight * (t - s), 0.0)
        top_t = higher
    highest_s, highest_t = tl.max(top_s, axis=0), tl.max(top_t, axis=0)
    shrink = tl.exp(top_t - highest_t)
    tl.store(out_ptr + row, highest_s)
    tl.store(out_ptr + T + row, highest_t)
    tl.store(out_ptr + 2 * T + row, tl.sum(total_s * tl.exp(top_s - highest_s), axis=0))
    tl.store(out_ptr + 3 * T + row, tl.sum(total_t * shrink, axis=0))
    tl.store(out_ptr + 4 * T + row, tl.sum(cross * shrink, axis=0))


@triton.jit
def _divergence_backward(
    student_ptr, teacher_ptr, norm_s_ptr, norm_t_ptr, grad_ptr, out_ptr, inverse, V, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    s = tl.load(student_ptr + row * V + at, mask=at < V, other=0.0).to(tl.float32) * inverse
    t = tl.load(teacher_ptr + row * V + at, mask=at < V, other=0.0).to(tl.float32) * inverse
    slope = tl.exp(s - tl.load(norm_s_ptr + row)) - tl.exp(t - tl.load(norm_t_ptr + row))
    slope = slope * (tl.load(grad_ptr + row) * inverse)
    tl.store(out_ptr + row * V + at, slope.to(out_ptr.dtype.element_ty), mask=at < V)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, group: Any) -> torch.Tensor:
        logits = logits.contiguous()
        vocab = logits.shape[-1]
        tokens = logits.numel() // vocab
        labels = labels.reshape(-1) - dist.get_rank(group) * vocab
        found = torch.empty(3, tokens, dtype=torch.float32, device=logits.device)
        if tokens:
            forward = kernels.launcher(_entropy_forward, (tokens,))
            forward(logits, labels, found, tokens, vocab, COLUMNS=COLUMNS, num_warps=8)
        top, total, picked = found
        total, top = _combine(total, top, group)
        if dist.get_world_size(group) > 1:
            dist.all_reduce(picked, group=group)
        norm = top + total.log()
        ctx.save_for_backward(logits, labels, norm)
        return (norm - picked).view(logits.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):  # type: ignore[override]
        logits, labels, norm = ctx.saved_tensors
        out, vocab = torch.empty_like(logits), logits.shape[-1]
        grid = (len(norm), -(-vocab // COLUMNS))
        if out.numel():
            backward = kernels.launcher(_entropy_backward, grid)
            backward(logits, labels, norm, grad.contiguous(), out, vocab, COLUMNS=COLUMNS, num_warps=8)
        return out, None, None


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor, group: Any, temperature: float) -> torch.Tensor:
        student, teacher = student.contiguous(), teacher.contiguous()
        vocab = student.shape[-1]
        tokens = student.numel() // vocab
        found = torch.empty(5, tokens, dtype=torch.float32, device=student.device)
        ctx.inverse = 1.0 / temperature
        if tokens:
            kernels.launcher(_divergence_forward, (tokens,))(
                student, teacher, found, ctx.inverse, tokens, vocab, COLUMNS=COLUMNS // 2, num_warps=8
            )
        top_s, top_t, total_s, total_t, cross = found
        total_s, top_s = _combine(total_s, top_s, group)
        both, top_t = _combine(torch.stack([total_t, cross]), top_t, group)
        norm_s, norm_t = top_s + total_s.log(), top_t + both[0].log()
        ctx.save_for_backward(student, teacher, norm_s, norm_t)
        return (both[1] / both[0] - norm_t + norm_s).view(student.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):  # type: ignore[override]
        student, teacher, norm_s, norm_t = ctx.saved_tensors
        out, vocab = torch.empty_like(student), student.shape[-1]
        grid = (len(norm_s), -(-vocab // COLUMNS))
        if out.numel():
            kernels.launcher(_divergence_backward, grid)(
                *(student, teacher, norm_s, norm_t, grad.contiguous(), out, ctx.inverse, vocab),
                COLUMNS=COLUMNS,
                num_warps=8,
            )
        return out, None, None, None


def _combine(sums: torch.Tensor, top: torch.Tensor, group: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums relative to each rank's maximum -> sums over all ranks relative to the common maximum, and that."""
    if dist.get_world_size(group) == 1:
        return sums, top
    common = top.clone()
    dist.all_reduce(common, op=dist.ReduceOp.MAX, group=group)
    sums = sums * (top - common).exp()
    dist.all_reduce(sums, group=group)
    return sums, common


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, group: Any) -> torch.Tensor:
    """Cross-entropy per token, nats.

    Args:
        logits: [..., V/tp] BF16, FP16 or FP32 on a CUDA device; carries the gradient.
        labels: int64 [...], token ids of the whole vocabulary.
        group: Process group of the vocabulary shards.

    Returns:
        FP32 [...].
    """
    return _CrossEntropy.apply(logits, labels, group)


def divergence(student: torch.Tensor, teacher: torch.Tensor, group: Any, temperature: float) -> torch.Tensor:
    """Forward KL(softmax(teacher / T) || softmax(student / T)) per token, nats.

    From sums over the vocabulary, with t and s the divided logits: sum p_t (t - s) - log Z_t + log Z_s.

    Args:
        student: [..., V/tp] logits, BF16, FP16 or FP32 on a CUDA device; carries the gradient.
        teacher: [..., V/tp] logits of the same dtype or another, no gradient.
        group: Process group of the vocabulary shards.
        temperature: T.

    Returns:
        FP32 [...].
    """
    return _Divergence.apply(student, teacher, group, temperature)
