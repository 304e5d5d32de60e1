"""What an export has from its source model, and must have as it is there: it decides what a server computes and says.

The weights cannot tell another rope base, norm epsilon or chat template. Shares no code with what copied the files.
"""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from halfbyte.export.reader import open_checkpoint
from halfbyte.export.record import CARD, RECORD
from halfbyte.training.errors import UserError
from halfbyte.training.model_config import read_config

WRITTEN_KEYS = {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
"""Keys of config.json that an export writes itself, beside quantization_config and older names of rotary settings."""
WRITTEN = (RECORD, CARD, "config.json", "hf_quant_config.json", "model*.safetensors", "model.safetensors.index.json")
"""Files that an export writes itself."""
MAY_BE_WRITTEN = "generation_config.json"
"""Copied, or written where the source has none."""


def broken_copies(out: Path, model_dir: Path) -> list[str]:
    """Differences between an export and the source model, a line each.

    Args:
        out: The exported directory.
        model_dir: The model that the run started from.

    Raises:
        UserError: the source's config.json is missing or damaged.
    """
    source = read_config(model_dir / "config.json")
    try:
        config = open_checkpoint(out).config
    except UserError:
        return []  # verify has said so
    expected = source | WRITTEN_KEYS | _older_rope(source.get("rope_parameters"))
    names = sorted((expected.keys() | config.keys()) - {"quantization_config"})
    problems = [
        f"{out / 'config.json'}: {name} = {config.get(name)!r}, and should be {expected.get(name)!r} as at {model_dir}"
        for name in names
        if name not in config or name not in expected or config[name] != expected[name]
    ]
    for path in sorted(out.iterdir()):
        if not any(fnmatchcase(path.name, pattern) for pattern in WRITTEN):
            problems += _unlike(path, model_dir / path.name)
    return problems


def _older_rope(newer: Any) -> dict[str, Any]:
    """Rotary settings under the names that transformers 4 reads, where the source has those of transformers 5."""
    if not isinstance(newer, dict):
        return {}
    older = dict(newer)
    older.pop("partial_rotary_factor", None)
    base = {"rope_theta": older.pop("rope_theta")} if "rope_theta" in older else {}
    return base | {"rope_scaling": older if "llama3" in (older.get("rope_type"), older.get("type")) else None}


def _unlike(path: Path, original: Path) -> list[str]:
    if not original.is_file():
        return [] if path.name == MAY_BE_WRITTEN else [f"{path}: belongs to no export, and {original} is not there"]
    same = path.is_file() and path.read_bytes() == original.read_bytes()
    return [] if same else [f"{path}: is not what {original} is"]
