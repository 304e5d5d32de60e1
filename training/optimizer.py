"""Megatron's optimizer as Lightning calls one, its parameter groups and the learning rate of every step."""

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from halfbyte.training import companions, gradients, lora
from halfbyte.training.config import Recipe, Train
from halfbyte.training.errors import UserError


def learning_rate(step: int, train: Train) -> float:
    """Learning rate of the update after global batch `step` (from 0): linear warmup, then cosine to the minimum.

    Megatron's own scheduler starts a warmup at 0, which makes the first update a no-op; with few steps that is a loss.
    """
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return train.min_learning_rate + (train.learning_rate - train.min_learning_rate) * cosine


def uses_distributed_optimizer(recipe: Recipe) -> bool:
    """The distributed optimizer keeps FP32 gradients, so float64 layout tests take the plain one."""
    return recipe.train.distributed_optimizer and recipe.train.dtype != "float64"


def _groups(config: OptimizerConfig, train: Train) -> dict[ParamKey, ParamGroupOverride]:
    """Megatron's parameter groups, and one for learned block scales: a rate of their own, no decay towards 2^0."""
    overrides = get_standard_config_overrides(config)
    if train.block_scale_lr_mult:
        scales = ParamKey(name=f"*{companions.NAME}.{companions.SCALES}:*")
        rate = train.learning_rate * train.block_scale_lr_mult
        overrides[scales] = ParamGroupOverride(max_lr=rate, wd_mult=0.0)
    return overrides


class MegatronOptimizer:
    """Megatron's optimizer with the few methods that Lightning calls on one."""

    def __init__(self, ddp: DistributedDataParallel, recipe: Recipe, dtype: torch.dtype):
        train = recipe.train
        config = OptimizerConfig(
            optimizer="adam",
            lr=train.learning_rate,
            weight_decay=train.weight_decay,
            adam_beta1=train.beta1,
            adam_beta2=train.beta2,
            adam_eps=train.eps,
            clip_grad=train.clip_grad,
            params_dtype=dtype,
            bf16=dtype is torch.bfloat16,
            use_distributed_optimizer=uses_distributed_optimizer(recipe),
        )
        self.megatron = get_megatron_optimizer(config, [ddp], _groups(config, train))
        gradients.fuse_clipping()
        for part in gradients.parts(self.megatron):
            gradients.fuse_adam(part.optimizer)
        self.ddp = ddp
        self.train_config = train
        self.defaults: dict[str, Any] = {}
        self.state: dict[str, Any] = {}
        self.gradient_norm = 0.0

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Megatron's parameter groups."""
        return self.megatron.param_groups

    def set_learning_rate(self, step: int) -> float:
        """Set and return the learning rate of update `step`; groups keep their multiples of it and of weight decay."""
        rate = learning_rate(step, self.train_config)
        for group in self.megatron.param_groups:
            group["lr"] = rate * (group["max_lr"] / self.train_config.learning_rate)
            group["weight_decay"] = self.train_config.weight_decay * group["wd_mult"]
        return rate

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the DDP gradient buffers."""
        self.ddp.zero_grad_buffer()
        lora.zero_gradients(self.ddp.module)
        self.megatron.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Clip over all ranks and update.

        Raises:
            UserError: the gradient norm is not finite; nothing was updated.
        """
        if closure is not None:
            closure()
        self.megatron.prepare_grads()
        norm = self.megatron.get_grad_norm()
        if not math.isfinite(norm):
            raise UserError(f"gradient norm is {norm}: stopped before the update; lower train.learning_rate")
        gradients.clip(self.megatron, norm)
        self.megatron.step_with_ready_grads()
        self.gradient_norm = float(norm)

    def state_dict(self) -> dict[str, Any]:
        """Empty: checkpoint.py saves the sharded state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do: checkpoint.py loads the sharded state."""
