"""One checkpoint on its way to the disk: planned by all ranks together, written by a thread of each, finished together.

Megatron's dist_checkpointing plans what every rank writes (checkpoint_record.py). The writing happens in a thread: it
reads host memory only, so that neither CUDA nor a process is forked, and file writes, fsync and SHA-256 leave Python's
lock to the training. The folder has a temporary name until all ranks have written; then a thread of rank 0 adds the
index, integrity.json, the name, and the link `last`.
"""

import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.storage import WriteResult

from halfbyte.training import integrity, retention
from halfbyte.training.checkpoint_content import Content
from halfbyte.training.checkpoint_memory import HostMemory
from halfbyte.training.checkpoint_record import Shards, planned
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
        handed_over: Whether rank 0 knows what all ranks have written.
    """

    def __init__(self, path: Path, shards: Shards, host: HostMemory | None, began: float):
        self.path, self._shards, self._host, self._began = path, shards, host, began
        self.seconds, self.handed_over = 0.0, False
        self._written = b""
        self._failure: BaseException | None = RuntimeError("the thread that writes ended early; see logs/")
        self._copied = threading.Event()
        self._thread = self._start(self._write)

    def _start(self, work: Callable[..., None], *args: Any) -> threading.Thread:
        # A daemon: a process that ends for another reason leaves the folder without its name, as kill -9 does.
        thread = threading.Thread(target=work, args=args, name="checkpoint", daemon=True)
        thread.start()
        return thread

    @property
    def step(self) -> int:
        """Optimizer steps after which the checkpoint was taken."""
        return retention.step_of(self.path)

    @property
    def done(self) -> bool:
        """Whether nothing is being written by this rank; if so on every rank, the next call below returns at once."""
        return not self._thread.is_alive()

    def wait_until_copied(self) -> None:
        """Return when the tensors may change; an optimizer step has to wait for this."""
        self._copied.wait()

    def hand_over(self) -> None:
        """Wait for all ranks, and let a thread of rank 0 complete the checkpoint; collective."""
        self._thread.join()
        first = dist.get_rank() == 0
        parts: list[Any] | None = [b""] * dist.get_world_size() if first else None
        dist.gather_object(self._written, parts)  # nothing where that failed
        self.handed_over = True
        # All files must stand before the rename makes the checkpoint visible.
        if parts is not None and all(parts):
            self._failure = RuntimeError("the thread that completes it ended early; see logs/")
            self._thread = self._start(self._add_name, parts)

    def finish(self) -> None:
        """Wait until the checkpoint has its name; collective.

        Raises:
            UserError: on every rank: the disk is full or not writable; what was there before stays.
        """
        if not self.handed_over:
            self.hand_over()
        self._thread.join()
        _agreed(self._failure, self.path)
        self.seconds = time.perf_counter() - self._began

    def _write(self) -> None:
        """The thread that writes this rank's files."""
        try:
            try:
                if self._host is not None:
                    self._host.copy()
            finally:
                self._copied.set()
            folder = _temporary(self.path)
            folder.mkdir(exist_ok=True)  # rank 0 has made it, which another node may not have seen
            results = self._write_shards()
            own = [name for name in integrity.written_by(folder, dist.get_rank()) if name.startswith("__")]
            self._written = pickle.dumps((results, integrity.digests(folder, own)))
            self._failure = None
        except FAILURES as error:
            self._failure = error

    def _write_shards(self) -> list[WriteResult]:
        """Write this rank's files, as Megatron's own async_fn does, which forgets why a write failed."""
        results: list[WriteResult] = []
        for number, bucket in enumerate(self._shards.buckets):
            made: Any = FileSystemWriterAsync.write_preloaded_data(
                [self._shards.writer.transforms], number, bucket, None, None, use_fsync=True
            )
            if isinstance(made[1], Exception):
                raise made[1]
            results += made[1]
        return results

    def _add_name(self, parts: list[bytes]) -> None:
        """The thread of rank 0 that completes a checkpoint whose shards stand."""
        try:
            _complete(self.path, self._shards, [pickle.loads(part) for part in parts])
            self._failure = None
        except FAILURES as error:
            self._failure = error


def begin(content: Content, path: Path, host: HostMemory | None = None) -> Write:
    """Plan a checkpoint, or repeat the plan of one before it, and start to write it; collective over all ranks.

    Args:
        content: What this rank saves.
        path: Final folder, `<run.dir>/checkpoints/step_NNNNNNNN`.
        host: Takes copies of all tensors, which may change as soon as `wait_until_copied` has returned, those of
            `content.buffers()` as soon as this returns. None copies nothing that is in host memory already: nothing
            may change before `finish` has returned.

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
    record = None if host is None else host.record
    fits = record is not None and record.fits(content)
    if _agreed(failure, path, fits) and record is not None:
        return Write(path, record.again(content, temporary), host, began)
    shards = None
    try:
        shards = planned(content, temporary, host)
    except FAILURES as error:
        failure = error
    _agreed(failure, path)
    assert shards is not None
    return Write(path, shards, host, began)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _complete(path: Path, shards: Shards, parts: list[tuple[list[WriteResult], Digests]]) -> None:
    """Add index, sums and name to what all ranks have written."""
    temporary = _temporary(path)
    digests = {name: value for _, own in parts for name, value in own.items()}
    assert shards.index is not None
    shards.writer.finish(shards.index, [results for results, _ in parts])
    save_config(CheckpointingConfig("torch_dist", 1), str(temporary))
    digests |= integrity.digests(temporary, sorted(set(integrity.written_by(temporary, 0)) - digests.keys()))
    integrity.write(temporary, digests)
    for file in [*temporary.iterdir(), temporary]:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)
    retention.point(path)


def _agreed(failure: BaseException | None, path: Path, vote: bool = False) -> bool:
    """Go on if no rank failed; collective. Returns whether every rank votes True.

    Raises:
        UserError: on every rank, with why the first rank that failed did.
    """
    votes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(votes, (None if failure is None else _reason(failure), vote))
    failed = [reason for reason, _ in votes if reason is not None]
    if not failed:
        return all(vote for _, vote in votes)
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
