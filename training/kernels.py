"""FP4 and FP8 fake quantization as one memory-bound Triton pass; bit for bit what numerics.py computes.

A program reads a tile of whole blocks, finds each block's scale, rounds, and writes the tile: 4 bytes of traffic per
BF16 element. No FP8 type and no approximate division is used, so every device that Triton supports gives the same bits:

* The block maximum is an integer maximum over the bits without the sign: NaN has the largest pattern and so survives.
* E4M3 and E2M1 are rounded by adding and subtracting a power of two, which is FP32's own round to nearest even.
* Quotients are correctly rounded at three instructions: q = x r, then q + (x - q s) r with r = 1/s (Markstein 1990,
  IBM Journal of Research and Development 34(1), 111-119), where r costs one division per block.
* Products and sums are never contracted to fused multiply-adds, except where one is written (enable_fp_fusion=False).

The rounding functions work on tiles in registers, so that producers (fused.py) round what they are about to store.
Shapes: T blocks of a tile, G elements of a block (16 or 32).
"""

# pyright: reportIndexIssue=false

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from halfbyte.training.config import BlockScale
from halfbyte.training.formats import Rounding

NONE, NVFP4, FOUR_OVER_SIX, MXFP4, FP8 = (tl.constexpr(i) for i in range(5))
"""How a kernel rounds a tile."""
ELEMENTS, WARPS = 1024, 1
"""Elements and warps per program; measured, see docs/evidence/h200_speed.md."""

_SIGNLESS = tl.constexpr(0x7FFFFFFF)
_EXPONENT = tl.constexpr(0x7F800000)
_MANTISSA = tl.constexpr(0x7FFFFF)
_INFINITY = tl.constexpr(0x7F800000)
_LARGEST = tl.constexpr(3.4028234663852886e38)
_ONE = tl.constexpr(0x3F800000)
_E4M3_SMALLEST_NORMAL = tl.constexpr(0x3C800000)  # FP32 bits of 2^-6
_E2M1_MAGIC = tl.constexpr((22 << 23) | 0x400000)  # rounding.round_e2m1 says why
_E4M3_MAGIC = tl.constexpr((20 << 23) | 0x400000)  # on the bits of 2^e: 1.5 * 2^(e+20), whose ulp is 2^(e-3)


@triton.jit
def _amax_bits(x):
    """Bits of the largest magnitude of each row: int32 [T]; above _INFINITY if the row holds a NaN."""
    return tl.max(x.to(tl.int32, bitcast=True) & _SIGNLESS, axis=1)


@triton.jit
def round_e2m1(y):
    """rounding.round_e2m1 for |y| up to 7."""
    exponent = tl.maximum(y.to(tl.int32, bitcast=True) & _EXPONENT, _ONE)
    magic = (exponent + _E2M1_MAGIC).to(tl.float32, bitcast=True)
    return (y + magic) - magic


@triton.jit
def _round_e4m3(v):
    """Nearest E4M3 value, ties to even, for |v| up to 448; a rounded zero is +0."""
    exponent = tl.maximum(v.to(tl.int32, bitcast=True) & _EXPONENT, _E4M3_SMALLEST_NORMAL)
    magic = (exponent + _E4M3_MAGIC).to(tl.float32, bitcast=True)
    return (v + magic) - magic


@triton.jit
def _divide(x, s):
    """Quotient x / s, correctly rounded, for |x| <= 449 s and finite; FP32, s in [2^-125, 2^126), s broadcast to x.

    What depends on s alone is computed once per s: Triton keeps it in the shape that s had before it was broadcast.
    """
    # Below 2^-60 the remainder x - q s could be too small for FP32: both sides times 2^64 is exact and avoids it.
    up = tl.where(s < 8.673617379884035e-19, 18446744073709551616.0, 1.0)
    s = s * up
    r = tl.div_rn(tl.zeros_like(s) + 1.0, s)
    # Markstein's theorem excludes a divisor whose mantissa is all ones, s = 2^k (2 - 2^-23). There x / s rounds to the
    # number after x 2^-(k+1): that product is q, and the remainder x 2^-24 times a little more than 2^-(k+1) is added.
    ones = (s.to(tl.int32, bitcast=True) & _MANTISSA) == _MANTISSA
    power = (r.to(tl.int32, bitcast=True) & _EXPONENT).to(tl.float32, bitcast=True)
    first, second = tl.where(ones, power, r), tl.where(ones, power * 1.00000095367431640625, r)
    x = x * up
    q = x * first
    return tl.fma(tl.fma(-q, s, x), second, q)


@triton.jit
def _block_scale(amax_bits, unit):
    """numerics._e4m3_scale as FP32 [T]; `unit` is one number, so its reciprocal is too."""
    unit = tl.zeros((1,), tl.float32) + unit
    amax = tl.minimum(amax_bits.to(tl.float32, bitcast=True), tl.minimum(449.0 * unit, _LARGEST))
    return _round_e4m3(tl.minimum(tl.maximum(_divide(amax, unit), 0.001953125), 448.0))


