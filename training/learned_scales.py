"""FP4 with block scales that are given, not computed from the block: rounding, and the gradient of the scales.

A scale is a parameter l = log2 of the block scale (without the scale per tensor). The forward pass rounds 2^l to what
the format stores, and the gradient passes that rounding straight through:

    NVFP4   nearest E4M3 number (by its midpoints in log2), 2^-9 .. 448, or 72 where q * scale must fit into FP8
    MXFP4   2^round(l), exponents -126 .. 125

Looking l up among the logarithms of midpoints, instead of taking 2^l, keeps the stored scale a function of comparisons
only: the same on a CPU and a GPU, whose exponentials differ in the last bit.

Shapes: N output channels, K input channels, G = K / block; C blocks of one chunk.
"""

from typing import Any

import torch
from torch import Tensor

from halfbyte.training import numerics
from halfbyte.training.config import BlockScale
from halfbyte.training.formats import GRIDS, Rounding
from halfbyte.training.rounding import E2M1_MAX, round_e2m1

LARGEST_BLOCK32 = 72.0
"""Largest E4M3 number s with 6 s <= 448: see numerics.DIVISOR for nvfp4_block32."""
MXFP4_EXPONENTS = (-126, 125)
"""All scales are normal FP32 numbers, and six times the largest is finite."""

_E4M3 = numerics.E4M3_VALUES
_MIDPOINTS = ((_E4M3[1:].double() + _E4M3[:-1].double()) / 2).log2()
_KERNEL: dict[Rounding, dict[str, Any]] = {
    Rounding.mxfp4: {"values": (), "midpoints": (), "limits": MXFP4_EXPONENTS},
    **{
        rounding: {
            "values": tuple(_E4M3.tolist()),
            "midpoints": tuple(_MIDPOINTS.float().tolist()),
            "limits": (0.0, largest),
        }
        for rounding, largest in ((Rounding.nvfp4, 448.0), (Rounding.nvfp4_block32, LARGEST_BLOCK32))
    },
}
"""What learned_kernels.py is told about a format."""


def block_scales(log2_NG: Tensor, rounding: Rounding) -> Tensor:
    """The block scales that a format stores, FP32 [N, G], of their trained logarithms.

    Args:
        log2_NG: Float [N, G].
        rounding: nvfp4, nvfp4_block32 or mxfp4.

    Returns:
        E4M3 numbers or powers of two; NaN where the parameter is.
    """
    log2_NG = log2_NG.detach()
    if rounding is Rounding.mxfp4:
        exponent = log2_NG.nan_to_num().round().clamp(*MXFP4_EXPONENTS).int()
        scales = numerics.mxfp4_scales(exponent + numerics.E8M0_BIAS)[0]
    else:
        place = torch.bucketize(log2_NG, _MIDPOINTS.to(log2_NG.device, log2_NG.dtype))
        scales = _E4M3.to(log2_NG.device)[place]
        if rounding is Rounding.nvfp4_block32:
            scales = scales.clamp(max=LARGEST_BLOCK32)
    return torch.where(log2_NG.isnan(), torch.nan, scales)


