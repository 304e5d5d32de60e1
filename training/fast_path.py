"""The quantized passes of one global batch or one evaluation: each weight rounded once, inputs where they are made.

ModelOpt's quantized linear rounds its weight in every micro-batch and replaces Megatron's function for the duration of
each call. Inside `weights_once` every weight is its fake-quantized value already: all micro-batches in flight, every
recomputation and both GEMMs of the backward pass read the one tensor. It is the parameter itself that holds it, so the
weight gradient goes where Megatron puts it (`main_grad`); with a straight-through gradient dL/dW = dL/dW_q.

The norm before qkv and fc1 and the SwiGLU before fc2 have one reader each, so they round what they produce (on a GPU in
the same kernel); the output projection rounds its input itself.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from halfbyte.training import companions, typed
from halfbyte.training.errors import UserError


@dataclass
class _Swapped:
    """One weight inside the context: the parameter, its own storage, and its version when it was swapped."""

    name: str
    parameter: torch.nn.Parameter
    own: torch.Tensor
    version: int


@contextlib.contextmanager
def weights_once(model: torch.nn.Module, kept: dict[str, torch.Tensor] | None = None) -> Iterator[None]:
    """Inside this context every quantized linear computes with its weight as it is quantized now.

    Outputs and gradients are bit for bit those of the ModelOpt path. Nothing can go stale: the context spans one global
    batch or one evaluation, and whatever changes weights (an optimizer step, a checkpoint load, an EMA swap) happens
    outside of it. Costs one copy of the quantized weights, and one pass over them.

    Args:
        model: A GPTModel after quantize.quantize; any dtype, any layout.
        kept: Where the quantized weights stay between calls, by name, so that they keep their addresses (graphs.py);
            None frees them at the end.

    Raises:
        UserError: somebody wrote to a weight inside the context; that change would be lost.
    """
    swapped: list[_Swapped] = []
    beside = companions.of(model)
    linears = [(name, module) for name, module in model.named_modules() if _base_forward(module) is not None]
    producers = _producers(model)
    try:
        for name, linear in linears:
            if hasattr(linear, "weight_quantizer"):
                if linear.weight_quantizer.is_enabled:  # not so for weights_as_served: they are on the grid already
                    swapped.append(_swap(name, linear, companions.weight_of(model, name), kept))
                _bypass(linear, producers.get(linear))
        if beside is not None:
            beside.base = {entry.name: entry.own for entry in swapped}
        with _at_hand(model):
            yield
    finally:
        if beside is not None:
            beside.base = {}
        for _, linear in linears:
            linear.__dict__.pop("forward", None)
        for producer in producers.values():
            producer.__dict__.pop("rounding", None)
        changed = [entry.name for entry in swapped if entry.parameter._version != entry.version]
        for entry in swapped:
            entry.parameter.data = entry.own
    if changed:
        raise UserError(
            f"{changed[0]}.weight was changed while its quantized value stood in for it: that change is lost"
        )


@contextlib.contextmanager
def _at_hand(model: torch.nn.Module) -> Iterator[None]:
    """Inside, every module's parameters and submodules are found as plain attributes.

    In a module of ModelOpt's a lookup takes ten microseconds, a dozen times per layer and micro-batch, and a GPU of
    a tensor-parallel group waits for them.
    """
    shown = []
    for module in model.modules():
        held = {**module._parameters, **module._modules}
        shown.append((module, {name: value for name, value in held.items() if name not in module.__dict__}))
    try:
        for module, held in shown:
            module.__dict__.update(held)
        yield
    finally:
        for module, held in shown:
            for name in held:
                module.__dict__.pop(name, None)


def _swap(name: str, linear: torch.nn.Module, weight: torch.Tensor, kept: dict[str, torch.Tensor] | None) -> _Swapped:
    rule, parameter = typed.quantizer(linear, "weight")._quantizer_cache, linear.get_parameter("weight")
    own = parameter.data
    with torch.no_grad():
        place = None if kept is None else kept.get(name)
        quantized = rule.fake(weight).to(own.dtype) if place is None else rule.fake_into(weight, place)
    if kept is not None:
        kept[name] = quantized
    parameter.data = quantized
    return _Swapped(name, parameter, own, parameter._version)


def _base_forward(module: torch.nn.Module) -> Callable | None:
    """Megatron's own forward of a parallel linear, below ModelOpt's."""
    for kind in (ColumnParallelLinear, RowParallelLinear):
        if isinstance(module, kind):
            return kind.forward
    return None


def _producers(model: torch.nn.Module) -> dict[torch.nn.Module, torch.nn.Module]:
    """Linear -> the module whose output nothing else reads."""
    pairs = {}
    for layer in typed.layers(model):
        pairs[layer.self_attention.linear_qkv] = layer.input_layernorm
        pairs[layer.mlp.linear_fc1] = layer.pre_mlp_layernorm
        pairs[layer.mlp.linear_fc2] = layer.mlp.activation_func
    return pairs


def _bypass(linear: torch.nn.Module, producer: torch.nn.Module | None) -> None:
    """Go straight to Megatron's linear; the input is rounded by its producer or, where there is none, on entry.

    Under sequence parallelism both see the shard before its gather.
    """
    base, quantizer = _base_forward(linear), typed.quantizer(linear, "input")
    assert base is not None
    rounding = quantizer._quantizer_cache if quantizer.is_enabled else None
    if rounding is not None and rounding.limit is not None:
        producer = None  # a producer's kernel knows no clipped gradient
    if rounding is None or producer is not None:
        if producer is not None:
            producer.__dict__["rounding"] = rounding
        linear.__dict__["forward"] = lambda *args, **kwargs: base(linear, *args, **kwargs)
    else:
        linear.__dict__["forward"] = lambda x, *args, **kwargs: base(linear, rounding.fake(x), *args, **kwargs)
