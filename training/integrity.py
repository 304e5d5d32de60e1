"""Checksums of a checkpoint's files: written last, and compared before anything is taken from the folder. Torch-free.

integrity.json has the form that Megatron's own `verify_integrity` reads ({"algorithm", "files": {name: SHA-256}}), with
the sizes beside it. Megatron has rank 0 read the whole checkpoint a second time; here every rank hashes its own part.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NAME = "integrity.json"
ALGORITHM = "sha256"
THREADS = 4
"""Files that one process hashes at once: hashlib releases the interpreter's lock."""


def written_by(folder: Path, rank: int) -> list[str]:
    """Names of the files that a rank's save wrote: Megatron's __<rank>_<n>.distcp, on rank 0 also what is no shard."""
    names = (path.name for path in folder.iterdir() if path.is_file())
    return sorted(n for n in names if n.startswith(f"__{rank}_") or (rank == 0 and not n.startswith("__")))


def digests(folder: Path, names: Iterable[str]) -> dict[str, tuple[str, int]]:
    """File name -> (SHA-256 in hexadecimal, bytes).

    Raises:
        OSError: a file is missing or cannot be read.
    """

    def digest(name: str) -> tuple[str, int]:
        with (folder / name).open("rb") as file:
            return hashlib.file_digest(file, ALGORITHM).hexdigest(), os.fstat(file.fileno()).st_size

    names = list(names)
    with ThreadPoolExecutor(THREADS) as threads:
        return dict(zip(names, threads.map(digest, names), strict=True))


def write(folder: Path, found: Mapping[str, tuple[str, int]]) -> None:
    """Write integrity.json; a folder without it counts as damaged.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    content = {
        "algorithm": ALGORITHM,
        "files": {name: digest for name, (digest, _) in found.items()},
        "bytes": {name: size for name, (_, size) in found.items()},
    }
    (folder / NAME).write_text(json.dumps(content, indent=1) + "\n")


def damage(folder: Path, *, rank: int = 0, world: int = 1) -> str | None:
    """What is wrong with a checkpoint's files: missing, added, truncated, changed.

    Args:
        folder: The checkpoint.
        rank: Which share of the files to read; names and sizes are compared by all.
        world: Of how many.

    Returns:
        The first problem that this rank finds, or None.
    """
    try:
        recorded, sizes = _recorded(folder)
        problem = _wrong_names(folder, sizes)
        if problem is not None:
            return problem
        for name, (digest, _) in digests(folder, sorted(recorded)[rank::world]).items():
            if digest != recorded[name]:
                return f"{name} is not what was saved (SHA-256)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not as it was written"
        return f"{NAME} or a file that it lists cannot be read ({reason})"
    return None


def damaged_line(path: Path, reason: str) -> str:
    """What to tell the user about a damaged checkpoint that nothing can take the place of."""
    return f"checkpoint {path}: damaged ({reason}); remove it, and halfbyte run goes on from an older one"


def complete(folder: Path) -> bool:
    """Whether all files are there with their sizes; reads none of them."""
    try:
        return _wrong_names(folder, _recorded(folder)[1]) is None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _recorded(folder: Path) -> tuple[dict[str, str], dict[str, int]]:
    content = json.loads((folder / NAME).read_text())
    if content["algorithm"] != ALGORITHM or content["files"].keys() != content["bytes"].keys() or not content["files"]:
        raise ValueError(content["algorithm"])
    return content["files"], content["bytes"]


def _wrong_names(folder: Path, sizes: Mapping[str, int]) -> str | None:
    """Compare names and sizes. A file too many counts: Megatron would read a common.pt that appears."""
    there = {path.name: path.stat().st_size for path in folder.iterdir()}
    del there[NAME]
    for name in sorted(sizes.keys() | there.keys()):
        if name not in there:
            return f"{name} is missing"
        if name not in sizes:
            return f"{name} was not saved with it"
        if there[name] != sizes[name]:
            return f"{name} has {there[name]:,} bytes instead of {sizes[name]:,}"
    return None
