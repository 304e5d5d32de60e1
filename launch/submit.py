"""The very same run under Slurm: one sbatch file, one srun, one task per GPU."""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from halfbyte.training.config import Recipe
from halfbyte.training.errors import RecipeError, UserError

BASE_PORT = 20000
PORTS = 10000
GRACE_S = 120
"""Seconds between Slurm's SIGTERM and the end of the job: time to save a checkpoint."""


def nodes_problem(recipe: Recipe, nodes: int) -> str | None:
    """Why `nodes` nodes cannot hold the layout, one task per GPU; None if they can."""
    world, per_node = recipe.world_size, recipe.launch.gpus_per_node
    if nodes < 1:
        return f"--nodes = {nodes}: must be positive; give at least 1"
    if world == nodes * per_node or (nodes == 1 and world < per_node):
        return None
    layout = recipe.parallel
    product = f"parallel = tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data} = {world} processes"
    fitting = (
        f"give --nodes {-(-world // per_node)}" if world % per_node == 0 or world < per_node else "change parallel"
    )
    return f"--nodes = {nodes}: {product}, but {nodes} x launch.gpus_per_node = {per_node} GPUs; {fitting}"


def sbatch_text(
    recipe: Recipe, recipe_arg: str, overrides: Sequence[str], nodes: int, *, programs: str | None = None
) -> str:
    """The sbatch file of `halfbyte run RECIPE key=value ...`.

    Slurm sends SIGTERM two minutes before the time limit and on preemption, and the run saves. A preempted job starts
    again by itself (--requeue), one that ran out of time when it is submitted again; both resume, as the run folder is
    there. The port is derived from the job's number, so that two jobs that share a node do not meet.

    Args:
        recipe: Resolved recipe.
        recipe_arg: The recipe as the user named it.
        overrides: `key=value` strings as the user wrote them.
        nodes: Number of nodes.
        programs: Folder of the `halfbyte` program, put first in PATH; none where a container brings its own.

    Returns:
        The file's text.

    Raises:
        RecipeError: the nodes do not fit the layout.
    """
    problem = nodes_problem(recipe, nodes)
    if problem:
        raise RecipeError([problem])
    launch = recipe.launch
    tasks = recipe.world_size // nodes
    folder = Path(recipe.run.dir)
    optional = {"partition": launch.partition, "account": launch.account}
    directives = [
        f"--job-name={recipe.run.name}",
        f"--nodes={nodes}",
        f"--ntasks-per-node={tasks}",
        f"--gpus-per-node={tasks}",
        f"--time={launch.time}",
        f"--signal=TERM@{GRACE_S}",
        "--requeue",
        "--open-mode=append",
        f"--output={folder}/slurm-%j.log",
        *(f"--{name}={value}" for name, value in optional.items() if value),
    ]
    container = f" --container-image={shlex.quote(launch.container)}" if launch.container else ""
    port = launch.port or f"$(({BASE_PORT} + SLURM_JOB_ID % {PORTS}))"
    command = shlex.join(["halfbyte", "run", recipe_arg, *overrides])
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {directive}" for directive in directives),
            "",
            "set -euo pipefail",
            *([f"export PATH={shlex.quote(programs)}:$PATH"] if programs else []),
            'export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"',
            f"export MASTER_PORT={port}",
            "",
            f"srun --kill-on-bad-exit=1{container} {command}",
            "",
        ]
    )


def submit(recipe: Recipe, recipe_arg: str, overrides: Sequence[str], nodes: int, *, dry_run: bool) -> str:
    """Write <run.dir>/submit.sbatch and hand it to Slurm.

    Args:
        recipe: Resolved recipe.
        recipe_arg: The recipe as the user named it.
        overrides: `key=value` strings as the user wrote them.
        nodes: Number of nodes.
        dry_run: Write the file only.

    Returns:
        What to tell the user: the path, and the file's text or the job's number.

    Raises:
        RecipeError: the nodes do not fit the layout.
        UserError: the file cannot be written, or sbatch is missing or refuses.
    """
    programs = None if recipe.launch.container else str(Path(sys.executable).parent)
    text = sbatch_text(recipe, recipe_arg, overrides, nodes, programs=programs)
    path = Path(recipe.run.dir) / "submit.sbatch"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another run.dir") from error
    if dry_run:
        return f"{path}\n\n{text}"
    try:
        done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError(f"sbatch: not found on this machine; copy {path} to a Slurm login node") from error
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0]
        raise UserError(f"sbatch refused {path}: {reason}")
    return f"{path}: submitted as job {done.stdout.strip().partition(';')[0]}"
