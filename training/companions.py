"""Parameters beside the weight of a quantized linear, whose gradients follow from the weight's.

With a straight-through gradient, what Megatron accumulates for a weight is dL/dW_q, the gradient of the weight as it is
quantized. A parameter p that W_q is made from (lsq.py: block scales, lora.py: adapters) has dL/dp = sum(dL/dW_q *
dW_q/dp), so no micro-batch computes anything more: its gradient is taken once per global batch, before Megatron sums
gradients over data-parallel ranks. It is linear in dL/dW_q, hence the sum is that of the whole batch.

Everything after that is Megatron's, as for any parameter: the sum over ranks, the division by the number of tokens,
norm and clipping, Adam, the shards of the distributed optimizer, the checkpoint.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint

NAME = "companions"
"""Of the module that holds them in a model."""
SCALES, ADAPTERS = "scales", "adapters"
"""The kinds: lsq.LearnedScale and lora.Adapter."""


def saved_as(kind: str, key: str, parameter: str) -> str:
    """Key in a checkpoint of a parameter beside the linear `key` (decoder.layers.7.mlp.linear_fc1)."""
    return f"{NAME}.{kind}.{key}.{parameter}"


class Companion(torch.nn.Module):
    """The parameters of one kind beside the weight of one linear."""

    kind: str

    def __init__(self, key: str):
        super().__init__()
        self.key = key
        self.axes: dict[str, int | None] = {}

    def hold(self, name: str, values: torch.Tensor, axis: int | None) -> torch.nn.Parameter:
        """Make a parameter of `values`, this rank's part along `axis` under tensor parallelism; None: all of it."""
        parameter = torch.nn.Parameter(values)
        set_tensor_model_parallel_attributes(parameter, axis is not None, 0 if axis is None else axis, 1)
        self.register_parameter(name, parameter)
        self.axes[name] = axis
        return parameter

    def take_gradient(self, linear: Any, weight: Callable[[], torch.Tensor]) -> None:
        """Set the parameters' `main_grad` from the gradient of the weight; collective over tensor parallelism.

        Args:
            linear: The Megatron linear, whose weight has the gradient of this rank's part of a global batch.
            weight: Gives this rank's part of the weight that was quantized, [N, K].
        """
        raise NotImplementedError

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """For Megatron's checkpoint, in which layers are numbered over the whole model."""
        entries = {}
        for name, parameter in [*self.named_parameters(), *self.named_buffers()]:
            key, axis = saved_as(self.kind, self.key, name), self.axes[name]
            entries[f"{prefix}{name}"] = (
                make_sharded_tensor_for_checkpoint(parameter, key)
                if axis is None
                else make_tp_sharded_tensor_for_checkpoint(parameter, key, tp_axis=axis)
            )
        return entries


class Companions(torch.nn.Module):
    """All companions of this rank's model; at most one of a kind beside a linear.

    `base` holds the weights' own storage while quantized ones stand in (fast_path.py).
    """

    def __init__(self) -> None:
        super().__init__()
        self.base: dict[str, torch.Tensor] = {}

    def of(self, kind: str, module: str) -> Any:
        """The companion of a kind beside a linear, by its name in this rank's model; None where there is none."""
        return self._modules.get(_place(kind, module))

    def put(self, module: str, companion: Companion) -> None:
        """Add one."""
        self.add_module(_place(companion.kind, module), companion)

    def each(self) -> Iterator[tuple[str, Companion]]:
        """(name of the linear in this rank's model, companion)."""
        for place, companion in self._modules.items():
            assert isinstance(companion, Companion)
            yield place.partition(":")[2].replace("/", "."), companion

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """Of all of them."""
        found: dict[str, Any] = {}
        for place, companion in self._modules.items():
            assert isinstance(companion, Companion)
            found |= companion.sharded_state_dict(f"{prefix}{place}.", sharded_offsets, metadata)
        return found


def _place(kind: str, module: str) -> str:
    return f"{kind}:{module.replace('.', '/')}"  # torch's names of modules hold no dot


def of(model: torch.nn.Module) -> Companions | None:
    """A model's companions, if it has any."""
    found = model._modules.get(NAME)
    assert found is None or isinstance(found, Companions)
    return found


def owns(parameter: str) -> bool:
    """Whether a parameter's name in the model is that of a companion's."""
    return parameter.startswith(f"{NAME}.")


def parts_of(key: str) -> int:
    """Into how many matrices, one over the other, tensor parallelism deals out a linear's rows: gate and up are two."""
    return 2 if key.endswith("mlp.linear_fc1") else 1


def collected(linear: Any) -> torch.Tensor:
    """The gradient [N, K] that a global batch's micro-batches have left for a linear's weight, on this rank."""
    return linear.weight.main_grad if hasattr(linear.weight, "main_grad") else linear.weight.grad


def weight_of(model: torch.nn.Module, module: str) -> torch.Tensor:
    """This rank's part of the weight [N, K] that is quantized: the parameter's own, an adapter's change added."""
    companions = of(model)
    weight = model.get_submodule(module).get_parameter("weight").data
    if companions is None:
        return weight
    weight, adapter = companions.base.get(module, weight), companions.of(ADAPTERS, module)
    return weight if adapter is None else adapter.merged(weight)


def take_gradients(model: torch.nn.Module) -> None:
    """Set every companion's gradient, a sum over this rank's micro-batches, from those of the weights."""
    companions = of(model)
    assert companions is not None
    with torch.no_grad():
        for module, companion in companions.each():
            companion.take_gradient(model.get_submodule(module), partial(weight_of, model, module))


def finalize(model: torch.nn.Module) -> Any:
    """Megatron's finalize_model_grads, with this model's companions where it has some."""
    return finalize_model_grads if of(model) is None else partial(_finalize, model)


def _finalize(model: torch.nn.Module, chunks: list[torch.nn.Module], *args: Any, **options: Any) -> None:
    take_gradients(model)
    finalize_model_grads(chunks, *args, **options)
