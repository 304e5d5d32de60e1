"""JSON files of the run folder: complete or absent, never half."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from halfbyte.training.errors import UserError

AGAIN = "delete it and run the stage again"


def at_home(path: str) -> Path:
    """A path as a user gives it: `~` or `~user` at its start is that home folder, where there is such a user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def write_json(path: Path, content: Any) -> None:
    """Write through a sibling file and a rename, so that a reader or a killed run never sees half a file.

    Raises:
        UserError: the disk is full or the folder is not writable.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); free space or choose another run.dir"
        ) from error


def replace_file(path: Path, content: bytes) -> None:
    """Write a file that a reader sees whole or as it was before.

    Raises:
        OSError: the disk is full or the folder is not writable.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of the run folder; all of them hold an object.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path}: not there; the stage that writes it has not run (halfbyte run resumes)") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); make it readable or delete it") from error
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); {AGAIN}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: damaged (a JSON {type(content).__name__}, not an object); {AGAIN}")
    return content


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """Around code that takes a file's content apart: what is not as it was written makes one line.

    Raises:
        UserError: Instead of KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError and what
            arithmetic raises.
    """
    try:
        yield
    except KeyError as error:
        raise UserError(f"{path}: damaged (no {error}); {AGAIN}") from error
    except (IndexError, TypeError, AttributeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"{path}: damaged ({(str(error).splitlines() or ['?'])[0]}); {AGAIN}") from error
