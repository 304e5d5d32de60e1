"""Learned block scales (LSQ, arXiv 1902.08153) of FP4 weights: train.block_scale_lr_mult.

Each block's scale, which the rule of quantize.block_scale chooses before training, becomes a trained parameter: the
logarithm to base 2, one FP32 number per block. The scale per tensor stays what calibration found. Arithmetic and
gradient are in learned_scales.py, where the gradient comes from in companions.py.

Shapes: P matrices that a weight stacks (gate over up: 2, else 1), R rows of each, G blocks along K; N = P R.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core import parallel_state

from halfbyte.training import companions, learned_scales
from halfbyte.training.companions import Companion, Companions
from halfbyte.training.config import Recipe
from halfbyte.training.formats import SPECS
from halfbyte.training.observe import is_row_parallel
from halfbyte.training.quantize import plan, refresh_scales
from halfbyte.training.shape import excluded


class LearnedScale(Companion):
    """The logarithms of one weight's block scales: `log2`, [P, R, G], FP32 (FP64 in float64 runs)."""

    kind = companions.SCALES

    def __init__(self, key: str, log2_NG: torch.Tensor, *, row_parallel: bool):
        super().__init__(key)
        log2_PRG = log2_NG.view(companions.parts_of(key), -1, log2_NG.shape[1])
        self.log2 = self.hold("log2", log2_PRG, 2 if row_parallel else 1)

    def take_gradient(self, linear: Any, weight: Callable[[], torch.Tensor]) -> None:
        """See Companion; the gradient is learned_scales.gradient."""
        rule = linear.weight_quantizer._quantizer_cache
        log2_NG = self.log2.flatten(0, 1)
        grad_NK = companions.collected(linear).to(self.log2.dtype)
        found = learned_scales.gradient(weight(), grad_NK, log2_NG, rule.rounding, rule.scale)
        self.log2.main_grad.copy_(found.view_as(self.log2))


def attach(model: torch.nn.Module, recipe: Recipe) -> None:
    """Give every trained FP4 weight its learned scales, as they are by rule now; idempotent.

    Args:
        model: This rank's GPTModel, calibrated, not yet wrapped in DDP; changed in place.
        recipe: Its train.block_scale_lr_mult says whether; layers that are not trained keep the rule.
    """
    if not recipe.train.block_scale_lr_mult:
        return
    beside = companions.of(model) or Companions()
    for layer in plan(model, recipe.quantize):
        if not _trains(layer.hf[0], recipe) or beside.of(LearnedScale.kind, layer.module) is not None:
            continue
        linear: Any = model.get_submodule(layer.module)
        weight, rule = linear.weight.data, linear.weight_quantizer._quantizer_cache
        log2_NG = learned_scales.initial_log2(weight, SPECS[layer.format].weights, rule.scale, rule.block_scale)
        log2_NG = log2_NG.to(torch.promote_types(weight.dtype, torch.float32))
        row_parallel = is_row_parallel(linear)
        beside.put(layer.module, LearnedScale(layer.key, log2_NG, row_parallel=row_parallel))
    model.add_module(companions.NAME, beside)
    refresh_scales(model, recipe.quantize)


def restore(model: torch.nn.Module, recipe: Recipe, log2: Mapping[str, torch.Tensor]) -> None:
    """Give weights the scales that an earlier run learned, before the quantizers are inserted.

    Args:
        model: This rank's GPTModel; changed in place.
        recipe: Its section `quantize`.
        log2: Megatron's name of a linear in the whole model -> logarithms of all its block scales, [N, G].
    """
    beside = companions.of(model) or Companions()
    world = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    for layer in plan(model, recipe.quantize):
        if layer.key not in log2:
            continue
        linear: Any = model.get_submodule(layer.module)
        row_parallel = is_row_parallel(linear)
        log2_PRG = log2[layer.key].unflatten(0, (companions.parts_of(layer.key), -1))
        own_NG = log2_PRG.chunk(world, 2 if row_parallel else 1)[rank].flatten(0, 1)
        own_NG = own_NG.to(linear.weight.device, torch.promote_types(linear.weight.dtype, torch.float32))
        beside.put(layer.module, LearnedScale(layer.key, own_NG, row_parallel=row_parallel))
    model.add_module(companions.NAME, beside)


def _trains(module: str, recipe: Recipe) -> bool:
    """Whether training changes a linear: by its adapter, where there are adapters."""
    lora = recipe.train.lora
    return excluded(module, lora.targets) if lora.rank else not excluded(module, recipe.train.freeze)
