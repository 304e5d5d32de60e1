"""A model's config.json, read in one place. Torch-free."""

import json
from pathlib import Path
from typing import Any

from halfbyte.training.errors import RecipeError


def read_config(path: Path) -> dict[str, Any]:
    """Read a Hugging Face config.json.

    Args:
        path: The file.

    Returns:
        Its content, unchecked beyond being an object.

    Raises:
        RecipeError: it cannot be read, or is not a JSON object; one line.
    """
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise RecipeError([f"{path}: cannot be read ({error.strerror}); give a Hugging Face directory"]) from error
    except (ValueError, RecursionError) as error:
        raise RecipeError([f"{path}: not valid JSON ({error}); copy the model's config.json again"]) from error
    if not isinstance(config, dict):
        raise RecipeError([f"{path}: not a JSON object; copy the model's config.json again"])
    return config
