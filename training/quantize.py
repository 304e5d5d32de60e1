"""THE quantization hook: plan layers, let ModelOpt insert quantizers, calibrate, report; planned != converted stops.

ModelOpt decides where a quantizer sits and collects the absolute maxima; the arithmetic is ours (numerics.py), given
to ModelOpt as the backend "halfbyte". The scale per tensor (NVFP4's second level, FP8's only one) comes from the
calibrated maximum and stays frozen, the block scales follow the tensor at every step. q/k/v and gate/up are one fused
linear here, so they share one format and one scale from the start and nothing has to be re-quantized at export.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
import torch.distributed as dist
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt.torch.quantization.nn.modules import tensor_quantizer

from halfbyte.training import companions, kv_cache, typed
from halfbyte.training.arithmetic import Arithmetic
from halfbyte.training.config import Format, LayerFormat, Quantize, Recipe
from halfbyte.training.errors import UserError
from halfbyte.training.files import damage, read_json
from halfbyte.training.formats import GRIDS, SPECS, Rounding
from halfbyte.training.hf_map import FUSED
from halfbyte.training.kv_format import KVCache
from halfbyte.training.shape import excluded, layer_format

SIDES = ("weight", "input")


@dataclass(frozen=True)
class Planned:
    """One fused Megatron linear that shall be quantized.

    Attributes:
        module: Its name in this rank's model (layer numbers count from this pipeline stage).
        key: Its name in the whole model, e.g. `decoder.layers.7.mlp.linear_fc1`.
        hf: Hugging Face module names of the linears it holds.
        format: Its number format.
    """

    module: str
    key: str
    hf: tuple[str, ...]
    format: Format

    @property
    def quantizers(self) -> dict[str, Rounding]:
        """Names of its quantizers in this rank's model, and how each rounds."""
        roundings = {side: SPECS[self.format].rounding(side) for side in SIDES}
        return {f"{self.module}.{side}_quantizer": rounding for side, rounding in roundings.items() if rounding}


def plan(model: torch.nn.Module, quantize: Quantize) -> list[Planned]:
    """This pipeline stage's linears to quantize, each with its format, by shape.layer_format.

    Raises:
        UserError: the recipe would split a fused linear (q/k/v or gate/up).
    """
    planned = []
    for local, layer in enumerate(typed.layers(model)):
        number = layer.layer_number - 1
        for name, parts in FUSED.items():
            hf = tuple(f"model.layers.{number}.{part}" for part in parts)
            out = {excluded(module, quantize.exclude) for module in hf}
            if len(out) > 1:
                raise UserError(f"quantize.exclude splits {', '.join(hf)}: they are one layer; exclude all or none")
            chosen = {layer_format(module, quantize) for module in hf}
            if len(chosen) > 1:
                raise UserError(f"quantize.layers splits {', '.join(hf)}: they are one layer; give them one format")
            (number_format,) = chosen
            if number_format is not None:
                key = f"decoder.layers.{number}.{name}"
                planned.append(Planned(f"decoder.layers.{local}.{name}", key, hf, number_format))
    return planned


def quantizer_config(rounding: Rounding) -> dict[str, Any]:
    """ModelOpt's settings of one quantizer, with our arithmetic."""
    grid = GRIDS[rounding]
    if grid.block_scale is None:
        return {"num_bits": (4, 3), "axis": None, "backend": "halfbyte"}
    block = {-1: grid.block, "type": "dynamic", "scale_bits": grid.block_scale}
    return {"num_bits": (2, 1), "block_sizes": block, "backend": "halfbyte"}


def modelopt_config(planned: list[Planned], quantize: Quantize) -> dict[str, Any]:
    """ModelOpt's configuration that quantizes exactly `planned`, each named, with our arithmetic.

    Whether there is a calibration follows from the recipe alone: the stages of a pipeline calibrate together, also one
    that has nothing to quantize.
    """
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for layer in planned:
        entries += [
            {"quantizer_name": name, "cfg": quantizer_config(rounding)} for name, rounding in layer.quantizers.items()
        ]
    named = {quantize.format.value, *(chosen.value for chosen in quantize.layers.values())} - {LayerFormat.bf16.value}
    roundings = {SPECS[Format(name)].rounding(side) for name in named for side in SIDES} - {None}
    calibrates = any(GRIDS[rounding].per_tensor for rounding in roundings if rounding)
    return {"quant_cfg": entries, "algorithm": "max" if calibrates else None}


