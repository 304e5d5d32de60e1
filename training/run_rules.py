"""What a recipe may call things, so that somebody else's recipe writes into its run folder and nowhere else. Pure."""

import re
from collections.abc import Iterator

from halfbyte.training.config import Recipe

NAME = r"[A-Za-z0-9_][\w.+-]*"
"""Of a run: it becomes a folder's name, and a job's."""
WORD = r"[\w.,:+/@=-]+"
"""Of what is written into an sbatch file's directives."""


def run_problems(recipe: Recipe) -> Iterator[str]:
    """One line for each name that could lead out of the run folder or into a second line of a script."""
    if not re.fullmatch(NAME, recipe.run.name):
        remedy = "becomes the run folder's and the job's name; use letters, digits, . _ + and -"
        yield f"run.name = {_printable(recipe.run.name)}: {remedy}"
    if not recipe.run.dir.isprintable() or not recipe.run.dir.strip():
        yield f"run.dir = {_printable(recipe.run.dir)}: not the path of a folder; use characters that can be printed"
    launch = recipe.launch
    for key, value in (("partition", launch.partition), ("account", launch.account), ("container", launch.container)):
        if value is not None and not re.fullmatch(WORD, value):
            remedy = "stands in the sbatch file; use letters, digits and . , : + / @ = _ -"
            yield f"launch.{key} = {_printable(value)}: {remedy}"


def _printable(text: str) -> str:
    return text if text.isprintable() else repr(text)
