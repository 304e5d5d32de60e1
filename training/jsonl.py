"""JSON Lines, plain or gzipped, one record at a time, with errors that name the file and the line."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from halfbyte.training.errors import UserError


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Stream the records of a `.jsonl` or `.jsonl.gz` file; blank lines are passed over.

    Args:
        path: The file; it is decompressed when its name ends in `.gz`.

    Yields:
        (line number counted from 1, record).

    Raises:
        UserError: the file cannot be opened, is not gzip where its name says so, is cut short, is not UTF-8, holds a
            line that is not a JSON object, or holds no record at all.
    """
    path = Path(path)
    line = records = 0
    try:
        with cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb") as file:
            for line, raw in enumerate(file, start=1):
                if raw.strip():
                    records += 1
                    yield line, _record(f"{path}:{line}", raw)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: not a complete gzip file (after line {line}: {error}); compress it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path in the recipe") from error
    if not records:
        raise UserError(f"{path}: holds no records; write one JSON object per line")


def field(record: dict[str, Any], key: str, where: str) -> Any:
    """The value at a dotted path, e.g. `request.context`.

    Args:
        record: One parsed line.
        key: Names of nested keys joined by dots. A key that itself contains the whole dotted name wins.
        where: `file:line` for the error.

    Raises:
        UserError: a part of the path is missing; the line names the keys that are there.
    """
    if key in record:
        return record[key]
    value: Any = record
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            present = ", ".join(value) if isinstance(value, dict) else f"a {type(value).__name__}"
            raise UserError(f"{where}: no key {key!r} (no {part!r} among: {present}); set the key in the recipe")
        value = value[part]
    return value


def text_field(record: dict[str, Any], key: str, where: str) -> str:
    """As `field`, for a value that must be a string.

    Raises:
        UserError: the path is missing, or its value is no string or not Unicode text.
    """
    value = field(record, key, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} is a {type(value).__name__}, not a string; fix the line or the key")
    try:
        value.encode()  # a JSON escape can spell half of a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {key!r} holds half a surrogate pair at character {error.start}; fix it") from error
    return value


def _record(where: str, raw: bytes) -> dict[str, Any]:
    try:
        record = json.loads(raw)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg} at column {error.colno}); fix or drop it") from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise UserError(f"{where}: not JSON that can be read ({error}); fix or drop it") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: a JSON {type(record).__name__}, not an object; write one {{...}} per line")
    return record


def read_scores(path: Path) -> list[dict[str, Any]]:
    """The lines of `scoring.write_scores`, as dicts with the fields of Score.

    Raises:
        UserError: the file is missing, damaged or empty.
    """
    if not path.exists():
        raise UserError(f"{path}: not there; run the evaluation first (halfbyte evaluate RUN_DIR)")
    return [record for _, record in read_jsonl(path)]
