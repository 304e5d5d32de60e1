"""The distributed optimizer's state as a checkpoint stores it, without the copies that a single rank does not need.

Megatron 0.19.2 gathers every bucket of FP32 parameters and moments over the data-parallel ranks, through four copies in
host memory, to cut it into parameters again. Where there is one data-parallel rank, it has them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from halfbyte.training import gradients


class _Pieces:
    """A flat buffer that is asked for the slices of single parameters only, and has those.

    Args:
        pieces: First element -> the elements from there on, 1-D.
    """

    def __init__(self, pieces: Mapping[int, torch.Tensor]):
        self._pieces = pieces

    def __getitem__(self, where: slice) -> torch.Tensor:
        piece = self._pieces[where.start]
        assert len(piece) == where.stop - where.start
        return piece


@contextmanager
def ungathered(optimizer: Any) -> Iterator[None]:
    """Within this context a save takes the optimizer's own tensors where no other rank has a part of them."""
    alone = [
        part
        for part in gradients.parts(optimizer)
        if isinstance(part, DistributedOptimizer) and part.data_parallel_group.size() == 1
    ]
    for part in alone:
        part.get_parameter_state_dp_zero = _instead(part)
    try:
        yield
    finally:
        for part in alone:
            del part.get_parameter_state_dp_zero


def _instead(part: DistributedOptimizer) -> Any:
    """What stands in for its method, whose options are about gathering."""
    return lambda **_: _state(part)


def _state(part: DistributedOptimizer) -> dict[Any, Any]:
    """As DistributedOptimizer.get_parameter_state_dp_zero: buffer -> dtype -> name -> flat FP32 values."""
    names = ("param", *part.optimizer_state_keys)
    state: dict[Any, Any] = {}
    for number, ranges in enumerate(part.gbuf_ranges):
        places = part.buffers[number].param_index_map
        ((dtype, buckets),) = ranges.items()
        pieces: dict[str, dict[int, torch.Tensor]] = {name: {} for name in names}
        for parameter in (parameter for bucket in buckets for parameter in bucket["param_map"]):
            tensors = part._get_main_param_and_optimizer_states(parameter)
            for name in names:
                pieces[name][places[parameter][0]] = tensors[name].detach().float()
        state[number] = {dtype: {name: _Pieces(found) for name, found in pieces.items()}}
    return state
