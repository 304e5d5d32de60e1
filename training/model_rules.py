"""Whether a recipe fits its model: layout, block sizes, exclude patterns. Pure and torch-free; a line per problem."""

import math
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from halfbyte.training.config import BLOCK, Format, Method, Recipe, SecondScale
from halfbyte.training.shape import FUSED_GROUPS, ROW_PARALLEL, ModelShape, excluded, linear_sizes, planned_linears


def model_problems(recipe: Recipe, shape: ModelShape) -> list[str]:
    """Everything about the layout and the formats that the model's sizes rule out, one line each."""
    return [*_layout(recipe, shape), *_formats(recipe, shape), *_patterns(recipe, shape)]


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
    if quantize.format == Format.mxfp4 and quantize.scale_2 != SecondScale.pow2:
        yield f"quantize.scale_2 = {quantize.scale_2}: mxfp4 has no second-level scale; leave the key out"
    block = BLOCK[quantize.format]
    planned = planned_linears(shape, recipe)
    sizes = linear_sizes(shape)
    told: set[str] = set()
    for name in planned:
        kind = name.split(".", 3)[3]
        shards = tensor if kind in ROW_PARALLEL and tensor > 0 else 1
        k = sizes[name][1]
        # A K that the ranks cannot share at all is _layout's problem.
        if k % shards == 0 and (k // shards) % block and kind not in told:
            told.add(kind)
            split = f" over parallel.tensor = {shards}" if shards > 1 else ""
            yield (
                f"quantize.format = {quantize.format}: blocks of {block} do not divide K = {k} of {kind}{split}; "
                "exclude the layer with quantize.exclude or choose another format or layout"
            )
    if recipe.method != Method.bf16 and not planned:
        patterns = ", ".join(quantize.exclude)
        yield f"quantize.exclude = [{patterns}]: leaves nothing to quantize; method=bf16 is the control"


def _patterns(recipe: Recipe, shape: ModelShape) -> Iterator[str]:
    if recipe.method == Method.bf16:
        return
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


def _some(items: Sequence[int]) -> str:
    return ", ".join(map(str, items[:4])) + (f" and {len(items) - 4} more" if len(items) > 4 else "")
