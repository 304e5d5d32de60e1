"""Whether training methods fit together and fit the plan. Pure and torch-free; a line per problem."""

from collections.abc import Iterator, Sequence

from halfbyte.training.config import Format, Method, Recipe
from halfbyte.training.formats import SPECS


def method_problems(recipe: Recipe, formats: Sequence[Format]) -> Iterator[str]:
    """What is trained beside the weights (learned block scales) needs a method that trains, and its kind of format.

    Args:
        recipe: A type-correct recipe.
        formats: Of the linears that it quantizes.
    """
    if recipe.train.block_scale_lr_mult > 0:
        yield from _learned_scales(recipe, formats)


def _learned_scales(recipe: Recipe, formats: Sequence[Format]) -> Iterator[str]:
    key = f"train.block_scale_lr_mult = {recipe.train.block_scale_lr_mult}"
    if recipe.method not in (Method.qat, Method.qad):
        yield f"{key}: method {recipe.method} trains no quantized weight; give 0, or method=qat or qad"
    for number_format in formats:
        if SPECS[number_format].grid.block_scale is None:
            yield f"{key}: {number_format} layers have no block scales to learn; give 0, or these layers an FP4 format"
    if recipe.train.fake_quant_after_steps:
        yield f"{key}: scales of BF16 steps have no gradient; give 0, or set train.fake_quant_after_steps=0"
