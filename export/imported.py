"""A published quantized directory as a starting point: its scales in place of a calibration, its bytes kept.

Weights are decoded and trained on from there. The scales per tensor stay those of the files; a linear that still holds
the decoded values at export is written with the very bytes that it came with, so a round trip changes none.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from halfbyte.export.reader import Checkpoint
from halfbyte.export.record import RECORD, broken_hashes
from halfbyte.export.source import cache_of, formats_of
from halfbyte.training import numerics
from halfbyte.training.config import Format, LayerFormat, Quantize, SecondScale
from halfbyte.training.errors import UserError
from halfbyte.training.formats import GRIDS, SPECS, Rounding
from halfbyte.training.hf_map import FUSED, HFWeight
from halfbyte.training.kv_format import SCALES, KVCache
from halfbyte.training.shape import ModelShape, linear_sizes


def plan_of(checkpoint: Checkpoint, shape: ModelShape) -> dict[str, Any]:
    """What a directory decides of the recipe's section `quantize`.

    Args:
        checkpoint: The opened directory.
        shape: The model's sizes.

    Returns:
        Values of format, layers, exclude, kv_cache and scale_2 with which the recipe plans what the files hold.

    Raises:
        UserError: the configs are damaged or contradict the tensors, or something beside decoder linears is quantized.
    """
    formats, linears = formats_of(checkpoint), list(linear_sizes(shape))
    other = sorted(formats.keys() - set(linears))
    if other:
        raise UserError(f"model.path = {checkpoint.folder}: {other[0]} is quantized; only decoder linears can be")
    if not formats:
        raise UserError(f"model.path = {checkpoint.folder}: its config says that it is quantized, and no tensor is")
    default = max(sorted(set(formats.values())), key=list(formats.values()).count)
    layers = {name: LayerFormat(of.value) for name, of in formats.items() if of is not default}
    scales = [checkpoint.raw(f"{name}.weight_scale_2") for name, of in formats.items() if SPECS[of].two_level]
    powers = all(np.frexp(scale)[0] == 0.5 for scale in scales)
    return {
        "format": default,
        "layers": layers,
        "exclude": ["lm_head", "model.embed_tokens", *(name for name in linears if name not in formats)],
        "kv_cache": cache_of(checkpoint),
        "scale_2": SecondScale.pow2 if powers else SecondScale.amax,
    }


def calibration(checkpoint: Checkpoint, shape: ModelShape, quantize: Quantize) -> dict[str, Any]:
    """The content of quantize.json that a directory stands for: maxima that lead to exactly its scales.

    Args:
        checkpoint: The opened directory.
        shape: The model's sizes.
        quantize: The recipe's section, as plan_of set it.

    Raises:
        UserError: a file is not as halfbyte.json lists it (where there is one); a scale is missing, differs inside a
            fused layer, or is none that a maximum leads to; a weight's values are not what its scales round them to.
    """
    broken = broken_hashes(checkpoint.folder) if (checkpoint.folder / RECORD).exists() else []
    if broken:
        raise UserError(f"model.path: {broken[0]}; get the directory again")
    formats, layers = formats_of(checkpoint), {}
    for layer in range(shape.layers):
        for name, parts in FUSED.items():
            members = [f"model.layers.{layer}.{part}" for part in parts]
            if members[0] in formats:
                layers[f"decoder.layers.{layer}.{name}"] = _fused(checkpoint, members, formats[members[0]], quantize)
    caches = {} if quantize.kv_cache is KVCache.none else _caches(checkpoint, shape)
    settings = {"format": quantize.format, "scale_2": quantize.scale_2, "block_scale": quantize.block_scale}
    written = {key: value.value for key, value in settings.items()} | {"kv_cache": quantize.kv_cache.value}
    return {**written, "layers": layers, "caches": caches, "source": str(checkpoint.folder)}


def _fused(checkpoint: Checkpoint, members: list[str], of: Format, quantize: Quantize) -> dict[str, Any]:
    """One entry of quantize.json: a Megatron linear and the Hugging Face linears in it."""
    spec, entry = SPECS[of], {"hf": members, "format": of.value, "weight_relative_rms_error": 0.0}
    maxima: dict[str, float] = {}
    for side, rounding in {"weight": spec.weights, "input": spec.inputs}.items():
        if rounding is None or not GRIDS[rounding].per_tensor:
            continue
        two_level = GRIDS[rounding].block_scale is not None
        suffix = "input_scale" if side == "input" else "weight_scale_2" if two_level else "weight_scale"
        scale = _one(checkpoint, [f"{name}.{suffix}" for name in members])
        maxima[side] = amax_of(f"{members[0]}.{suffix}", scale, rounding, side, quantize)
        entry.setdefault("scale_2" if two_level else "scale", {})[side] = float(scale)
    for name in members:
        _check_values(checkpoint, name, spec.weights, maxima.get("weight"), quantize)
    return entry | {"amax": maxima}


def _one(checkpoint: Checkpoint, names: list[str]) -> np.ndarray:
    """The scale that all members of a fused layer share, float32 []."""
    values = [checkpoint.raw(name) for name in names]
    if any(value.size != 1 for value in values) or len({value.tobytes() for value in values}) > 1:
        shown = ", ".join(f"{name} = {value.tolist()}" for name, value in zip(names, values, strict=True))
        raise UserError(
            f"model.path = {checkpoint.folder}: not one scale for one fused layer: {shown}; export it again"
        )
    return values[0].reshape(())


def amax_of(name: str, scale: np.ndarray, rounding: Rounding, side: str, quantize: Quantize) -> float:
    """A maximum from which numerics.tensor_scale computes this scale, a BF16 number if there is one.

    Args:
        name: Of the scale, for the message.
        scale: float32 [].
        rounding: The rounding whose scale it is.
        side: weight or input.
        quantize: The recipe's section: kinds of scales.

    Raises:
        UserError: there is none: zero, not finite, or made by another rule.
    """
    block_scale = quantize.block_scale if side == "weight" else Quantize().block_scale
    divisor = 448.0 if rounding is Rounding.fp8 else numerics.DIVISOR[rounding, block_scale][0]
    product = np.float32(np.float64(scale) * divisor)
    near = [product, *(np.nextafter(product, np.float32(end)) for end in (0, np.inf))]
    candidates = [torch.tensor(product).bfloat16().float(), *(torch.tensor(value) for value in near)]
    for amax in candidates if np.isfinite(product) and scale > 0 else []:
        if numerics.tensor_scale(amax, rounding, quantize.scale_2, block_scale) == float(scale):
            return float(amax)
    raise UserError(f"{name} = {float(scale)}: no maximum leads to this scale; the directory was made by another rule")


def _check_values(
    checkpoint: Checkpoint, module: str, rounding: Rounding, amax: float | None, quantize: Quantize
) -> None:
    values = torch.from_numpy(np.ascontiguousarray(checkpoint.decode(module)))
    if not torch.isfinite(values).all():
        raise UserError(f"{checkpoint.folder}: {module} decodes to NaN or Inf; the file is damaged, get it again")
    scale = None
    if amax is not None:
        scale = numerics.tensor_scale(torch.tensor(amax), rounding, quantize.scale_2, quantize.block_scale)
    wrong = int((numerics.fake_quantize(values, rounding, scale, quantize.block_scale) != values).sum())
    if wrong:
        raise UserError(
            f"model.path = {checkpoint.folder}: {wrong} values of {module} move when they are rounded with "
            f"quantize.block_scale = {quantize.block_scale}; its block scales were chosen otherwise: try "
            "quantize.block_scale=mse"
        )


def _caches(checkpoint: Checkpoint, shape: ModelShape) -> dict[str, Any]:
    caches: dict[str, Any] = {}
    for layer in range(shape.layers):
        entry = caches.setdefault(f"decoder.layers.{layer}.self_attention", {})
        for side, (part, suffix) in SCALES.items():
            name = f"model.layers.{layer}.{part}.{suffix}"
            scale = _one(checkpoint, [name])
            entry[side] = {"amax": amax_of(name, scale, Rounding.fp8, "input", Quantize()), "scale": float(scale)}
    return caches


def with_source_bytes(weights: Iterable[HFWeight], checkpoint: Checkpoint) -> Iterator[HFWeight]:
    """Give every linear that still holds its decoded values the bytes that it came with.

    Args:
        weights: The trained tensors.
        checkpoint: The directory that training started from.
    """
    for weight in weights:
        module = weight.name.removesuffix(".weight")
        untouched = weight.quantized and weight.log2_scale is None
        if not untouched or not torch.equal(_decoded(checkpoint, module, weight), weight.tensor):
            yield weight
            continue
        prefix = f"{module}."
        suffixes = [name.removeprefix(prefix) for name in checkpoint.entries if name.startswith(prefix)]
        own = [suffix for suffix in suffixes if suffix not in ("bias", "k_scale", "v_scale")]
        yield replace(weight, packed={suffix: _stored(checkpoint, f"{prefix}{suffix}") for suffix in own})


def _stored(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor as pack.pack would return it."""
    bits = torch.from_numpy(np.array(checkpoint.raw(name)))
    return bits.view(torch.float8_e4m3fn) if checkpoint.entries[name].dtype == "F8_E4M3" else bits


def _decoded(checkpoint: Checkpoint, module: str, weight: HFWeight) -> torch.Tensor:
    values = torch.from_numpy(np.ascontiguousarray(checkpoint.decode(module)))
    return values.to(weight.tensor.dtype).to(weight.tensor.device)
