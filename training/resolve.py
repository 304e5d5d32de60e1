"""A recipe file and key=value overrides become one checked `Recipe`; every problem is reported at once.

Order of precedence: the dataclass defaults < the recipe's base < the recipe < key=value. merge.py builds the recipe and
checks types, rules.py and model_rules.py check that the values make sense together. Nothing here imports torch.
"""

import importlib.resources
import os
import tempfile
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from halfbyte.training.config import Recipe
from halfbyte.training.errors import RecipeError, UserError
from halfbyte.training.files import at_home
from halfbyte.training.merge import merge
from halfbyte.training.model_source import MODEL_RECORD, UNPACKED
from halfbyte.training.retention import latest, step_of
from halfbyte.training.rules import leaves, problems

MAY_CHANGE = (
    "description",
    "run.dir",
    "run.name",
    "run.project",
    "run.wandb",
    "model.fetch",
    "model.config",
    "parallel.*",
    "train.steps",
    "train.micro_batch",
    "train.recompute",
    "train.cuda_graphs",
    "train.micro_batches_at_once",
    "train.distributed_optimizer",
    "checkpoint.*",
    "evaluate.tokens_per_batch",
    "gate.*",
    "export.*",
    "verify.*",
    "sensitivity.*",
    "generate.*",
    "telemetry.*",
    "launch.*",
)
"""Keys that an existing run may change: they do not touch what was calibrated, trained or scored so far."""

MOVABLE = ("model.path", "model.reference")
"""Keys that may name another place where the run folder knows what stood there: the start compares (model_identity)."""


def resolve(recipe: str, overrides: list[str], *, need_weights: bool = False) -> Recipe:
    """Merge, type-check and reason about a recipe.

    Args:
        recipe: Path of a YAML file, or the name of a shipped recipe (see `shipped`).
        overrides: `key=value` strings with dotted keys; a task is addressed by number or name
            (evaluate.tasks.lambada.limit=100). A YAML file among them is merged in its place: some keys of a recipe,
            such as the sensitivity.yaml of a run folder.
        need_weights: Whether the weights and tokenizer must already be at model.path.

    Returns:
        The complete recipe: interpolations resolved, model and data paths absolute.

    Raises:
        RecipeError: one line per problem, `field = value: what is wrong; remedy`.
    """
    built, merged = merge(find_recipe(recipe), overrides)
    # A rule that names a broken key would reason about a default that nobody asked for.
    rules = problems(built, need_weights=need_weights)
    merged.problems += [line for line in rules if not any(key in line for key in merged.broken)]
    if merged.problems:
        raise RecipeError(merged.problems)
    return built


def load(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe without reasoning about it, e.g. the resolved.yaml of a run folder.

    Args:
        path: YAML file.
        overrides: `key=value` strings.

    Raises:
        RecipeError: the file is missing or not a recipe, one line per problem.
    """
    built, merged = merge(Path(path), overrides or [])
    if merged.problems:
        raise RecipeError(merged.problems)
    return built


def of_run(resolved: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run folder, which may have been moved, and with it what model.path was unpacked into.

    Args:
        resolved: The folder's resolved.yaml.
        overrides: `key=value` strings.

    Raises:
        RecipeError: as `load`.
    """
    folder = resolved.parent
    recipe = load(resolved, [*overrides, f"run.dir={folder}"])
    here, model = folder.absolute() / UNPACKED, Path(recipe.model.path)
    if model.parent.name == UNPACKED and not model.exists() and (here / model.name).is_dir():
        recipe.model.path = str(here / model.name)
    return recipe


def save(recipe: Recipe, path: str | Path) -> None:
    """Write a resolved recipe as plain YAML, complete or not at all.

    Raises:
        UserError: the folder cannot be written.
    """
    path, text = Path(path), OmegaConf.to_yaml(OmegaConf.structured(recipe))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: under srun every process writes this file.
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            file.write(text)
        Path(file.name).chmod(0o644)
        Path(file.name).replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another run.dir") from error


def shipped() -> dict[str, Path]:
    """Name -> path of every recipe that comes with halfbyte, sorted by name."""
    folder = Path(str(importlib.resources.files("halfbyte.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(recipe: str) -> Path:
    """The file that a path or a shipped name stands for.

    Raises:
        RecipeError: neither a file nor a shipped name; the line lists the names.
    """
    path = at_home(recipe)
    if os.path.isfile(path):  # of a folder that may not be read, Path.is_file raises
        return path
    names = shipped()
    if recipe in names:
        return names[recipe]
    raise RecipeError([f"{recipe}: no such recipe; give a YAML file or one of {', '.join(names)}"])


def resume_problems(old: Recipe, new: Recipe) -> list[str]:
    """What keeps an existing run from continuing under a changed recipe, one line per key.

    Args:
        old: The recipe in the run folder.
        new: The recipe asked for now.
    """
    before = dict(_resumable(old))
    if (Path(new.run.dir) / MODEL_RECORD).is_file():
        now = dict(leaves(new))
        before = {key: value for key, value in before.items() if key not in MOVABLE or None in (value, now[key])}
    changed = [
        f"{key} = {value}: the run at {old.run.dir} has {before[key]}; keep that value or choose a new run.dir"
        for key, value in _resumable(new)
        if key in before and _ordered(value) != _ordered(before[key])
    ]
    return [*changed, *_fewer_steps(old, new)]


def _fewer_steps(old: Recipe, new: Recipe) -> Iterator[str]:
    """A problem if train.steps was lowered below what the run's newest checkpoint has."""
    newest, steps = latest(Path(new.run.dir) / "checkpoints"), new.train.steps
    if newest is not None and step_of(newest) > steps != old.train.steps:
        remedy = f"give at least {step_of(newest)}, or choose a new run.dir"
        yield f"train.steps = {steps}: the run at {new.run.dir} has a checkpoint after step {step_of(newest)}; {remedy}"


def _resumable(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Every key that an existing run must keep, and its value: of the tasks their names, and the fields of each."""
    for key, value in leaves(recipe):
        if key == "evaluate.tasks":
            yield key, ", ".join(task.name for task in value) or "none"
            for task in value:
                yield from leaves(task, f"{key}.{task.name}.")
        elif not any(fnmatchcase(key, pattern) for pattern in MAY_CHANGE):
            yield key, value


def _ordered(value: Any) -> Any:
    """A mapping as its pairs: the order of quantize.layers decides."""
    return list(value.items()) if isinstance(value, dict) else value
