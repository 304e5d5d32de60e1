"""Where a format ends, and the gradient that ends there: quantize.clip_gradient.

`clip_gradient` makes the straight-through estimator that of rounding *and* saturation: beyond the largest value that
the frozen scale lets the format represent, the output no longer follows the input, and its derivative is zero (as for
the saturating estimator of arXiv 1602.02830, section 1.3). Where block scales are learned, a weight ends with its block
(arXiv 1902.08153, equation 5); where a rule finds them, they follow the weight.
"""

from typing import Any

import torch

from halfbyte.training.formats import Rounding

LARGEST = {Rounding.nvfp4: 6.0 * 448.0, Rounding.nvfp4_block32: 448.0, Rounding.fp8: 448.0}
"""Largest magnitude per unit of the scale per tensor. MXFP4 has no such scale."""


def largest(rounding: Rounding, scale: torch.Tensor) -> torch.Tensor:
    """FP32 []: the largest magnitude that a rounding with an FP32 [] scale per tensor represents.

    It is the calibrated maximum or, where the scale was rounded up to a power of two, up to twice as much: what lies
    between is represented, and keeps its gradient.
    """
    return scale * LARGEST[rounding]


class _ClipGradient(torch.autograd.Function):
    """The identity, whose gradient is zero where the input lies outside; keeps one byte per element."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x.abs() > limit)  # False for NaN, whose gradient has to stay visible
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):  # type: ignore[override]
        (outside,) = ctx.saved_tensors
        return grad.masked_fill(outside, 0.0), None


def clip_gradient(x: torch.Tensor, limit: torch.Tensor | None) -> torch.Tensor:
    """X as it is, with a gradient of zero where |x| exceeds `limit`.

    Args:
        x: Any shape, any float dtype.
        limit: FP32 on x's device, [] or x's shape; None limits nothing.
    """
    if limit is None or not (x.requires_grad and torch.is_grad_enabled()):
        return x
    return _ClipGradient.apply(x, limit)


def clip_weight_gradients(model: torch.nn.Module) -> None:
    """Zero the accumulated gradient of every weight outside its format's range, after a global batch.

    `fast_path.weights_once` rounds weights outside of autograd, and where a weight lies is the same in all
    micro-batches and on all data-parallel ranks: one mask on the sum is the sum of masked gradients.

    Args:
        model: This rank's GPTModel, quantized, wrapped in Megatron's DDP; weights and main_grad of the same shard.
    """
    converted: list[Any] = [module for module in model.modules() if hasattr(module, "weight_quantizer")]
    for linear in converted:
        if not (linear.weight_quantizer.is_enabled and linear.weight.requires_grad):
            continue
        limit = linear.weight_quantizer._quantizer_cache.end()
        if limit is not None:
            linear.weight.main_grad.masked_fill_(linear.weight.detach().abs() > limit, 0.0)
