"""What the saves of one start have in common: memory for the copies that are written, and a record of the first."""

import threading
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica

if TYPE_CHECKING:
    from halfbyte.training.checkpoint_record import Record


class HostMemory:
    """Copies of a rank's tensors in host memory, so that training can change them while they are written.

    Weights and optimizer state change in the optimizer step alone, so the copying may take the forward and backward
    pass before it: `stage` only notes what to copy, `copy` copies in a thread, and the next update waits for it. The
    memory is kept from save to save: on a CPU fresh memory costs more than the copy, on a GPU pinning it does.

    Attributes:
        record: What the last save that Megatron planned holds, for those after it.
    """

    def __init__(self) -> None:
        self.record: Record | None = None
        self._kept: dict[Any, torch.Tensor] = {}
        self._now: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._later: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._stream: torch.cuda.Stream | None = None
        self._reservation: threading.Thread | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing was staged or reserved yet."""
        return not self._kept and self._reservation is None

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
        self._now, self._later = [], []
        for part in _written(state):
            source = part.data.detach()  # the values of now: fast_path.py points parameters elsewhere during a pass
            part.data = self._place(_index(part), source)
            (self._now if source.data_ptr() in at_once else self._later).append((part.data, source))
        self.stage_again()

    def stage_again(self) -> None:
        """Note the tensors of the last `stage` once more, which have other values by now."""
        for kept, source in self._now:
            kept.copy_(source, non_blocking=True)
        if self._stream is None and any(source.is_cuda for _, source in self.staged):
            self._stream = torch.cuda.Stream()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
            torch.cuda.current_stream().synchronize()

    @property
    def staged(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(copy, tensor of the training) of all that was staged last."""
        return [*self._now, *self._later]

    def copy(self) -> None:
        """Copy what was staged; returns when all is there. No tensor of it may change meanwhile."""
        if self._stream is None:
            for kept, source in self._later:
                kept.copy_(source)
            return
        with torch.cuda.stream(self._stream):  # beside what the GPU computes
            for kept, source in self._later:
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
