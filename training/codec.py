"""The bytes of FP4 and FP8 tensors: values to codes and block scales, and back.

The rounding is that of training/numerics.py, so that decode(encode(w)) equals fake(w) bit for bit. Two E2M1 codes share
a byte, the even column in the low half; code = sign << 3 | index of the magnitude. Zeros are always written as code 0,
and a block whose codes are all zero carries the NVFP4 scale 1.0, as ModelOpt's packer writes it: every weight has one
encoding, and packing the decoded values gives the same bytes.
"""

import torch
from torch import Tensor

from halfbyte.training import numerics, rounding
from halfbyte.training.config import BlockScale
from halfbyte.training.numerics import MXFP4_BLOCK, NVFP4_BLOCK

MINUS_ZERO = 0x80
"""E4M3's code of -0."""


@torch.no_grad()
def nvfp4_encode(
    w: Tensor,
    scale_2: Tensor,
    block_scale: BlockScale = BlockScale.amax,
    block: int = NVFP4_BLOCK,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pack a weight as NVFP4; decode(encode(w)) equals nvfp4_fake(w) bit for bit.

    Args:
        w: [N, K] (or [..., K]) float; K a multiple of the block.
        scale_2: FP32 [].
        block_scale: How block scales are chosen.
        block: Elements along K that share a block scale.
        scales: FP32 [N, K/block] block scales in the place of the rule, E4M3 numbers; then decode(encode(w)) equals
            learned_scales.fake(w).

    Returns:
        packed: uint8 [N, K/2]; byte j holds code 2j in its low half and code 2j+1 in its high half.
        scale: float8_e4m3fn [N, K/block], linear row-major, in [2^-9, 448]; NaN where the block holds a NaN.

    Raises:
        ValueError: The last dimension is not a multiple of the block.
    """
    scale_2 = scale_2.to(device=w.device, dtype=torch.float32)
    packed, scale = _empty_encoding(w, block, torch.float8_e4m3fn)
    packed_rows, scale_rows = packed.view(-1, block // 2), scale.view(-1, 1)
    for rows, chunk in numerics.chunks(w, block):
        if scales is None:
            scale_C1 = numerics.nvfp4_block_scale(chunk, scale_2, block_scale).float()
        else:
            scale_C1 = scales.reshape(-1, 1)[rows]
        codes = _pack(rounding.round_e2m1(chunk / (scale_C1 * scale_2)))
        nan, words = scale_C1.isnan(), codes.view(torch.int64)  # 16 codes a word
        empty = (words.masked_fill_(nan, 0) == 0).all(-1, keepdim=True) & ~nan
        scale_rows[rows] = scale_C1.masked_fill(empty, 1.0).to(torch.float8_e4m3fn)  # one encoding of zeros
        packed_rows[rows] = codes
    return packed, scale


@torch.no_grad()
def nvfp4_decode(packed: Tensor, scale: Tensor, scale_2: Tensor) -> Tensor:
    """Values of an NVFP4 tensor: q * (scale * scale_2), two FP32 products.

    Args:
        packed: uint8 [N, K/2].
        scale: float8_e4m3fn [N, K/block].
        scale_2: FP32 [].

    Returns:
        FP32 [N, K].
    """
    block_scale = scale.float() * scale_2.to(device=scale.device, dtype=torch.float32)
    return (_unpack(packed).unflatten(-1, (scale.shape[-1], -1)) * block_scale.unsqueeze(-1)).flatten(-2) + 0.0


@torch.no_grad()
def mxfp4_encode(
    w: Tensor, block_scale: BlockScale = BlockScale.amax, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Pack a weight as MXFP4; decode(encode(w)) equals mxfp4_fake(w) bit for bit.

    Args:
        w: [N, K] (or [..., K]) float; K a multiple of 32.
        block_scale: How block scales are chosen: amax or mse.
        scales: FP32 [N, K/32] block scales in the place of the rule, powers of two; then decode(encode(w)) equals
            learned_scales.fake(w).

    Returns:
        packed: uint8 [N, K/2]; byte j holds code 2j in its low half and code 2j+1 in its high half.
        scale: uint8 [N, K/32], E8M0: exponent + 127; 255 (NaN) where the block holds a NaN.

    Raises:
        ValueError: The last dimension is not a multiple of 32.
    """
    packed, scale = _empty_encoding(w, MXFP4_BLOCK, torch.uint8)
    packed_rows, scale_rows = packed.view(-1, MXFP4_BLOCK // 2), scale.view(-1, 1)
    for rows, chunk in numerics.chunks(w, MXFP4_BLOCK):
        if scales is None:
            code = numerics.mxfp4_exponent_code(chunk, block_scale)
        else:
            code = scales.reshape(-1, 1)[rows].view(torch.int32) >> 23  # the exponent field of a power of two
        codes = _pack(rounding.round_e2m1(chunk * numerics.mxfp4_scales(code)[1]))
        codes.view(torch.int64).masked_fill_(code == numerics.E8M0_NAN, 0)
        scale_rows[rows] = code.to(torch.uint8)
        packed_rows[rows] = codes
    return packed, scale


@torch.no_grad()
def mxfp4_decode(packed: Tensor, scale: Tensor) -> Tensor:
    """Values of an MXFP4 tensor: q * 2^(scale - 127).

    Args:
        packed: uint8 [N, K/2].
        scale: uint8 [N, K/32].

    Returns:
        FP32 [N, K]; NaN where the scale is 255.
    """
    block_scale, _ = numerics.mxfp4_scales(scale.int())
    return (_unpack(packed).unflatten(-1, (-1, MXFP4_BLOCK)) * block_scale.unsqueeze(-1)).flatten(-2) + 0.0


@torch.no_grad()
def fp8_encode(w: Tensor, scale: Tensor) -> Tensor:
    """Codes of an FP8 weight; decode(encode(w)) equals fp8_fake(w) bit for bit. Zeros are written as +0 (code 0).

    Args:
        w: [N, K] (or [..., K]) float.
        scale: FP32 [], see numerics.fp8_scale.

    Returns:
        float8_e4m3fn of w's shape; NaN where w is.
    """
    scale = scale.to(device=w.device, dtype=torch.float32)
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    rows = codes.view(-1, 1)
    for row, chunk in numerics.chunks(w, 1):
        code = rounding.round_e4m3(chunk / scale).view(torch.uint8)
        rows[row] = code.masked_fill_(code == MINUS_ZERO, 0)
    return codes.view(torch.float8_e4m3fn)


@torch.no_grad()
def fp8_decode(codes: Tensor, scale: Tensor) -> Tensor:
    """Values of an FP8 tensor, q * scale: FP32 of the shape of the float8_e4m3fn codes.

    Args:
        codes: float8_e4m3fn [N, K].
        scale: FP32 [].
    """
    return codes.float() * scale.to(device=codes.device, dtype=torch.float32) + 0.0


def _empty_encoding(w: Tensor, block: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Uninitialised packed codes [..., K/2] and block scales [..., K/block]; ValueError if K does not fit."""
    numerics.check_blocks(w, block)
    lead, k = w.shape[:-1], w.shape[-1]
    packed = torch.empty(*lead, k // 2, dtype=torch.uint8, device=w.device)
    return packed, torch.empty(*lead, k // block, dtype=scale_dtype, device=w.device)


def _pack(q: Tensor) -> Tensor:
    """Signed E2M1 values, FP32 [C, block] -> uint8 [C, block/2]; NaN, whose conversion is undefined, gives any code.

    The index of a magnitude is min(2q, q + 2, q/2 + 4), E2M1's three steps as one concave line: on whole numbers of
    eight bits, of which a core takes 64 at a time.
    """
    twice = (q + q).to(torch.int8)
    magnitude = twice.abs()
    index = torch.minimum(magnitude, (magnitude >> 1) + 2)
    index = torch.minimum(index, (magnitude >> 2).add_(4))
    pair = (twice >> 4).bitwise_and_(8).bitwise_or_(index).view(torch.int16)  # the even column in the low byte
    return (pair >> 4).bitwise_or_(pair).to(torch.uint8)


def _unpack(packed: Tensor) -> Tensor:
    """uint8 [..., K/2] -> signed E2M1 values, FP32 [..., K]."""
    value_of_code = torch.tensor([*rounding.E2M1, *(-v for v in rounding.E2M1)], device=packed.device)
    pair_of_byte = torch.stack([value_of_code.repeat(16), value_of_code.repeat_interleave(16)], -1)
    return pair_of_byte[packed.int()].flatten(-2)
