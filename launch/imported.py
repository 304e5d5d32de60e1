"""model.path brings formats: a quantized directory or a .nemo archive, which also brings the run weights and scales."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from halfbyte.export.reader import Checkpoint, open_checkpoint
from halfbyte.training.choices import Activations
from halfbyte.training.config import Method, Quantize, Recipe, Smoothing, Weights
from halfbyte.training.errors import RecipeError, UserError
from halfbyte.training.files import write_json
from halfbyte.training.model_source import UNPACKED, brings_formats, has_quantizers, is_quantized
from halfbyte.training.nemo_archive import is_archive, read
from halfbyte.training.nemo_archive import unpack as unpack_into
from halfbyte.training.rules import missing_weights, problems
from halfbyte.training.shape import ModelShape, read_shape

DEFAULT = Quantize()
CONVERT = "convert it (halfbyte export DIR --format dequantized --to DIR) first"


def adopt(recipe: Recipe) -> Recipe:
    """Set the section `quantize` as the files at model.path say, if they are quantized or bring quantizers.

    Args:
        recipe: A resolved recipe; changed in place.

    Returns:
        The recipe.

    Raises:
        RecipeError: a key of the recipe says otherwise than the files, or cannot be kept with them.
        UserError: the files are damaged.
    """
    path = Path(recipe.model.path)
    if not brings_formats(path):
        return recipe
    from halfbyte.export import imported, quantizer_state

    shape, found = read_shape(path / "config.json"), []
    if has_quantizers(path):
        state = quantizer_state.read_state(path)
        where, decided = f"model.path = {path} has quantizers", quantizer_state.plan_of(path, state, shape)
        if state.learned and recipe.method in (Method.qat, Method.qad) and not recipe.train.block_scale_lr_mult:
            found.append(f"train.block_scale_lr_mult = 0: {where} with learned block scales; give a factor to go on")
    else:
        where, decided = f"model.path = {path} is quantized", imported.plan_of(source(recipe), shape)
    found += [
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
        found.append(f"method = bf16: {where}; {'take the BF16 model' if has_quantizers(path) else CONVERT}")
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


def unpack(recipe: Recipe) -> Recipe:
    """Unpack model.path into the run folder where it is a .nemo archive, once, and set it to the directory.

    Processes that a launcher has started may all call this: one unpacks, the others wait.

    Args:
        recipe: A resolved recipe, its formats adopted; changed in place.

    Returns:
        The recipe.

    Raises:
        UserError: the archive is damaged or not safe, or the disk is full.
    """
    archive = Path(recipe.model.path)
    if not is_archive(archive):
        return recipe
    from halfbyte.export.folder import disk_errors, replacing
    from halfbyte.export.record import RECORD, broken_hashes

    out = Path(recipe.run.dir).absolute() / UNPACKED / archive.stem
    record = read(archive, RECORD)
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with (out.parent / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (out / RECORD).is_file() or (out / RECORD).read_bytes() != record:
                with replacing(out) as partial:
                    unpack_into(archive, partial)
                    broken = broken_hashes(partial)
                    if broken:
                        raise UserError(f"{archive}: {broken[0].replace(f'{partial}/', '')}; get the archive again")
    recipe.model.path = str(out)
    missing = missing_weights(recipe)
    if missing:
        raise UserError(f"{archive}: lacks {', '.join(missing)}; get the archive again")
    return recipe


def start_from(recipe: Recipe, gpt: Any, shape: ModelShape, runtime: Any, report: Path) -> None:
    """Put the weights at model.path into the model and their scales into quantize.json, unless that is there.

    Args:
        recipe: The recipe; model.path is quantized, or an unpacked .nemo archive.
        gpt: This rank's model, without quantizers; changed in place.
        shape: The model's sizes.
        runtime: This process (runtime.Runtime).
        report: Path of quantize.json.

    Raises:
        UserError: damaged files, or scales that no calibration leads to.
    """
    from halfbyte.export import imported, quantizer_state
    from halfbyte.training import lsq
    from halfbyte.training.model import import_hf
    from halfbyte.training.runtime import on_first_rank

    folder = Path(recipe.model.path)
    state = quantizer_state.read_state(folder) if has_quantizers(folder) else None
    if recipe.model.reference is not None:
        with plain_weights(folder, recipe, runtime) as plain:
            import_hf(gpt, plain, shape, runtime)
    if state is not None and state.learned:
        lsq.restore(gpt, recipe, quantizer_state.learned_scales(folder, state, shape))

    def write() -> None:
        if report.exists():
            return
        if state is None:
            write_json(report, imported.calibration(source(recipe), shape, recipe.quantize))
        else:
            write_json(report, quantizer_state.calibration(folder, state, shape))

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
