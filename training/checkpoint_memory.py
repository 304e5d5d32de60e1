"""What the saves of one start have in common: memory for the copies that are written, and Megatron's plan."""

import threading
from collections.abc import Collection
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.metadata import Metadata


class Plan(TorchDistSaveShardedStrategy):
    """Megatron's way to save, with what completes a checkpoint at hand.

    Its own last steps take five collectives, and a disk that is full at the index leaves the other ranks waiting.

    Attributes:
        writer: Of the save that was planned last.
        index: What the whole checkpoint holds, on rank 0.
    """

    writer: FileSystemWriterAsync
    index: Metadata

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any, async_strategy: str) -> Any:
        self.writer, self.index = writer, save_state_dict_ret[1]
        return super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret, async_strategy)


class HostMemory:
    """Copies of a rank's tensors in host memory, so that training can change them while they are written.

    Weights and optimizer state change in the optimizer step alone, so the copying may take the forward and backward
    pass before it: `stage` only notes what to copy, `copy` copies in a thread, and the next update waits for it. The
    memory is kept from save to save: on a CPU fresh memory costs more than the copy, on a GPU pinning it does.

    Attributes:
        saves: How many were staged in it, the same on every rank.
        plan: From the third save on it neither makes nor gathers what the first two agreed on.
    """

    def __init__(self) -> None:
        self.saves = 0
        self.plan = Plan(cached_metadata=True)
        self._kept: dict[Any, torch.Tensor] = {}
        self._due: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._stream: torch.cuda.Stream | None = None
        self._reservation: threading.Thread | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing was staged or reserved yet."""
        return self.saves == 0 and self._reservation is None

    def reserve(self, state: dict[str, Any]) -> None:
        """Begin to take the memory that `stage` will need, in a thread: pinning it takes longer than filling it.

        Args:
            state: As for `stage`.
        """
        wanted = [(_index(part), part.data) for part in _written(state)]

        def take() -> None:
            for index, tensor in wanted:
                self._place(index, tensor)

        self._reservation = threading.Thread(target=take, name="checkpoint memory", daemon=True)
        self._reservation.start()

    def stage(self, state: dict[str, Any], at_once: Collection[int] = ()) -> None:
        """Put what `copy` will fill in the place of the tensors that this rank writes.

        Args:
            state: Megatron's sharded state dict.
            at_once: Addresses of tensors that something else than an optimizer step may change: these are copied here.
        """
        if self._reservation is not None:
            self._reservation.join()
            self._reservation = None
        self._due = []
        for part in _written(state):
            source = part.data.detach()  # the values of now: fast_path.py points parameters elsewhere during a pass
            part.data = self._place(_index(part), source)
            if source.data_ptr() in at_once:
                part.data.copy_(source)
            else:
                self._due.append((part.data, source))
        self.saves += 1
        if self._stream is None and any(source.is_cuda for _, source in self._due):
            self._stream = torch.cuda.Stream()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    def copy(self) -> None:
        """Copy what was staged; returns when all is there. No tensor of it may change meanwhile."""
        due, self._due = self._due, []
        if self._stream is None:
            for kept, source in due:
                kept.copy_(source)
            return
        with torch.cuda.stream(self._stream):  # beside what the GPU computes
            for kept, source in due:
                kept.copy_(source, non_blocking=True)
        self._stream.synchronize()

    def _place(self, index: Any, like: torch.Tensor) -> torch.Tensor:
        kept = self._kept.get(index)
        if kept is None or (kept.shape, kept.dtype) != (like.shape, like.dtype):
            kept = torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda)
            self._kept[index] = kept
        return kept


def _written(state: dict[str, Any]) -> list[Any]:
    """The sharded tensors of a state dict that this rank writes, as the factories cut them."""
    apply_factories(state)  # as Megatron would
    parts = (part for part in nested_values(state) if isinstance(part, ShardedTensor))
    return [part for part in parts if is_main_replica(part.replica_id)]


def _index(part: ShardedTensor) -> tuple[str, tuple[int, ...]]:
    return part.key, part.global_offset
