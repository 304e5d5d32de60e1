"""How a run stands: its jobs in Slurm's queue, what the run folder holds, what went wrong. Torch-free."""

import time
from collections.abc import Callable
from pathlib import Path

from halfbyte.launch.jobs import NoAnswer, NoSlurm, queue
from halfbyte.training import retention
from halfbyte.training.config import Recipe
from halfbyte.training.files import damage, read_json

FOLLOW_S = 5.0
"""Seconds between two looks."""


def follow(recipe: Recipe, show: Callable[[str], None]) -> None:
    """Show the status whenever it has changed, until no job of the run is in the queue.

    A controller that does not answer, as at times on a busy cluster, is asked again.

    Args:
        recipe: The run's recipe.
        show: Takes the text.

    Raises:
        NoSlurm: this machine has no squeue, so that the end cannot be seen; the status was shown.
        UserError: see `status`.
    """
    shown = None
    while True:
        asked = _asked(Path(recipe.run.dir))
        text = _text(recipe, asked)
        if text != shown:
            show(text)
        if isinstance(asked, list):
            if not asked:
                return
        elif isinstance(asked, NoSlurm):
            raise asked
        shown = text
        time.sleep(FOLLOW_S)


def status(recipe: Recipe) -> str:
    """The status as a few lines; one of them says so where Slurm cannot be asked about the run's jobs.

    Args:
        recipe: The run's recipe.

    Raises:
        UserError: a file of the run folder is damaged.
    """
    return _text(recipe, _asked(Path(recipe.run.dir)))


def _asked(folder: Path) -> list[str] | NoAnswer:
    """The run's jobs in the queue, or why Slurm cannot be asked."""
    try:
        return queue(folder)
    except NoAnswer as error:
        return error


def _text(recipe: Recipe, asked: list[str] | NoAnswer) -> str:
    folder = Path(recipe.run.dir)
    lines = [f"{recipe.run.name}: {recipe.method}, {folder}"]
    if isinstance(asked, NoAnswer):
        lines.append(f"  jobs unknown: {asked}")
    else:
        lines += [f"  job {job}" for job in asked] or ["  no job in the queue"]
    newest = retention.latest(folder / "checkpoints")
    reached = 0 if newest is None else retention.step_of(newest)
    if recipe.train.steps and recipe.method != "ptq":
        lines.append(f"  checkpoint after step {reached} of {recipe.train.steps}" if reached else "  no checkpoint yet")
    marks = folder / "state.json"
    if marks.exists():
        lines.append(f"  done: {', '.join(read_json(marks)) or 'nothing'}")
    if (folder / "gate.json").exists():
        with damage(folder / "gate.json"):
            lines.append(f"  gate: {read_json(folder / 'gate.json')['verdict']}")
    if (folder / "export" / "hf").is_dir():
        lines.append(f"  released: {folder / 'export' / 'hf'}")
    return "\n".join([*lines, *_last_words(folder)])


def _last_words(folder: Path) -> list[str]:
    """What the process said that ended first in the newest start, if it did not end well."""
    reports = []
    for path in (folder / "errors").glob("rank*.json"):
        with damage(path):
            content = read_json(path)
            reports.append((content["time"], content["message"]))
    return [f"  last message: {min(reports)[1]}"] if reports and min(reports)[1] else []
