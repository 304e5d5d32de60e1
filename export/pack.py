"""One linear layer as the tensors that a serving runtime reads.

Suffixes per quantized linear `P` (N output channels, K input channels):

    format        tensor            dtype           shape
    nvfp4         P.weight          uint8           [N, K/2]    two E2M1 codes a byte, even column in the low half
                  P.weight_scale    float8_e4m3fn   [N, K/16]   linear row-major (kernels swizzle it, files do not)
                  P.weight_scale_2  float32         []
                  P.input_scale     float32         []          absent for w4a16_nvfp4; of FP8 for w4a8_nvfp4_fp8,
                                                                which has P.weight_scale [N, K/32]
    mxfp4         P.weight_packed   uint8           [N, K/2]
                  P.weight_scale    uint8           [N, K/32]   E8M0: exponent + 127
    fp8           P.weight          float8_e4m3fn   [N, K]
                  P.weight_scale    float32         []          amax/448
                  P.input_scale     float32         []          amax/448

Where the key/value cache is quantized, k_proj and v_proj have one more, also those that stay BF16 themselves:

    fp8, nvfp4    k_proj.k_scale    float32         []          amax/448 of the layer's keys, after their rotation
                  v_proj.v_scale    float32         []          amax/448 of the layer's values

The NVFP4 and FP8 names are ModelOpt's unified Hugging Face layout, the MXFP4 names compressed-tensors'
mxfp4-pack-quantized: the layouts that TensorRT-LLM, vLLM and SGLang load. Which format a linear has is decided by its
name alone (shape.layer_format).
"""

import torch
from torch import Tensor

from halfbyte.training import codec, learned_scales, numerics
from halfbyte.training.config import Format, Quantize
from halfbyte.training.errors import UserError
from halfbyte.training.formats import GRIDS, SPECS
from halfbyte.training.hf_map import HFWeight
from halfbyte.training.kv_format import SCALES
from halfbyte.training.shape import layer_format


def module_name(tensor_name: str) -> str:
    """`model.layers.0.mlp.up_proj.weight` -> `model.layers.0.mlp.up_proj`."""
    return tensor_name.removesuffix(".weight")


def format_of(weight: HFWeight, quantize: Quantize) -> Format:
    """Format of a quantized linear.

    Raises:
        UserError: The recipe leaves it in BF16.
    """
    number_format = layer_format(module_name(weight.name), quantize)
    if number_format is None:
        raise UserError(f"{weight.name}: quantized in the model, BF16 in the recipe; use the recipe of this run")
    return number_format


def weight_scale(weight: HFWeight, quantize: Quantize) -> Tensor:
    """FP32 [] scale per tensor of a weight: NVFP4's second-level scale or FP8's only one.

    Raises:
        UserError: The weight was never calibrated, or its amax is not finite.
    """
    amax = _amax(weight, "weight_amax")
    rounding = SPECS[format_of(weight, quantize)].weights
    return numerics.tensor_scale(amax, rounding, quantize.scale_2, quantize.block_scale)


def input_scale(weight: HFWeight, quantize: Quantize) -> Tensor | None:
    """FP32 [] scale per tensor of a layer's input, NVFP4 or FP8; None where inputs are not rounded with one.

    Raises:
        UserError: The input was never calibrated, or only with zeros, or its amax is not finite.
    """
    rounding = SPECS[format_of(weight, quantize)].inputs
    if rounding is None or not GRIDS[rounding].per_tensor:
        return None
    amax = _amax(weight, "input_amax")
    if amax == 0:
        raise UserError(
            f"{weight.name}: its input was zero on all calibration data; "
            f"add {module_name(weight.name)} to quantize.exclude"
        )
    return numerics.tensor_scale(amax, rounding, quantize.scale_2)


