"""Post-training quantization of one model in place: what happens between the BF16 weights and quantize.json."""

from collections.abc import Callable
from typing import Any

import torch

from halfbyte.training import quantize
from halfbyte.training.config import Activations, Recipe
from halfbyte.training.observe import Percentiles, observe
from halfbyte.training.runtime import Runtime


def calibrate(
    model: torch.nn.Module, recipe: Recipe, runtime: Runtime, run: Callable[[torch.nn.Module], None]
) -> dict[str, Any]:
    """Calibrate as the recipe's section `quantize` says, and insert the quantizers; collective.

    Args:
        model: This rank's GPTModel with the BF16 model's weights; changed in place.
        recipe: The recipe; `method` is not bf16.
        runtime: This process.
        run: Runs the calibration windows through the model it is given.

    Returns:
        The content of quantize.json (see quantize.quantize), equal on every rank.

    Raises:
        UserError: see quantize.quantize.
    """
    section = recipe.quantize
    planned = quantize.plan(model, section)
    percentiles = Percentiles() if section.activations is Activations.percentile else None
    if percentiles:
        observe(model, planned, run, [percentiles.take])
    input_amax = percentiles.amax(section.percentile) if percentiles else None
    return quantize.quantize(model, recipe, runtime, run, input_amax)
