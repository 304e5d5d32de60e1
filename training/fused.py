"""RMSNorm, SwiGLU and rotary embedding as one Triton pass each; the first two round for the FP4 or FP8 linear behind.

An activation is then quantized while it is still in registers: no pass over memory is added to BF16 training. The
result is bit for bit that of the same kernel without rounding, followed by numerics.fake_quantize; the gradient passes
straight through the rounding. On the CPU torch's own operations do the same (model.py).

Shapes: R rows (sequence times batch), H hidden or F ffn elements of a row, G elements of a block; S sequence, B batch,
N heads, D head dimension.
"""

# pyright: reportIndexIssue=false, reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl

from halfbyte.training import kernels
from halfbyte.training.kernels import NONE, round_tile

ELEMENTS = 4096
"""Elements of a program's tile: whole rows of RMSNorm (at least one), a part of a row or some rows of SwiGLU."""
BACKWARD_PROGRAMS = 1024
"""Programs of RMSNorm's backward pass; each adds up the weight's gradient over its rows. Fixed, so that sums are."""


@triton.jit
def _round_rows(y, scale_ptr, RULE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, G: tl.constexpr):
    """FP32 [ROWS, COLUMNS] rounded in blocks of G neighbours."""
    if RULE == NONE:
        return y
    T: tl.constexpr = ROWS * COLUMNS // G
    return tl.reshape(round_tile(tl.reshape(y, (T, G)), scale_ptr, RULE, T), (ROWS, COLUMNS))


