"""Rounding to E2M1 and E4M3, and the search for a block's best scale: what numerics.py and codec.py are made of.

Everything takes FP32 and works element by element or block by block. Shapes: C blocks.
"""

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitude of code & 7; code & 8 is the sign."""
E2M1_MAX = 6.0
E4M3_MAX = 448.0
SWEEP_LEAST, SWEEP_MOST = 2.5, 10.0
"""A scale s is a candidate of BlockScale.mse if 2.5 s < amax <= 10 s: two octaves, 16 scales in E4M3 and 2 in E8M0."""

_EXPONENT_MASK = 0x7F800000
_ONE = 0x3F800000  # FP32 bits of 1.0
_MAGIC = (22 << 23) | 0x400000  # on the bits of 2^e: 1.5 * 2^(e+22), whose ulp is 2^(e-1)


def round_e2m1(y: Tensor, out: Tensor | None = None) -> Tensor:
    """Nearest signed E2M1 value, ties to even, saturating at 6; FP32, no branches, y is overwritten.

    Adding 1.5 * 2^(e+22) to a number of exponent e pushes everything below its first mantissa bit out of FP32, with
    the hardware's own ties-to-even; e is at least 0, because below 1 the grid keeps the step 0.5. The 1.5 keeps the
    sum of a negative number in the same binade. A rounded zero comes out as +0.
    """
    y.clamp_(-E2M1_MAX, E2M1_MAX)
    magic = y.view(torch.int32).bitwise_and(_EXPONENT_MASK).clamp_(min=_ONE).add_(_MAGIC).view(torch.float32)
    y.add_(magic)
    return torch.sub(y, magic, out=y if out is None else out)


def round_e4m3(y: Tensor) -> Tensor:
    """Nearest signed E4M3 value, ties to even, saturating at 448: FP32 -> float8_e4m3fn; y is overwritten.

    A rounded zero keeps its sign here; the callers make it +0.
    """
    return y.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def block_amax(chunk: Tensor) -> Tensor:
    """Absolute maximum of each block: FP32 [C, block] -> [C, 1]; NaN where the block holds a NaN.

    The bits of numbers without a sign have their order, NaN above all: their maximum is four times as fast on a CPU.
    """
    return chunk.abs().view(torch.int32).amax(-1, keepdim=True).view(torch.float32)


def sum_of_squares(error: Tensor) -> Tensor:
    """Neighbour by neighbour: FP32 [C, block] -> [C, 1]; `error` is overwritten."""
    error = error.square_()
    while error.shape[-1] > 1:
        error = error[:, 0::2] + error[:, 1::2]
    return error


def best_scale(u: Tensor, scales: Tensor, candidates: int) -> Tensor:
    """The scale s with the smallest squared error of a block rounded to s times E2M1, among 2.5 s < amax <= 10 s.

    Equal errors go to the larger scale, and a block too small (large) for any candidate gets the smallest (largest)
    scale. Rounding a rounded block then finds the same scale again. Let s* be chosen for u and y be u on its grid:

    * s* is a candidate for y: amax(u) > 2.5 s* rounds to 3 s* or more.
    * y has no error under s*, so only a larger candidate s' with none could take its place. Then amax(y) = g s* = g' s'
      with E2M1 values 3 <= g' < g, and amax(u) > 2.5 s', because what rounds to g is above 2.5 g / g': s' was
      a candidate for u. As y lies on its grid too, no element of u has a larger error under s' than under s*, and
      rounded differences, squares and sums in a fixed order are monotone: s' would have been chosen.

    This needs every s to have at most 21 bits, so that midpoints 5 s / 4 ... 5 s are FP32 numbers and a rounded
    quotient never crosses one, and u to be exact: hence no scale_2 but a power of two.

    Args:
        u: FP32 [C, block] in units of the scale that `scales` multiply.
        scales: FP32 [S], ascending.
        candidates: How many neighbours of `scales` two octaves hold at most.

    Returns:
        FP32 [C, 1]; NaN where the block holds a NaN.
    """
    u = u.clamp(-(2.0**60), 2.0**60)  # far beyond any scale, and the sum of squares stays finite
    amax = block_amax(u)
    first = torch.searchsorted(scales, amax / torch.full_like(amax, SWEEP_MOST)).clamp_(max=len(scales) - 1)
    best = scales[first]
    least = sum_of_squares(u - round_e2m1(u / best) * best)
    for step in range(1, candidates):
        scale = scales[(first + step).clamp_(max=len(scales) - 1)]
        error = sum_of_squares(u - round_e2m1(u / scale) * scale)
        better = (error <= least) & (SWEEP_LEAST * scale < amax)
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return torch.where(amax.isnan(), amax, best)
