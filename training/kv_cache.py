"""Quantization of the key/value cache: every layer rounds its keys and its values as a runtime stores them.

Keys are rounded after their rotation, which is when runtimes store them, and attention reads what was rounded, in
training, scoring and decoding alike. Both formats have one FP32 scale per layer for keys and one for values,
amax/448, which is what k_scale and v_scale of a checkpoint hold:

    fp8      E4M3 elements                                        value = q * s
    nvfp4    E2M1 elements, blocks of 16 along a head's elements  value = q * (sb * s), sb an E4M3 block scale

For NVFP4 that scale is six times the second-level scale of a weight: q * sb then stays within E4M3's range, in which
attention kernels unpack it. The maxima are collected on the calibration windows, of the model whose linears are not
rounded yet, and stay frozen. Shapes: S sequence, B batch, G key/value heads of this rank, D head dimension.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from halfbyte.training import numerics, typed
from halfbyte.training.errors import UserError
from halfbyte.training.formats import Rounding
from halfbyte.training.kv_format import SCALES, KVCache
from halfbyte.training.model import Attention

ROUNDS_AS = {KVCache.fp8: Rounding.fp8, KVCache.nvfp4: Rounding.nvfp4}
"""How the elements of a cache format are rounded."""


class CacheRounding(torch.nn.Module):
    """Rounding of one layer's keys or values. `amax` is FP32 [], NaN until calibrated, and part of a checkpoint."""

    def __init__(self, cache: KVCache, device: torch.device):
        super().__init__()
        self.rounding = ROUNDS_AS[cache]
        self.amax: torch.Tensor
        self.scale: torch.Tensor
        self.register_buffer("amax", torch.full((), torch.nan, device=device))
        self.register_buffer("scale", self.amax.clone(), persistent=False)
        self.collecting, self.rounds = False, True

    def forward(self, x_SBGD: torch.Tensor) -> torch.Tensor:
        """Fake-quantized [S, B, G, D] in its own dtype, gradient passed straight through; as it is while collecting."""
        if self.collecting:
            self.amax = torch.maximum(self.amax, x_SBGD.detach().abs().amax().float())
        if self.collecting or not self.rounds:
            return x_SBGD
        return numerics.fake_quantize(x_SBGD, self.rounding, self.scale)


def insert(model: torch.nn.Module, cache: KVCache) -> None:
    """Give every attention of this rank's model its two roundings, not calibrated; nothing for `none`."""
    if cache is KVCache.none:
        return
    for attention in _attentions(model).values():
        device = next(model.parameters()).device
        attention.key_rounding, attention.value_rounding = CacheRounding(cache, device), CacheRounding(cache, device)


@contextlib.contextmanager
def collecting(model: torch.nn.Module) -> Iterator[None]:
    """Inside this context the maxima are collected and nothing is rounded; afterwards all ranks agree. Collective.

    Raises:
        UserError: a maximum is not finite, or nothing went through a layer.
    """
    roundings = _roundings(model)
    for rounding in roundings.values():
        rounding.amax, rounding.collecting = torch.zeros_like(rounding.amax), True
    try:
        yield
    finally:
        for rounding in roundings.values():
            rounding.collecting = False
    for rounding in roundings.values():
        # Heads are split over tensor-parallel ranks; data-parallel ranks have seen the same windows.
        dist.all_reduce(rounding.amax, dist.ReduceOp.MAX, group=parallel_state.get_tensor_and_data_parallel_group())
    refresh_scales(model)


@contextlib.contextmanager
def unrounded(model: torch.nn.Module) -> Iterator[None]:
    """Inside this context keys and values pass as they are: fake_quant.unquantized, which is about the linears too."""
    roundings = _roundings(model).values()
    for rounding in roundings:
        rounding.rounds = False
    try:
        yield
    finally:
        for rounding in roundings:
            rounding.rounds = True


def refresh_scales(model: torch.nn.Module) -> None:
    """Derive every scale from its maximum: after calibration and after every checkpoint load.

    Raises:
        UserError: a maximum is not a positive number.
    """
    for (layer, side), rounding in _roundings(model).items():
        if not (rounding.amax.isfinite() and rounding.amax > 0):
            raise UserError(
                f"quantize.kv_cache: the {side}s of layer {layer} were calibrated to {rounding.amax.item()}; check the "
                "weights and the calibration data"
            )
        rounding.scale = numerics.fp8_scale(rounding.amax)


def describe(model: torch.nn.Module) -> dict[str, dict[str, dict[str, float]]]:
    """This rank's part of quantize.json: Megatron's name of the attention -> side -> amax and scale."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (layer, side), rounding in _roundings(model).items():
        values = {"amax": float(rounding.amax), "scale": float(rounding.scale)}
        found.setdefault(f"decoder.layers.{layer}.self_attention", {})[side] = values
    return found


def restore(model: torch.nn.Module, layers: Mapping[str, Any]) -> None:
    """Take the maxima from quantize.json.

    Args:
        model: This rank's GPTModel after `insert`.
        layers: Of all ranks' `describe` together.

    Raises:
        KeyError: a layer is not in it.
    """
    for (layer, side), rounding in _roundings(model).items():
        rounding.amax.fill_(layers[f"decoder.layers.{layer}.self_attention"][side]["amax"])
    refresh_scales(model)


@contextlib.contextmanager
def scales_as_served(model: torch.nn.Module, scales: Mapping[str, float]) -> Iterator[None]:
    """Inside this context keys and values are rounded with the scales of exported files.

    Args:
        model: This rank's GPTModel.
        scales: Tensor name (model.layers.0.self_attn.k_proj.k_scale) -> scale.

    Raises:
        UserError: a scale is missing.
    """
    before = {rounding: rounding.scale for rounding in _roundings(model).values()}
    try:
        for (layer, side), rounding in _roundings(model).items():
            name = f"model.layers.{layer}.{'.'.join(SCALES[side])}"
            if name not in scales:
                raise UserError(f"export: the files hold no {name}; export again")
            rounding.scale = torch.full_like(rounding.scale, scales[name])
        yield
    finally:
        for rounding, scale in before.items():
            rounding.scale = scale


def _attentions(model: torch.nn.Module) -> dict[int, Attention]:
    """Layer number, counted from 0 over the whole model -> its attention."""
    return {layer.layer_number - 1: layer.self_attention.core_attention for layer in typed.layers(model)}


def _roundings(model: torch.nn.Module) -> dict[tuple[int, str], CacheRounding]:
    """(layer number, side) -> rounding; empty where the cache is not quantized."""
    found = {}
    for layer, attention in _attentions(model).items():
        for side, rounding in (("key", attention.key_rounding), ("value", attention.value_rounding)):
            if isinstance(rounding, CacheRounding):
                found[layer, side] = rounding
    return found