def initial_log2(w_NK: Tensor, rounding: Rounding, scale_2: Tensor | None, block_scale: BlockScale) -> Tensor:
    """The logarithms of the block scales that a weight has by rule.

    Args:
        w_NK: [N, K] float.
        rounding: nvfp4, nvfp4_block32 or mxfp4.
        scale_2: FP32 [] scale per tensor; None for MXFP4.
        block_scale: The rule.

    Returns:
        FP32 [N, G]; rounding with them is rounding by the rule, bit for bit.
    """
    block = GRIDS[rounding].block
    log2_NG = torch.empty(w_NK.shape[0], w_NK.shape[1] // block, device=w_NK.device)
    for rows, chunk in numerics.chunks(w_NK, block):
        if scale_2 is None:
            exponent = numerics.mxfp4_exponent_code(chunk, block_scale) - numerics.E8M0_BIAS
            log2_NG.view(-1, 1)[rows] = exponent.float()
        else:
            log2_NG.view(-1, 1)[rows] = numerics.nvfp4_block_scale(chunk, scale_2, block_scale).float().log2()
    return log2_NG


def fake(w_NK: Tensor, log2_NG: Tensor, rounding: Rounding, scale_2: Tensor | None) -> Tensor:
    """Round a weight to multiples of its given scales and back.

    Args:
        w_NK: [N, K] float.
        log2_NG: Float [N, G].
        rounding: nvfp4, nvfp4_block32 or mxfp4.
        scale_2: FP32 [] scale per tensor; None for MXFP4.

    Returns:
        Contiguous, w's shape and dtype: q * (block scale * scale per tensor), elements to nearest, ties to even,
        saturating at 6.
    """
    if kernels := _kernels(w_NK, log2_NG):
        block = GRIDS[rounding].block
        return kernels.fake(w_NK, log2_NG.detach(), _on(w_NK, scale_2), block=block, **_KERNEL[rounding])
    steps, out = _steps(log2_NG, rounding, scale_2), torch.empty_like(w_NK, memory_format=torch.contiguous_format)
    for rows, chunk in numerics.chunks(w_NK, GRIDS[rounding].block):
        out.view(-1, chunk.shape[1])[rows] = round_e2m1(chunk / steps[rows]).mul_(steps[rows]).to(out.dtype)
    return out


def gradient(w_NK: Tensor, grad_NK: Tensor, log2_NG: Tensor, rounding: Rounding, scale_2: Tensor | None) -> Tensor:
    """LSQ's gradient of the block scales, with LSQ's factor.

    With v = w / s, q = v rounded and ^w = q s (arXiv 1902.08153, equation 3): d ^w / d s = q - v where |v| <= 6, else
    sign(v) 6. Times 1 / sqrt(block * 6) (section 2.2), which gives it the size of a weight's gradient; the chain rule's
    factor s ln 2 of the logarithm is left out: it hardly changes during training, Adam does not depend on a constant
    factor, and with it the gradients would be of the size of Adam's epsilon.

    Args:
        w_NK: [N, K] float.
        grad_NK: [N, K] float, gradient of the rounded weight.
        log2_NG: Float [N, G].
        rounding: nvfp4, nvfp4_block32 or mxfp4.
        scale_2: FP32 [] scale per tensor; None for MXFP4.

    Returns:
        [N, G] in grad's dtype.
    """
    block = GRIDS[rounding].block
    root = (block * E2M1_MAX) ** 0.5
    if grad_NK.dtype is torch.float32 and (kernels := _kernels(w_NK, log2_NG)):
        constants = {"root": root, "block": block} | _KERNEL[rounding]
        return kernels.gradient(w_NK.detach(), grad_NK, log2_NG.detach(), _on(w_NK, scale_2), **constants)
    steps = _steps(log2_NG, rounding, scale_2)
    out_NG = torch.empty(log2_NG.shape, dtype=grad_NK.dtype, device=grad_NK.device)
    grads = grad_NK.reshape(-1, block)
    for rows, chunk in numerics.chunks(w_NK, block):
        v = chunk / steps[rows]
        q = round_e2m1(v.clone())
        slope = torch.where(v.abs() <= E2M1_MAX, q - v, q)
        out_NG.view(-1)[rows] = (grads[rows] * slope).sum(-1) / root
    return out_NG


def ends(log2_NG: Tensor, rounding: Rounding, scale_2: Tensor | None) -> Tensor:
    """The largest magnitude that each element of a weight can have: FP32 [N, K], 6 of its block's steps.

    Args:
        log2_NG: Float [N, G].
        rounding: nvfp4, nvfp4_block32 or mxfp4.
        scale_2: FP32 [] scale per tensor; None for MXFP4.
    """
    return (E2M1_MAX * _steps(log2_NG, rounding, scale_2)).expand(-1, GRIDS[rounding].block).reshape(len(log2_NG), -1)


def _kernels(w: Tensor, log2: Tensor) -> Any:
    """The module with the kernels, where they take a weight."""
    if not w.is_cuda:
        return None
    from halfbyte.training import learned_kernels  # Triton comes with torch's CUDA builds only

    return learned_kernels if learned_kernels.supports(w, log2) else None


def _on(w: Tensor, scale_2: Tensor | None) -> Tensor | None:
    return None if scale_2 is None else scale_2.to(w.device)


def _steps(log2_NG: Tensor, rounding: Rounding, scale_2: Tensor | None) -> Tensor:
    """What the elements of every block are multiples of: FP32 [N * G, 1]."""
    scales = block_scales(log2_NG, rounding).reshape(-1, 1)
    return scales if scale_2 is None else scales * scale_2.to(scales.device)


class _PassStraight(torch.autograd.Function):
    """`fake`, whose gradient with respect to the weight is the identity; the scales get theirs from companions.py."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, log2: Tensor, rounding: Rounding, scale_2: Tensor | None) -> Tensor:
        return fake(w, log2, rounding, scale_2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        return grad, None, None, None


def fake_quantize(w_NK: Tensor, log2_NG: Tensor, rounding: Rounding, scale_2: Tensor | None) -> Tensor:
    """`fake` with a straight-through gradient to the weight, and none to the scales."""
    return _PassStraight.apply(w_NK, log2_NG.detach(), rounding, scale_2)
