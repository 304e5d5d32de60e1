"""Fake quantization switched off for a while: the first phase of train.fake_quant_after_steps."""

import contextlib
from collections.abc import Iterator

import torch

from halfbyte.training import kv_cache
from halfbyte.training.quantize import enabled_quantizers


@contextlib.contextmanager
def unquantized(model: torch.nn.Module) -> Iterator[None]:
    """Inside this context no linear and no cache rounds anything; what did before does so again afterwards.

    Args:
        model: This rank's GPTModel, quantized or not.
    """
    quantizers = [quantizer for _, quantizer in enabled_quantizers(model)]
    for quantizer in quantizers:
        quantizer.disable()
    try:
        with kv_cache.unrounded(model):
            yield
    finally:
        for quantizer in quantizers:
            quantizer.enable()
