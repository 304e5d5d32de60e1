"""A folder that appears whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from halfbyte.training.errors import UserError


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Give an empty folder beside `out` that takes its place when the block ends well, and vanishes otherwise."""
    try:
        yield begin(out)
        finish(out)
    except BaseException:  # Ctrl-C included
        abandon(out)
        raise


def begin(out: Path) -> Path:
    """Make the empty folder beside `out` that `finish` puts in its place. One writer at a time.

    What a killed writer left is cleared, and what stood at `out` before it is put back.

    Raises:
        UserError: it cannot be made.
    """
    partial, previous = _beside(out)
    with disk_errors(out):
        _put_back(previous, out)
        shutil.rmtree(previous, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    return partial


def finish(out: Path) -> None:
    """Flush the new folder and put it in the place of what stands at `out`.

    Two renames, because a rename cannot replace a folder that holds files. Killed between them, the old folder stands
    as .<name>.previous and the next call of `begin` puts it back.
    """
    partial, previous = _beside(out)
    for path in partial.iterdir():
        flush(path)
    flush(partial)
    _swap(partial, previous, out)
    shutil.rmtree(previous, ignore_errors=True)


def abandon(out: Path) -> None:
    """Remove the new folder; what stood at `out` stands there."""
    partial, previous = _beside(out)
    shutil.rmtree(partial, ignore_errors=True)
    _put_back(previous, out)


def _beside(out: Path) -> tuple[Path, Path]:
    return out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.previous")


def move(source: Path, out: Path) -> None:
    """Rename a complete folder to `out`, in the place of what stands there; on one file system.

    Killed at any point, either the old folder or the new one is at `out` once this is called again.

    Raises:
        UserError: it cannot be renamed.
    """
    previous = out.with_name(f".{out.name}.previous")
    with disk_errors(out):
        _put_back(previous, out)
        shutil.rmtree(previous, ignore_errors=True)
        try:
            _swap(source, previous, out)
        except BaseException:
            _put_back(previous, out)
            raise
    shutil.rmtree(previous, ignore_errors=True)


def _swap(source: Path, previous: Path, out: Path) -> None:
    if out.exists():
        out.rename(previous)
    source.rename(out)
    flush(out.parent)


def _put_back(previous: Path, out: Path) -> None:
    if previous.exists() and not out.exists():
        previous.rename(out)


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn failures of the file system (disk full, no permission) inside the block into one line.

    Raises:
        UserError: Instead of OSError and SafetensorError.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        parent = next(folder for folder in out.absolute().parents if folder.exists())
        free = shutil.disk_usage(parent).free / 1e9
        raise UserError(f"{out}: export failed: {error} ({free:.1f} GB free); what stood there is unchanged") from error


def flush(path: Path) -> None:
    """Fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_plain_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file of a folder that is not at its place yet, as Hugging Face writes them.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    path.write_text(json.dumps(content, indent=2) + "\n")
