"""Which model a path holds: a fingerprint of a small part of its weights, and the record of it in a run folder."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from halfbyte.training.config import Recipe
from halfbyte.training.errors import UserError
from halfbyte.training.files import damage, read_json, write_json
from halfbyte.training.model_source import MODEL_RECORD

WEIGHTS = "weights"
"""Key of a fingerprint: what stands in the safetensors files, however it is divided among them."""
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*")
BESIDE = ("config.json", "generation_config.json", "hf_quant_config.json", "quantizers.json", *TOKENIZER)
"""Files beside the weights that change what a run computes; no model card, nor halfbyte.json, which gets a verdict."""


def fingerprint(folder: Path, beside: Sequence[str] = BESIDE) -> dict[str, str]:
    """What a model directory holds, wherever it lies, as file name or WEIGHTS -> SHA-256.

    Of every tensor count its name, type and shape, and its first, middle and last row (a vector counts in full). So
    another model, a trained layer or a merged adapter shows; a change in other rows of a matrix alone does not.

    Args:
        folder: The directory; one without weight files has no entry WEIGHTS.
        beside: Patterns of the files that count beside the weights.

    Raises:
        UserError: a weight file is damaged.
    """
    tensors = sorted(entry for path in folder.glob("*.safetensors") for entry in _tensors(path))
    return file_hashes(folder, beside) | ({WEIGHTS: _hash("".join(tensors).encode())} if tensors else {})


def file_hashes(folder: Path, patterns: Sequence[str]) -> dict[str, str]:
    """File name -> SHA-256 of the files that one of the patterns fits."""
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {path.name: _hash(path.read_bytes()) for path in sorted(paths)}


def joined(hashes: dict[str, str]) -> str:
    """One SHA-256 of several by name."""
    return _hash("".join(f"{name} {value}\n" for name, value in sorted(hashes.items())).encode())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _tensors(path: Path) -> Iterator[str]:
    """One line for each tensor of a file."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                stored = file.get_slice(name)
                shape: list[int] = stored.get_shape()
                if len(shape) < 2:
                    parts = [file.get_tensor(name)]
                else:
                    rows = sorted({0, shape[0] // 2, shape[0] - 1} & set(range(shape[0])))
                    parts = [stored[row : row + 1] for row in rows]
                digest = hashlib.sha256(f"{name} {stored.get_dtype()} {shape}".encode())
                for part in parts:
                    digest.update(part.contiguous().reshape(-1).view(torch.uint8).numpy())
                yield f"{name} {digest.hexdigest()}\n"
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: corrupt weight file ({error}); copy it again") from error


def begin(recipe: Recipe, run: Path) -> None:
    """Record the models that a run begins with, unless results of an earlier start and their record stand.

    Args:
        recipe: model.path and, where it is given, model.reference.
        run: The run folder.

    Raises:
        UserError: a weight file is damaged, or the folder cannot be written.
    """
    record = run / MODEL_RECORD
    if not (record.exists() and _has_results(run)):
        write_json(record, {key: fingerprint(path) for key, path in _models(recipe).items()})


def check(recipe: Recipe, run: Path) -> None:
    """Refuse to go on from the results of a run that began with another model.

    Weights that are gone are no other weights: what needs them says so.

    Args:
        recipe: model.path and model.reference are looked at.
        run: The run folder; one of an earlier version has no record, and nothing is refused there.

    Raises:
        UserError: a model is another one, or a file is damaged.
    """
    record = run / MODEL_RECORD
    if not (record.exists() and _has_results(run)):
        return
    content = read_json(record)
    for key, path in _models(recipe).items():
        with damage(record):
            before: dict[str, str] = dict(content[key])
        now = fingerprint(path)
        if WEIGHTS not in now:
            before.pop(WEIGHTS, None)
        other = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
        if other:
            raise UserError(
                f"{key} = {path}: not the model that the run at {run} began with (other: {', '.join(other)}); put the "
                "old files back, or choose a new run.dir"
            )


def _models(recipe: Recipe) -> dict[str, Path]:
    paths = {"model.path": recipe.model.path, "model.reference": recipe.model.reference}
    return {key: Path(path) for key, path in paths.items() if path is not None}


def _has_results(run: Path) -> bool:
    """Whether a start of this run has scored or calibrated: before that, a model may still be mended."""
    return (run / "state.json").exists() or (run / "quantize.json").exists()
