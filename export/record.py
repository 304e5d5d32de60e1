"""halfbyte.json: where the files of an export come from, their hashes, and what the gate said."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from halfbyte.export.folder import disk_errors, write_plain_json
from halfbyte.training.config import Format, Recipe
from halfbyte.training.files import damage, read_json, write_json
from halfbyte.training.formats import SPECS

RECORD = "halfbyte.json"
CARD = "README.md"


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 of the resolved recipe as JSON with sorted keys, but for quantize.layers, whose order decides."""
    content = asdict(recipe)
    content["quantize"]["layers"] = list(content["quantize"]["layers"].items())
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """What halfbyte.json says of a file: its SHA-256 and its bytes."""
    return {"sha256": file_hash(path), "bytes": path.stat().st_size}


def write_record(
    folder: Path,
    recipe: Recipe,
    formats: dict[str, Format],
    checkpoint: str,
    versions: dict[str, str],
    hashed: Mapping[str, dict[str, Any]],
) -> None:
    """halfbyte.json: where the files come from, and their hashes. No gate has judged them yet.

    Args:
        folder: The directory.
        recipe: The recipe of the run.
        formats: Quantized module -> format.
        checkpoint: Name of the training checkpoint.
        versions: Package -> version.
        hashed: File -> its entry (file_entry), of those that need not be read for it.
    """
    files = {path.name: hashed.get(path.name) or file_entry(path) for path in sorted(folder.iterdir())}
    distinct = sorted(set(formats.values()))
    two_level = any(SPECS[number_format].two_level for number_format in distinct)
    record = {
        "method": recipe.method.value,
        "format": "+".join(distinct) or "bf16",
        "scale_2": recipe.quantize.scale_2.value if two_level else None,
        "kv_cache": recipe.quantize.kv_cache.value if formats else "none",
        "gate": None,
        "checkpoint": checkpoint,
        "recipe_sha256": recipe_hash(recipe),
        "recipe": asdict(recipe),
        "versions": versions,
        "files": files,
    }
    write_plain_json(folder / RECORD, record)


def record_verdict(out: Path, verdict: dict[str, Any] | None, card: str | None = None) -> None:
    """Write the gate's verdict into the halfbyte.json of a finished export, at once or not at all.

    Args:
        out: The exported directory.
        verdict: Content of gate.json; None takes one back.
        card: Text of the model card that goes with it; None removes one.

    Raises:
        UserError: halfbyte.json is missing, damaged or cannot be written.
    """
    record, path = read_json(out / RECORD), out / CARD
    with damage(out / RECORD):
        files = {name: entry for name, entry in record["files"].items() if name != CARD}
    with disk_errors(out):
        path.unlink(missing_ok=True)
        if card is not None:
            path.write_text(card)
            files[CARD] = file_entry(path)
    write_json(out / RECORD, record | {"gate": verdict, "files": files})


def altered_file(path: Path, sha256: str | None) -> list[str]:
    """A line if a file is not the one with this SHA-256: halfbyte.json, by which others are judged, or an archive."""
    return [] if path.is_file() and file_hash(path) == sha256 else [_changed(path)]


def _changed(path: Path) -> str:
    return f"{path} changed after the export (SHA-256 differs)"


def broken_hashes(out: Path, *, rank: int = 0, size: int = 1) -> list[str]:
    """Files of a directory that are not as they were written, by the list in halfbyte.json; a line each.

    Args:
        out: The directory.
        rank: Which share of the files to read; the first also compares the list with what is there.
        size: Of how many.
    """
    try:
        listed = json.loads((out / RECORD).read_bytes())["files"]
        hashes = {name: entry["sha256"] for name, entry in listed.items()}
        sizes = {name: entry["bytes"] for name, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        line = f"{out / RECORD} is missing or damaged ({error!r}): the files cannot be told from altered ones"
        return [line] if rank == 0 else []
    present = {path.name for path in out.iterdir()} - {RECORD}
    problems: list[str] = []
    if rank == 0:
        problems += [f"{out / name} is listed in {RECORD} but missing" for name in sorted(hashes.keys() - present)]
        problems += [f"{out / name} is not listed in {RECORD}" for name in sorted(present - hashes.keys())]
    both = sorted(present & hashes.keys())[rank::size]
    changed = [name for name in both if not _unchanged(out / name, sizes[name], hashes[name])]
    return problems + [_changed(out / name) for name in changed]


def _unchanged(path: Path, size: int, sha256: str) -> bool:
    """Whether a file is as it was; the size is quick. One that cannot be read, or is none, is not."""
    try:
        return path.is_file() and path.stat().st_size == size and file_hash(path) == sha256
    except OSError:
        return False