def quantize(
    model: torch.nn.Module,
    recipe: Recipe,
    calibrate: Callable[[torch.nn.Module], None],
) -> dict[str, Any]:
    """Insert quantizers, calibrate them, prove that what was planned is what was converted.

    Args:
        model: This rank's GPTModel, weights loaded; changed in place.
        recipe: The recipe; `method` is not bf16.
        calibrate: Runs the calibration windows through the model it is given (not called for MXFP4, which needs none).

    Returns:
        The content of quantize.json: the default format, scale_2 and block_scale modes, and per layer its own format,
        maxima, scales (scale_2 of NVFP4, scale of FP8) and the relative RMS error of its weight; the format of the
        cache, and per attention the maxima and scales of keys and values. Equal on every rank.

    Raises:
        UserError: a planned layer was not converted, another one was, a weight or a calibrated maximum is not finite.
    """
    planned = plan(model, recipe.quantize)
    for layer in planned:
        if not torch.isfinite(typed.linear(model, layer.module).weight).all():
            raise UserError(f"quantize: {layer.key}.weight holds NaN or Inf; check the weights")
    kv_cache.insert(model, recipe.quantize.kv_cache)
    with kv_cache.collecting(model):
        insert(model, planned, recipe.quantize, calibrate)
    refresh_scales(model, recipe.quantize)
    return report(model, planned, recipe.quantize)


def report(model: torch.nn.Module, planned: list[Planned], quantize: Quantize) -> dict[str, Any]:
    """The content of quantize.json for a calibrated model; collective."""
    return {
        "format": quantize.format.value,
        "scale_2": quantize.scale_2.value,
        "block_scale": quantize.block_scale.value,
        "kv_cache": quantize.kv_cache.value,
        "layers": gather_layers({layer.key: _describe(model, layer) for layer in planned}),
        "caches": gather_layers(kv_cache.describe(model)),
    }


def restore(model: torch.nn.Module, recipe: Recipe, report: Path) -> dict[str, Any]:
    """Insert quantizers with the calibration that an earlier start of this run wrote to quantize.json.

    Raises:
        UserError: the file belongs to another plan.
    """
    content = read_json(report)
    planned = plan(model, recipe.quantize)
    kv_cache.insert(model, recipe.quantize.kv_cache)
    insert(model, planned, recipe.quantize, lambda stage: None)
    with damage(report):
        _same_plan(content, model, planned, recipe.quantize, report)
        for layer in planned:
            linear = typed.linear(model, layer.module)
            for side, amax in content["layers"][layer.key]["amax"].items():
                quantizer = typed.quantizer(linear, side)
                quantizer.amax = torch.tensor(amax, dtype=linear.weight.dtype, device=linear.weight.device)
        if recipe.quantize.kv_cache is not KVCache.none:
            kv_cache.restore(model, content["caches"])
        refresh_scales(model, recipe.quantize)
    return content


def _same_plan(
    content: dict[str, Any], model: torch.nn.Module, planned: list[Planned], quantize: Quantize, report: Path
) -> None:
    here = {layer.layer_number - 1 for layer in typed.layers(model)}
    listed = {(key, entry["format"]) for key, entry in content["layers"].items() if int(key.split(".")[2]) in here}
    differing = sorted({key for key, _ in listed ^ {(layer.key, layer.format.value) for layer in planned}})
    block_scale = content.get("block_scale", "amax")  # absent in run folders older than the key
    there = (content["format"], content["scale_2"], block_scale)
    if content.get("kv_cache", "none") != quantize.kv_cache.value:
        differing.append(f"kv_cache {content['kv_cache']}")
    if there != (quantize.format.value, quantize.scale_2.value, quantize.block_scale.value):
        differing.append(f"{content['format']} with scale_2 {content['scale_2']} and block_scale {block_scale}")
    if differing:
        raise UserError(
            f"{report}: {differing[0]} is not as the recipe plans; the run folder belongs to another recipe"
        )


def insert(
    model: torch.nn.Module,
    planned: list[Planned],
    quantize: Quantize,
    calibrate: Callable[[torch.nn.Module], None],
) -> None:
    """Insert the quantizers of `planned`, calibrate them, prove that they and no others are there.

    Args:
        model: This rank's GPTModel; changed in place.
        planned: The layers and their formats, by `plan`.
        quantize: The recipe's section that `planned` follows from.
        calibrate: As in `quantize`.

    Raises:
        UserError: a planned layer was not converted, another one was, a calibrated maximum is not finite.
    """
    if not tensor_quantizer.is_registered_quant_backend("halfbyte"):
        tensor_quantizer.register_quant_backend("halfbyte", _fake_quantize)
    with contextlib.redirect_stdout(None):  # ModelOpt prints a count; ours is the stage's line
        try:
            mtq.quantize(model, modelopt_config(planned, quantize), calibrate)
        except AssertionError as error:  # ModelOpt's calibrator asserts that every maximum is finite
            reason = f"quantize: calibration failed ({error}); check the weights and the calibration data"
            raise UserError(reason) from error
    converted = sorted(name for name, _ in enabled_quantizers(model))
    expected = sorted(name for layer in planned for name in layer.quantizers)
    if converted != expected:
        missing, extra = sorted(set(expected) - set(converted)), sorted(set(converted) - set(expected))
        raise UserError(
            f"quantize: planned != converted; not quantized: {missing or 'none'}, unplanned: {extra or 'none'}"
        )


