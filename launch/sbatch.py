"""The text of an sbatch file: directives, what they mean, and the few lines of bash that keep a run going. Pure.

Slurm tells the script two minutes before the time limit (USR1) and on preemption (TERM), then the processes as well.
The script has Slurm send SIGTERM to the processes, which save and end; a preempted job starts again by itself, one that
ran out of time is put back into the queue by the script, or, in an array, the next job goes on and only the last one is
put back. What dies or hangs is started again within the job, and then by the next job of an array; what would only come
again (a bad recipe, a full disk, the gate) takes the rest of an array out of the queue.
"""

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from halfbyte.training.config import Recipe
from halfbyte.training.config_launch import GRACE_S
from halfbyte.training.errors import CAUSE, FINAL, LOST, RecipeError
from halfbyte.training.hardware import GPUS
from halfbyte.training.run_rules import read_paths

BASE_PORT = 20000
PORTS = 10000
MOST_REQUEUES = 100
"""A run that makes no progress within its time limit must not go round for ever."""
NCCL = """\
# NCCL finds NVLink and InfiniBand by itself. Tensor parallelism belongs where NVLink joins the GPUs (a node, or a
# rack such as NVL72); pipeline and data parallelism may cross the network. Where that goes wrong:
#   export NCCL_DEBUG=INFO              says which links are taken: P2P (NVLink), NET/IB, NET/Socket (Ethernet)
#   export NCCL_SOCKET_IFNAME=ib0       the interface on which ranks meet, if the first one leads nowhere
#   export NCCL_IB_HCA=mlx5             which InfiniBand adapters carry data
#   export NCCL_NVLS_ENABLE=0           no NVLink multicast (NVLS), where the fabric manager does not offer it"""
FORWARD = """\
# SIGTERM to the processes lets them save: Slurm's own signal to them, for srun answers one by killing them. On
# preemption Slurm has sent it already. bash runs a trap only between commands, hence the wait.
ending=
trap 'ending=time; scancel --signal=TERM "@JOB@"' USR1
trap 'ending=preempted' TERM

attempt=0
while true; do
  rm -f @CAUSE@
  srun @SRUN@ &
  step=$!
  while kill -0 "$step" 2>/dev/null; do wait "$step"; done
  wait "$step"
  code=$?
  # srun has the highest code of all, of processes that it ended itself as well; the first that knew why left its own.
  if [ "$code" -ne 0 ] && [ -s @CAUSE@ ]; then code=$(cat @CAUSE@); fi
  # 1 to @FINAL@ would only come again. Above: a process hung, was killed or lost its GPU, or it is Slurm's own error.
  if [ "$code" -le @FINAL@ ]; then break; fi
  if [ -n "$ending" ] || [ "$attempt" -ge @RESTARTS@ ]; then break; fi
  attempt=$((attempt + 1))
  echo "restart $attempt of @RESTARTS@ from the newest checkpoint (srun ended with $code)" >&2
done"""
END_OF_ARRAY = f"""\
# The jobs that wait for their turn would repeat it; after anything else the next one goes on. The last one is held
# first: of a job that is cancelled before Slurm has split it off the array, dependents believe that it ended well.
if [ "$code" -ge 1 ] && [ "$code" -le {FINAL} ] && [ -z "$ending" ]; then
  echo "ended with $code, which would only come again: the array's waiting jobs are taken out of the queue" >&2
  last=$SLURM_ARRAY_TASK_MAX
  [ "$SLURM_ARRAY_TASK_ID" -eq "$last" ] || scontrol hold "${{SLURM_ARRAY_JOB_ID}}_$last"
  scancel --state=PENDING "$SLURM_ARRAY_JOB_ID"
fi"""
REQUEUE = f"""\
if [ "$ending" = time ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {MOST_REQUEUES} ]; then
  scontrol requeue "@JOB@"
fi"""
WITHIN_ARRAY = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
"""How Slurm finds one job of an array: the last one's SLURM_JOB_ID is the number of them all."""
LAST_OF_ARRAY = """\
# The next job of the array goes on where this one stopped; after the last one there is none.
if [ "$SLURM_ARRAY_TASK_ID" -lt "$SLURM_ARRAY_TASK_MAX" ]; then exit "$code"; fi"""


