"""Planned memory of weights, gradients and optimizer against what training holds, in FP32 and FP64."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from halfbyte.launch.plan_memory import memory_per_rank
from halfbyte.launch.plan_model import Architecture, Layout
from halfbyte.training.choices import Dtype
from halfbyte.training.config import Quantize, Recipe, Train

WORLD = runpy.run_path(str(Path(__file__).with_name("workers") / "world.py"))


def held(module) -> dict[str, int]:
    """Bytes of a module's matrices after a step: weights, gradients, and what the optimizer keeps of each."""
    matrices = [parameter for parameter in module.gpt.parameters() if parameter.dim() == 2]
    sizes = {parameter.numel() for parameter in matrices}
    states = [slot for part in module.optimizer.megatron.chained_optimizers for slot in part.optimizer.state.values()]
    moments = [tensor for slot in states for tensor in slot.values() if tensor.numel() in sizes]
    return {
        "weights": sum(parameter.nbytes for parameter in matrices),
        "gradients": sum(parameter.main_grad.nbytes for parameter in matrices),
        "optimizer": sum(tensor.nbytes for tensor in moments),
    }


@pytest.mark.slow  # imports Megatron-Core
@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.float64])
def test_state_of_training_is_counted_in_the_recipe_s_type(dtype):
    train = Train(steps=2, global_batch=4, micro_batch=2, sequence_length=12, dtype=dtype, distributed_optimizer=False)
    recipe = Recipe(train=train, quantize=Quantize(calibration_samples=1))
    with WORLD["world_of_one"]() as opened:
        module = WORLD["training"](replace(opened, dtype=getattr(torch, dtype)), recipe)
        module.training_step(WORLD["batches"](), 0)
        found = held(module)
    planned = memory_per_rank(recipe, Architecture.dense("", WORLD["SHAPE"]), Layout.of(recipe))
    assert {part: planned[part] for part in found} == found