def enabled_quantizers(model: torch.nn.Module) -> Iterator[tuple[str, TensorQuantizer]]:
    """(name, quantizer) of every quantizer that is switched on."""
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and module.is_enabled:
            yield name, module


def settings(model: torch.nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """(name, attributes) of every quantizer, as ModelOpt stores them in a checkpoint; compare two with `==`."""
    left_out = vars(torch.nn.Module()).keys() | TensorQuantizer._skip_properties_for_save_restore
    return [
        (name, {key: copy.copy(value) for key, value in vars(module).items() if key not in left_out})
        for name, module in model.named_modules()
        if isinstance(module, TensorQuantizer)
    ]


def refresh_scales(model: torch.nn.Module, quantize: Quantize) -> None:
    """Derive every scale from its calibrated maximum: after calibration and after every checkpoint load.

    Raises:
        UserError: a maximum is missing or not finite.
    """
    roundings = {name: way for layer in plan(model, quantize) for name, way in layer.quantizers.items()}
    learned = companions.of(model)
    for name, quantizer in enabled_quantizers(model):
        calibrated = GRIDS[roundings[name]].per_tensor
        amax: torch.Tensor | None = quantizer.amax if calibrated else None  # type: ignore[assignment] - torch says Tensor | Module
        if calibrated and (amax is None or not torch.isfinite(amax).all()):
            found = "nothing" if amax is None else amax.item()
            raise UserError(f"quantize: {name} was calibrated to {found}; check the weights and the calibration data")
        module, _, side = name.removesuffix("_quantizer").rpartition(".")
        scales = None if learned is None or side == "input" else learned.of(companions.SCALES, module)
        log2 = None if scales is None else scales.log2
        quantizer._quantizer_cache = Arithmetic.of(side, roundings[name], amax, quantize, log2)
    kv_cache.refresh_scales(model)


def _fake_quantize(x: torch.Tensor, quantizer: TensorQuantizer) -> torch.Tensor:
    """ModelOpt's backend entry: x -> x on the format's grid, gradient passed straight through."""
    return quantizer._quantizer_cache.fake(x)


def weight_errors(model: torch.nn.Module, quantize: Quantize) -> dict[str, float]:
    """Relative RMS error ||W_q - W|| / ||W|| of every quantized weight as it is now, by layer; equal on every rank."""
    return gather_layers({at.key: _weight_error(model, at.module) for at in plan(model, quantize)})


@contextlib.contextmanager
def as_exported(model: torch.nn.Module) -> Iterator[None]:
    """Inside this context every exported parameter that is not fake-quantized has BF16 values: what an export writes.

    For evaluation where the computation is in FP32 or FP64, so that the scored model is the shipped one; afterwards the
    parameters are as they were. In BF16 nothing is done.
    """
    quantized = {name.removesuffix("_quantizer") for name, _ in enabled_quantizers(model)}
    rounded = {
        parameter: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if name not in quantized and not companions.owns(name) and parameter.dtype is not torch.bfloat16
    }
    with torch.no_grad():
        for parameter in rounded:
            parameter.copy_(parameter.to(torch.bfloat16))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, before in rounded.items():
                parameter.copy_(before)


def _describe(model: torch.nn.Module, layer: Planned) -> dict[str, Any]:
    linear = typed.linear(model, layer.module)
    entry: dict[str, Any] = {
        "hf": list(layer.hf),
        "format": layer.format.value,
        "weight_relative_rms_error": _weight_error(model, layer.module),
        "amax": {},
        "scale_2": {},
    }
    for side in SIDES:
        quantizer = typed.quantizer(linear, side)
        rule = quantizer._quantizer_cache if quantizer.is_enabled else None
        if rule is not None and rule.scale is not None:
            assert quantizer.amax is not None  # the scale was computed from it
            entry["amax"][side] = float(quantizer.amax)
            kind = "scale" if GRIDS[rule.rounding].block_scale is None else "scale_2"
            entry.setdefault(kind, {})[side] = float(rule.scale)
    return entry


def _weight_error(model: torch.nn.Module, module: str) -> float:
    with torch.no_grad():
        weight, quantizer = companions.weight_of(model, module), typed.linear(model, module).weight_quantizer
        error = (quantizer(weight).float() - weight.float()).square().sum()
        weight = weight.float()
        sums = torch.stack([error, weight.square().sum()]).double()
    # Row- and column-parallel shards cover the weight exactly once: sums over the group are sums over the whole.
    from megatron.core import parallel_state

    dist.all_reduce(sums, group=parallel_state.get_tensor_model_parallel_group())
    return float((sums[0] / sums[1].clamp(min=1e-30)).sqrt())


def gather_layers(mine: dict[str, Any]) -> dict[str, Any]:
    """Entries by layer key, of all pipeline stages, in layer order; collective."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    merged = {key: value for part in parts for key, value in part.items()}
    return dict(sorted(merged.items(), key=lambda item: (int(item[0].split(".")[2]), item[0])))
