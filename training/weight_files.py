"""Whether the weight files of a model directory fit the model: headers and index only, no tensor is read."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from halfbyte.training.errors import UserError
from halfbyte.training.hf_map import expected_shapes
from halfbyte.training.model_source import is_quantized
from halfbyte.training.shape import ModelShape


def check_weights(model_dir: Path, shape: ModelShape) -> None:
    """Compare the files' headers with the shapes that the model needs; no tensor is read.

    Raises:
        UserError: quantized weights, no weight file, a corrupt one, a missing tensor or another shape (a vocabulary
            that does not fit shows here).
    """
    if is_quantized(model_dir):
        raise UserError(
            f"model.path = {model_dir}: is quantized, and this command needs plain weights; convert it with "
            "halfbyte export DIR --format dequantized --to DIR"
        )
    found: dict[str, tuple[int, ...]] = {}
    held_by: dict[str, str] = {}
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise UserError(f"model.path = {model_dir}: no *.safetensors file there; download or convert the weights")
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
                held_by |= dict.fromkeys(tensors.keys(), file.name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: corrupt weight file ({error}); copy it again") from error
    _check_index(model_dir / "model.safetensors.index.json", held_by)
    for name, size in expected_shapes(shape).items():
        if name not in found:
            raise UserError(f"model.path = {model_dir}: tensor {name} is missing; the checkpoint is incomplete")
        if found[name] != size:
            raise UserError(
                f"model.path = {model_dir}: {name} has shape {list(found[name])}, config.json asks for {list(size)}; "
                "weights and config.json (vocabulary, sizes) do not belong together"
            )


def _check_index(path: Path, held_by: dict[str, str]) -> None:
    """The importer opens the files that the index names: they must be this directory's, and hold the tensors."""
    if not path.exists():
        return
    try:
        places = json.loads(path.read_bytes())["weight_map"].items()
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}); copy it again") from error
    for name, file in places:
        if held_by.get(name) != file:
            raise UserError(f"{path}: {name} should be in {file!r}, and is not; copy index and files again")
