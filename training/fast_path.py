"""The quantized passes of one global batch or one evaluation: each weight rounded once, no wrapper around the inputs.

ModelOpt's quantized linear rounds its weight in every micro-batch and replaces Megatron's function for the duration of
each call. Inside `weights_once` every weight is its fake-quantized value already: all micro-batches in flight, every
recomputation and both GEMMs of the backward pass read the one tensor. It is the parameter itself that holds it, so the
weight gradient goes where Megatron puts it (`main_grad`); with a straight-through gradient dL/dW = dL/dW_q.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from halfbyte.training.errors import UserError


@dataclass
class _Swapped:
    """One weight inside the context: the parameter, its own storage, and its version when it was swapped."""

    name: str
    parameter: torch.nn.Parameter
    own: torch.Tensor
    version: int


@contextlib.contextmanager
def weights_once(model: torch.nn.Module) -> Iterator[None]:
    """Inside this context every quantized linear computes with its weight as it is quantized now.

    Outputs and gradients are bit for bit those of the ModelOpt path. Nothing can go stale: the context spans one global
    batch or one evaluation, and whatever changes weights (an optimizer step, a checkpoint load, an EMA swap) happens
    outside of it. Costs one copy of the quantized weights, and one pass over them.

    Args:
        model: A GPTModel after quantize.quantize; any dtype, any layout.

    Raises:
        UserError: somebody wrote to a weight inside the context; that change would be lost.
    """
    swapped: list[_Swapped] = []
    linears = [(name, module) for name, module in model.named_modules() if _base_forward(module) is not None]
    try:
        for name, linear in linears:
            if hasattr(linear, "weight_quantizer"):
                if linear.weight_quantizer.is_enabled:  # not so for weights_as_served: they are on the grid already
                    swapped.append(_swap(name, linear))
                linear.__dict__["forward"] = _forward(linear)
        yield
    finally:
        for _, linear in linears:
            linear.__dict__.pop("forward", None)
        changed = [entry.name for entry in swapped if entry.parameter._version != entry.version]
        for entry in swapped:
            entry.parameter.data = entry.own
    if changed:
        raise UserError(
            f"{changed[0]}.weight was changed while its quantized value stood in for it: that change is lost"
        )


def _swap(name: str, linear: torch.nn.Module) -> _Swapped:
    rule = linear.weight_quantizer._quantizer_cache
    parameter: torch.nn.Parameter = linear.weight  # type: ignore[assignment]
    own = parameter.data
    with torch.no_grad():
        quantized = rule.fake(own)
    parameter.data = quantized
    return _Swapped(name, parameter, own, parameter._version)


def _base_forward(module: torch.nn.Module) -> Callable | None:
    """Megatron's own forward of a parallel linear, below ModelOpt's."""
    for kind in (ColumnParallelLinear, RowParallelLinear):
        if isinstance(module, kind):
            return kind.forward
    return None


def _forward(linear: torch.nn.Module) -> Callable:
    """Round the input (a sequence-parallel shard before its gather) and go straight to Megatron's linear."""
    base, quantizer = _base_forward(linear), linear.input_quantizer
    assert base is not None
    rule = quantizer._quantizer_cache if quantizer.is_enabled else None

    def forward(x: torch.Tensor, *args, **kwargs):
        if rule is not None:
            x = rule.fake(x)
        return base(linear, x, *args, **kwargs)

    return forward
