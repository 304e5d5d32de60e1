"""JSON files of the run folder: complete or absent, never half."""

import json
import os
from pathlib import Path
from typing import Any

from halfbyte.training.errors import UserError


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


def read_json(path: Path) -> Any:
    """Read a JSON file of the run folder.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path}: not there; the stage that writes it has not run (halfbyte run resumes)") from error
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); delete it and run the stage again") from error
