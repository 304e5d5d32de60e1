"""The process environment: with launch/start.py the only reader of os.environ. Torch-free."""

import ctypes
import logging
import os
import signal
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from halfbyte.training.errors import USAGE, UserError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SRUN = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")


def launcher() -> tuple[str, str, str, str] | None:
    """Names of the variables in which the program that started this process says what it is one of; None: of nothing.

    Raises:
        UserError: SLURM_NTASKS is no number.
    """
    if TORCHRUN[0] in os.environ:
        return TORCHRUN
    return SRUN if SRUN[0] in os.environ and _number("SLURM_NTASKS", 1) > 1 else None


def coordinates() -> tuple[int, int, int, int]:
    """(rank, world, local rank, local world) from torchrun's or Slurm's variables; (0, 1, 0, 1) without either.

    Raises:
        UserError: one of them is missing, as where another program has set RANK for itself, or no number.
    """
    names = launcher()
    if names is None:
        return 0, 1, 0, 1
    rank, world, local_rank, local_world = names
    return _number(rank), _number(world), _number(local_rank), _number(local_world, 1 if names is SRUN else None)


def _number(name: str, default: int | None = None) -> int:
    value = os.environ.get(name)
    if value is None and default is not None:
        return default
    if value is None or not (value.isascii() and value.isdigit()):
        first = (TORCHRUN if name in TORCHRUN else SRUN)[0]
        remedy = f"start all processes with torchrun or srun, or unset {first}: halfbyte then starts its own"
        problem = "is not set" if value is None else f"= {value!r} is no number"
        raise UserError(f"{name} {problem}, but {first} says that a launcher started this process: {remedy}", USAGE)
    return int(value)


def open_standard_streams() -> None:
    """Let a standard stream that was closed before the start (`>&-`) lead nowhere.

    The next file to be opened would take its number, and what a library prints would end up in that file.
    """
    for number, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def lead_nowhere(stream: TextIO) -> None:
    """Lead a stream nowhere that takes no more: what waits in its buffer would fail again, at the latest at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def set_process_environment() -> None:
    """Settings that libraries read at import: no model hub, no CPU instructions that some machines only advertise."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars; ours asks for itself


def order_kernels(*, side_by_side: bool) -> None:
    """How many queues a GPU takes kernels from; before anything runs on it.

    Megatron orders its overlaps by a single one. Micro-batches side by side need one each, and more for what moves
    beside them.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32" if side_by_side else "1")


@contextmanager
def tokenizer_threads() -> Iterator[None]:
    """Let the tokenizer use its threads, which are off elsewhere: one process packs while the others wait for it."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def quiet_libraries() -> None:
    """A run prints one line per stage: libraries may speak up from ERROR on."""
    names = ("megatron", "modelopt", "torch", "torch.utils.cpp_extension", "transformers", "lightning", "nemo")
    for name in (*names, "lm_eval", "datasets", "sacrebleu"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def rendezvous(port: int) -> str:
    """Where the processes meet: MASTER_ADDR:MASTER_PORT of torchrun or Slurm, or a port here for a single process.

    Args:
        port: launch.port; 0 takes a free one.
    """
    env = os.environ
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in env:  # a single process, started without torchrun
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            env["MASTER_PORT"] = str(probe.getsockname()[1])
    return f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"


PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, so that kill -9 on `halfbyte run` leaves nothing behind.

    A worker in a session of its own would otherwise train on, into the folder of the run that resumes it.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
