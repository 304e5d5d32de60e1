"""FP4 and FP8 arithmetic in plain torch: the definition every kernel is tested against, and the product's CPU path.

The FP4 formats round elements to E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign) and share one scale per block along the
last dimension (K, the input channels of a linear); FP8 rounds to E4M3 with one scale for the whole tensor:

    format   block   block scale                  scale per tensor, FP32   value
    NVFP4    16      E4M3, amax/(6 s2), RNE       s2, see second_scale     q * (sb * s2)
    (4/6)    16      E4M3, amax/(6 s2 or 4 s2)    s2, see second_scale     q * (sb * s2)
    (W4A8)   32      as NVFP4 or 4/6              s2 >= amax/448           q * (sb * s2)
    (mse)    16      E4M3, see best_scale         s2, see second_scale     q * (sb * s2)
    MXFP4    32      E8M0, 2^ceil(log2(amax/6))   none                     q * 2^k
    (mse)    32      E8M0, see best_scale         none                     q * 2^k
    FP8      none    none                         s = amax/448             q * s

The rules, with the reasons in docs/decisions.md:

* Elements round to nearest, ties to even, and saturate: FP4 at 6, FP8 at 448, Inf included. Divisions are correctly
  rounded.
* The NVFP4 block scale is clamped to [2^-9, 448] before the E4M3 cast: E4M3's smallest subnormal and its largest value.
* A NaN makes its whole block NaN (in FP8: its element), never a finite number. Finite input never becomes Inf.
* Zeros come out as +0, whatever their sign was.
* A power-of-two s2 makes q * (sb * s2) exact in BF16 and the block scales the same in every serving runtime.

Everything is computed in FP32, whatever the input's dtype, block by block: a shard of a tensor quantizes to the shard
of the whole. The bytes of these values are training/codec.py's.

Shapes: N output channels, K input channels; C blocks of one chunk.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from halfbyte.training.config import BlockScale, SecondScale
from halfbyte.training.formats import GRIDS, Rounding
from halfbyte.training.rounding import (
    E2M1_MAX,
    E4M3_MAX,
    best_scale,
    block_amax,
    round_e2m1,
    round_e4m3,
    sum_of_squares,
)

NVFP4_BLOCK = GRIDS[Rounding.nvfp4].block
MXFP4_BLOCK = GRIDS[Rounding.mxfp4].block

E4M3_MIN = 2.0**-9
DIVISOR = {
    (Rounding.nvfp4, BlockScale.amax): (2688.0, 0.65625, 12),
    (Rounding.nvfp4, BlockScale.four_over_six): (1536.0, 0.75, 11),
    (Rounding.nvfp4, BlockScale.mse): (1536.0, 0.75, 11),
    (Rounding.nvfp4_block32, BlockScale.amax): (448.0, 0.875, 9),
    (Rounding.nvfp4_block32, BlockScale.four_over_six): (448.0, 0.875, 9),
}
"""D = 6 M, where M is the block scale that a tensor's maximum gets, and m and e with D = m * 2^e. M is 448, E4M3's
largest; 256 in 4/6 and mse: a scale half as large again, which puts the maximum at 4, is then still in range (arXiv
2512.02010, section 3); 448/6 where q * sb itself shall fit into E4M3 (ModelOpt's W4A8_NVFP4_FP8)."""
SCALE_2_EXPONENT = 116
"""s2 stays in [2^-116, 2^116]: then E2M1's smallest step times E4M3's smallest scale times s2 is FP32's smallest normal
number (0.5 * 2^-9 * 2^-116 = 2^-126), and 6 * 448 * s2 is finite."""
E8M0_BIAS, E8M0_NAN, E8M0_MAX = 127, 255, 252
"""E8M0 code = exponent + 127; 252 is the largest whose block maximum, 6 * 2^125, is finite in FP32."""

E4M3_VALUES = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
"""All positive numbers of E4M3, ascending; FP32 [126]."""
_MXFP4_STEPS = torch.tensor([0.5, 1.0, 2.0])

# Temporaries of one chunk stay in a core's L2 cache; a GPU wants few launches instead.
_CPU_CHUNK = 1 << 18  # elements
_GPU_CHUNK = 1 << 24


@torch.no_grad()
def second_scale(
    amax: Tensor,
    mode: SecondScale,
    block_scale: BlockScale = BlockScale.amax,
    rounding: Rounding = Rounding.nvfp4,
) -> Tensor:
    """Second-level scale of NVFP4: amax/D with D from DIVISOR, as it is or rounded up to a power of two.

    Exact for every FP32 amax: no logarithm is taken. With D = a * 2^b and amax = m * 2^e, a and m in [0.5, 1),
    2^ceil(log2(amax/D)) is 2^(e-b) if m <= a and 2^(e-b+1) otherwise.

    Args:
        amax: Absolute maximum of a tensor (or of its calibration data), any shape, any float dtype.
        mode: pow2 or amax (ModelOpt's value).
        block_scale: How block scales are chosen.
        rounding: nvfp4 or nvfp4_block32.

    Returns:
        FP32, shape of amax, clamped to [2^-116, 2^116]: defined for amax = 0. NaN and Inf propagate.
    """
    amax = amax.float()
    divisor, top_mantissa, top_exponent = DIVISOR[Rounding(rounding), BlockScale(block_scale)]
    if SecondScale(mode) is SecondScale.amax:
        # Tensor / tensor: CUDA turns a division by a Python number into a product with its rounded reciprocal.
        scale = amax / torch.full_like(amax, divisor)
        scale = scale.clamp(2.0**-SCALE_2_EXPONENT, 2.0**SCALE_2_EXPONENT)
    else:
        mantissa, exponent = torch.frexp(amax)
        exponent = exponent - top_exponent + (mantissa > top_mantissa).int()
        exponent = exponent.clamp(-SCALE_2_EXPONENT, SCALE_2_EXPONENT)
        # frexp(0) has exponent 0: without this line amax = 0 would get a larger scale than amax = 1e-6.
        exponent = torch.where(amax == 0, -SCALE_2_EXPONENT, exponent)
        scale = _power_of_two(exponent)
    return torch.where(amax.isfinite(), scale, amax)


@torch.no_grad()
def fp8_scale(amax: Tensor) -> Tensor:
    """The scale of an FP8 tensor: amax/448, so that E4M3's largest value is the tensor's largest.

    Args:
        amax: Absolute maximum of a tensor (or of its calibration data), any shape, any float dtype.

    Returns:
        FP32, shape of amax, clamped to [2^-116, 2^116]: defined for amax = 0. NaN and Inf propagate.
    """
    amax = amax.float()
    scale = amax / torch.full_like(amax, E4M3_MAX)
    return torch.where(amax.isfinite(), scale.clamp(2.0**-SCALE_2_EXPONENT, 2.0**SCALE_2_EXPONENT), amax)


def tensor_scale(
    amax: Tensor, rounding: Rounding, mode: SecondScale, block_scale: BlockScale = BlockScale.amax
) -> Tensor:
    """The FP32 scale per tensor of a rounding that has one: fp8_scale, or second_scale in `mode` and `block_scale`."""
    return fp8_scale(amax) if rounding == Rounding.fp8 else second_scale(amax, mode, block_scale, rounding)


@torch.no_grad()
def nvfp4_fake(
    x: Tensor, scale_2: Tensor, block_scale: BlockScale = BlockScale.amax, block: int = NVFP4_BLOCK
) -> Tensor:
    """Round to NVFP4 and back.

    Idempotent for a frozen scale_2, with one exception that the format itself makes: a block with an amax between
    9 and 10 times 2^-9 * s2 (5e-6 of the tensor's amax) gets the subnormal scale 2 * 2^-9, on which 9..10 rounds to 8,
    and 8 alone would have got the scale 2^-9 and saturated at 6. BlockScale.mse has no exception (see best_scale).

    Args:
        x: [..., K] float32, bfloat16, float16 or float64; K a multiple of the block.
        scale_2: FP32 [] second-level scale (see second_scale), on x's device or a CPU scalar.
        block_scale: How block scales are chosen.
        block: Elements along K that share a block scale.

    Returns:
        Contiguous, x's shape and dtype. float32 and float64 hold the NVFP4 values exactly; bfloat16 holds them exactly
        if scale_2 is a power of two and rounds them to nearest otherwise.

    Raises:
        ValueError: The last dimension is not a multiple of the block.
    """
    scale_2 = scale_2.to(device=x.device, dtype=torch.float32)

    def quantize(chunk: Tensor, out: Tensor) -> None:
        scale = nvfp4_block_scale(chunk, scale_2, block_scale).float().mul_(scale_2)
        round_e2m1(chunk / scale, out=out).mul_(scale)

    return _map_blocks(x, block, quantize)


@torch.no_grad()
def mxfp4_fake(x: Tensor, block_scale: BlockScale = BlockScale.amax) -> Tensor:
    """Round to MXFP4 and back.

    The exponent of BlockScale.amax is the smallest k with amax <= 6 * 2^k (RCEIL), so nothing in range saturates; k is
    clamped to [-127, 125], so that finite input stays finite. Idempotent; but under amax a block whose maximum was
    rounded down to 3 * 2^k may be encoded with the exponent below the second time (same values, other bytes).

    Args:
        x: [..., K] float32, bfloat16, float16 or float64; K a multiple of 32.
        block_scale: How exponents are chosen: amax or mse.

    Returns:
        Contiguous, x's shape and dtype, exact in float32, float64 and bfloat16.

    Raises:
        ValueError: The last dimension is not a multiple of 32.
    """

    def quantize(chunk: Tensor, out: Tensor) -> None:
        scale, inverse = mxfp4_scales(mxfp4_exponent_code(chunk, block_scale))
        round_e2m1(chunk * inverse, out=out).mul_(scale)

    return _map_blocks(x, MXFP4_BLOCK, quantize)


@torch.no_grad()
def fp8_fake(x: Tensor, scale: Tensor) -> Tensor:
    """Round to FP8 (E4M3 with one scale) and back. Idempotent.

    Args:
        x: [..., K] float32, bfloat16, float16 or float64.
        scale: FP32 [] (see fp8_scale), on x's device or a CPU scalar.

    Returns:
        Contiguous, x's shape and dtype. float32 and float64 hold the FP8 values exactly, bfloat16 rounds them to
        nearest.

    Raises:
        ValueError: x has no dimension.
    """
    scale = scale.to(device=x.device, dtype=torch.float32)

    def quantize(chunk: Tensor, out: Tensor) -> None:
        torch.mul(round_e4m3(chunk / scale).float(), scale, out=out).add_(0.0)

    return _map_blocks(x, GRIDS[Rounding.fp8].block, quantize)


def _rounded(
    x: Tensor, rounding: Rounding, scale: Tensor | None, block_scale: BlockScale, out: Tensor | None
) -> Tensor:
    """Fake-quantized x, in `out` where a kernel can write there, else in a new tensor."""
    grid = GRIDS[rounding]
    if scale is None and grid.per_tensor:
        raise ValueError(f"{rounding.value} needs a scale per tensor")
    if x.is_cuda and rounding is not Rounding.nvfp4_block32:  # weights only, once a batch: no kernel of its own
        from halfbyte.training import kernels  # Triton comes with torch's CUDA builds only

        check_blocks(x, grid.block)
        if kernels.supports(x, rounding, block_scale):
            scale = None if scale is None else scale.to(device=x.device, dtype=torch.float32)
            return kernels.fake(x, rounding, scale, block_scale, out)
    if scale is None or not grid.per_tensor:
        return mxfp4_fake(x, block_scale)
    return fp8_fake(x, scale) if grid.block_scale is None else nvfp4_fake(x, scale, block_scale, grid.block)


class StraightThrough(torch.autograd.Function):
    """Fake quantization whose gradient is the identity; nothing is saved for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, rounding: Rounding, scale: Tensor | None, block_scale: BlockScale) -> Tensor:
        """Fake-quantized x; see fake_quantize."""
        return _rounded(x, rounding, scale, block_scale, None)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        """The gradient of the output, unchanged, also where values saturated."""
        return grad, None, None, None


def fake_quantize(
    x: Tensor, rounding: Rounding, scale: Tensor | None = None, block_scale: BlockScale = BlockScale.amax
) -> Tensor:
    """Fake quantization with a straight-through gradient (dL/dx = dL/dy everywhere).

    Args:
        x: [..., K] float; K a multiple of the block.
        rounding: How one operand of a format rounds (formats.SPECS).
        scale: FP32 [] scale per tensor: NVFP4's second-level scale or FP8's only one; ignored by mxfp4.
        block_scale: How block scales are chosen; FP8 has none.

    Returns:
        x's shape and dtype.

    Raises:
        ValueError: K is not a multiple of the block, or the scale is missing.
    """
    return StraightThrough.apply(x, Rounding(rounding), scale, block_scale)


@torch.no_grad()
def fake_quantize_into(
    x: Tensor, out: Tensor, rounding: Rounding, scale: Tensor | None = None, block_scale: BlockScale = BlockScale.amax
) -> Tensor:
    """fake_quantize without a gradient, written to `out`: contiguous, x's shape and dtype; the same errors.

    Returns:
        `out`.
    """
    found = _rounded(x, Rounding(rounding), scale, block_scale, out)
    return out if found is out else out.copy_(found)


def _map_blocks(x: Tensor, block: int, quantize: Callable[[Tensor, Tensor], None]) -> Tensor:
    """Run quantize(FP32 chunk [C, block], FP32 out [C, block]) over x; the result has x's shape and dtype."""
    check_blocks(x, block)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out_rows = out.view(-1, block)
    for rows, chunk in chunks(x, block):
        if x.dtype == torch.float32:
            quantize(chunk, out_rows[rows])
        else:
            result = torch.empty_like(chunk)
            quantize(chunk, result)
            out_rows[rows] = result
    return out


def check_blocks(x: Tensor, block: int) -> None:
    """Raise ValueError unless x's last dimension is a multiple of the block."""
    if x.dim() == 0 or x.shape[-1] % block:
        raise ValueError(f"last dimension of {tuple(x.shape)} is not a multiple of the block of {block}")


def chunks(x: Tensor, block: int) -> Iterator[tuple[slice, Tensor]]:
    """Consecutive blocks of x as FP32 [C, block], with their row numbers; not to be written to."""
    if not x.numel():
        return
    rows_NB = x.detach().reshape(-1, block)
    step = (_CPU_CHUNK if x.device.type == "cpu" else _GPU_CHUNK) // block
    for start in range(0, len(rows_NB), step):
        rows = slice(start, start + step)
        yield rows, rows_NB[rows].float()


def nvfp4_block_scale(chunk: Tensor, scale_2: Tensor, block_scale: BlockScale = BlockScale.amax) -> Tensor:
    """E4M3 block scale: float8_e4m3fn [C, 1] of FP32 [C, block]; mse needs blocks of 16 and scale_2 a power of two."""
    if BlockScale(block_scale) is BlockScale.mse:
        return best_scale(chunk / scale_2, E4M3_VALUES.to(chunk.device), 16).to(torch.float8_e4m3fn)
    amax = block_amax(chunk)
    six = _e4m3_scale(amax, E2M1_MAX * scale_2)
    if BlockScale(block_scale) is BlockScale.amax:
        return six
    four = _e4m3_scale(amax, 4.0 * scale_2)
    # A NaN or an equal error leaves the 6.
    better = _squared_error(chunk, four, scale_2) < _squared_error(chunk, six, scale_2)
    return torch.where(better, four.float(), six.float()).to(torch.float8_e4m3fn)


def element_scale(chunk: Tensor, rounding: Rounding, scale: Tensor | None, block_scale: BlockScale) -> Tensor:
    """What the elements of FP4 blocks are multiples of once they are rounded: FP32 [C, 1] of FP32 [C, block]."""
    if not GRIDS[rounding].per_tensor:
        return mxfp4_scales(mxfp4_exponent_code(chunk, block_scale))[0]
    assert scale is not None
    return nvfp4_block_scale(chunk, scale, block_scale).float() * scale


def _e4m3_scale(amax: Tensor, unit: Tensor) -> Tensor:
    return (amax / unit).clamp_(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn)


def _squared_error(chunk: Tensor, scale: Tensor, scale_2: Tensor) -> Tensor:
    """Squared error of each block in units of scale_2, so that no tensor is too small or too large for FP32: [C, 1].

    The order of the sum is part of the definition (neighbour by neighbour): kernels must prefer the same scale.
    """
    y = (chunk / (scale.float() * scale_2)).clamp_(-16.0, 16.0)  # beyond, both scales are 448 and the errors equal
    return sum_of_squares(y - round_e2m1(y.clone())) * scale.float().square()


def mxfp4_exponent_code(chunk: Tensor, block_scale: BlockScale = BlockScale.amax) -> Tensor:
    """E8M0 code of a block's exponent: int32 [C, 1] of FP32 [C, 32]; ceil(log2(amax/6)), or best_scale under mse.

    From the bits: amax = 1.f * 2^e and 6 = 1.5 * 2^2, so the exponent is e - 2, plus 1 if 1.f > 1.5. Adding 0x3FFFFF
    carries into the exponent field exactly then.
    """
    amax = block_amax(chunk)
    nan = amax.isnan()
    bits = amax.masked_fill_(nan, 0.0).view(torch.int32)
    code = bits.add_(0x3FFFFF).bitwise_right_shift_(23).sub_(2).clamp_(0, E8M0_MAX)
    if BlockScale(block_scale) is BlockScale.mse:
        # In units of the RCEIL scale: the candidates are one of half, one and two of it, and its neighbour.
        inverse = mxfp4_scales(code)[1]
        best = best_scale(chunk.nan_to_num(0.0) * inverse, _MXFP4_STEPS.to(chunk.device), 2)
        code = (code + (best.view(torch.int32) >> 23) - E8M0_BIAS).clamp_(0, E8M0_MAX)
    return code.masked_fill_(nan, E8M0_NAN)


def mxfp4_scales(code: Tensor) -> tuple[Tensor, Tensor]:
    """2^(code-127) and, for code <= 252, its reciprocal, both FP32 and exact; NaN for code 255."""
    nan = code == E8M0_NAN
    # 2^-127 is subnormal: mantissa 0x400000 under an exponent field of 0.
    bits = torch.where(code == 0, 0x400000, code << 23)
    scale = bits.view(torch.float32).masked_fill(nan, torch.nan)
    inverse = ((2 * E8M0_BIAS - code) << 23).view(torch.float32).masked_fill(nan, torch.nan)
    return scale, inverse


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent for int32 exponents in [-126, 127], exactly (a library pow may be off by an ulp)."""
    return ((exponent + 127) << 23).int().view(torch.float32)
