"""RMSNorm and SwiGLU as one Triton pass each, which round their output for the FP4 or FP8 linear behind them.

An activation is then quantized while it is still in registers: no pass over memory is added to BF16 training. The
result is bit for bit that of the same kernel without rounding, followed by numerics.fake_quantize; the gradient passes
straight through the rounding. On the CPU, and in float64, torch's own operations do the same.

Shapes: R rows (sequence times batch), H hidden or F ffn elements of a row, T blocks of G elements of a tile.
"""

# pyright: reportIndexIssue=false, reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl

from halfbyte.training import kernels
from halfbyte.training.kernels import NONE, round_tile

BACKWARD_PROGRAMS = 512
"""Programs of RMSNorm's backward pass; each adds up the weight's gradient over its rows. Fixed, so that sums are."""


@triton.jit
def _norm_forward(
    x_ptr, weight_ptr, out_ptr, rstd_ptr, scale_ptr, eps, H, RULE: tl.constexpr, T: tl.constexpr, G: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, T)[:, None] * G + tl.arange(0, G)[None, :]
    inside = column < H
    x = tl.load(x_ptr + row * H + column, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(tl.sum(x * x, axis=1), axis=0) / H + eps)
    tl.store(rstd_ptr + row, rstd)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    y = (x * rstd * weight).to(out_ptr.dtype.element_ty).to(tl.float32)
    y = round_tile(y, scale_ptr, RULE, T)
    tl.store(out_ptr + row * H + column, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward(x_ptr, weight_ptr, rstd_ptr, grad_ptr, out_ptr, partial_ptr, R, H, T: tl.constexpr, G: tl.constexpr):
    """Gradient of x: rstd (g w - x' mean(g w x')) with x' = x rstd; of the weight, per program: sum of g x'."""
    column = tl.arange(0, T)[:, None] * G + tl.arange(0, G)[None, :]
    inside = column < H
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    partial = tl.zeros((T, G), tl.float32)
    stride = H.to(tl.int64)  # more elements than 32 bits can count
    for row in range(tl.program_id(0), R, tl.num_programs(0)):
        at = row * stride + column
        rstd = tl.load(rstd_ptr + row)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * rstd
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        partial += grad * x
        grad = grad * weight
        mean = tl.sum(tl.sum(grad * x, axis=1), axis=0) / H
        tl.store(out_ptr + at, (rstd * (grad - x * mean)).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * H + column, partial, mask=inside)


@triton.jit
def _swiglu_forward(
    h_ptr, out_ptr, scale_ptr, blocks, per_row, F, RULE: tl.constexpr, T: tl.constexpr, G: tl.constexpr
):
    block = tl.program_id(0) * T + tl.arange(0, T)
    inside = (block < blocks)[:, None]
    inner = tl.arange(0, G)[None, :]
    gate_at = ((block // per_row).to(tl.int64) * 2 * F + (block % per_row) * G)[:, None] + inner
    gate = tl.load(h_ptr + gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + gate_at + F, mask=inside, other=0.0).to(tl.float32)
    y = (gate / (1.0 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty).to(tl.float32)
    y = round_tile(y, scale_ptr, RULE, T)
    tl.store(out_ptr + block.to(tl.int64)[:, None] * G + inner, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(h_ptr, grad_ptr, out_ptr, blocks, per_row, F, T: tl.constexpr, G: tl.constexpr):
    block = tl.program_id(0) * T + tl.arange(0, T)
    inside = (block < blocks)[:, None]
    inner = tl.arange(0, G)[None, :]
    gate_at = ((block // per_row).to(tl.int64) * 2 * F + (block % per_row) * G)[:, None] + inner
    gate = tl.load(h_ptr + gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + gate_at + F, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + block.to(tl.int64)[:, None] * G + inner, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    gate_grad = grad * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(out_ptr + gate_at, gate_grad.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + gate_at + F, (grad * silu).to(out_ptr.dtype.element_ty), mask=inside)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, rule: tl.constexpr, scale: torch.Tensor | None
    ) -> torch.Tensor:
        x = x.contiguous()
        hidden = x.shape[-1]
        rows, block = x.numel() // hidden, kernels.width(rule)
        out, rstd = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
        shape = {"T": triton.next_power_of_2(hidden // block), "G": block, "num_warps": _warps(hidden)}
        if rows:
            _norm_forward[(rows,)](x, weight, out, rstd, scale, eps, hidden, RULE=rule, **shape, enable_fp_fusion=False)
        ctx.save_for_backward(x, weight, rstd)
        ctx.shape = shape
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):  # type: ignore[override]
        x, weight, rstd = ctx.saved_tensors
        out, programs = torch.empty_like(x), min(len(rstd), BACKWARD_PROGRAMS)
        partial = torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device)
        if programs:
            _norm_backward[(programs,)](
                x, weight, rstd, grad.contiguous(), out, partial, len(rstd), x.shape[-1], **ctx.shape
            )
        return out, partial.sum(0).to(weight.dtype), None, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, rule: tl.constexpr, scale: torch.Tensor | None) -> torch.Tensor:
        h = h.contiguous()
        out = torch.empty(*h.shape[:-1], h.shape[-1] // 2, dtype=h.dtype, device=h.device)
        grid, sizes, shape = _tiles(out, rule)
        if out.numel():
            _swiglu_forward[grid](h, out, scale, *sizes, RULE=rule, **shape, enable_fp_fusion=False)
        ctx.save_for_backward(h)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):  # type: ignore[override]
        (h,) = ctx.saved_tensors
        out = torch.empty_like(h)
        grid, sizes, shape = _tiles(grad, NONE)
        if out.numel():
            _swiglu_backward[grid](h, grad.contiguous(), out, *sizes, **shape)
        return out, None, None


def _tiles(out: torch.Tensor, rule: tl.constexpr) -> tuple[tuple[int], tuple[int, int, int], dict[str, int]]:
    block, ffn = kernels.width(rule), out.shape[-1]
    tile, blocks = kernels.ELEMENTS // 2 // block, out.numel() // block
    return (triton.cdiv(blocks, tile),), (blocks, ffn // block, ffn), {"T": tile, "G": block, "num_warps": 4}


def _warps(hidden: int) -> int:
    return min(8, max(1, triton.next_power_of_2(hidden) // 1024))


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, rule: tl.constexpr, scale: torch.Tensor | None
) -> torch.Tensor:
    """RMSNorm, x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467), rounded by `rule`.

    Args:
        x: [..., H] BF16, FP16 or FP32 on a CUDA device; H a multiple of the rule's block.
        weight: [H], x's dtype.
        eps: Added to the mean square.
        rule: kernels.rule_of(...) or kernels.NONE.
        scale: FP32 [] scale per tensor of a rule that has one.

    Returns:
        x's shape and dtype: the norm in FP32, rounded to that dtype, then by the rule.
    """
    return _RMSNorm.apply(x, weight, eps, rule, scale)


def swiglu(h: torch.Tensor, rule: tl.constexpr, scale: torch.Tensor | None) -> torch.Tensor:
    """silu(gate) * up of h = [gate, up] (arXiv 2002.05202), rounded by `rule`.

    Args:
        h: [..., 2F] BF16, FP16 or FP32 on a CUDA device; F a multiple of the rule's block.
        rule: kernels.rule_of(...) or kernels.NONE.
        scale: FP32 [] scale per tensor of a rule that has one.

    Returns:
        [..., F], h's dtype: computed in FP32, rounded to that dtype, then by the rule.
    """
    return _SwiGLU.apply(h, rule, scale)