@dataclass(frozen=True)
class Job:
    """One sbatch file.

    Attributes:
        name: Of the job in the queue; the file is called <kind>.sbatch.
        kind: submit, evaluate or export.
        command: What every task runs, as words.
        nodes: Number of nodes.
        tasks: Processes per node.
        gpus: Whether each of them has one.
        array: Jobs of which one starts when the one before has ended; 1 is a plain job.
    """

    name: str
    kind: str
    command: tuple[str, ...]
    nodes: int
    tasks: int
    gpus: bool
    array: int = 1


def jobs(recipe: Recipe, copy: Path, nodes: int, *, array: int = 1, separate: bool = False) -> list[Job]:
    """What to submit, in order; each waits until the one before has ended well.

    Args:
        recipe: Resolved recipe.
        copy: Where its copy stands.
        nodes: Number of nodes.
        array: Jobs in a row that share the training.
        separate: Evaluation, and gate with export, as jobs of their own; the last one needs no GPU.

    Raises:
        RecipeError: the nodes do not fit the layout, or array is no positive number.
    """
    problem = nodes_problem(recipe, nodes)
    problem = problem or (f"--jobs = {array}: must be positive; give at least 1" if array < 1 else None)
    if problem:
        raise RecipeError([problem])
    tasks, name, folder = recipe.world_size // nodes, recipe.run.name, recipe.run.dir
    gpus = recipe.launch.gpus
    if not separate:
        return [Job(name, "submit", ("halfbyte", "run", str(copy)), nodes, tasks, gpus, array)]
    judge = shlex.join(["halfbyte", "gate", folder]) + " && " + shlex.join(["halfbyte", "export", folder])
    return [
        Job(name, "submit", ("halfbyte", "train", folder), nodes, tasks, gpus, array),
        Job(f"{name}-evaluate", "evaluate", ("halfbyte", "evaluate", folder), nodes, tasks, gpus),
        Job(f"{name}-export", "export", ("bash", "-c", judge), 1, 1, False),
    ]


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
    have = f"{nodes * per_node} GPUs in {nodes} x {per_node} (launch.gpus_per_node)"
    return f"--nodes = {nodes}: {product}, but {have}; {fitting}"


def links_note(recipe: Recipe) -> str | None:
    """What to know where tensor-parallel ranks, neighbours in Megatron's order, lie on more than one node; else None.

    Right inside a rack that NVLink joins and very slow anywhere else; neither the recipe nor Slurm says which it is.
    """
    tensor, per_node = recipe.parallel.tensor, recipe.launch.gpus_per_node
    if not recipe.launch.gpus or recipe.world_size <= per_node or per_node % tensor == 0:
        return None
    racks = " or ".join(f"{gpu.name} ({gpu.domain} GPUs)" for gpu in GPUS.values() if gpu.domain > gpu.per_node)
    return (
        f"note: parallel.tensor = {tensor}: spans nodes (launch.gpus_per_node = {per_node}), and every layer waits for "
        f"the link between them; right where that is NVLink, as in a rack of {racks}; elsewhere take a divisor of "
        f"{per_node}, and parallel.pipeline for the rest"
    )


def container_options(recipe: Recipe, here: Path) -> list[str]:
    """Options of srun for launch.container, as its plugin pyxis takes them; none without a container.

    The image sees what the recipe names, each folder at its own place: the working directory, run.dir, and all that a
    run reads (of a file the folder). Where a name is a link, its target as well.

    Args:
        recipe: Resolved recipe.
        here: The working directory, absolute; a relative run.dir lies in it.

    Raises:
        RecipeError: a folder has a name that --container-mounts cannot hold.
    """
    if recipe.launch.container is None:
        return []
    paths = [here / recipe.run.dir, *(Path(path) for path in read_paths(recipe).values() if path)]
    places = [here, *(path.parent if path.is_file() else path for path in paths)]
    folders = {Path(os.path.normpath(name)) for place in places for name in (place, place.resolve())} - {Path("/")}
    seen = sorted(folder for folder in folders if folders.isdisjoint(folder.parents))
    odd = [folder for folder in seen if set(",:") & set(str(folder))]
    if odd:
        remedy = "a container sees no folder with , or : in its name; give it another name, or leave the key out"
        raise RecipeError([f"launch.container = {recipe.launch.container}: {folder}: {remedy}" for folder in odd])
    return [
        f"--container-image={recipe.launch.container}",
        f"--container-mounts={','.join(f'{folder}:{folder}' for folder in seen)}",
        f"--container-workdir={here}",
    ]


