"""When fake quantization takes part in training, and where its gradient does not: the two exceptions from plain QAT.

`clip_gradient` makes the straight-through estimator that of rounding *and* saturation: beyond the largest value that
the frozen scale lets the format represent, the output no longer follows the input, and its derivative is zero (as for
the saturating estimator of arXiv 1602.02830, section 1.3). `unquantized` is the first phase of a run that trains in
BF16 before it quantizes (train.fake_quant_after_steps).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from halfbyte.training.formats import Rounding

LARGEST = {Rounding.nvfp4: 6.0 * 448.0, Rounding.nvfp4_block32: 448.0, Rounding.fp8: 448.0}
"""Largest magnitude per unit of the scale per tensor. MXFP4 has no such scale and saturates nowhere."""


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
        limit: FP32 [] on x's device; None limits nothing.
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
    for linear in _converted(model):
        if not (linear.weight_quantizer.is_enabled and linear.weight.requires_grad):
            continue
        limit = linear.weight_quantizer._quantizer_cache.limit
        if limit is not None:
            linear.weight.main_grad.masked_fill_(linear.weight.detach().abs() > limit, 0.0)


@contextlib.contextmanager
def unquantized(model: torch.nn.Module) -> Iterator[None]:
    """Inside this context no linear rounds anything (nor a cache in kv_cache.unrounded); what did before does so again.

    Args:
        model: This rank's GPTModel, quantized or not.
    """
    quantizers = [
        quantizer
        for linear in _converted(model)
        for quantizer in (linear.weight_quantizer, linear.input_quantizer)
        if quantizer.is_enabled
    ]
    for quantizer in quantizers:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.enable()


def _converted(model: torch.nn.Module) -> list[Any]:
    """The linears that ModelOpt has given quantizers, switched on or not."""
    return [module for module in model.modules() if hasattr(module, "weight_quantizer")]
