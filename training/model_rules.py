"""Whether a recipe fits its model: layout, block sizes, exclude patterns. Pure and torch-free; a line per problem."""

import math
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from halfbyte.training import kv_format
from halfbyte.training.config import (
    Activations,
    BlockScale,
    Format,
    Method,
    Quantize,
    Recipe,
    SecondScale,
    Smoothing,
    Weights,
)
from halfbyte.training.formats import GRIDS, SPECS, Rounding
from halfbyte.training.kv_format import KVCache
from halfbyte.training.method_rules import method_problems
from halfbyte.training.pattern_rules import freeze_problems, pattern_problems, some
from halfbyte.training.shape import (
    FUSED_GROUPS,
    ROW_PARALLEL,
    ModelShape,
    deciding_pattern,
    excluded,
    layer_format,
    linear_sizes,
    planned_linears,
)


def model_problems(recipe: Recipe, shape: ModelShape) -> list[str]:
    """Everything about the layout and the formats that the model's sizes rule out, one line each."""
    problems = [*_layout(recipe, shape), *_formats(recipe, shape), *_distill(recipe, shape)]
    if recipe.method != Method.bf16:
        problems += [*_patterns(recipe, shape), *_layers(recipe, shape)]
    problems += method_problems(recipe, shape)
    return problems if recipe.method == Method.ptq else [*problems, *freeze_problems(recipe, shape)]


def _distill(recipe: Recipe, shape: ModelShape) -> Iterator[str]:
    k = recipe.distill.top_k
    if k is not None and k >= shape.vocab:
        yield f"distill.top_k = {k}: the vocabulary has {shape.vocab} tokens; give less, or null for all of them"


def _layout(recipe: Recipe, shape: ModelShape) -> Iterator[str]:
    layout, train = recipe.parallel, recipe.train
    tensor, pipeline = layout.tensor, layout.pipeline
    if tensor > 0:
        sizes = {
            "attention heads": shape.heads,
            "key/value heads": shape.kv_heads,
            "intermediate size": shape.ffn,
            "vocabulary": shape.vocab,
        }
        odd = [f"{what} ({size})" for what, size in sizes.items() if size % tensor]
        if odd:
            fitting = _divisors(math.gcd(*sizes.values()))
            yield f"parallel.tensor = {tensor}: does not divide the model's {', '.join(odd)}; use {fitting}"
    last = layout.last_stage_layers
    if last is None and pipeline > 0 and shape.layers % pipeline:
        yield (
            f"parallel.pipeline = {pipeline}: does not divide the model's {shape.layers} layers; "
            f"use {_divisors(shape.layers)}"
        )
    if (
        last is not None
        and pipeline > 1
        and not (0 < last < shape.layers and (shape.layers - last) % (pipeline - 1) == 0)
    ):
        yield (
            f"parallel.last_stage_layers = {last}: the other {pipeline - 1} pipeline stages must share the rest of "
            f"{shape.layers} layers evenly, at least one each; choose another number or none"
        )
    if layout.sequence and tensor == 1:
        yield "parallel.sequence = true: splits over tensor-parallel ranks, and parallel.tensor = 1; set it false"
    lengths = {"train.sequence_length": train.sequence_length}
    lengths["quantize.calibration_length"] = recipe.quantize.calibration_length or 0
    for key, length in lengths.items():
        if layout.sequence and tensor > 1 and length % tensor:
            yield (
                f"{key} = {length}: not a multiple of parallel.tensor = {tensor}, which parallel.sequence needs; "
                "round it up"
            )
        if length > shape.max_positions:
            ends = f"ends at {shape.max_positions} positions"
            if shape.sliding_window == shape.max_positions:
                ends = f"has a sliding window of {shape.sliding_window} tokens, beyond which attention is not supported"
            yield f"{key} = {length}: the model {ends}; give at most {shape.max_positions}"


