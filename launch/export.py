"""`halfbyte export RUN --format FORMAT`, and the further layouts (`export.also`) of a released checkpoint."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from halfbyte.export import nemo
from halfbyte.export.convert import convert, origin
from halfbyte.export.record import RECORD, altered_file, broken_hashes, file_hash
from halfbyte.launch import handover, report
from halfbyte.launch.console import Console
from halfbyte.launch.start import RESOLVED
from halfbyte.launch.verify_report import settle
from halfbyte.training.choices import Container
from halfbyte.training.config import Method, Recipe
from halfbyte.training.errors import USAGE, UserError
from halfbyte.training.files import damage, read_json
from halfbyte.training.nemo_archive import SUFFIX, is_archive, read
from halfbyte.training.resolve import of_run


def export_as(source: Path, container: str, to: Path | None, ranks: int | None, *, allow_failed_gate: bool) -> Path:
    """Convert the checkpoint of a finished run, or a quantized Hugging Face directory.

    Where this puts right what verify.json held against the run's own conversion, the report is written again.

    Args:
        source: A run folder, or the directory of a quantized checkpoint.
        container: A name of Container; nemo needs the run folder, where the training checkpoint is.
        to: Destination; none means the place of the run folder, and a directory without a run needs one.
        ranks: Tensor-parallel size of the engine; none means export.tensor_parallel of the run's recipe, or 1.
        allow_failed_gate: Convert a checkpoint that the gate did not release.

    Returns:
        Where the conversion stands.

    Raises:
        UserError: no such format or folder, nothing was exported or released there, or the conversion failed.
    """
    if container not in list(Container):
        raise UserError(f"--format {container}: no such format; use one of {', '.join(Container)}", USAGE)
    if ranks is not None and ranks < 1:
        raise UserError(f"--tp {ranks}: not a number of GPUs; give 1 or more", USAGE)
    recipe = of_run(source / RESOLVED) if (source / RESOLVED).is_file() else None
    if recipe is None and not (source / "config.json").is_file():
        raise UserError(f"{source}: neither a run folder nor a checkpoint; give one of them", USAGE)
    if recipe is None and to is None:
        raise UserError(f"{source}: no run folder, so name a destination with --to DIR", USAGE)
    kind = Container(container)
    if kind is Container.nemo and recipe is None:
        raise UserError(f"--format nemo: {source} is no run folder, which has the trained weights; give it", USAGE)
    if kind is Container.nemo and to is not None and to.suffix != SUFFIX:
        raise UserError(f"--to {to}: the archive is one file; end its name with {SUFFIX}", USAGE)
    checkpoint = source if recipe is None else serving_checkpoint(recipe, source, allow_failed_gate=allow_failed_gate)
    size = ranks or (recipe.export.tensor_parallel if recipe is not None else 1)
    out = to or place(source, kind)
    if kind is Container.nemo:
        assert recipe is not None
        _archive(recipe, source, checkpoint, out, Console(True))
    else:
        _convert(checkpoint, kind, out, size, Console(True))
    if recipe is not None and out == place(source, kind):
        _note(source, kind)
        if settle(source, partial(altered, source)):
            with Console(True).stage("report") as notes:
                notes.append(report.summary(report.write(recipe, source, to_wandb=False)))
    return out


def serving_checkpoint(recipe: Recipe, folder: Path, *, allow_failed_gate: bool) -> Path:
    """The exported directory of a finished run.

    Raises:
        UserError: nothing was exported, or the gate has not released it.
    """
    if recipe.method == Method.bf16:
        raise UserError(f"{folder}: method = bf16 quantizes nothing; serve {handover.released(folder)} as it is")
    if (handover.released(folder) / "config.json").exists():
        return handover.released(folder)
    out = handover.exported(folder)
    if out is None:
        raise UserError(f"{folder}: holds no exported checkpoint; export it first (halfbyte export {folder})")
    if not allow_failed_gate:
        raise UserError(f"{out}: the gate has not released it; --allow-failed-gate takes it all the same")
    return out


def altered(folder: Path) -> list[str]:
    """Files of the further layouts of a run that are not as they were made; a line each.

    Raises:
        UserError: export/export.json is damaged.
    """
    return [line for name, sha256 in _known(folder).items() for line in _altered(place(folder, name), sha256)]


def _known(folder: Path) -> dict[Container, str]:
    """The layouts that were made, each with the SHA-256 of its halfbyte.json, or of the archive."""
    with damage(folder / "export" / "export.json"):
        return {Container(name): str(sha256) for name, sha256 in handover.known(folder).get("also", {}).items()}


def _altered(out: Path, sha256: str | None) -> list[str]:
    if out.is_file():
        return altered_file(out, sha256)
    return [*altered_file(out / RECORD, sha256), *broken_hashes(out)] if out.exists() else []


def _note(folder: Path, container: Container) -> None:
    """Remember a layout as it was made: `altered` compares with it."""
    out = place(folder, container)
    handover.remember(folder, also=_known(folder) | {container: file_hash(out if out.is_file() else out / RECORD)})


def place(folder: Path, container: Container) -> Path:
    """Where a run keeps a conversion: a directory, or the .nemo archive."""
    return folder / "export" / (f"model{SUFFIX}" if container is Container.nemo else container.value)


def convert_also(recipe: Recipe, folder: Path, console: Console) -> None:
    """Make the layouts of export.also from the released checkpoint, unless they are there; older conversions go.

    Raises:
        UserError: a conversion failed; the release stands.
    """
    source, ranks = handover.released(folder), recipe.export.tensor_parallel
    for container in Container:
        out = place(folder, container)
        current = origin(source, container, ranks).items() <= _record(out).items()
        current = current and not _altered(out, _known(folder).get(container))
        if container in recipe.export.also and not current:
            if container is Container.nemo:
                _archive(recipe, folder, source, out, console)
            else:
                _convert(source, container, out, ranks, console)
            _note(folder, container)
        elif not current:
            _remove(out)
    settle(folder, partial(altered, folder))


def _record(out: Path) -> dict[str, Any]:
    """halfbyte.json of a conversion; nothing where there is none."""
    if not is_archive(out):
        return read_json(out / RECORD) if (out / RECORD).exists() else {}
    try:
        return json.loads(read(out, RECORD))
    except ValueError as error:
        raise UserError(f"{out}: its {RECORD} is damaged ({error}); delete the archive") from error


def _remove(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    if out.is_file():
        out.unlink()


def withdraw_also(folder: Path) -> None:
    """Remove what was made from an older release: conversions, engine, serving commands."""
    for out in (*(place(folder, container) for container in Container), folder / "export" / "engine"):
        _remove(out)
    for path in (folder / "export").glob("engine.*"):
        path.unlink()
    (folder / "export" / "SERVE.md").unlink(missing_ok=True)


def _convert(source: Path, container: Container, out: Path, ranks: int, console: Console) -> None:
    with console.stage(f"export {container}") as notes:
        made = convert(source, container, out, ranks=ranks)
        notes.append(
            f"{made['tensors']} tensors checked, {made['bytes'] / 1e6:.1f} MB in {made['files']} file(s), {out}"
        )


def _archive(recipe: Recipe, folder: Path, release: Path, out: Path, console: Console) -> None:
    """Write the .nemo archive of the checkpoint that was released."""
    newest, exported = handover.newest_checkpoint(folder).name, read_json(release / RECORD).get("checkpoint")
    if newest != exported:
        raise UserError(f"{release}: was made from {exported}, the newest checkpoint is {newest}; export it first")
    weights = partial(handover.trained_weights, recipe, folder)
    with console.stage("export nemo") as notes:
        made = nemo.write(release, recipe, weights, handover.weight_errors(folder), out)
        notes.append(f"{made['tensors']} tensors checked, {made['bytes'] / 1e6:.1f} MB, {out}")
