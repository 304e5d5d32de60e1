"""Reading a .nemo archive from anybody: an uncompressed tar, every header checked before anything is taken out of it.

The layout is that of NeMo's save/restore connector (files at the top level, `model_config.yaml` among them), with one
difference: the weights are safetensors, where the connector writes a pickle. Nothing here opens a pickle; an archive
that holds one is refused. Torch-free.
"""

import hashlib
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from halfbyte.training.errors import UserError

SUFFIX = ".nemo"
CONFIG = "model_config.yaml"
REQUIRED = (CONFIG, "config.json", "quantizers.json", "quantizers.safetensors", "halfbyte.json")
"""What an archive holds beside weights and tokenizer."""
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle", ".distcp", ".metadata")
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][\w.+-]*", re.ASCII)
MOST_HEADER_BYTES = 16_000_000
"""Of all headers together, 512 bytes each: far beyond any archive. tarfile reads an extended header as a whole, and its
length is whatever the archive claims."""
MOST_TEXT_BYTES = 16_000_000
"""Of a JSON file that is read into memory."""
PIECE = 1 << 22
"""Bytes that are copied at a time."""


class _Headers:
    """The part of a file that tarfile needs to walk from header to header, with an end to what it may read."""

    def __init__(self, file: IO[bytes]):
        self._file, self._left = file, MOST_HEADER_BYTES
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        self._left -= size
        if size < 0 or self._left < 0:
            raise tarfile.ReadError("its headers claim more bytes than any archive needs")
        return self._file.read(size)


def is_archive(path: Path) -> bool:
    """Whether a model path is a .nemo file rather than a directory."""
    return path.suffix == SUFFIX and path.is_file()


def members(archive: Path) -> dict[str, tarfile.TarInfo]:
    """The files of an archive by name, in its order; no content is read.

    Args:
        archive: The .nemo file.

    Raises:
        UserError: it is no uncompressed tar, is truncated, lacks a file of REQUIRED, or holds a pickle, a name twice,
            or anything but plain files at its top level; one line.
    """
    found: dict[str, tarfile.TarInfo] = {}
    size = _size(archive)
    try:
        with archive.open("rb") as file, tarfile.open(fileobj=_Headers(file), mode="r:") as tar:  # type: ignore[arg-type] - what tarfile needs of a file
            for member in tar:
                name = member.name.removeprefix("./")
                if name == "." and member.isdir():
                    continue  # how NeMo's connector begins
                reason = _wrong(member, name, size) or ("is there twice" if name in found else None)
                if reason:
                    raise UserError(f"{archive}: {name!r} in it {reason}; do not use this archive")
                found[name] = member
    except OSError as error:
        raise UserError(f"{archive}: cannot be read ({error.strerror}); make it readable") from error
    except (tarfile.TarError, ValueError, IndexError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{archive}: not an uncompressed tar archive, or a damaged one ({error}); get it again"
        ) from error
    missing = [name for name in REQUIRED if name not in found]
    if missing:
        remedy = "only archives that `halfbyte export RUN_DIR --format nemo` has written can be read"
        raise UserError(f"{archive}: lacks {', '.join(missing)}; {remedy}")
    return found


def _size(archive: Path) -> int:
    try:
        return archive.stat().st_size
    except OSError as error:
        raise UserError(f"{archive}: cannot be read ({error.strerror}); give a .nemo file") from error


def _wrong(member: tarfile.TarInfo, name: str, archive_bytes: int) -> str | None:
    """Why a member must not be used; None where it may be."""
    if name.endswith(PICKLES):
        return "is a pickle, which runs what its maker wants when it is opened; weights have to be safetensors"
    if member.size < 0 or member.offset_data + member.size > archive_bytes:
        return f"claims {member.size:,} bytes, more than the file has"
    try:
        tarfile.data_filter(member, "/nowhere")
    except tarfile.FilterError as error:
        return f"is not safe to take out ({type(error).__name__})"
    if not member.isreg() or member.issparse():
        return "is not a plain file"
    if not PLAIN_NAME.fullmatch(name):
        return "is not a plain file name at the top level"
    return None


def read(archive: Path, name: str) -> bytes:
    """A small file of an archive, such as config.json.

    Raises:
        UserError: as `members`, or there is no such file or it is too large.
    """
    member = members(archive).get(name)
    if member is None:
        raise UserError(f"{archive}: holds no {name}; get it again")
    if member.size > MOST_TEXT_BYTES:
        raise UserError(f"{archive}: {name!r} in it has {member.size:,} bytes, and a text is expected; get it again")
    return b"".join(_content(archive, member))


def unpack(archive: Path, folder: Path) -> None:
    """Copy every file of an archive into an empty folder.

    Raises:
        UserError: as `members`.
        OSError: the disk is full or the folder cannot be written.
    """
    for name, member in members(archive).items():
        with (folder / name).open("xb") as out:
            for piece in _content(archive, member):
                out.write(piece)


def digests(archive: Path) -> dict[str, str]:
    """SHA-256 of every file of an archive, by name.

    Raises:
        UserError: as `members`.
    """
    found = {}
    for name, member in members(archive).items():
        digest = hashlib.sha256()
        for piece in _content(archive, member):
            digest.update(piece)
        found[name] = digest.hexdigest()
    return found


def _content(archive: Path, member: tarfile.TarInfo) -> Iterator[bytes]:
    """A plain file's bytes, which lie in one piece: tarfile's own reading could follow what a header claims."""
    with archive.open("rb") as file:
        file.seek(member.offset_data)
        left = member.size
        while left:
            piece = file.read(min(left, PIECE))
            if not piece:
                raise UserError(f"{archive}: ended while it was read; get it again")
            left -= len(piece)
            yield piece