def cache_scale(weight: HFWeight) -> dict[str, Tensor]:
    """The scale of the key/value cache that stands beside k_proj or v_proj.

    Returns:
        Suffix (k_scale or v_scale) -> FP32 [] on the CPU; empty for every other tensor and without a quantized cache.

    Raises:
        UserError: The calibrated maximum is not a positive number.
    """
    if weight.cache_amax is None:
        return {}
    amax = _amax(weight, "cache_amax")
    if amax <= 0:
        raise UserError(f"{weight.name}: its part of the cache was zero on all calibration data; use other data")
    (suffix,) = (suffix for part, suffix in SCALES.values() if module_name(weight.name).endswith(part))
    return {suffix: numerics.fp8_scale(amax).cpu()}


def fake(weight: HFWeight, quantize: Quantize) -> Tensor:
    """The values a quantized weight is trained with, FP32 [N, K]: what the packed bytes must decode to."""
    spec = SPECS[format_of(weight, quantize)]
    scale = weight_scale(weight, quantize) if spec.grid.per_tensor else None
    if weight.log2_scale is not None:
        return learned_scales.fake(weight.tensor.detach().float(), weight.log2_scale, spec.weights, scale)
    return numerics.fake_quantize(weight.tensor.detach().float(), spec.weights, scale, quantize.block_scale)


def pack(weight: HFWeight, quantize: Quantize) -> dict[str, Tensor]:
    """Pack one quantized linear.

    Args:
        weight: Complete training-time weight, [N, K] float.
        quantize: Formats and kind of second-level scale.

    Returns:
        Suffix (without the dot) -> CPU tensor, as in the table above; decoding it gives fake(weight) bit for bit.
        weight.packed, where the weight has it.

    Raises:
        UserError: Not a matrix, K not a multiple of the block, a NaN or Inf in the weight, a missing amax.
    """
    if weight.packed is not None:
        return weight.packed
    number_format = format_of(weight, quantize)
    tensor, grid = weight.tensor.detach(), SPECS[number_format].grid
    if tensor.dim() != 2 or tensor.shape[1] % grid.block:
        raise UserError(
            f"{weight.name}: shape {list(tensor.shape)} cannot be packed as {number_format.value}, whose block is "
            f"{grid.block} input channels; add {module_name(weight.name)} to quantize.exclude"
        )
    if not all(_is_finite(x) for x in (tensor, weight.log2_scale) if x is not None):
        raise UserError(f"{weight.name}: the weight or its scales hold NaN or Inf; export an earlier checkpoint")
    scales = None
    if weight.log2_scale is not None:
        scales = learned_scales.block_scales(weight.log2_scale, SPECS[number_format].weights)
    if not grid.per_tensor:
        codes, scale = codec.mxfp4_encode(tensor, quantize.block_scale, scales)
        return {"weight_packed": codes.cpu(), "weight_scale": scale.cpu()}
    per_tensor = weight_scale(weight, quantize)
    if grid.block_scale is None:
        packed = {"weight": codec.fp8_encode(tensor, per_tensor).cpu(), "weight_scale": per_tensor.cpu()}
    else:
        codes, scale = codec.nvfp4_encode(tensor, per_tensor, quantize.block_scale, grid.block, scales)
        packed = {"weight": codes.cpu(), "weight_scale": scale.cpu(), "weight_scale_2": per_tensor.cpu()}
    of_input = input_scale(weight, quantize)
    return packed if of_input is None else packed | {"input_scale": of_input.cpu()}


def _is_finite(x: Tensor) -> bool:
    """No NaN and no Inf in x: its extremes would show them. Looking at every element costs more than packing it."""
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(x.detach()))


def _amax(weight: HFWeight, which: str) -> Tensor:
    """The calibrated amax as FP32 []; `which` is weight_amax, input_amax or cache_amax."""
    amax = {
        "weight_amax": weight.weight_amax,
        "input_amax": weight.input_amax,
        "cache_amax": weight.cache_amax,
    }[which]
    if amax is None:
        raise UserError(f"{weight.name}: {which} is missing; calibrate again (halfbyte run on a new run.dir)")
    if amax.numel() != 1 or not torch.isfinite(amax).all():
        raise UserError(f"{weight.name}: {which} is {amax.tolist()}, not one finite number; calibrate again")
    return amax.detach().float().reshape(())
