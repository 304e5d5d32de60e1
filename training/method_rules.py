"""Whether training methods fit together and fit the plan. Pure and torch-free; a line per problem."""

from collections.abc import Iterator

from halfbyte.training.config import Method, Recipe
from halfbyte.training.config_distill import Distill, Divergence
from halfbyte.training.config_train import Lora
from halfbyte.training.formats import SPECS
from halfbyte.training.pattern_rules import pattern_problems, some, stages
from halfbyte.training.shape import ModelShape, excluded, linear_sizes, planned_linears


def method_problems(recipe: Recipe, shape: ModelShape) -> Iterator[str]:
    """What is trained beside the weights, or compared inside of a model, needs a method and layers that allow it.

    Args:
        recipe: A type-correct recipe.
        shape: The model's shape.
    """
    if recipe.train.block_scale_lr_mult > 0:
        yield from _learned_scales(recipe, shape)
    if recipe.train.lora.rank > 0:
        yield from _lora(recipe, shape)
    yield from _switched_off(recipe)
    if recipe.distill.hidden_layers:
        yield from _hidden_layers(recipe, shape)


def _beside(key: str, recipe: Recipe) -> Iterator[str]:
    if recipe.method not in (Method.qat, Method.qad):
        yield f"{key}: method {recipe.method} trains no quantized weight; give 0, or method=qat or qad"
    if recipe.train.fake_quant_after_steps:
        yield f"{key}: learns from quantized weights only; give 0, or set train.fake_quant_after_steps=0"


def _switched_off(recipe: Recipe) -> Iterator[str]:
    """Keys of a section that the method reads, and that another key of the section switches off."""
    lora, distill = recipe.train.lora, recipe.distill
    if recipe.method in (Method.qat, Method.qad) and lora.rank == 0:
        why = "train.lora.rank = 0 trains no adapters; give a rank, or leave it out"
        if lora.alpha != Lora().alpha and lora.alpha > 0:
            yield f"train.lora.alpha = {lora.alpha:g}: {why}"
        if lora.targets != Lora().targets:
            yield f"train.lora.targets = [{', '.join(lora.targets)}]: {why}"
    read = recipe.method is not Method.qad or distill.loss is Divergence.jensen_shannon
    if not read and distill.beta != Distill().beta and 0 < distill.beta < 1:
        yield f"distill.beta = {distill.beta}: is read under distill.loss=jensen_shannon only; set it"


def _learned_scales(recipe: Recipe, shape: ModelShape) -> Iterator[str]:
    key = f"train.block_scale_lr_mult = {recipe.train.block_scale_lr_mult}"
    yield from _beside(key, recipe)
    for number_format in sorted(set(planned_linears(shape, recipe).values())):
        if SPECS[number_format].grid.block_scale is None:
            yield f"{key}: {number_format} layers have no block scales to learn; give 0, or these layers an FP4 format"


def _lora(recipe: Recipe, shape: ModelShape) -> Iterator[str]:
    lora, frozen = recipe.train.lora, recipe.train.freeze
    key = f"train.lora.rank = {lora.rank}"
    yield from _beside(key, recipe)
    if frozen:
        yield f"train.freeze = [{', '.join(frozen)}]: train.lora.rank = {lora.rank} freezes all weights; leave it out"
    linears = list(planned_linears(shape, recipe))
    if not linears:
        return  # reported elsewhere
    yield from pattern_problems("train.lora.targets", lora.targets, linears, shape, "quantized linear")
    trained = {name for name in linears if excluded(name, lora.targets)}
    full = max((min(linear_sizes(shape)[name]) for name in trained), default=lora.rank)
    if lora.rank > full:
        yield f"{key}: above the full rank of every adapted linear, {full}; give less, or 0 to train the weights"
    held = stages(recipe, shape, linears)
    idle = [number for number, inside in enumerate(held) if not inside & trained]
    if idle:
        which = f"pipeline stage {some(idle)} (counted from 0)" if len(held) > 1 else "the model"
        targets = ", ".join(lora.targets)
        yield f"train.lora.targets = [{targets}]: no adapter in {which}, which has nothing to train then; name more"


def _hidden_layers(recipe: Recipe, shape: ModelShape) -> Iterator[str]:
    numbers = recipe.distill.hidden_layers
    key = f"distill.hidden_layers = {numbers}"
    if recipe.method is not Method.qad or not recipe.distill.hidden:
        yield f"{key}: is read by method qad with a weight; set distill.hidden, or leave it out"
    if len(set(numbers)) < len(numbers) or not all(0 <= number < shape.layers for number in numbers):
        yield f"{key}: the model's layers are 0 to {shape.layers - 1}; name each at most once"
    for name, wrong, remedy in (
        ("parallel.pipeline", recipe.parallel.pipeline > 1, "1"),
        ("train.recompute", recipe.train.recompute, "false"),
    ):
        if wrong:
            yield f"{key}: inner layers are compared without it; set {name}={remedy}, or leave the key out"
