"""What one rank writes in a save: planned by Megatron once in a start, repeated from a record after that.

A plan takes Megatron's and ModelOpt's state dicts, hundreds of pickles and collectives, and is the same in every save
of a start: the same tensors in the same order, which host memory has new values of, and one object with what is no
tensor. A record is kept only if that object can be made byte for byte as Megatron made it, and if every tensor comes
from memory that training computes in: what a plan computed for itself would be old in the next save.
"""

import io
import os
import queue
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.metadata import Metadata

from halfbyte.training.checkpoint_content import Content
from halfbyte.training.checkpoint_memory import HostMemory

COMMON = "common_state"
"""Megatron's key of what is no tensor; rank 0 writes it."""
FIXED = "_extra_state"
"""Is part of the keys under which ModelOpt stores a linear's quantizers."""

Bucket = tuple[str, str, tuple[list[tuple[Any, io.BytesIO]], list[tuple[Any, torch.Tensor]]]]
"""A file: path, name, serialized objects and tensors in host memory, each with its place in the plan."""


@dataclass(frozen=True)
class Shards:
    """The files of one rank.

    Attributes:
        writer: Megatron's, of the folder.
        index: What the whole checkpoint holds; None on other ranks than 0.
        buckets: The files, at most one.
    """

    writer: FileSystemWriterAsync
    index: Metadata | None
    buckets: list[Bucket]


@dataclass(frozen=True)
class Record:
    """Shards of a save, for those after it.

    Attributes:
        fingerprint: Content.fingerprint of the save.
        shards: What it wrote, from host memory.
        host: That memory.
    """

    fingerprint: list[Any]
    shards: Shards
    host: HostMemory

    def fits(self, content: Content) -> bool:
        """Whether a save of this content writes the same tensors and quantizers; else the record is worthless."""
        return self.fingerprint == content.fingerprint()

    def again(self, content: Content, folder: Path) -> Shards:
        """As `planned` without asking Megatron, for content that fits; no collective, and nothing of the disk.

        Args:
            content: What is saved.
            folder: Where to.
        """
        self.host.stage_again()
        common = content.common() if dist.get_rank() == 0 else b""
        buckets = [
            (
                str(folder / name),
                name,
                ([(at, io.BytesIO(common) if _is_common(at) else stored) for at, stored in objects], tensors),
            )
            for _, name, (objects, tensors) in self.shards.buckets
        ]
        return replace(self.shards, writer=_writer(folder), buckets=buckets)


class _Plan(TorchDistSaveShardedStrategy):
    """Megatron's way to save, with what completes a checkpoint at hand.

    Its own last steps take five collectives, and a disk that is full at the index leaves the other ranks waiting.
    """

    index: Metadata | None

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any, async_strategy: str) -> Any:
        self.index = save_state_dict_ret[1]
        return super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret, async_strategy)


def planned(content: Content, folder: Path, host: HostMemory | None) -> Shards:
    """Have Megatron plan a save into a folder, which is there; collective.

    Args:
        content: What is saved.
        folder: Where to.
        host: Takes the place of the tensors, and a record where one can be kept. None copies what is on a GPU.
    """
    # Of this save alone. Megatron would make one in a process of its own, which outlives a worker that is killed.
    filesystem_async._results_queue = queue.SimpleQueue()
    state, plan = content.state(), _Plan()
    if host is not None:
        host.stage(state, content.buffers())
    request = dist_checkpointing.save(state, str(folder), plan, async_sharded_save=True, async_strategy="mcore")
    assert request is not None
    buckets = [] if request.preload_fn is None else request.preload_fn()  # what is still on the GPU
    shards = Shards(_writer(folder), plan.index, buckets)
    if host is not None:
        host.record = Record(content.fingerprint(), shards, host) if _repeatable(shards, content, host) else None
    return shards


def _repeatable(shards: Shards, content: Content, host: HostMemory) -> bool:
    """Whether later saves can be made of these shards and of `content.common`."""
    objects = [entry for _, _, (found, _) in shards.buckets for entry in found]
    tensors = [tensor for _, _, (_, found) in shards.buckets for _, tensor in found]
    common = content.common() if dist.get_rank() == 0 else b""
    copies = {copy.data_ptr() for copy, _ in host.staged}
    memory = content.storages()
    return (
        all(stored.getvalue() == common if _is_common(at) else FIXED in at.index.fqn for at, stored in objects)
        and all(tensor.data_ptr() in copies for tensor in tensors)
        and all(source.untyped_storage().data_ptr() in memory for _, source in host.staged)
    )


def _is_common(at: Any) -> bool:
    return at.index.fqn.startswith(COMMON)


def _writer(folder: Path) -> FileSystemWriterAsync:
    writer = FileSystemWriterAsync(os.fspath(folder))
    writer.set_up_storage_writer(dist.get_rank() == 0)
    return writer
