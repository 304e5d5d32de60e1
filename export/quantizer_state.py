"""The quantizers of a run in files of their own: what a .nemo archive keeps beside the weights as they were trained.

    quantizers.json         settings (format, scale_2, block_scale, kv_cache), whether block scales were learned, and
                            of every quantized linear its format and the weight error that the run reported last
    quantizers.safetensors  P = Hugging Face name of a linear, all but the last FP32 []
                            P.weight_quantizer.amax, .scale          where the format has a scale per tensor
                            P.input_quantizer.amax, .scale           likewise, of the linear's input
                            P.output_quantizer.amax, .scale          k_proj and v_proj, where the cache is quantized
                            P.weight_quantizer.log2_block_scale      [N, K / block], only where they were learned

A maximum is what calibration found, a scale what follows from it (NVFP4's second level, FP8's only one); a file in
which it does not follow is damaged. There are no pre-scales: smoothing is folded into the weights. Block scales that
are not learned follow from weight, scale and rule.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from halfbyte.export.pack import cache_scale, format_of, input_scale, module_name, weight_scale
from halfbyte.training import nemo_archive, numerics
from halfbyte.training.config import BlockScale, Format, LayerFormat, Quantize, SecondScale
from halfbyte.training.errors import UserError
from halfbyte.training.formats import GRIDS, SPECS
from halfbyte.training.hf_map import FUSED, HFWeight, expected_shapes, fuse
from halfbyte.training.kv_format import SCALES, KVCache
from halfbyte.training.model_source import QUANTIZERS
from halfbyte.training.shape import ModelShape, linear_sizes

NUMBERS = "quantizers.safetensors"
LOG2 = "weight_quantizer.log2_block_scale"


@dataclass(frozen=True)
class State:
    """The content of quantizers.json.

    Attributes:
        settings: Values of the recipe's keys quantize.format, scale_2, block_scale and kv_cache.
        formats: Hugging Face module name -> format of every quantized linear.
        errors: Hugging Face module name -> relative RMS error of its weight, as the run reported it.
        learned: Whether some linear's block scales were learned.
    """

    settings: dict[str, Any]
    formats: dict[str, Format]
    errors: dict[str, float]
    learned: bool


def numbers(weight: HFWeight, quantize: Quantize) -> dict[str, torch.Tensor]:
    """What quantizers.safetensors says of one weight, but for learned block scales: FP32 [] by name; often nothing.

    Raises:
        UserError: it was never calibrated.
    """
    found: dict[str, tuple[torch.Tensor | None, torch.Tensor]] = {}
    if weight.quantized:
        if SPECS[format_of(weight, quantize)].grid.per_tensor:
            found["weight_quantizer"] = weight.weight_amax, weight_scale(weight, quantize)
        of_input = input_scale(weight, quantize)
        if of_input is not None:
            found["input_quantizer"] = weight.input_amax, of_input
    for scale in cache_scale(weight).values():
        found["output_quantizer"] = weight.cache_amax, scale
    module, named = module_name(weight.name), {}
    for quantizer, (amax, scale) in found.items():
        assert amax is not None  # the scale was computed from it
        named |= {f"{module}.{quantizer}.amax": amax, f"{module}.{quantizer}.scale": scale}
    return {name: value.detach().float().reshape(()).cpu() for name, value in named.items()}


def describe(
    quantize: Quantize, formats: Mapping[str, Format], errors: Mapping[str, float], *, learned: bool
) -> dict[str, Any]:
    """The content of quantizers.json; the arguments are those of State."""
    settings = {name: value.value for name, value in _settings(quantize).items()}
    layers = {name: {"format": of.value, "weight_relative_rms_error": errors[name]} for name, of in formats.items()}
    return {**settings, "learned_block_scales": learned, "layers": layers}


def _settings(quantize: Quantize) -> dict[str, Any]:
    return {
        "format": quantize.format,
        "scale_2": quantize.scale_2,
        "block_scale": quantize.block_scale,
        "kv_cache": quantize.kv_cache,
    }


def read_state(model_path: Path) -> State:
    """quantizers.json of a .nemo archive or of a directory that one was unpacked into.

    Raises:
        UserError: it cannot be read, or holds what no archive of this package does.
    """
    where = f"{model_path / QUANTIZERS}"
    try:
        archive = nemo_archive.is_archive(model_path)
        text = nemo_archive.read(model_path, QUANTIZERS) if archive else (model_path / QUANTIZERS).read_bytes()
        content = json.loads(text)
        kinds = {"format": Format, "scale_2": SecondScale, "block_scale": BlockScale, "kv_cache": KVCache}
        layers = content["layers"].items()
        state = State(
            settings={name: kind(content[name]) for name, kind in kinds.items()},
            formats={name: Format(entry["format"]) for name, entry in layers},
            errors={name: float(entry["weight_relative_rms_error"]) for name, entry in layers},
            learned=content["learned_block_scales"] is True,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{where}: missing or damaged ({error!r}); get the archive again") from error
    if not state.formats:
        raise UserError(f"{where}: no linear is quantized; get the archive again")
    return state


def plan_of(model_path: Path, state: State, shape: ModelShape) -> dict[str, Any]:
    """What the state decides of the recipe's section `quantize`.

    Returns:
        Values of format, layers, exclude, kv_cache, scale_2 and block_scale with which the recipe plans the same.

    Raises:
        UserError: it names a linear that the model does not have.
    """
    linears = linear_sizes(shape)
    unknown = sorted(state.formats.keys() - linears.keys())
    if unknown:
        raise UserError(f"{model_path / QUANTIZERS}: names {unknown[0]}, which config.json's model does not have")
    default = state.settings["format"]
    return state.settings | {
        "layers": {name: LayerFormat(of.value) for name, of in state.formats.items() if of is not default},
        "exclude": ["lm_head", "model.embed_tokens", *(name for name in linears if name not in state.formats)],
    }


class Numbers:
    """quantizers.safetensors of an unpacked archive.

    Raises:
        UserError: it is damaged or lacks what the state needs; from every method.
    """

    def __init__(self, folder: Path):
        self._path = folder / NUMBERS
        try:
            self._file = safe_open(self._path, framework="pt")
            self._names = frozenset(self._file.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._path}: damaged ({error}); get the archive again") from error

    def amax(self, modules: Iterable[str], quantizer: str) -> torch.Tensor:
        """The maximum that all members of a fused layer share, FP32 []."""
        names = [f"{module}.{quantizer}.amax" for module in modules]
        values = [self._scalar(name) for name in names]
        if any(value != values[0] for value in values):
            shown = ", ".join(f"{name} = {float(value)}" for name, value in zip(names, values, strict=True))
            raise UserError(f"{self._path}: not one maximum for one fused layer: {shown}; get the archive again")
        return values[0]

    def check_scale(self, module: str, quantizer: str, scale: torch.Tensor) -> None:
        """Compare a scale that was computed from a maximum with the one in the file."""
        name = f"{module}.{quantizer}.scale"
        if self._scalar(name) != scale:
            raise UserError(f"{self._path}: {name} is not {float(scale)}, as its maximum says; get the archive again")

    def log2(self, module: str, size: tuple[int, int]) -> torch.Tensor | None:
        """The learned logarithms of a linear's block scales, [N, K / block]; None where a rule chooses them."""
        name = f"{module}.{LOG2}"
        if name not in self._names:
            return None
        found = self._file.get_tensor(name)
        if found.shape != size or not found.is_floating_point() or not found.isfinite().all():
            raise UserError(f"{self._path}: {name} {list(found.shape)} is not {list(size)} finite numbers")
        return found

    def _scalar(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise UserError(f"{self._path}: lacks {name}; get the archive again")
        value = self._file.get_tensor(name)
        if value.shape != () or value.dtype != torch.float32 or not value.isfinite() or value < 0:
            raise UserError(f"{self._path}: {name} is not one FP32 number of 0 or more; get the archive again")
        return value


def calibration(folder: Path, state: State, shape: ModelShape) -> dict[str, Any]:
    """The content of quantize.json that the quantizers stand for.

    Args:
        folder: An unpacked archive.
        state: Its quantizers.json.
        shape: The model's sizes.

    Raises:
        UserError: a number is missing, differs inside a fused layer, or does not go with its scale.
    """
    quantize, numbers_of = Quantize(**state.settings), Numbers(folder)
    layers, caches = {}, {}
    for layer in range(shape.layers):
        for name, parts in FUSED.items():
            members = [f"model.layers.{layer}.{part}" for part in parts]
            if members[0] in state.formats:
                layers[f"decoder.layers.{layer}.{name}"] = _fused(numbers_of, members, state, quantize)
        if quantize.kv_cache is not KVCache.none:
            caches[f"decoder.layers.{layer}.self_attention"] = _caches(numbers_of, f"model.layers.{layer}.")
    settings = {name: value.value for name, value in state.settings.items()}
    return {**settings, "layers": layers, "caches": caches, "source": folder.name}


def _fused(numbers_of: Numbers, members: list[str], state: State, quantize: Quantize) -> dict[str, Any]:
    """One entry of quantize.json: a Megatron linear and the Hugging Face linears in it."""
    of = state.formats[members[0]]
    entry: dict[str, Any] = {"hf": members, "format": of.value, "weight_relative_rms_error": state.errors[members[0]]}
    entry |= {"amax": {}, "scale_2": {}}
    for side in ("weight", "input"):
        rounding = SPECS[of].rounding(side)
        if rounding is None or not GRIDS[rounding].per_tensor:
            continue
        amax = numbers_of.amax(members, f"{side}_quantizer")
        rule = quantize.block_scale if side == "weight" else BlockScale.amax
        scale = numerics.tensor_scale(amax, rounding, quantize.scale_2, rule)
        for member in members:
            numbers_of.check_scale(member, f"{side}_quantizer", scale)
        entry["amax"][side] = float(amax)
        entry.setdefault("scale" if GRIDS[rounding].block_scale is None else "scale_2", {})[side] = float(scale)
    return entry


def _caches(numbers_of: Numbers, prefix: str) -> dict[str, Any]:
    entry = {}
    for side, (part, _) in SCALES.items():
        amax = numbers_of.amax([prefix + part], "output_quantizer")
        scale = numerics.fp8_scale(amax)
        numbers_of.check_scale(prefix + part, "output_quantizer", scale)
        entry[side] = {"amax": float(amax), "scale": float(scale)}
    return entry


def learned_scales(folder: Path, state: State, shape: ModelShape) -> dict[str, torch.Tensor]:
    """Megatron's name of a linear -> the learned logarithms of its block scales, [N, K / block].

    Raises:
        UserError: a part of a fused linear has none, or they are not finite numbers of the right shape.
    """
    numbers_of, found = Numbers(folder), {}
    for layer in range(shape.layers) if state.learned else ():
        for name, parts in FUSED.items():
            modules = [
                f"model.layers.{layer}.{part}" for part in parts if f"model.layers.{layer}.{part}" in state.formats
            ]
            own = {module: numbers_of.log2(module, blocks(module, state.formats[module], shape)) for module in modules}
            there = {module.split(".", 3)[3]: log2 for module, log2 in own.items() if log2 is not None}
            if there and len(there) != len(parts):
                raise UserError(f"{folder / NUMBERS}: not all of {', '.join(parts)} in layer {layer} have {LOG2}")
            if there:
                found[f"decoder.layers.{layer}.{name}"] = fuse(name, there, shape)
    return found


def blocks(module: str, of: Format, shape: ModelShape) -> tuple[int, int]:
    """[N, K / block] of a linear."""
    n, k = linear_sizes(shape)[module]
    return n, k // SPECS[of].grid.block


def read_weights(folder: Path, state: State, shape: ModelShape) -> Iterator[HFWeight]:
    """The model of an unpacked archive, tensor by tensor, as saved_weights.read_weights gives a checkpoint's.

    Raises:
        UserError: a weight or a number is missing or damaged.
    """
    numbers_of, left = Numbers(folder), set(expected_shapes(shape))
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in left & set(file.keys()):
                    left.discard(name)
                    yield _weight(numbers_of, name, file.get_tensor(name), state, shape)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged ({error}); get the archive again") from error
    if left:
        raise UserError(f"{folder}: lacks {min(left)}; get the archive again")


def _weight(numbers_of: Numbers, name: str, tensor: torch.Tensor, state: State, shape: ModelShape) -> HFWeight:
    module = module_name(name)
    of, cached = state.formats.get(module), state.settings["kv_cache"] is not KVCache.none

    def amax(quantizer: str, wanted: bool) -> torch.Tensor | None:
        return numbers_of.amax([module], quantizer) if wanted else None

    keeps = cached and module.endswith(tuple(part for part, _ in SCALES.values()))
    if of is None:
        return HFWeight(name, tensor, cache_amax=amax("output_quantizer", keeps))
    roundings = {side: SPECS[of].rounding(side) for side in ("weight", "input")}
    calibrated = {side: rounding is not None and GRIDS[rounding].per_tensor for side, rounding in roundings.items()}
    return HFWeight(
        name,
        tensor,
        quantized=True,
        weight_amax=amax("weight_quantizer", calibrated["weight"]),
        input_amax=amax("input_quantizer", calibrated["input"]),
        cache_amax=amax("output_quantizer", keeps),
        log2_scale=numbers_of.log2(module, blocks(module, of, shape)),
    )
