"""The very same run under Slurm: its recipe is copied, the sbatch files (sbatch.py) are written and handed over."""

import subprocess
import sys
from pathlib import Path

from halfbyte.launch import sbatch
from halfbyte.launch.jobs import NoAnswer, queue, record, submitted
from halfbyte.launch.revision import revision
from halfbyte.launch.start import RESOLVED
from halfbyte.training.config import Recipe
from halfbyte.training.errors import UserError
from halfbyte.training.resolve import save

COPY = "submit.yaml"


def submit(recipe: Recipe, nodes: int, *, array: int = 1, separate: bool = False, dry_run: bool = False) -> str:
    """Write the recipe's copy and the sbatch files into the run folder, and hand them to Slurm.

    Args:
        recipe: Resolved recipe.
        nodes: Number of nodes.
        array: Jobs in a row that share the training.
        separate: Evaluation and export as jobs of their own.
        dry_run: Write the files only.

    Returns:
        What to tell the user: a note on links, if any; the paths, and the files' texts or the jobs' numbers.

    Raises:
        RecipeError: the nodes do not fit the layout, or a container cannot see a folder.
        UserError: a file cannot be written, a job of this run is still in the queue, or sbatch is missing or refuses.
    """
    folder = Path(recipe.run.dir)
    jobs = sbatch.jobs(recipe, folder / COPY, nodes, array=array, separate=separate)
    programs = None if recipe.launch.container else str(Path(sys.executable).parent)
    commit, here = revision(12), Path.cwd()
    texts = [sbatch.text(recipe, job, programs=programs, revision=commit, here=here) for job in jobs]
    _check_queue(folder)
    save(recipe, folder / COPY)
    if not dry_run:
        save(recipe, folder / RESOLVED)
    note = sbatch.links_note(recipe)
    said, before, numbers = [note] if note else [], None, []
    for job, text in zip(jobs, texts, strict=True):
        path = folder / f"{job.kind}.sbatch"
        _write(path, text)
        if dry_run:
            said.append(f"{path}\n\n{text}")
            continue
        try:
            number = _sbatch(path, [] if before is None else _after(before))
        except UserError as error:
            if not numbers:
                raise
            waiting = f"submitted before it: job {', '.join(numbers)}"
            raise UserError(f"{error}; {waiting}, which scancel takes back") from error
        numbers.append(number)
        record(folder, {"id": number, "name": job.name, "file": path.name})
        said.append(f"{path}: submitted as job {number}")
        # The last job of an array goes on where the others stopped, so that it alone has to end well.
        before = f"{number}_{job.array}" if job.array > 1 else number
    return "\n".join([*said, *([] if dry_run else [f"halfbyte status {folder} follows it"])])


def _after(job: str) -> list[str]:
    """Options of a job that needs another one's result: without it, it is no job that waits for ever in the queue."""
    return [f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"]


def _check_queue(folder: Path) -> None:
    """Refuse to write under a job of this run that is in the queue: it reads the recipe's copy when it starts.

    A second job would find the run folder taken. A damaged record is an error here, before there is a job to note.
    """
    if not submitted(folder):
        return
    try:
        jobs = queue(folder)
    except NoAnswer:  # sbatch may have one
        return
    if jobs:
        remedy = "wait for it, take it back with scancel, or ask for several in a row with --jobs"
        raise UserError(f"run.dir = {folder}: job {jobs[0]} is in the queue for this run; {remedy}")


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
    number = done.stdout.strip().partition(";")[0]
    if not number.isdigit():
        raise UserError(f"sbatch {path}: answered {number[:80]!r}, which is no job's number; squeue shows what it did")
    return number
