"""From which checkpoint a run goes on: the newest whose files are as they were saved. Collective, over all ranks."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from halfbyte.training import integrity, retention
from halfbyte.training.errors import UserError


def newest_good(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are as they were saved; collective.

    Damaged ones that are newer are set aside (retention.set_aside), and the link `last` is moved.

    Returns:
        The checkpoint, or None if there is none, and one line for each that was set aside.

    Raises:
        UserError: a damaged folder cannot be renamed.
    """
    said: list[str] = []
    while True:
        path = _from_first(partial(retention.repair_link, checkpoints))
        reason = None if path is None else damage(path)
        if path is None or reason is None:
            return path, said
        aside = _from_first(partial(retention.set_aside, path))
        said.append(f"checkpoint {path}: damaged ({reason}); set aside as {aside.name}")


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, the same on every rank, or None; collective, each rank reads a share."""
    mine = integrity.damage(path, rank=dist.get_rank(), world=dist.get_world_size())
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return next(filter(None, found), None)


def check(path: Path) -> None:
    """Read a checkpoint's files and compare their checksums; collective.

    Raises:
        UserError: it is damaged.
    """
    reason = damage(path)
    if reason is not None:
        raise UserError(integrity.damaged_line(path, reason))


def _from_first[T](work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, on every rank."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = work()
        except OSError as error:
            box[1] = f"{error.filename}: {error.strerror}; make the folder of checkpoints writable"
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]