@triton.jit
def _norm_forward(
    x_ptr,
    weight_ptr,
    out_ptr,
    rstd_ptr,
    scale_ptr,
    eps,
    R,
    H,
    RULE: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    at = row.to(tl.int64)[:, None] * H + column
    inside = (row < R)[:, None] & (column < H)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / H + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < R)
    weight = tl.load(weight_ptr + column, mask=column < H, other=0.0).to(tl.float32)
    y = (x * rstd[:, None] * weight).to(out_ptr.dtype.element_ty).to(tl.float32)
    y = _round_rows(y, scale_ptr, RULE, ROWS, COLUMNS, G)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward(
    x_ptr,
    weight_ptr,
    rstd_ptr,
    grad_ptr,
    out_ptr,
    partial_ptr,
    R,
    H,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradient of x: rstd (g w - x' mean(g w x')) with x' = x rstd; of the weight, per program: sum of g x'."""
    column = tl.arange(0, COLUMNS)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < H, other=0.0).to(tl.float32)
    partial = tl.zeros((ROWS, COLUMNS), tl.float32)
    stride = H.to(tl.int64)  # more elements than 32 bits can count
    for start in range(tl.program_id(0) * ROWS, R, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < R)[:, None] & (column < H)
        at = row[:, None] * stride + column
        rstd = tl.load(rstd_ptr + row, mask=row < R, other=0.0)[:, None]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * rstd
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        partial += grad * x
        grad = grad * weight
        mean = (tl.sum(grad * x, axis=1) / H)[:, None]
        tl.store(out_ptr + at, (rstd * (grad - x * mean)).to(out_ptr.dtype.element_ty), mask=inside)
    total = tl.sum(partial, axis=0)[None, :]
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * H + column, total, mask=column < H)


@triton.jit
def _swiglu_forward(
    h_ptr,
    out_ptr,
    scale_ptr,
    R,
    F,
    RULE: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < R) & (column < F)
    at = row.to(tl.int64) * 2 * F + column
    gate = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + at + F, mask=inside, other=0.0).to(tl.float32)
    y = (gate / (1.0 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty).to(tl.float32)
    y = _round_rows(y, scale_ptr, RULE, ROWS, COLUMNS, G)
    tl.store(out_ptr + row.to(tl.int64) * F + column, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(h_ptr, grad_ptr, out_ptr, R, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < R) & (column < F)
    at = row.to(tl.int64) * 2 * F + column
    gate = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + at + F, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row.to(tl.int64) * F + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    gate_grad = grad * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(out_ptr + at, gate_grad.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + at + F, (grad * silu).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rope(x_ptr, out_ptr, cos_ptr, sin_ptr, B, N, SIGN: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    """One position of one sequence, all heads: pairs (i, i + D/2) turn by the position's angles."""
    place = tl.program_id(0)
    head, inner = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    at = (place.to(tl.int64) * N + head) * (2 * HALF) + inner
    inside = head < N
    angle = (place // B) * (2 * HALF) + inner
    cos, sin = tl.load(cos_ptr + angle).to(tl.float32), tl.load(sin_ptr + angle).to(tl.float32) * SIGN
    a = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + at + HALF, (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=inside)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, rule: tl.constexpr, scale: torch.Tensor | None
    ) -> torch.Tensor:
        x = x.contiguous()
        hidden = x.shape[-1]
        rows = x.numel() // hidden
        out, rstd = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
        columns = triton.next_power_of_2(hidden)
        tile = {"ROWS": max(1, ELEMENTS // columns), "COLUMNS": columns, "num_warps": 8 if columns > ELEMENTS else 4}
        if rows:
            kernels.launcher(_norm_forward, (-(-rows // tile["ROWS"]),))(
                *(x, weight, out, rstd, scale, eps, rows, hidden),
                **(tile | {"RULE": rule, "G": kernels.width(rule), "enable_fp_fusion": False}),
            )
        ctx.save_for_backward(x, weight, rstd)
        ctx.tile = tile
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):  # type: ignore[override]
        x, weight, rstd = ctx.saved_tensors
        rows, hidden = len(rstd), x.shape[-1]
        out, programs = torch.empty_like(x), min(-(-rows // ctx.tile["ROWS"]), BACKWARD_PROGRAMS)
        partial = torch.empty(programs, hidden, dtype=torch.float32, device=x.device)
        if programs:
            backward = kernels.launcher(_norm_backward, (programs,))
            backward(x, weight, rstd, grad.contiguous(), out, partial, rows, hidden, **ctx.tile)
        return out, partial.sum(0).to(weight.dtype), None, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, rule: tl.constexpr, scale: torch.Tensor | None) -> torch.Tensor:
        h = h.contiguous()
        out = torch.empty(*h.shape[:-1], h.shape[-1] // 2, dtype=h.dtype, device=h.device)
        if out.numel():
            grid, sizes, tile = _part_rows(out)
            rounding = {"RULE": rule, "G": kernels.width(rule), "enable_fp_fusion": False}
            kernels.launcher(_swiglu_forward, grid)(h, out, scale, *sizes, **(tile | rounding))
        ctx.save_for_backward(h)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):  # type: ignore[override]
        (h,) = ctx.saved_tensors
        out = torch.empty_like(h)
        if out.numel():
            grid, sizes, tile = _part_rows(grad)
            kernels.launcher(_swiglu_backward, grid)(h, grad.contiguous(), out, *sizes, **tile)
        return out, None, None


def _part_rows(out: torch.Tensor) -> tuple[tuple[int, int], tuple[int, int], dict[str, int]]:
    """Grid, (rows, columns) and tile for [..., F]: the largest power of two that divides F, so that no lane idles."""
    ffn = out.shape[-1]
    rows, columns = out.numel() // ffn, min(ELEMENTS // 2, max(32, ffn & -ffn))
    tile = {"ROWS": ELEMENTS // 2 // columns, "COLUMNS": columns, "num_warps": 4}
    return (-(-rows // tile["ROWS"]), -(-ffn // columns)), (rows, ffn), tile


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SBND: torch.Tensor, cos_SD: torch.Tensor, sin_SD: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos_SD, sin_SD)
        return _turn(x_SBND, cos_SD, sin_SD, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):  # type: ignore[override]
        cos_SD, sin_SD = ctx.saved_tensors
        return _turn(grad, cos_SD, sin_SD, -1), None, None


def _turn(x_SBND: torch.Tensor, cos_SD: torch.Tensor, sin_SD: torch.Tensor, sign: int) -> torch.Tensor:
    x_SBND = x_SBND.contiguous()
    out = torch.empty_like(x_SBND)
    sequence, batch, heads, width = x_SBND.shape
    tile = {"HEADS": triton.next_power_of_2(heads), "HALF": width // 2, "num_warps": 4 if heads > 8 else 1}
    if out.numel():
        kernels.launcher(_rope, (sequence * batch,))(x_SBND, out, cos_SD, sin_SD, batch, heads, SIGN=sign, **tile)
    return out


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


def rotary(x_SBND: torch.Tensor, cos_SD: torch.Tensor, sin_SD: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (arXiv 2104.09864) with pairs (i, i + D/2), as Llama has them.

    Args:
        x_SBND: [S, B, N, D] BF16, FP16 or FP32 on a CUDA device; D a power of two of at least 2.
        cos_SD: [S, D], cosines of each position's angles; the second half repeats the first.
        sin_SD: [S, D], sines.

    Returns:
        Contiguous [S, B, N, D], x's dtype; computed in FP32.
    """
    return _Rope.apply(x_SBND, cos_SD, sin_SD)
