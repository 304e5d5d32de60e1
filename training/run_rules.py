"""What a recipe may call things, so that somebody else's recipe writes into its run folder and nowhere else."""

import re
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

from halfbyte.training.config import Recipe
from halfbyte.training.config_launch import GRACE_S

NAME = r"[A-Za-z0-9_][\w.+-]*"
"""Of a run: it becomes a folder's name, and a job's."""
WORD = r"[\w.,:+/@=-]+"
"""Of what is written into an sbatch file's directives."""
PROJECT = r"[^/\\#?%:]{1,128}"
"""What W&B takes as the name of a project."""
INPUT_PATHS = (
    "model.path",
    "model.reference",
    "model.config",
    "data.train",
    "quantize.calibration_data",
    "distill.teacher",
    "gate.control",
    "sensitivity.data",
)
"""Keys of what a run reads; the data of its tasks beside them."""


def run_problems(recipe: Recipe) -> Iterator[str]:
    """One line for each name that could lead out of the run folder or into a second line of a script, or bad limit."""
    if not re.fullmatch(NAME, recipe.run.name):
        remedy = "becomes the run folder's and the job's name; use letters, digits, . _ + and -"
        yield f"run.name = {_printable(recipe.run.name)}: {remedy}"
    if not recipe.run.dir.isprintable() or not recipe.run.dir.strip():
        yield f"run.dir = {_printable(recipe.run.dir)}: not the path of a folder; use characters that can be printed"
    if not re.fullmatch(PROJECT, recipe.run.project):
        yield f"run.project = {_printable(recipe.run.project)}: W&B takes at most 128 characters, none of / \\ # ? % :"
    launch = recipe.launch
    yield from _time_limit(launch.time)
    for key, value in (("partition", launch.partition), ("account", launch.account), ("container", launch.container)):
        if value is not None and not re.fullmatch(WORD, value):
            remedy = "stands in the sbatch file; use letters, digits and . , : + / @ = _ -"
            yield f"launch.{key} = {_printable(value)}: {remedy}"


def _time_limit(text: str) -> Iterator[str]:
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", text):
        yield f"launch.time = {text}: not a Slurm time limit; write hours:minutes:seconds"
    elif 0 < seconds_of(text) <= GRACE_S:
        reason = f"Slurm tells a run {GRACE_S} s before the end, which is its start here"
        yield f"launch.time = {text}: {reason}; give more (one number is minutes, 0 sets no limit)"


def seconds_of(limit: str) -> int:
    """Seconds of a time limit as Slurm reads it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; 0 sets no limit."""
    days, dash, rest = limit.rpartition("-")
    numbers = [int(part) for part in rest.split(":")]
    if dash or len(numbers) == 3:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    else:
        hours, minutes, seconds = 0, *(*numbers, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def read_paths(recipe: Recipe) -> dict[str, str | None]:
    """Key -> path of everything that a run reads; None where the recipe names nothing."""
    paths: dict[str, str | None] = {key: attrgetter(key)(recipe) for key in INPUT_PATHS}
    return paths | {f"evaluate.tasks.{i}.data": task.data for i, task in enumerate(recipe.evaluate.tasks)}


def unreachable_paths(recipe: Recipe) -> Iterator[str]:
    """One line for each path that cannot even be looked up: in a closed folder, too long, or with a NUL."""
    for key, path in {"run.dir": recipe.run.dir, **read_paths(recipe)}.items():
        try:
            Path(path or ".").stat()
        except (FileNotFoundError, NotADirectoryError):
            pass  # a rule of its own says what is missing
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            shown = _printable(path or "")[:200]
            yield f"{key} = {shown}: cannot be looked up ({reason}); give a path that this user can read"


def _printable(text: str) -> str:
    return text if text.isprintable() else repr(text)
