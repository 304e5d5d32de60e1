"""FP4 fake quantization as one memory-bound Triton pass; bit for bit what numerics.py computes.

A program reads a tile of whole blocks, finds each block's scale, rounds, and writes the tile: 4 bytes of traffic per
BF16 element. No FP8 type and no approximate division is used, so every device that Triton supports gives the same bits:

* The block maximum is an integer maximum over the bits without the sign: NaN has the largest pattern and so survives.
* E4M3 and E2M1 are rounded by adding and subtracting a power of two, which is FP32's own round to nearest even.
* Quotients are correctly rounded at three instructions: q = x r, then q + (x - q s) r with r = 1/s (Markstein 1990,
  IBM Journal of Research and Development 34(1), 111-119), where r costs one division per block.

Shapes: T blocks of a tile, G elements of a block (16 or 32).
"""

# pyright: reportIndexIssue=false

import torch
import triton
import triton.language as tl

TILE = 256
"""Blocks per program for NVFP4 (4096 elements), half as many for MXFP4."""

_SIGNLESS = tl.constexpr(0x7FFFFFFF)
_EXPONENT = tl.constexpr(0x7F800000)
_MANTISSA = tl.constexpr(0x7FFFFF)
_INFINITY = tl.constexpr(0x7F800000)
_ONE = tl.constexpr(0x3F800000)
_E4M3_SMALLEST_NORMAL = tl.constexpr(0x3C800000)  # FP32 bits of 2^-6
_E2M1_MAGIC = tl.constexpr((22 << 23) | 0x400000)  # numerics.round_e2m1 says why
_E4M3_MAGIC = tl.constexpr((20 << 23) | 0x400000)  # on the bits of 2^e: 1.5 * 2^(e+20), whose ulp is 2^(e-3)


@triton.jit
def _load(x_ptr, blocks, TILE: tl.constexpr, G: tl.constexpr):
    """FP32 [T, G] of this program, with its offsets and mask."""
    block = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    offset = block[:, None] * G + tl.arange(0, G)[None, :]
    inside = (block < blocks)[:, None]
    return tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32), offset, inside


@triton.jit
def _amax_bits(x):
    """Bits of the largest magnitude of each row: int32 [T]; above _INFINITY if the row holds a NaN."""
    return tl.max(x.to(tl.int32, bitcast=True) & _SIGNLESS, axis=1)


@triton.jit
def _round_e2m1(y):
    """numerics.round_e2m1 for |y| up to 7."""
    exponent = tl.maximum(y.to(tl.int32, bitcast=True) & _EXPONENT, _ONE)
    magic = (exponent + _E2M1_MAGIC).to(tl.float32, bitcast=True)
    return (y + magic) - magic


@triton.jit
def _round_e4m3(v):
    """Nearest E4M3 value, ties to even, for v in [2^-9, 448]."""
    exponent = tl.maximum(v.to(tl.int32, bitcast=True) & _EXPONENT, _E4M3_SMALLEST_NORMAL)
    magic = (exponent + _E4M3_MAGIC).to(tl.float32, bitcast=True)
    return (v + magic) - magic


@triton.jit
def _divide(x, s):
    """Quotient x / s, correctly rounded: FP32 [T, G] by [T], |x| <= 6.1 s; s in [2^-125, 2^126)."""
    # Below 2^-60 the remainder x - q s could be too small for FP32: both sides times 2^64 is exact and avoids it.
    up = tl.where(s < 8.673617379884035e-19, 18446744073709551616.0, 1.0)
    s = s * up
    r = tl.div_rn(1.0, s)
    # Markstein's theorem excludes a divisor whose mantissa is all ones, s = 2^k (2 - 2^-23). There x / s rounds to the
    # number after x 2^-(k+1): that product is q, and the remainder x 2^-24 times a little more than 2^-(k+1) is added.
    ones = (s.to(tl.int32, bitcast=True) & _MANTISSA) == _MANTISSA
    power = (r.to(tl.int32, bitcast=True) & _EXPONENT).to(tl.float32, bitcast=True)
    first, second = tl.where(ones, power, r)[:, None], tl.where(ones, power * 1.00000095367431640625, r)[:, None]
    x = x * up[:, None]
    q = x * first
    return tl.fma(tl.fma(-q, s[:, None], x), second, q)


@triton.jit
def _nvfp4(x_ptr, out_ptr, scale_2_ptr, blocks, TILE: tl.constexpr):
    x, offset, inside = _load(x_ptr, blocks, TILE, 16)
    scale_2 = tl.load(scale_2_ptr)
    amax_bits = _amax_bits(x)
    ratio = tl.div_rn(amax_bits.to(tl.float32, bitcast=True), tl.zeros_like(amax_bits).to(tl.float32) + 6.0 * scale_2)
    scale = _round_e4m3(tl.minimum(tl.maximum(ratio, 0.001953125), 448.0)) * scale_2
    limit = (6.0 * scale)[:, None]
    y = _round_e2m1(_divide(tl.minimum(tl.maximum(x, -limit), limit), scale))
    scale = tl.where(amax_bits > _INFINITY, float("nan"), scale)
    tl.store(out_ptr + offset, (y * scale[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _mxfp4(x_ptr, out_ptr, blocks, TILE: tl.constexpr):
    x, offset, inside = _load(x_ptr, blocks, TILE, 32)
    amax_bits = _amax_bits(x)
    code = tl.minimum(tl.maximum(((amax_bits + 0x3FFFFF) >> 23) - 2, 0), 252)  # numerics.mxfp4_exponent_code
    inverse = ((254 - code) << 23).to(tl.float32, bitcast=True)
    scale = tl.where(code == 0, 0x400000, code << 23).to(tl.float32, bitcast=True)  # 2^-127 is subnormal
    y = _round_e2m1(tl.minimum(tl.maximum(x * inverse[:, None], -6.0), 6.0))
    scale = tl.where(amax_bits > _INFINITY, float("nan"), scale)
    tl.store(out_ptr + offset, (y * scale[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


def nvfp4_fake(x: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """numerics.nvfp4_fake on the GPU.

    Args:
        x: [..., K] float32, bfloat16 or float16 on a CUDA device; K a multiple of 16 (the caller has checked it).
        scale_2: FP32 [] on the same device.

    Returns:
        Contiguous, x's shape and dtype.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    blocks = x.numel() // 16
    if blocks:
        _nvfp4[(triton.cdiv(blocks, TILE),)](x, out, scale_2, blocks, TILE=TILE, num_warps=4)
    return out


def mxfp4_fake(x: torch.Tensor) -> torch.Tensor:
    """numerics.mxfp4_fake on the GPU.

    Args:
        x: [..., K] float32, bfloat16 or float16 on a CUDA device; K a multiple of 32 (the caller has checked it).

    Returns:
        Contiguous, x's shape and dtype.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    blocks = x.numel() // 32
    if blocks:
        _mxfp4[(triton.cdiv(blocks, TILE // 2),)](x, out, blocks, TILE=TILE // 2, num_warps=4)
    return out
