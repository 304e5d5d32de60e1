"""What one rank's part of a training checkpoint holds, as Megatron is told it, and what of it stays between saves."""

import io
import random
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from halfbyte.training import gradients, optimizer_state, quantize


@dataclass
class Trainable:
    """What a checkpoint stores besides plain values: this rank's model and, in training, its Megatron optimizer."""

    model: torch.nn.Module
    optimizer: Any | None = None

    def state(self, *, loading: bool) -> dict[str, Any]:
        """Megatron's sharded state dict of both, for a save or a load."""
        weights = self.model.sharded_state_dict(prefix="")  # type: ignore[operator]
        if self.optimizer is None:
            return {"model": weights}
        # The distributed optimizer refuses its default sharding in 0.19; the plain one takes no such argument.
        sharded = any(isinstance(part, DistributedOptimizer) for part in gradients.parts(self.optimizer))
        kind = {"metadata": {"distrib_optim_sharding_type": optimizer_state.FORMAT}} if sharded else {}
        with nullcontext() if loading else optimizer_state.ungathered(self.optimizer):
            state = self.optimizer.sharded_state_dict(weights, is_loading=loading, **kind)
        return {"model": weights, "optimizer": state}


@dataclass(frozen=True)
class Content:
    """What is saved: tensors and their places, which stay, and values that are new in every save.

    Attributes:
        trainable: Model and optimizer of this rank.
        plain: Picklable values, the same on every rank.
    """

    trainable: Trainable
    plain: dict[str, Any]

    def state(self) -> dict[str, Any]:
        """All of it, as Megatron's sharded state dict."""
        return self.trainable.state(loading=False) | self._values()

    def common(self) -> bytes:
        """What Megatron leaves of `state` without tensors and without what has a key of its own, as it stores that."""
        optimizer, stored = self.trainable.optimizer, io.BytesIO()
        kept = {} if optimizer is None else {"optimizer": optimizer_state.common(optimizer)}
        torch.save([kept | self._values()], stored)
        return stored.getvalue()

    def fingerprint(self) -> list[Any]:
        """Equal in two saves that store the same tensors at the same places, and the same quantizers."""
        of_tensors = [
            (name, tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.requires_grad)
            for name, tensor in self._tensors()
        ]
        return [of_tensors, quantize.settings(self.trainable.model)]

    def storages(self) -> set[int]:
        """Addresses of the memory that training computes in."""
        return {tensor.untyped_storage().data_ptr() for _, tensor in self._tensors()}

    def buffers(self) -> set[int]:
        """Addresses of tensors that a forward pass may change; all others change in the optimizer step alone."""
        return {buffer.data_ptr() for buffer in self.trainable.model.buffers()}

    def _values(self) -> dict[str, Any]:
        rng = {"torch": torch.get_rng_state(), "numpy": numpy.random.get_state(), "python": random.getstate()}
        return {"plain": self.plain, "rng": rng}

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters and buffers of the model, what the optimizer updates in their place, and its state."""
        for name, module in self.trainable.model.named_modules():
            for own in (module._parameters, module._buffers):
                yield from ((f"{name}.{key}", tensor) for key, tensor in own.items() if tensor is not None)
        for part in [] if self.trainable.optimizer is None else gradients.parts(self.trainable.optimizer):
            for group in part.optimizer.param_groups:
                yield from (("updated", parameter) for parameter in group["params"])
            for slot in part.optimizer.state.values():
                yield from ((key, value) for key, value in slot.items() if isinstance(value, torch.Tensor))
