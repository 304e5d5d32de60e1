"""Whether a recipe fits its model: layout, block sizes, exclude patterns. Pure and torch-free; a line per problem."""

import math
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from halfbyte.training.config import (
    BLOCK,
    TWO_LEVEL,
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
    problems = [*_layout(recipe, shape), *_formats(recipe, shape)]
    return problems if recipe.method == Method.bf16 else [*problems, *_patterns(recipe, shape), *_layers(recipe, shape)]


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
    if layout.sequence and tensor > 1 and train.sequence_length % tensor:
        yield (
            f"train.sequence_length = {train.sequence_length}: not a multiple of parallel.tensor = {tensor}, which "
            "parallel.sequence needs; round it up"
        )
    lengths = {"train.sequence_length": train.sequence_length}
    lengths["quantize.calibration_length"] = recipe.quantize.calibration_length or 0
    for key, length in lengths.items():
        if length > shape.max_positions:
            yield f"{key} = {length}: the model ends at {shape.max_positions} positions; give at most that"


def _divisors(number: int) -> str:
    return ", ".join(str(i) for i in range(1, number + 1) if number % i == 0)


def _formats(recipe: Recipe, shape: ModelShape) -> Iterator[str]:
    quantize, tensor = recipe.quantize, recipe.parallel.tensor
    planned = planned_linears(shape, recipe)
    formats = sorted(set(planned.values()))
    if formats and not set(formats) & set(TWO_LEVEL):
        names = " and ".join(formats)
        if quantize.scale_2 != SecondScale.pow2:
            yield f"quantize.scale_2 = {quantize.scale_2}: {names} has no second-level scale; leave the key out"
        if quantize.block_scale != BlockScale.amax and not (
            quantize.block_scale == BlockScale.mse and Format.mxfp4 in formats
        ):
            yield f"quantize.block_scale = {quantize.block_scale}: {names} has no choice of scales; leave the key out"
    elif quantize.block_scale == BlockScale.mse and quantize.scale_2 != SecondScale.pow2:
        yield (
            f"quantize.block_scale = mse: quantize.scale_2 = {quantize.scale_2} would blur which scales reproduce a "
            "block exactly; use scale_2=pow2, or block_scale=four_over_six"
        )
    yield from _calibration(recipe, formats)
    yield from _smoothing(quantize)
    sizes = linear_sizes(shape)
    told: set[tuple[str, Format]] = set()
    for name, number_format in planned.items():
        kind, block = name.split(".", 3)[3], BLOCK[number_format]
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
    if Format.mxfp4 in formats and len(formats) > 1:
        others = ", ".join(name for name in formats if name != Format.mxfp4)
        yield (
            f"quantize.layers: mixes mxfp4 with {others}, and no serving runtime reads MXFP4 layers in a mixed "
            "checkpoint; use nvfp4 for them, or mxfp4 everywhere (bf16 layers may stay beside it)"
        )
    if recipe.method != Method.bf16 and not planned:
        patterns, layers = ", ".join(quantize.exclude), "" if not quantize.layers else " and quantize.layers"
        yield f"quantize.exclude = [{patterns}]{layers}: leaves nothing to quantize; method=bf16 is the control"


def _calibration(recipe: Recipe, formats: Sequence[Format]) -> Iterator[str]:
    """Keys of the calibration that would do nothing."""
    quantize, default = recipe.quantize, Quantize()
    if quantize.weights == Weights.gptq and set(formats) == {Format.fp8}:
        yield "quantize.weights = gptq: compensates FP4 layers only, and all are fp8; leave the key out"
    if quantize.activations == Activations.percentile:
        if formats and not {Format.nvfp4, Format.fp8} & set(formats):
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
    for pattern in recipe.quantize.exclude:
        if not any(fnmatchcase(module, pattern) for module in modules):
            yield (
                f"quantize.exclude = {pattern}: matches no module; write a Hugging Face module name such as "
                "model.layers.0.mlp.down_proj, * stands for anything"
            )
    for group in FUSED_GROUPS:
        split = [
            layer
            for layer in range(shape.layers)
            if 0 < sum(excluded(f"model.layers.{layer}.{name}", recipe.quantize.exclude) for name in group) < len(group)
        ]
        if split:
            members = ", ".join(name.rpartition(".")[2] for name in group)
            yield (
                f"quantize.exclude = [{', '.join(recipe.quantize.exclude)}]: splits {members} of layer {_some(split)}, "
                "one layer at training time; exclude all of them or none"
            )


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
                f"quantize.layers: gives {shown} in layer {_some(layers)}, one layer at training time and in every "
                "runtime; match all of them with one pattern"
            )


def _some(items: Sequence[int]) -> str:
    return ", ".join(map(str, items[:4])) + (f" and {len(items) - 4} more" if len(items) > 4 else "")
