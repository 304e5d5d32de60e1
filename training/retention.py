"""Which training checkpoints a run folder has: their names, the newest, which ones stay. Torch-free, no collectives.

A folder is called step_NNNNNNNN when all of its files stand; .step_NNNNNNNN.tmp is being written, or was left by a
killed save; damaged_step_NNNNNNNN did not match its checksums when a run resumed, and stays until the next save; what
begins with .removed_ is being deleted; the link `last` names the newest complete one.
"""

import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from halfbyte.training import integrity
from halfbyte.training.config_launch import Checkpoint

LAST = "last"
REMOVED = ".removed_"


def folder_name(step: int) -> str:
    """Folder of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """Optimizer steps after which a checkpoint was saved."""
    return int(folder.name.removeprefix("step_"))


def on_disk(checkpoints: Path) -> list[Path]:
    """All complete checkpoints, oldest first."""
    return sorted(path for path in checkpoints.glob("step_*") if path.is_dir())


def latest(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint, or None.

    It is the one that the link `last` names. Where that was removed, it is the newest one that is left.
    """
    link = checkpoints / LAST
    if link.exists():
        return link.resolve()
    left = on_disk(checkpoints)
    return left[-1].resolve() if left else None


def repair_link(checkpoints: Path) -> Path | None:
    """Point `last` at the newest complete checkpoint, which it does not after its target went; rank 0 only.

    Returns:
        That checkpoint, or None.
    """
    newest = latest(checkpoints)
    if newest is not None and not (checkpoints / LAST).exists():
        point(newest)
    return newest


def point(path: Path) -> None:
    """Let `last` name this checkpoint."""
    link = path.with_name(f".{LAST}.tmp")
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    link.replace(path.with_name(LAST))


def set_aside(path: Path) -> Path:
    """Take a damaged checkpoint out of the row; rank 0 only.

    Returns:
        Where it is now.
    """
    aside = path.with_name(f"damaged_{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)


def mean_loss(step: int, losses: Sequence[float], every: int) -> float:
    """What `keep_best` compares: the mean training loss of the `every` steps before a checkpoint (0: of all steps)."""
    since = losses[max(0, step - every) if every else 0 : step]
    return sum(since) / len(since) if since else float("inf")


def prune(checkpoints: Path, keep: Checkpoint, losses: Sequence[float]) -> list[Path]:
    """Take out of the row what need not stay, and what killed saves and damaged checkpoints left; rank 0 only.

    To be called when a checkpoint is complete and before the next one is begun. Only checkpoints whose files all have
    their sizes count, so that the only good one is never lost.

    Args:
        checkpoints: The folder of checkpoints.
        keep: How many of the newest and of the best stay.
        losses: Training loss of every step so far.

    Returns:
        Folders for `delete`, which takes as long as they are large: they have new names, so that nothing meets them.
    """
    whole = [path for path in on_disk(checkpoints) if integrity.complete(path)]
    if not whole:
        return []
    ranked = sorted(whole, key=lambda path: mean_loss(step_of(path), losses, keep.every_steps))
    stay = {*whole[-keep.keep :], *ranked[: keep.keep_best]}
    left = [path for pattern in (".step_*.tmp", "damaged_step_*") for path in checkpoints.glob(pattern)]
    for path in [*(path for path in on_disk(checkpoints) if path not in stay), *left]:
        with suppress(OSError):
            path.rename(checkpoints / f"{REMOVED}{path.name}.{time.time_ns()}")
    return sorted(checkpoints.glob(f"{REMOVED}*"))  # also those of a start that was killed while it deleted


def delete(folders: Sequence[Path]) -> None:
    """Free the space that `prune` found; what cannot be deleted is left to the next one."""
    for path in folders:
        shutil.rmtree(path, ignore_errors=True)
