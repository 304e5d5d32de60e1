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

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.storage import WriteResult

from halfbyte.training import integrity, retention
from halfbyte.training.checkpoint_memory import HostMemory, Plan
from halfbyte.training.errors import UserError

FAILURES = (OSError, RuntimeError, CheckpointingException, CheckpointException)
"""What a disk that is full or not writable raises, here or from inside Megatron."""

Digests = dict[str, tuple[str, int]]
"""File name -> SHA-256, bytes."""


class Write:
    """This rank's part of a checkpoint that is being written. `begin` makes one.

    Attributes:
        path: The checkpoint's folder once it is complete.
        seconds: From `begin` to the end of `finish`.
    """

    def __init__(
        self, path: Path, plan: Plan, request: AsyncRequest, buckets: list[Any], host: HostMemory | None, began: float
    ):
        self.path, self._plan, self._request, self._host, self._began = path, plan, request, host, began
        self.seconds = 0.0
        self._results: list[WriteResult] = []
        self._digests: Digests = {}
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
        first = dist.get_rank() == 0
        parts: list[Any] | None = [None] * dist.get_world_size() if first else None
        dist.gather_object((self._failure is None, self._results, self._digests), parts)
        failure = self._failure
        # All files must stand before the rename makes the checkpoint visible.
        if parts is not None and all(written for written, _, _ in parts):
            failure = _complete(self.path, self._plan, parts)
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
        for number, bucket in enumerate(buckets):
            made: Any = FileSystemWriterAsync.write_preloaded_data(
                transforms, number, bucket, None, None, use_fsync=True
            )
            if isinstance(made[1], Exception):
                raise made[1]
            self._results += made[1]


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
    plan, request, buckets = Plan() if host is None else host.plan, None, None
    try:
        content = state()
        if host is not None:
            host.stage(content, at_once)
        request = dist_checkpointing.save(
            content,
            str(temporary),
            plan,
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
    return Write(path, plan, request, buckets or [], host, began)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _complete(path: Path, plan: Plan, parts: list[tuple[bool, list[WriteResult], Digests]]) -> BaseException | None:
    """Give a checkpoint whose shards stand its index, sums and name; rank 0 only. Returns why that failed."""
    temporary = _temporary(path)
    digests = {name: value for _, _, own in parts for name, value in own.items()}
    try:
        plan.writer.finish(plan.index, [results for _, results, _ in parts])
        save_config(CheckpointingConfig(plan.backend, plan.version), str(temporary))
        digests |= integrity.digests(temporary, sorted(set(integrity.written_by(temporary, 0)) - digests.keys()))
        integrity.write(temporary, digests)
        for file in [*temporary.iterdir(), temporary]:
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        retention.point(path)
    except FAILURES as error:
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