def _divisors(number: int) -> str:
    return ", ".join(str(i) for i in range(1, number + 1) if number % i == 0)


def _formats(recipe: Recipe, shape: ModelShape) -> Iterator[str]:
    quantize, tensor = recipe.quantize, recipe.parallel.tensor
    planned = planned_linears(shape, recipe)
    formats = sorted(set(planned.values()))
    if formats and not any(SPECS[number_format].two_level for number_format in formats):
        names = " and ".join(formats)
        if quantize.scale_2 != SecondScale.pow2:
            yield f"quantize.scale_2 = {quantize.scale_2}: {names} has no second-level scale; leave the key out"
        if quantize.block_scale != BlockScale.amax and not (
            quantize.block_scale == BlockScale.mse and any(SPECS[f].weights is Rounding.mxfp4 for f in formats)
        ):
            yield f"quantize.block_scale = {quantize.block_scale}: {names} has no choice of scales; leave the key out"
    elif quantize.block_scale == BlockScale.mse and quantize.scale_2 != SecondScale.pow2:
        yield (
            f"quantize.block_scale = mse: quantize.scale_2 = {quantize.scale_2} would blur which scales reproduce a "
            "block exactly; use scale_2=pow2, or block_scale=four_over_six"
        )
    if quantize.block_scale == BlockScale.mse and Format.w4a8_nvfp4_fp8 in formats:
        yield "quantize.block_scale = mse: not for w4a8_nvfp4_fp8, whose scales are bounded; use amax or four_over_six"
    yield from _calibration(recipe, formats)
    yield from _smoothing(quantize)
    if (
        quantize.clip_gradient
        and formats
        and not recipe.train.block_scale_lr_mult
        and not any(SPECS[number_format].grid.per_tensor for number_format in formats)
    ):
        yield f"quantize.clip_gradient = true: {' and '.join(formats)} has no calibrated range to leave; leave it out"
    sizes = linear_sizes(shape)
    told: set[tuple[str, Format]] = set()
    for name, number_format in planned.items():
        kind, block = name.split(".", 3)[3], SPECS[number_format].grid.block
        shards = tensor if kind in ROW_PARALLEL and tensor > 0 else 1
        k = sizes[name][1]
        # A K that the ranks cannot share at all is _layout's problem.
        if k % shards == 0 and (k // shards) % block and (kind, number_format) not in told:
            told.add((kind, number_format))
            split = f" over parallel.tensor = {shards}" if shards > 1 else ""
            pattern = deciding_pattern(name, quantize)
            key = "quantize.format" if pattern is None else f"quantize.layers.{pattern}"
            yield (
                f"{key} = {number_format}: blocks of {block} do not divide K = {k} of {kind}{split}; "
                "exclude the layer with quantize.exclude or choose another format or layout"
            )
    alone = next((number_format for number_format in formats if not SPECS[number_format].mixes), None)
    if alone is not None and len(formats) > 1:
        others = ", ".join(name for name in formats if name != alone)
        yield (
            f"quantize.layers: mixes {alone} with {others}, and no serving runtime reads {alone.upper()} layers in a "
            f"mixed checkpoint; use nvfp4 for them, or {alone} everywhere (bf16 layers may stay beside it)"
        )
    yield from _cache(recipe, shape, formats)
    if recipe.method != Method.bf16 and not planned:
        patterns, layers = ", ".join(quantize.exclude), "" if not quantize.layers else " and quantize.layers"
        yield f"quantize.exclude = [{patterns}]{layers}: leaves nothing to quantize; method=bf16 is the control"


def _cache(recipe: Recipe, shape: ModelShape, formats: list[Format]) -> Iterator[str]:
    chosen = recipe.quantize.kv_cache
    if chosen is KVCache.none or recipe.method == Method.bf16:
        return
    if chosen is KVCache.nvfp4 and shape.head_dim % kv_format.BLOCK:
        yield (
            f"quantize.kv_cache = {chosen}: blocks of {kv_format.BLOCK} do not divide the model's heads of "
            f"{shape.head_dim}; use fp8 or none"
        )
    if any(SPECS[number_format].quant_algo is None for number_format in formats):
        yield (
            f"quantize.kv_cache = {chosen}: no serving runtime is known to read it beside mxfp4 weights; use none, or "
            "nvfp4 for the weights"
        )


def _calibration(recipe: Recipe, formats: Sequence[Format]) -> Iterator[str]:
    """Keys of the calibration that would do nothing."""
    quantize, default = recipe.quantize, Quantize()
    if quantize.weights == Weights.gptq and set(formats) == {Format.fp8}:
        yield "quantize.weights = gptq: compensates FP4 layers only, and all are fp8; leave the key out"
    if quantize.activations == Activations.percentile:
        inputs = [SPECS[number_format].inputs for number_format in formats]
        if formats and not any(rounding is not None and GRIDS[rounding].per_tensor for rounding in inputs):
            yield (
                f"quantize.activations = percentile: the inputs of {' and '.join(formats)} have no scale per tensor; "
                "leave the key out"
            )
        if not 0 < quantize.percentile <= 100:
            yield f"quantize.percentile = {quantize.percentile}: a share in percent; give a number such as 99.99"
    elif quantize.percentile != default.percentile:
        yield f"quantize.percentile = {quantize.percentile}: is read under quantize.activations=percentile only; set it"


def _smoothing(quantize: Quantize) -> Iterator[str]:
    alpha = quantize.smoothing_alpha
    if not 0 <= alpha <= 1:
        yield f"quantize.smoothing_alpha = {alpha}: an exponent between 0 and 1; 0.5 is the default"
    elif quantize.smoothing != Smoothing.smoothquant and alpha != Quantize().smoothing_alpha:
        yield f"quantize.smoothing_alpha = {alpha}: is read under quantize.smoothing=smoothquant only; set it"


def _patterns(recipe: Recipe, shape: ModelShape) -> Iterator[str]:
    modules = [*linear_sizes(shape), "lm_head", "model.embed_tokens"]
    yield from pattern_problems("quantize.exclude", recipe.quantize.exclude, modules, shape)


def _layers(recipe: Recipe, shape: ModelShape) -> Iterator[str]:
    """Every pattern of quantize.layers decides about something, and no fused layer gets two formats."""
    quantize, modules = recipe.quantize, list(linear_sizes(shape))
    deciding = {deciding_pattern(name, quantize) for name in modules if not excluded(name, quantize.exclude)}
    for pattern, chosen in quantize.layers.items():
        key = f"quantize.layers.{pattern} = {chosen}"
        if not any(fnmatchcase(module, pattern) for module in modules):
            yield (
                f"{key}: matches no linear of the decoder layers (embedding and lm_head always stay BF16); write a "
                "Hugging Face module name such as model.layers.0.mlp.down_proj, * stands for anything"
            )
        elif pattern not in deciding:
            yield (
                f"{key}: decides about no layer, because quantize.exclude or an earlier pattern has all that it "
                "matches; move it up or take it out"
            )
    for group in FUSED_GROUPS:
        split: dict[str, list[int]] = {}
        for layer in range(shape.layers):
            members = [f"model.layers.{layer}.{name}" for name in group]
            if any(excluded(name, quantize.exclude) for name in members):
                continue  # whole or reported by _patterns
            chosen = [str(layer_format(name, quantize) or "bf16") for name in members]
            if len(set(chosen)) > 1:
                shown = ", ".join(f"{name.rpartition('.')[2]} {word}" for name, word in zip(group, chosen, strict=True))
                split.setdefault(shown, []).append(layer)
        for shown, layers in split.items():
            yield (
                f"quantize.layers: gives {shown} in layer {some(layers)}, one layer at training time and in every "
                "runtime; match all of them with one pattern"
            )