def text(recipe: Recipe, job: Job, *, programs: str | None, revision: str | None, here: Path) -> str:
    """One sbatch file.

    The port is derived from the job's number, so that two jobs that share a node do not meet.

    Args:
        recipe: Resolved recipe.
        job: What to run.
        programs: Folder of the `halfbyte` program, put first in PATH; none where a container brings its own.
        revision: Commit of halfbyte's source, if it is a checkout.
        here: The working directory, which a container starts in.

    Raises:
        RecipeError: see `container_options`.
    """
    launch = recipe.launch
    srun = shlex.join(["--kill-on-bad-exit=1", *container_options(recipe, here), *job.command])
    port = launch.port or f"$(({BASE_PORT} + SLURM_JOB_ID % {PORTS}))"
    cause = shlex.quote(str(Path(recipe.run.dir) / "errors" / CAUSE))
    values = {"SRUN": srun, "RESTARTS": launch.max_restarts, "FINAL": FINAL, "CAUSE": cause}
    values["JOB"] = "$SLURM_JOB_ID" if job.array == 1 else WITHIN_ARRAY
    forward, requeue = FORWARD, REQUEUE
    for name, value in values.items():
        forward, requeue = (part.replace(f"@{name}@", str(value)) for part in (forward, requeue))
    return "\n".join(
        [
            "#!/bin/bash",
            f"# {job.name}: {shlex.join(job.command)}",
            *([f"# halfbyte at git revision {revision}"] if revision else []),
            *(f"#SBATCH {directive}" for directive in _directives(recipe, job)),
            "",
            "set -uo pipefail",
            *([f"export PATH={shlex.quote(programs)}:$PATH"] if programs else []),
            # srun does not take it from the job by itself (since Slurm 22.05)
            *([f"export SRUN_CPUS_PER_TASK={launch.cpus_per_task}"] if launch.cpus_per_task else []),
            f"export SLURM_EXIT_ERROR={LOST}",  # of srun itself, which is 1 otherwise
            'MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"',
            f"export MASTER_ADDR MASTER_PORT={port}",
            "",
            NCCL,
            "",
            forward,
            *([END_OF_ARRAY, LAST_OF_ARRAY] if job.array > 1 else []),
            requeue,
            'exit "$code"',
            "",
        ]
    )


def _directives(recipe: Recipe, job: Job) -> list[str]:
    launch, folder = recipe.launch, Path(recipe.run.dir)
    optional = {"partition": launch.partition, "account": launch.account}
    log = "%A_%a" if job.array > 1 else "%j"
    return [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.tasks}",
        *([f"--gpus-per-node={job.tasks}"] if job.gpus else []),
        *([f"--cpus-per-task={launch.cpus_per_task}"] if launch.cpus_per_task else []),
        f"--time={launch.time}",
        *([f"--array=1-{job.array}%1"] if job.array > 1 else []),
        f"--signal=B:USR1@{GRACE_S}",
        "--requeue",
        "--open-mode=append",
        log_option(folder / f"slurm-{log}.log"),
        *(f"--{name}={value}" for name, value in optional.items() if value),
    ]


def log_option(path: Path) -> str:
    """`--output` of an sbatch directive, which Slurm reads by rules of its own: blanks and # end an option.

    Args:
        path: Its name may hold Slurm's replacement symbols (%j); in the name of its folder % stands for itself.
    """
    shown = f"{str(path.parent).replace('%', '%%')}/{path.name}"
    if re.fullmatch(r"[\w./%+=@:,-]+", shown, re.ASCII):
        return f"--output={shown}"
    escaped = shown.replace("\\", "\\\\").replace('"', '\\"')
    return f'--output="{escaped}"'
