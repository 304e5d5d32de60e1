"""learned_scales.py on a GPU: one pass over a weight each for rounding and for the gradient of its block scales.

Rounding is bit for bit that of learned_scales.fake; the gradient adds its block's elements in another order. In torch's
own operations both are dozens of small launches per weight, for which a GPU of a small model waits longer than for the
rest of the step.

Shapes: T blocks of a tile, G elements of a block (16 or 32).
"""

# pyright: reportIndexIssue=false

import functools

import torch
import triton
import triton.language as tl

from halfbyte.training import kernels
from halfbyte.training.kernels import ELEMENTS, WARPS, round_e2m1

_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken off again, FP32 is rounded to whole numbers


@triton.jit
def _power_of_two(log2, LEAST: tl.constexpr, MOST: tl.constexpr):
    """2 to the nearest whole number within LEAST .. MOST, FP32 [T]; some number where log2 is NaN."""
    whole = (tl.clamp(log2, LEAST, MOST) + _ROUND) - _ROUND
    return ((tl.where(log2 != log2, 0.0, whole).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _nearest(log2, values_ptr, midpoints_ptr, COUNT: tl.constexpr):
    """values[number of midpoints below log2], FP32 [T]: torch.bucketize as a search by halves."""
    place = tl.zeros_like(log2).to(tl.int32)
    for halving in tl.static_range(7):
        further = place + (64 >> halving)
        midpoint = tl.load(midpoints_ptr + further - 1, mask=further <= COUNT, other=float("inf"))
        place = tl.where(midpoint < log2, further, place)
    return tl.load(values_ptr + place)


@triton.jit
def _steps(
    log2_ptr,
    block,
    blocks,
    values_ptr,
    midpoints_ptr,
    scale_ptr,
    COUNT: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
):
    """learned_scales._steps: FP32 [T], NaN where the parameter is. COUNT = 0: powers of two."""
    log2 = tl.load(log2_ptr + block, mask=block < blocks, other=0.0)
    if COUNT == 0:
        step = _power_of_two(log2, LEAST, MOST)
    else:
        step = tl.minimum(_nearest(log2, values_ptr, midpoints_ptr, COUNT), MOST) * tl.load(scale_ptr)
    return tl.where(log2 != log2, log2, step)


@triton.jit
def _fake(
    w_ptr,
    log2_ptr,
    out_ptr,
    values_ptr,
    midpoints_ptr,
    scale_ptr,
    blocks,
    COUNT: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    T: tl.constexpr,
    G: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    step = _steps(log2_ptr, block, blocks, values_ptr, midpoints_ptr, scale_ptr, COUNT, LEAST, MOST)[:, None]
    at, inside = block[:, None] * G + tl.arange(0, G)[None, :], (block < blocks)[:, None]
    w = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.div_rn(w, tl.broadcast_to(step, (T, G)))
    rounded = round_e2m1(tl.clamp(v, -6.0, 6.0)) * step
    tl.store(out_ptr + at, tl.where(w != w, w, rounded).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gradient(
    w_ptr,
    grad_ptr,
    log2_ptr,
    out_ptr,
    values_ptr,
    midpoints_ptr,
    scale_ptr,
    root,
    blocks,
    COUNT: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    T: tl.constexpr,
    G: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    step = _steps(log2_ptr, block, blocks, values_ptr, midpoints_ptr, scale_ptr, COUNT, LEAST, MOST)[:, None]
    at, inside = block[:, None] * G + tl.arange(0, G)[None, :], (block < blocks)[:, None]
    v = tl.div_rn(tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32), tl.broadcast_to(step, (T, G)))
    q = round_e2m1(tl.clamp(v, -6.0, 6.0))
    slope = tl.where(tl.abs(v) <= 6.0, q - v, tl.where(v != v, v, q))
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + block, tl.sum(grad * slope, axis=1) / root, mask=block < blocks)


@functools.cache
def _tables(values: tuple[float, ...], midpoints: tuple[float, ...], device: torch.device) -> tuple[torch.Tensor, ...]:
    return torch.tensor(values, device=device), torch.tensor(midpoints, device=device)


def supports(w: torch.Tensor, log2: torch.Tensor) -> bool:
    """Whether the kernels take a weight: on a GPU, 16- or 32-bit floats, and logarithms in FP32."""
    return w.is_cuda and w.dtype in (torch.float32, torch.bfloat16, torch.float16) and log2.dtype is torch.float32


def fake(
    w: torch.Tensor,
    log2: torch.Tensor,
    scale_2: torch.Tensor | None,
    *,
    block: int,
    values: tuple[float, ...],
    midpoints: tuple[float, ...],
    limits: tuple[float, float],
) -> torch.Tensor:
    """learned_scales.fake.

    Args:
        w: [N, K] on a CUDA device, see supports; K a multiple of the block.
        log2: FP32 [N, K / block], the same device.
        scale_2: FP32 [] scale per tensor, the same device; None for powers of two.
        block: Elements that share a scale.
        values: The numbers that a block scale can be, ascending, at most 128; none: powers of two.
        midpoints: log2 of what lies between them, one fewer, as FP32 numbers.
        limits: Of the scale; of its exponent for powers of two.

    Returns:
        Contiguous, w's shape and dtype.
    """
    w, log2 = w.contiguous(), log2.contiguous()
    out, tables = torch.empty_like(w), _tables(values, midpoints, w.device)
    if blocks := log2.numel():
        kernels.launcher(_fake, _grid(blocks, block))(
            *(w, log2, out, *tables, scale_2, blocks), **_constants(block, len(midpoints), limits), num_warps=WARPS
        )
    return out


def gradient(
    w: torch.Tensor,
    grad: torch.Tensor,
    log2: torch.Tensor,
    scale_2: torch.Tensor | None,
    *,
    root: float,
    block: int,
    values: tuple[float, ...],
    midpoints: tuple[float, ...],
    limits: tuple[float, float],
) -> torch.Tensor:
    """learned_scales.gradient.

    Args:
        w: As in fake.
        grad: FP32 [N, K], gradient of the rounded weight, the same device.
        log2: As in fake.
        scale_2: As in fake.
        root: What the sums are divided by.
        block: As in fake.
        values: As in fake.
        midpoints: As in fake.
        limits: As in fake.

    Returns:
        FP32, log2's shape.
    """
    w, grad, log2 = w.contiguous(), grad.contiguous(), log2.contiguous()
    out, tables = torch.empty_like(log2), _tables(values, midpoints, w.device)
    if blocks := log2.numel():
        kernels.launcher(_gradient, _grid(blocks, block))(
            *(w, grad, log2, out, *tables, scale_2, root, blocks),
            **_constants(block, len(midpoints), limits),
            num_warps=WARPS,
        )
    return out


def _grid(blocks: int, block: int) -> tuple[int]:
    return (-(-blocks // (ELEMENTS // block)),)


def _constants(block: int, count: int, limits: tuple[float, float]) -> dict[str, float | bool]:
    least, most = limits
    tile = {"T": ELEMENTS // block, "G": block, "enable_fp_fusion": False}
    return tile | {"COUNT": count, "LEAST": least, "MOST": most}
