"""The trained model as a server runs it: the weights of an export, and the scales that stand in its files."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from halfbyte.training import kv_cache, typed
from halfbyte.training.arithmetic import Arithmetic
from halfbyte.training.config import Quantize
from halfbyte.training.errors import UserError
from halfbyte.training.quantize import Planned, plan


@contextlib.contextmanager
def weights_as_served(model: torch.nn.Module, quantize: Quantize, scales: Mapping[str, float]) -> Iterator[None]:
    """Inside this context weights stay as they are; inputs and cache are rounded with the scales of exported files.

    Args:
        model: This rank's GPTModel, quantizers inserted, with the decoded weights of an export.
        quantize: The plan that the export was made by.
        scales: From the files, name of the tensor -> scale: input_scale of every linear whose input has one (the
            members of a fused linear have the same), k_scale and v_scale where the cache is quantized.

    Raises:
        UserError: the files lack the scale of a layer whose input is quantized with one, or members differ.
    """
    layers = [(layer, typed.linear(model, layer.module)) for layer in plan(model, quantize)]
    before: list[tuple[typed.Quantizer, Arithmetic]] = []
    try:
        for layer, linear in layers:
            linear.weight_quantizer.disable()
            quantizer = linear.input_quantizer
            rule = quantizer._quantizer_cache if quantizer.is_enabled else None
            if rule is None or rule.scale is None:
                continue
            before.append((quantizer, rule))
            scale = torch.full_like(rule.scale, _one_scale(layer, scales))
            quantizer._quantizer_cache = replace(rule, scale=scale)
        with kv_cache.scales_as_served(model, scales):
            yield
    finally:
        for _, linear in layers:
            linear.weight_quantizer.enable()
        for quantizer, rule in before:
            quantizer._quantizer_cache = rule


def _one_scale(layer: Planned, scales: Mapping[str, float]) -> float:
    found = {scales.get(f"{name}.input_scale") for name in layer.hf}
    scale = found.pop()
    if found or scale is None:
        raise UserError(f"export: the files hold no one input_scale for {', '.join(layer.hf)}; export again")
    return scale
