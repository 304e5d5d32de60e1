"""Sections of the recipe about keeping a run alive: its checkpoints, and how its processes start."""

from dataclasses import dataclass

GRACE_S = 120
"""Seconds between Slurm's signal and the end of a job: time to save a checkpoint."""


@dataclass
class Checkpoint:
    """Sharded training checkpoints under <run.dir>/checkpoints."""

    every_steps: int = 0
    """Save every N steps; 0 means only at the end and on interruption."""
    background: bool = True
    """Write while training goes on, from a copy in host memory (of weights and optimizer state); the last checkpoint of
    a start is always waited for. False makes no copy and waits for every one."""
    keep: int = 2
    """How many of the newest checkpoints stay on disk."""
    keep_best: int = 0
    """How many of lowest mean training loss stay, of these or older: the mean of the every_steps steps before each."""


@dataclass
class Launch:
    """How processes start. World size comes from `parallel`."""

    max_restarts: int = 3
    """How often a run starts itself again from its newest checkpoint after a process was killed, hung, or lost a device
    or a peer."""
    hang_seconds: float = 1800.0
    """A training step without progress for so long is a hang: all processes end with code 5. 0 never says so."""
    gpus_per_node: int = 8
    """Processes per node under Slurm."""
    gpus: bool = True
    """Whether Slurm gives each of them a GPU; false for a cluster of CPUs."""
    cpus_per_task: int | None = None
    """CPU cores that Slurm gives each process; none is the cluster's default, on many one core, which Python, NCCL's
    threads and the thread that writes checkpoints then share."""
    port: int = 0
    """Rendezvous port on this machine; 0 picks a free one."""
    partition: str | None = None
    """Slurm partition."""
    account: str | None = None
    """Slurm account."""
    time: str = "04:00:00"
    """Slurm time limit: minutes, hours:minutes:seconds, days-hours, ...; two minutes before it the run is saved."""
    container: str | None = None
    """Image that srun starts everything in (its plugin pyxis). It must have halfbyte, and it sees the working
    directory, run.dir and what the recipe reads, at their own places."""
