"""One checkpoint on its way to the disk: planned by all ranks together, written by a thread of each, finished together.

Megatron's dist_checkpointing plans what every rank writes and splits a save into what needs all ranks and what does not
(an AsyncRequest). What does not, the writing, happens in a thread: it reads host memory only, so that neither CUDA
nor a process is forked, and file writes, fsync and SHA-256 leave Python's lock to the training. The folder has a
temporary name until all ranks have written; then come the index, integrity.json, the name, and the link `last`.
"""

import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from halfbyte.training import integrity, retention
from halfbyte.training.errors import UserError

FAILURES = (OSError, RuntimeError, CheckpointingException, CheckpointException)
"""What a disk that is full or not writable raises, here or from inside Megatron."""


class HostMemory:
    """What saves of one start have in common: the copies of a rank's tensors that are written, and Megatron's plan.

    Training can change the tensors while their copies are written.

    Weights and optimizer state change in the optimizer step alone, so the copying may take the forward and backward
    pass before it: `stage` only notes what to copy, `copy` copies in a thread, and the next update waits for it. The
    memory is kept from save to save: on a CPU fresh memory costs more than the copy, on a GPU pinning it does.

    Attributes:
        saves: How many were staged in it, the same on every rank.
        plan: Megatron's strategy, which from the third save on neither makes nor gathers what the first two agreed on.
    """

    def __init__(self) -> None:
        self.saves = 0
        self.plan = TorchDistSaveShardedStrategy(cached_metadata=True)
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


class Write:
    """This rank's part of a checkpoint that is being written. `begin` makes one.

    Attributes:
        path: The checkpoint's folder once it is complete.
        seconds: From `begin` to the end of `finish`.
    """

    def __init__(
        self, path: Path, request: AsyncRequest, buckets: list[Any], began: float, host: HostMemory | None = None
    ):
        self.path, self._request, self._began, self._host = path, request, began, host
        self.seconds = 0.0
        self._digests: dict[str, tuple[str, int]] = {}
        self._failure: BaseException | None = RuntimeError("the thread that writes ended early; see logs/")
        self._copied = threading.Event()
        # A daemon: a process that ends for another reason leaves the folder without its name, as kill -9 does.
        self._thread = threading.Thread(target=self._write, args=(buckets,), name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def step(self) -> int:
        """Optimizer steps after which the checkpoint was taken."""
        return retention.step_of(self.path)

    @property
    def done(self) -> bool:
        """Whether this rank has written; every rank has to before `finish` returns at once."""
        return not self._thread.is_alive()

    def wait_until_copied(self) -> None:
        """Return when the tensors may change; an optimizer step has to wait for this."""
        self._copied.wait()

    def finish(self) -> None:
        """Wait for all ranks, then give the checkpoint its name; collective.

        Raises:
            UserError: on every rank: the disk is full or not writable; what was there before stays.
        """
        self._thread.join()
        _agreed(self._failure, self.path)
        failure: BaseException | None = None
        try:
            for finalize in self._request.finalize_fns:
                finalize()
            if dist.get_rank() == 0:  # what Megatron has written just now
                folder = _temporary(self.path)
                left = set(integrity.written_by(folder, 0)) - self._digests.keys()
                self._digests |= integrity.digests(folder, sorted(left))
        except FAILURES as error:
            failure = error
        # Every rank must agree that all files stand before the rename makes the checkpoint visible.
        _agreed(failure, self.path)
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, self._digests)
        if dist.get_rank() == 0:
            failure = _name(self.path, {name: value for part in parts for name, value in part.items()})
        _agreed(failure, self.path)
        self.seconds = time.perf_counter() - self._began

    def _write(self, buckets: list[Any]) -> None:
        """The thread."""
        try:
            try:
                if self._host is not None:
                    self._host.copy()
            finally:
                self._copied.set()
            self._write_shards(buckets)
            folder = _temporary(self.path)
            own = [name for name in integrity.written_by(folder, dist.get_rank()) if name.startswith("__")]
            self._digests = integrity.digests(folder, own)
            self._failure = None
        except FAILURES as error:
            self._failure = error

    def _write_shards(self, buckets: list[Any]) -> None:
        """Write this rank's files, as Megatron's own async_fn does, which forgets why a write failed."""
        if self._request.async_fn is None:  # nothing to write on this rank
            return
        transforms, _ = self._request.async_fn.args  # type: ignore[attr-defined] - a functools.partial
        _, _, results = self._request.async_fn_args
        written = {}
        for number, bucket in enumerate(buckets):
            made: Any = FileSystemWriterAsync.write_preloaded_data(
                transforms, number, bucket, None, None, use_fsync=True
            )
            written[number] = made[1]
            if isinstance(written[number], Exception):
                raise written[number]
        results.put(written)


