"""Training checkpoints: sharded, reshardable, atomic. saved_weights.py takes single tensors out of one.

A checkpoint folder holds Megatron's dist_checkpointing files (weights with quantizer maxima, optimizer state) and
what Lightning and halfbyte need to go on: step, losses so far (the data position is the step: order is a function of
seed and step), RNG state, recipe. It is written under a temporary name and renamed when complete; the link `last`
moves after that, so a killed save never shadows the last good one (checkpoint_write.py). Layouts may change between
save and load.
"""

import pickle
import random
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from halfbyte.training import gradients, untrusted
from halfbyte.training.checkpoint_content import Content, Trainable
from halfbyte.training.checkpoint_memory import HostMemory
from halfbyte.training.checkpoint_write import Write
from halfbyte.training.checkpoint_write import begin as start
from halfbyte.training.errors import UserError

DAMAGED = (
    CheckpointingException,
    CheckpointException,  # torch's, not an Exception but a BaseException
    AssertionError,
    AttributeError,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)
"""What reading a damaged checkpoint raises."""


def begin(trainable: Trainable, plain: dict[str, Any], path: Path, host: HostMemory | None = None) -> Write:
    """Start to write one checkpoint, which `finish` of what is returned completes; both are collective.

    Args:
        trainable: Model and optimizer of this rank.
        plain: Picklable values, the same on every rank.
        path: Final folder, `<run.dir>/checkpoints/step_NNNNNNNN`.
        host: See checkpoint_write.begin: with it training may go on at once, up to the next optimizer step, which has
            to call `wait_until_copied` first.

    Raises:
        UserError: the disk is full or not writable; what was there before stays.
    """
    return start(Content(trainable, plain), path, host)


def reserve(trainable: Trainable, host: HostMemory) -> None:
    """Begin to take the memory that `begin` will copy to; after the first step, which makes the optimizer's state."""
    host.reserve(trainable.state(loading=False))


def save(trainable: Trainable, plain: dict[str, Any], path: Path) -> None:
    """Write one checkpoint and wait for it; as `begin` and `finish`."""
    begin(trainable, plain, path).finish()


def load(trainable: Trainable, path: Path) -> dict[str, Any]:
    """Load weights (and optimizer state) in place, from any layout; returns the plain values.

    Raises:
        UserError: the folder is damaged or belongs to another model.
    """
    if trainable.optimizer is not None:
        _give_state(trainable.optimizer)
    try:
        untrusted.check_index(path)
        loaded: Any = dist_checkpointing.load(trainable.state(loading=True), str(path))
    except DAMAGED as error:
        raise UserError(f"checkpoint {path}: cannot be loaded ({why(error)}); remove it to use an older one") from error
    trainable.model.load_state_dict(loaded["model"], strict=False)
    if trainable.optimizer is not None:
        trainable.optimizer.load_state_dict(loaded["optimizer"])
        for part in gradients.parts(trainable.optimizer):
            for parameter, slot in part.optimizer.state.items():  # 0.19.2 hands every parameter the SAME step tensor
                if isinstance(slot.get("step"), torch.Tensor):
                    slot["step"] = slot["step"].to(parameter.device, copy=True)
            gradients.fuse_adam(part.optimizer)
    _set_rng(loaded["rng"])
    return loaded["plain"]


def why(error: BaseException) -> str:
    """The first line of what went wrong, from inside torch's wrapper where there is one."""
    if isinstance(error, CheckpointException):
        error = next((cause for cause, _ in error.failures.values()), error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _give_state(optimizer: Any) -> None:
    """Torch's Adam has no state before its first step: make the slots that a load fills."""
    for part in gradients.parts(optimizer):
        part.init_state_fn(part.optimizer, part.config)
        for parameter, slot in part.optimizer.state.items():
            slot.setdefault("step", torch.tensor(0.0, device=parameter.device))


def tolerate_plain_adam() -> None:
    """Let Megatron 0.19.2's reshardable load work with torch's Adam, whose 'step' it looks up and does not find.

    A non-tensor 'step' is skipped there; the step itself was restored before. Idempotent.
    """
    put = DistributedOptimizer._set_main_param_and_optimizer_states
    if put.__name__ == "_without_step":
        return

    def _without_step(self, param, tensors):
        return put(self, param, {"step": None, **tensors})

    DistributedOptimizer._set_main_param_and_optimizer_states = _without_step


def _set_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    numpy.random.set_state(state["numpy"])
    random.setstate(state["python"])