@triton.jit
def _squared_error(x, scale, scale_2, T: tl.constexpr):
    """numerics._squared_error: FP32 [T], summed neighbour by neighbour."""
    limit = tl.minimum(16.0 * (scale * scale_2), _LARGEST)[:, None]
    y = _divide(tl.clamp(x, -limit, limit), (scale * scale_2)[:, None])
    y = tl.clamp(y, -16.0, 16.0)
    error = y - round_e2m1(tl.clamp(y, -6.0, 6.0))
    a, b = tl.split(tl.reshape(error * error, (T, 8, 2)))
    a, b = tl.split(tl.reshape(a + b, (T, 4, 2)))
    a, b = tl.split(tl.reshape(a + b, (T, 2, 2)))
    a, b = tl.split(a + b)
    return (a + b) * (scale * scale)


@triton.jit
def _nvfp4(x, scale_2, T: tl.constexpr, CHOOSE: tl.constexpr):
    amax_bits = _amax_bits(x)
    scale = _block_scale(amax_bits, 6.0 * scale_2)
    if CHOOSE:
        four = _block_scale(amax_bits, 4.0 * scale_2)
        better = _squared_error(x, four, scale_2, T) < _squared_error(x, scale, scale_2, T)
        scale = tl.where(better, four, scale)
    scale = scale * scale_2
    limit = (6.0 * scale)[:, None]
    y = round_e2m1(_divide(tl.clamp(x, -limit, limit), scale[:, None]))
    return y * tl.where(amax_bits > _INFINITY, float("nan"), scale)[:, None]


@triton.jit
def _mxfp4(x):
    amax_bits = _amax_bits(x)
    code = tl.minimum(tl.maximum(((amax_bits + 0x3FFFFF) >> 23) - 2, 0), 252)  # numerics.mxfp4_exponent_code
    inverse = ((254 - code) << 23).to(tl.float32, bitcast=True)
    scale = tl.where(code == 0, 0x400000, code << 23).to(tl.float32, bitcast=True)  # 2^-127 is subnormal
    y = round_e2m1(tl.clamp(x * inverse[:, None], -6.0, 6.0))
    return y * tl.where(amax_bits > _INFINITY, float("nan"), scale)[:, None]


@triton.jit
def _fp8(x, scale):
    scale = tl.zeros((1, 1), tl.float32) + scale
    limit = tl.minimum(449.0 * scale, _LARGEST)
    y = tl.clamp(_divide(tl.clamp(x, -limit, limit), scale), -448.0, 448.0)
    return tl.where(x != x, x, _round_e4m3(y) * scale)


@triton.jit
def round_tile(x, scale_ptr, RULE: tl.constexpr, T: tl.constexpr):
    """FP32 [T, G] rounded by RULE; scale_ptr holds the FP32 scale per tensor of a rule that has one."""
    if RULE == NVFP4:
        x = _nvfp4(x, tl.load(scale_ptr), T, False)
    elif RULE == FOUR_OVER_SIX:
        x = _nvfp4(x, tl.load(scale_ptr), T, True)
    elif RULE == MXFP4:
        x = _mxfp4(x)
    elif RULE == FP8:
        x = _fp8(x, tl.load(scale_ptr))
    return x


@triton.jit
def _fake(x_ptr, out_ptr, scale_ptr, blocks, RULE: tl.constexpr, T: tl.constexpr, G: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    offset = block[:, None] * G + tl.arange(0, G)[None, :]
    inside = (block < blocks)[:, None]
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offset, round_tile(x, scale_ptr, RULE, T).to(out_ptr.dtype.element_ty), mask=inside)


def rule_of(rounding: Rounding, block_scale: BlockScale) -> tl.constexpr:
    """The constant that tells a kernel how to round."""
    if rounding == Rounding.mxfp4:
        return MXFP4
    if rounding == Rounding.fp8:
        return FP8
    return FOUR_OVER_SIX if block_scale is BlockScale.four_over_six else NVFP4


def width(rule: tl.constexpr) -> int:
    """Elements of a tile's rows: the block of the format, 16 where there is none."""
    return 32 if rule is MXFP4 else 16


def supports(x: torch.Tensor, rounding: Rounding, block_scale: BlockScale) -> bool:
    """Whether the kernels take a tensor: CUDA, 16- or 32-bit floats, whole tiles; not BlockScale.mse."""
    if block_scale is BlockScale.mse:
        return False
    whole = x.numel() % width(rule_of(rounding, block_scale)) == 0
    return x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16) and whole


def launcher(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """A kernel over a grid of programs; triton's own type lacks what a launch takes besides arguments (num_warps)."""
    return kernel[grid]


def fake(
    x: torch.Tensor,
    rounding: Rounding,
    scale: torch.Tensor | None,
    block_scale: BlockScale,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """numerics.fake_quantize on the GPU, without its gradient.

    Args:
        x: [..., K] float32, bfloat16 or float16 on a CUDA device; K a multiple of the block (already checked).
        rounding: How; not nvfp4_block32.
        scale: FP32 [] scale per tensor on x's device; ignored by mxfp4.
        block_scale: How NVFP4 chooses its block scales.
        out: Contiguous, x's shape and dtype: where to write; None for a new tensor.

    Returns:
        `out`.
    """
    x = x.contiguous()
    out = torch.empty_like(x) if out is None else out
    rule = rule_of(rounding, block_scale)
    block = width(rule)
    blocks = x.numel() // block
    if blocks:
        tile = ELEMENTS // block
        grid = (-(-blocks // tile),)
        launcher(_fake, grid)(
            x, out, scale, blocks, RULE=rule, T=tile, G=block, num_warps=WARPS, enable_fp_fusion=False
        )
    return out
