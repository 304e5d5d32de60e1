"""The distributed optimizer's state as a checkpoint stores it: every rank writes the part that it has.

Megatron 0.19.2 stores FP32 parameters and moments in the shape of the parameters ("fully_reshardable"), so that any
layout can load them. Its distributed optimizer cuts a flat buffer over the data-parallel ranks instead, at places that
have nothing to do with rows; to save, Megatron gathers every buffer on every rank, through four copies in host memory.
None of this is needed: a stretch of a flat parameter is a few boxes of the parameter (a piece of a row, whole rows, a
piece of a row), and the format takes boxes of any place and size. Keys, shapes and what loads them stay as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from halfbyte.training import gradients

FORMAT = "fully_reshardable"
"""Megatron's name of it."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes in a tensor, one per axis."""


@contextmanager
def ungathered(optimizer: Any) -> Iterator[None]:
    """Within this context a save takes the distributed optimizer's own tensors, and no rank waits for another."""
    sharded = [part for part in gradients.parts(optimizer) if isinstance(part, DistributedOptimizer)]
    for part in sharded:
        part.sharded_param_state_fully_reshardable = _instead(part)
    try:
        yield
    finally:
        for part in sharded:
            del part.sharded_param_state_fully_reshardable


def common(optimizer: Any) -> dict[Any, Any]:
    """What Megatron's `sharded_state_dict` holds without its tensors: hyperparameters, steps, in its order."""
    found = [_common(part) for part in gradients.parts(optimizer)]
    return found[0] if len(found) == 1 else dict(enumerate(found))


def _common(part: Any) -> dict[str, Any]:
    state = part.state_dict()
    if isinstance(part, DistributedOptimizer):
        return state | {"param_state_sharding_type": FORMAT}
    state.pop("fp32_from_fp16_params", None)
    adam = state.get("optimizer", state)  # the FP32 optimizer's is torch's own
    adam["state"] = {"common_step": part._extract_common_per_param_step(adam)}
    for group in adam["param_groups"]:
        del group["params"]
    return state


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Cut a stretch of a row-major tensor into boxes, in the order of their elements.

    Args:
        shape: The tensor's, at least one axis.
        start: The first element of the stretch, counted in the flat tensor.
        stop: The one after the last.

    Returns:
        At most 2 x (number of axes) - 1 boxes.
    """
    inner = prod(shape[1:])
    while start < stop:
        row, rows = start // inner, (stop - start) // inner
        if start % inner == 0 and rows:
            yield (row, *(0 for _ in shape[1:])), (rows, *shape[1:])
            start += rows * inner
        else:
            end = min(stop, (row + 1) * inner)
            for offsets, sizes in boxes(shape[1:], start - row * inner, end - row * inner):
                yield (row, *offsets), (1, *sizes)
            start = end


def _instead(part: DistributedOptimizer) -> Any:
    """What stands in for its method of the same arguments."""
    return lambda weights, *_: _state(part, weights)


def _state(part: DistributedOptimizer, weights: dict[str, Any]) -> dict[int, Any]:
    """As DistributedOptimizer.sharded_param_state_fully_reshardable: number -> name -> what this rank stores."""
    stored = {
        entry.data: entry
        for entry in nested_values(weights)
        if isinstance(entry, (ShardedTensor, ShardedTensorFactory))
    }
    alone = part.data_parallel_group.size() == 1
    names = ("param", *part.optimizer_state_keys)
    state: dict[int, Any] = {}
    for number, ranges in enumerate(part.gbuf_ranges):
        ((_, buckets),) = ranges.items()
        own = {parameter: places["param"] for b in buckets for parameter, places in b["param_map"].items()}
        for parameter in (parameter for parameter in part.buffers[number].param_index_map if parameter in own):
            tensors = part._get_main_param_and_optimizer_states(parameter)
            whole = _whole(stored[parameter])
            state[len(state)] = {
                name: [
                    piece
                    for entry, first in whole
                    for piece in _pieces(entry, first, f"optimizer.state.{name}.", tensors[name], own[parameter], alone)
                ]
                for name in names
            }
    return state


def _whole(entry: ShardedTensor | ShardedTensorFactory) -> list[tuple[ShardedTensor, int]]:
    """What a parameter is stored as, without data, and where in the flat parameter each tensor begins."""
    held: Any = entry.data  # declared Optional, which it is in plans only
    without = replace(entry, data=torch.empty(held.shape, dtype=held.dtype, device="meta"))
    tensors: list[Any] = [without] if isinstance(without, ShardedTensor) else list(nested_values(without.build()))
    assert all(tensor.data.is_contiguous() for tensor in tensors)
    return [(tensor, tensor.data.storage_offset()) for tensor in tensors]


def _pieces(
    entry: ShardedTensor, first: int, prefix: str, flat: torch.Tensor, own: Any, alone: bool
) -> Iterator[ShardedTensor]:
    """The boxes of a stored tensor that lie in a rank's stretch of its parameter.

    Args:
        entry: What the model stores.
        first: Where it begins in the flat parameter.
        prefix: Comes before its key.
        flat: The rank's stretch of the parameter's values (or moments), 1-D.
        own: Where the stretch lies in the flat parameter, `start` and `end`.
        alone: Whether there is one data-parallel rank, whose boxes are whole tensors in Megatron's regular grid.
    """
    start, stop = max(own.start, first), min(own.end, first + prod(entry.local_shape))
    flat = flat.detach().float()[start - own.start : stop - own.start] if start < stop else flat[:0]
    taken = 0
    for offsets, sizes in boxes(entry.local_shape, start - first, stop - first):
        piece = flat[taken : taken + prod(sizes)].view(sizes)
        taken += prod(sizes)
        ahead = entry.prepend_axis_num
        at = [*entry.global_offset[:ahead], *map(sum, zip(entry.global_offset[ahead:], offsets, strict=True))]
        yield replace(
            entry,
            key=prefix + entry.key,
            data=piece,
            dtype=piece.dtype,
            local_shape=tuple(sizes),
            global_offset=tuple(at),
            axis_fragmentations=entry.axis_fragmentations if alone else None,
            replica_id=(*entry.replica_id[:-1], 0),  # type: ignore[misc] - (pipeline, tensor, data): no other has it
        )
