"""Typed views of what torch, Megatron and ModelOpt hand out untyped: where types are declared instead of proved.

torch types every attribute of a module as Tensor | Module, and Megatron its process groups as whatever they can be in
some layout. What they are in this project's models is said here, once.
"""

from typing import Any, Protocol, cast

import torch
from megatron.core import parallel_state

from halfbyte.training.arithmetic import Arithmetic


class Quantizer(Protocol):
    """ModelOpt's TensorQuantizer with our backend."""

    amax: torch.Tensor | None
    is_enabled: bool
    _quantizer_cache: Arithmetic

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        """X as it is quantized."""
        ...

    def enable(self) -> None:
        """Quantize from now on."""
        ...

    def disable(self) -> None:
        """Hand values through."""
        ...


class Linear(Protocol):
    """One of Megatron's parallel linears, after ModelOpt has given it quantizers."""

    weight: torch.nn.Parameter
    weight_quantizer: Quantizer
    input_quantizer: Quantizer


def linear(model: torch.nn.Module, name: str) -> Linear:
    """A linear by its name in this rank's model, decoder.layers.0.mlp.linear_fc1."""
    return cast(Linear, model.get_submodule(name))


def quantizer(of: torch.nn.Module | Linear, side: str) -> Quantizer:
    """The quantizer of a linear's `weight` or `input`."""
    found = {"weight": cast(Linear, of).weight_quantizer, "input": cast(Linear, of).input_quantizer}
    return found[side]


def layers(model: torch.nn.Module) -> list[Any]:
    """This pipeline stage's transformer layers."""
    return list(cast(Any, model).decoder.layers)


def pipeline_group() -> torch.distributed.ProcessGroup:
    """The ranks that hold the stages of one pipeline; only interleaved schedules have several."""
    return cast(torch.distributed.ProcessGroup, parallel_state.get_pipeline_model_parallel_group())


def tensor_group() -> torch.distributed.ProcessGroup:
    """The ranks that hold the parts of one layer."""
    return cast(torch.distributed.ProcessGroup, parallel_state.get_tensor_model_parallel_group())
