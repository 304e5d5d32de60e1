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


def in_both_spellings(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The content of a config.json, so that transformers 4 and 5 read the same model from it.

    transformers 5 keeps rotary settings in `rope_parameters`. 4.57, which TensorRT-LLM 1.2.1 pins, looks for
    `rope_theta` and `rope_scaling` instead, and takes a base of 10,000 where it finds none, without a word.

    Args:
        config: A config.json that read_shape accepts; files that transformers 4 wrote are read by both as they are.
        dtype: Type of the weights in the files: `dtype` for transformers 5, `torch_dtype` for 4 and the servers.
    """
    rope, older = config.get("rope_parameters"), {}
    if isinstance(rope, dict):
        older = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
        scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
        plain = scaling.get("rope_type", scaling.get("type", "default")) == "default"
        older["rope_scaling"] = None if plain else scaling
    return config | older | {"dtype": dtype, "torch_dtype": dtype}


def _content(path: Path) -> bytes:
    return read(path.parent, path.name) if is_archive(path.parent) else path.read_bytes()
