"""Training checkpoints: sharded, reshardable, atomic. saved_weights.py takes single tensors out of one.

A checkpoint folder holds Megatron's dist_checkpointing files (weights with quantizer maxima, optimizer state) and
what Lightning and halfbyte need to go on: step, losses so far (the data position is the step: order is a function of
seed and step), RNG state, recipe. It is written under a temporary name and renamed when complete; the link `last`
moves after that, so a killed save never shadows the last good one. Layouts may change between save and load.
"""

import multiprocessing
import os
import pickle
import random
import shutil
from dataclasses import dataclass
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from halfbyte.training import gradients, integrity, retention, untrusted
from halfbyte.training.environment import serve_parent, starting_helpers
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


@dataclass
class Trainable:
    """What a checkpoint stores besides plain values: this rank's model and, in training, its Megatron optimizer."""

    model: torch.nn.Module
    optimizer: Any | None = None


def save(trainable: Trainable, plain: dict[str, Any], path: Path) -> None:
    """Write one checkpoint; collective over all ranks.

    Args:
        trainable: Model and optimizer of this rank.
        plain: Picklable values, the same on every rank.
        path: Final folder, `<run.dir>/checkpoints/step_NNNNNNNN`.

    Raises:
        UserError: the disk is full or not writable; what was there before stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    first = dist.get_rank() == 0
    failure: BaseException | None = None
    found: dict[str, tuple[str, int]] = {}
    try:
        _give_queue()
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        dist.barrier()
        dist_checkpointing.save(_state(trainable, loading=False) | {"plain": plain, "rng": _rng()}, str(temporary))
        found = integrity.digests(temporary, integrity.written_by(temporary, dist.get_rank()))
    except (OSError, RuntimeError, CheckpointingException, CheckpointException) as error:
        failure = error
    # Every rank must agree that all files stand before the rename makes the checkpoint visible.
    reason = _any_reason(failure)
    if reason is None:
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, found)
        try:
            if first:
                integrity.write(temporary, {name: value for part in parts for name, value in part.items()})
                _fsync(temporary)
                shutil.rmtree(path, ignore_errors=True)
                temporary.rename(path)
                retention.point(path)
        except OSError as error:
            failure = error
        reason = _any_reason(failure)
    if reason is not None:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(path.parent).free / 1e9
        raise UserError(
            f"checkpoint {path} not saved ({reason}; {free:.1f} GB free there); the previous one stays; "
            "free space and start again"
        )


def _give_queue() -> None:
    """Make the queue of Megatron's checkpoint writer in a process that lives and dies with this one. Idempotent.

    Megatron 0.19.2 would make it in a process that outlives a worker killed by SIGKILL, and that the SIGTERM which
    Slurm sends to all processes of a job kills before the worker has saved.
    """
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        with starting_helpers():
            manager.start(initializer=serve_parent)
        filesystem_async._results_queue = manager.Queue()


def _any_reason(failure: BaseException | None) -> str | None:
    """Why the first rank that failed did, on every rank; None when none did. Collective."""
    mine = None
    if isinstance(failure, CheckpointException):  # its text is a traceback; ranks other than 0 get it without a cause
        causes = failure.failures  # pyright: ignore[reportOptionalMemberAccess] - it narrows torch's class to None
        mine = next((str(cause) for cause, _ in causes.values()), "")
    elif failure is not None:
        mine = str(failure) or type(failure).__name__
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, None if mine is None else next(iter(mine.strip().splitlines()[-1:]), ""))
    failed = [reason for reason in reasons if reason is not None]
    return next(filter(None, failed), "no reason given") if failed else None


def _fsync(folder: Path) -> None:
    for file in [*folder.iterdir(), folder]:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def load(trainable: Trainable, path: Path) -> dict[str, Any]:
    """Load weights (and optimizer state) in place, from any layout; returns the plain values.

    Raises:
        UserError: the folder is damaged or belongs to another model.
    """
    if trainable.optimizer is not None:
        _give_state(trainable.optimizer)
    try:
        untrusted.check_index(path)
        loaded = dist_checkpointing.load(_state(trainable, loading=True), str(path))
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


def _state(trainable: Trainable, *, loading: bool) -> dict[str, Any]:
    weights = trainable.model.sharded_state_dict(prefix="")  # type: ignore[operator]
    if trainable.optimizer is None:
        return {"model": weights}
    # The distributed optimizer refuses its default sharding in 0.19; the plain one takes no such argument.
    sharded = any(isinstance(part, DistributedOptimizer) for part in gradients.parts(trainable.optimizer))
    kind = {"metadata": {"distrib_optim_sharding_type": "fully_reshardable"}} if sharded else {}
    return {"model": weights, "optimizer": trainable.optimizer.sharded_state_dict(weights, is_loading=loading, **kind)}


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


def _rng() -> dict[str, Any]:
    return {"torch": torch.get_rng_state(), "numpy": numpy.random.get_state(), "python": random.getstate()}


def _set_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    numpy.random.set_state(state["numpy"])
    random.setstate(state["python"])
