"""The very same run under Slurm: its recipe is copied, the sbatch files (sbatch.py) are written and handed over."""

import subprocess
import sys
from pathlib import Path

from halfbyte.launch import sbatch
from halfbyte.launch.start import RESOLVED
from halfbyte.training.config import Recipe
from halfbyte.training.errors import UserError
from halfbyte.training.files import read_json, write_json
from halfbyte.training.resolve import save

COPY = "submit.yaml"
RECORD = "submit.json"
"""What was submitted: {"jobs": [{"id", "name", "file"}, ...]}, the newest last; halfbyte status reads it."""


def submit(recipe: Recipe, nodes: int, *, array: int = 1, separate: bool = False, dry_run: bool = False) -> str:
    """Write the recipe's copy and the sbatch files into the run folder, and hand them to Slurm.

    Args:
        recipe: Resolved recipe.
        nodes: Number of nodes.
        array: Jobs in a row that share the training.
        separate: Evaluation and export as jobs of their own.
        dry_run: Write the files only.

    Returns:
        What to tell the user: the paths, and the files' texts or the jobs' numbers.

    Raises:
        RecipeError: the nodes do not fit the layout.
        UserError: a file cannot be written, or sbatch is missing or refuses.
    """
    folder = Path(recipe.run.dir)
    jobs = sbatch.jobs(recipe, folder / COPY, nodes, array=array, separate=separate)
    programs = None if recipe.launch.container else str(Path(sys.executable).parent)
    save(recipe, folder / COPY)
    if not dry_run:
        save(recipe, folder / RESOLVED)
    said, before = [], None
    for job in jobs:
        path = folder / f"{job.kind}.sbatch"
        text = sbatch.text(recipe, job, programs=programs, revision=revision())
        _write(path, text)
        if dry_run:
            said.append(f"{path}\n\n{text}")
            continue
        number = _sbatch(path, [] if before is None else [f"--dependency=afterok:{before}"])
        record(folder, {"id": number, "name": job.name, "file": path.name})
        said.append(f"{path}: submitted as job {number}")
        # The last job of an array goes on where the others stopped, so that it alone has to end well.
        before = f"{number}_{job.array}" if job.array > 1 else number
    return "\n".join([*said, *([] if dry_run else [f"halfbyte status {folder} follows it"])])


def record(folder: Path, job: dict[str, str]) -> None:
    """Add a job to submit.json."""
    path = folder / RECORD
    before = read_json(path)["jobs"] if path.exists() else []
    write_json(path, {"jobs": [*before, job]})


def revision() -> str | None:
    """Revision of halfbyte's source as git describes it (`-dirty`: with changes); None if it was installed without."""
    source = Path(__file__).parent
    line = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another run.dir") from error


def _sbatch(path: Path, options: list[str]) -> str:
    """Hand one file to Slurm; returns the job's number."""
    try:
        line = ["sbatch", "--parsable", *options, str(path)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError(f"sbatch: not found on this machine; copy {path} to a Slurm login node") from error
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0]
        raise UserError(f"sbatch refused {path}: {reason}")
    return done.stdout.strip().partition(";")[0]
