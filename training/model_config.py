"""A model's config.json, read in one place. Torch-free."""

import json
from pathlib import Path
from typing import Any

from halfbyte.training.errors import RecipeError, UserError
from halfbyte.training.nemo_archive import is_archive, read


def read_config(path: Path) -> dict[str, Any]:
    """Read a Hugging Face config.json.

    Args:
        path: The file, in a model directory or in a .nemo archive (model.nemo/config.json).

    Returns:
        Its content, unchecked beyond being an object.

    Raises:
        RecipeError: it cannot be read, or is not a JSON object; one line.
    """
    try:
        config = json.loads(_content(path))
    except UserError as error:
        raise RecipeError([str(error)]) from error
    except OSError as error:
        raise RecipeError([f"{path}: cannot be read ({error.strerror}); give a Hugging Face directory"]) from error
    except (ValueError, RecursionError) as error:
        raise RecipeError([f"{path}: not valid JSON ({error}); copy the model's config.json again"]) from error
    if not isinstance(config, dict):
        raise RecipeError([f"{path}: not a JSON object; copy the model's config.json again"])
    return config


def _content(path: Path) -> bytes:
    return read(path.parent, path.name) if is_archive(path.parent) else path.read_bytes()
