"""The jobs of a run in Slurm's queue, and the record of them in the run folder. Torch-free."""

import subprocess
from pathlib import Path

from halfbyte.training.errors import UserError
from halfbyte.training.files import damage, read_json, write_json

RECORD = "submit.json"
"""What was submitted: {"jobs": [{"id", "name", "file"}, ...]}, the newest last; halfbyte status reads it."""


class NoAnswer(UserError):
    """Slurm cannot say what is in its queue."""


class NoSlurm(NoAnswer):
    """Nor will it ever: this machine has no squeue."""


def record(folder: Path, job: dict[str, str]) -> None:
    """Add a job to submit.json."""
    write_json(folder / RECORD, {"jobs": [*submitted(folder), job]})


def submitted(folder: Path) -> list[dict[str, str]]:
    """The jobs in submit.json, the newest last; each has "id", "name" and "file".

    Raises:
        UserError: the file is damaged.
    """
    path = folder / RECORD
    if not path.exists():
        return []
    with damage(path):
        return [{key: str(job[key]) for key in ("id", "name", "file")} for job in read_json(path)["jobs"]]


def queue(folder: Path) -> list[str]:
    """Number, name, state, time and reason or nodes of every submitted job that Slurm still has.

    Raises:
        NoAnswer: squeue is missing (NoSlurm) or fails.
        UserError: submit.json is damaged.
    """
    found = []
    for job in submitted(folder):  # one by one: squeue refuses a list in which one has left the queue
        line = ["squeue", "--noheader", f"--jobs={job['id']}", "--format=%i %j %T, %M of %l, %R"]
        try:
            done = subprocess.run(line, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise NoSlurm("squeue: not found on this machine; ask on a Slurm login node") from error
        if done.returncode and "Invalid job id" not in done.stderr:
            raise NoAnswer(f"squeue: {(done.stderr.strip().splitlines() or ['?'])[0]}")
        found += done.stdout.splitlines()
    return found
