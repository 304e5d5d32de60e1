"""Post-training quantization of one model in place: what happens between the BF16 weights and quantize.json."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from halfbyte.training import gptq, quantize
from halfbyte.training.config import Activations, Method, Quantize, Recipe, Smoothing, Weights
from halfbyte.training.errors import UserError
from halfbyte.training.formats import GRIDS, SPECS
from halfbyte.training.observe import Percentiles, observe
from halfbyte.training.smoothing import smooth


def changes_weights(section: Quantize) -> bool:
    """Whether calibration leaves other weights than it found, so that quantize.json alone cannot restore it."""
    return section.smoothing is not Smoothing.none or section.weights is Weights.gptq


def calibrate(model: torch.nn.Module, recipe: Recipe, run: Callable[[torch.nn.Module], None]) -> dict[str, Any]:
    """Calibrate as the recipe's section `quantize` says, and insert the quantizers; collective.

    Args:
        model: This rank's GPTModel with the BF16 model's weights; changed in place.
        recipe: The recipe; `method` is not bf16.
        run: Runs the calibration windows through the model it is given.

    Returns:
        The content of quantize.json (see quantize.quantize), equal on every rank.

    Raises:
        UserError: see quantize.quantize; or a layer that shall be trained was calibrated to 0.
    """
    section = recipe.quantize
    planned = quantize.plan(model, section)
    smoothed = smooth(model, planned, section, run)
    percentiles = Percentiles() if section.activations is Activations.percentile else None
    hessians = gptq.Hessians(model) if section.weights is Weights.gptq else None
    if percentiles or hessians:
        observe(model, planned, run, [taker.take for taker in (percentiles, hessians) if taker])
    report = quantize.quantize(model, recipe, run)
    if percentiles:
        _clip_inputs(model, planned, percentiles.amax(section.percentile))
        quantize.refresh_scales(model, section)
        report = quantize.report(model, planned, section)
    for key, facts in smoothed.items():
        report["layers"][key]["smoothing"] = facts
    if hessians:
        compensated = [layer for layer in planned if gptq.has_blocks(layer)]
        mine = {layer.key: gptq.apply(model, layer, hessians.sums.pop(layer.key)) for layer in compensated}
        for key, facts in quantize.gather_layers(mine).items():
            report["layers"][key] |= facts
    if recipe.method is not Method.ptq:
        _refuse_zeros(report["layers"], recipe.method)
    return report


def _refuse_zeros(layers: Mapping[str, Any], method: Method) -> None:
    """What was calibrated to 0 (zeroed projections of an expanded model) is rounded to 0 however far it is trained."""
    held = {key: entry["hf"] for key, entry in layers.items() if 0 in entry["amax"].values()}
    if held:
        names = ", ".join(name for names in held.values() for name in names)
        raise UserError(
            f"quantize: weights or inputs of {', '.join(held)} were calibrated to 0, and method {method} cannot train "
            f"them away from it; add {names} to quantize.exclude"
        )


def _clip_inputs(model: torch.nn.Module, planned: Sequence[quantize.Planned], amax: Mapping[str, torch.Tensor]) -> None:
    """Put a linear's percentile in the place of its input's maximum, where the format has a scale per tensor."""
    for layer in planned:
        quantizer: Any = model.get_submodule(layer.module).input_quantizer
        inputs = SPECS[layer.format].inputs
        if inputs is not None and GRIDS[inputs].per_tensor:
            quantizer.amax = torch.minimum(quantizer.amax, amax[layer.key].to(quantizer.amax))
