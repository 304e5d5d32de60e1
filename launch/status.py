"""How a run stands: its jobs in Slurm's queue, what the run folder holds, what went wrong. Torch-free."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from halfbyte.launch.submit import RECORD
from halfbyte.training import retention
from halfbyte.training.config import Recipe
from halfbyte.training.errors import UserError
from halfbyte.training.files import damage, read_json

FOLLOW_S = 5.0
"""Seconds between two looks."""


def follow(recipe: Recipe, show: Callable[[str], None]) -> None:
    """Show the status whenever it has changed, until no job of the run is in the queue.

    Args:
        recipe: The run's recipe.
        show: Takes the text.

    Raises:
        UserError: see `status`.
    """
    shown = None
    while True:
        queued, text = queue(Path(recipe.run.dir)), status(recipe)
        if text != shown:
            show(text)
        if not queued:
            return
        shown = text
        time.sleep(FOLLOW_S)


def status(recipe: Recipe) -> str:
    """The status as a few lines.

    Args:
        recipe: The run's recipe.

    Raises:
        UserError: a file of the run folder is damaged, or squeue fails.
    """
    folder = Path(recipe.run.dir)
    lines = [f"{recipe.run.name}: {recipe.method}, {folder}"]
    lines += [f"  job {job}" for job in queue(folder)] or ["  no job in the queue"]
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


def queue(folder: Path) -> list[str]:
    """Number, name, state, time and reason or nodes of every submitted job that Slurm still has.

    Raises:
        UserError: squeue is missing or fails.
    """
    path = folder / RECORD
    if not path.exists():
        return []
    with damage(path):
        numbers = [job["id"] for job in read_json(path)["jobs"]]
    found = []
    for number in numbers:  # one by one: squeue refuses a list in which one has left the queue
        line = ["squeue", "--noheader", f"--jobs={number}", "--format=%i %j %T, %M of %l, %R"]
        try:
            done = subprocess.run(line, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise UserError("squeue: not found on this machine; ask on a Slurm login node") from error
        if done.returncode and "Invalid job id" not in done.stderr:
            raise UserError(f"squeue: {(done.stderr.strip().splitlines() or ['?'])[0]}")
        found += done.stdout.splitlines()
    return found


def _last_words(folder: Path) -> list[str]:
    """What the process said that ended first in the newest start, if it did not end well."""
    reports = []
    for path in (folder / "errors").glob("rank*.json"):
        with damage(path):
            content = read_json(path)
            reports.append((content["time"], content["message"]))
    return [f"  last message: {min(reports)[1]}"] if reports and min(reports)[1] else []