def begin(
    state: Callable[[], dict[str, Any]], path: Path, host: HostMemory | None = None, at_once: Collection[int] = ()
) -> Write:
    """Plan a checkpoint and start to write it; collective over all ranks.

    Args:
        state: Makes Megatron's sharded state dict of this rank.
        path: Final folder, `<run.dir>/checkpoints/step_NNNNNNNN`.
        host: Takes copies of all tensors, which may change as soon as `wait_until_copied` has returned. None copies
            nothing that is in host memory already: nothing may change before `finish` has returned.
        at_once: Addresses of tensors that may change as soon as this returns.

    Raises:
        UserError: on every rank: the disk is full or not writable; what was there before stays.
    """
    began, failure = time.perf_counter(), None
    temporary = _temporary(path)
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            failure = error
    _agreed(failure, path)
    # Of this save alone. Megatron would make one in a process of its own, which outlives a worker that is killed.
    filesystem_async._results_queue = queue.SimpleQueue()
    request = buckets = None
    try:
        content = state()
        if host is not None:
            host.stage(content, at_once)
        request = dist_checkpointing.save(
            content,
            str(temporary),
            None if host is None else host.plan,  # type: ignore[arg-type] - Megatron's own default
            # All ranks compare what each of them would write, which stays what it was in a run's first save.
            validate_access_integrity=host is None or host.saves == 1,
            async_sharded_save=True,
            async_strategy="mcore",
        )
        assert request is not None
        buckets = None if request.preload_fn is None else request.preload_fn()  # what is still on the GPU
    except FAILURES as error:
        failure = error
    _agreed(failure, path)
    assert request is not None
    return Write(path, request, buckets or [], began, host)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _name(path: Path, digests: dict[str, tuple[str, int]]) -> OSError | None:
    """Complete a checkpoint whose shards and index stand; rank 0 only. Returns why that could not be done."""
    temporary = _temporary(path)
    try:
        integrity.write(temporary, digests)
        for file in [*temporary.iterdir(), temporary]:
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        retention.point(path)
    except OSError as error:
        return error
    return None


def _agreed(failure: BaseException | None, path: Path) -> None:
    """Go on if no rank failed; collective.

    Raises:
        UserError: on every rank, with why the first rank that failed did.
    """
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, None if failure is None else _reason(failure))
    failed = [reason for reason in reasons if reason is not None]
    if not failed:
        return
    if dist.get_rank() == 0:
        shutil.rmtree(_temporary(path), ignore_errors=True)
    free = shutil.disk_usage(_existing(path)).free / 1e9
    raise UserError(
        f"checkpoint {path} not saved ({next(filter(None, failed), 'no reason given')}; {free:.1f} GB free there); "
        "the previous one stays; free space and start again"
    )


def _reason(failure: BaseException) -> str:
    """The last line of what went wrong; "" where only another rank knows it."""
    if isinstance(failure, CheckpointException):  # its text is a traceback; ranks other than 0 get it without a cause
        causes = failure.failures  # pyright: ignore[reportOptionalMemberAccess] - it narrows torch's class to None
        text = next((str(cause) for cause, _ in causes.values()), "")
    else:
        text = str(_disk(failure)) or type(failure).__name__
    return next(iter(text.strip().splitlines()[-1:]), "")


def _disk(failure: BaseException) -> BaseException:
    """What the disk said before torch's writer stumbled over the consequences."""
    cause: BaseException | None = failure
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause or failure


def _existing(path: Path) -> Path:
    """The innermost folder of a path that is there."""
    return next(parent for parent in path.parents if parent.exists())
