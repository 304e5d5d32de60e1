"""model.path is a quantized directory: the recipe takes its formats from the files, the run its weights and scales."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from halfbyte.export.reader import Checkpoint, open_checkpoint
from halfbyte.training.choices import Activations
from halfbyte.training.config import Method, Quantize, Recipe, Smoothing, Weights
from halfbyte.training.errors import RecipeError
from halfbyte.training.files import write_json
from halfbyte.training.model_source import is_quantized
from halfbyte.training.rules import problems
from halfbyte.training.shape import ModelShape, read_shape

DEFAULT = Quantize()


def adopt(recipe: Recipe) -> Recipe:
    """Set the section `quantize` as the files at model.path say, if they are quantized.

    Args:
        recipe: A resolved recipe; changed in place.

    Returns:
        The recipe.

    Raises:
        RecipeError: a key of the recipe says otherwise than the files, or cannot be kept with them.
        UserError: the files are damaged.
    """
    if not is_quantized(Path(recipe.model.path)):
        return recipe
    from halfbyte.export.imported import plan_of

    where = f"model.path = {recipe.model.path} is quantized"
    decided = plan_of(source(recipe), read_shape(Path(recipe.model.path) / "config.json"))
    found = [
        f"quantize.{key} = {_shown(value)}: {where} with {_shown(decided[key])}; leave the key out"
        for key, value in _given(recipe.quantize).items()
        if key in decided and value != decided[key]
    ]
    found += [
        f"quantize.{key} = {value}: {where}, and its scales take the place of a calibration; leave the key out"
        for key, value in {
            "weights": recipe.quantize.weights is not Weights.round,
            "smoothing": recipe.quantize.smoothing is not Smoothing.none,
            "activations": recipe.quantize.activations is not Activations.max,
        }.items()
        if value
    ]
    if recipe.method is Method.bf16:
        found.append(f"method = bf16: {where}; convert it (halfbyte export DIR --format dequantized --to DIR) first")
    if recipe.method is Method.qad and recipe.model.reference is None and recipe.distill.teacher is None:
        found.append(f"model.reference: {where}, so QAD needs the BF16 model that it was made from; set it")
    if not found:
        for key, value in decided.items():
            setattr(recipe.quantize, key, value)
        found = problems(recipe)
    if found:
        raise RecipeError(found)
    return recipe


@contextmanager
def plain_weights(model_dir: Path, recipe: Recipe, runtime: Any) -> Iterator[Path]:
    """A directory with the model's weights for the importer: itself, or decoded while the block runs; collective.

    Args:
        model_dir: A model directory, quantized or not.
        recipe: The recipe of the run, in whose cache the decoded weights stand.
        runtime: This process (runtime.Runtime).

    Raises:
        UserError: the directory is damaged, or the disk is full.
    """
    if not is_quantized(model_dir):
        yield model_dir
        return
    from halfbyte.export.decode import write_decoded
    from halfbyte.training.runtime import on_first_rank

    decoded = Path(recipe.run.dir) / "cache" / "imported"
    on_first_rank(runtime, lambda: len(write_decoded(model_dir, decoded)))
    yield decoded  # without `finally`: where a rank has failed, the others wait inside other collectives
    on_first_rank(runtime, lambda: shutil.rmtree(decoded, ignore_errors=True))


def start_from(recipe: Recipe, gpt: Any, shape: ModelShape, runtime: Any, report: Path) -> None:
    """Put the quantized directory's weights into the model and its scales into quantize.json, unless that is there.

    Args:
        recipe: The recipe; model.path is quantized.
        gpt: This rank's model, without quantizers; changed in place.
        shape: The model's sizes.
        runtime: This process (runtime.Runtime).
        report: Path of quantize.json.

    Raises:
        UserError: damaged files, or scales that no calibration leads to.
    """
    from halfbyte.export.imported import calibration
    from halfbyte.training.model import import_hf
    from halfbyte.training.runtime import on_first_rank

    if recipe.model.reference is not None:
        with plain_weights(Path(recipe.model.path), recipe, runtime) as folder:
            import_hf(gpt, folder, shape, runtime)

    def write() -> None:
        if not report.exists():
            write_json(report, calibration(source(recipe), shape, recipe.quantize))

    on_first_rank(runtime, write)


def source(recipe: Recipe) -> Checkpoint:
    """The quantized directory at model.path."""
    return open_checkpoint(recipe.model.path)


def _given(quantize: Quantize) -> dict[str, Any]:
    """Keys that differ from the defaults."""
    values = {item.name: getattr(quantize, item.name) for item in fields(quantize)}
    return {key: value for key, value in values.items() if value != getattr(DEFAULT, key)}


def _shown(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list | dict) else str(value)
