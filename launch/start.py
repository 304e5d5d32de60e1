"""Start the processes of one run on this machine, pass signals on to them, and turn their end into one exit code.

torchrun's agent (torch.distributed.launcher) starts and watches the workers. What it does on Ctrl-C is replaced: it
would stop them before they have saved. So is its restart: it would repeat what fails for a reason (a bad file, a full
disk, the gate). Inside torchrun or srun this process already is a worker: nothing is started.
"""

import fcntl
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from halfbyte.training.config import Recipe
from halfbyte.training.environment import coordinates, launcher
from halfbyte.training.errors import CAUSE, FAILED, LOST, OK, UserError

RESOLVED = "resolved.yaml"
LOCK = ".lock"
"""In the run folder: which process works there."""
TOGETHER_S = 2
"""Workers that end within this many seconds of the first one ended of the same cause."""


class Died(UserError):
    """A process was killed, hung, or lost a device or a peer: the same start, repeated, may well succeed."""


def inside_launcher() -> bool:
    """Whether torchrun or a multi-task srun started this process."""
    return launcher() is not None


def is_first() -> bool:
    """Whether this is the process that prepares the run folder: rank 0, or the only one so far."""
    return coordinates()[0] == 0


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Have a run folder to oneself: two that write into it at once would spoil each other's checkpoints and scores.

    The lock is the kernel's and ends with the process that holds it, however that ends. Rank 0 holds it for all.

    Args:
        folder: The run folder; made if missing.

    Raises:
        UserError: another process holds it; the line names that process.
    """
    file = _opened(folder / LOCK) if is_first() else None
    if file is None:
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            remedy = "wait until it has ended, or choose another run.dir"
            raise UserError(f"run.dir = {folder}: {holder} is at work there; {remedy}") from None
        except OSError:  # a file system without locks
            pass
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield


def _opened(path: Path) -> TextIO | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a+")
    except OSError:  # what writes there next says why it cannot
        return None


def launch(
    recipe: Recipe, stages: Sequence[str], *, allow_failed_gate: bool = False, entry: Sequence[str] | None = None
) -> int:
    """Run stages in all processes of the layout.

    Args:
        recipe: Resolved recipe; <run.dir>/resolved.yaml holds it.
        stages: Stage names of pipeline.STAGES.
        allow_failed_gate: Export even if the gate fails.
        entry: Command of one worker, for tests; none means launch/pipeline.py.

    Returns:
        0, or the exit code of a worker that had nothing to say (3: gate failed, 4: inconclusive).

    Raises:
        UserError: the earliest message that a worker left in <run.dir>/errors, or how it was killed, with its code; a
            taken launch.port. Workers that died (see Died) are started again first, launch.max_restarts times.
    """
    folder = Path(recipe.run.dir)
    if inside_launcher():
        return run_here(recipe, stages, allow_failed_gate=allow_failed_gate)
    _check_port(recipe.launch.port)
    command = [*(entry or [sys.executable, "-m", "halfbyte.launch.pipeline"])]
    command += _arguments(recipe, stages, allow_failed_gate)
    for restart in range(1, recipe.launch.max_restarts + 1):
        clear_errors(folder)
        try:
            return _supervise(recipe.world_size, recipe.launch.port, command, folder)
        except Died as died:
            again = f"restart {restart} of {recipe.launch.max_restarts} from the newest checkpoint"
            print(f"{died}: {again}", file=sys.stderr, flush=True)
    clear_errors(folder)
    try:
        return _supervise(recipe.world_size, recipe.launch.port, command, folder)
    except Died as died:
        raise UserError(f"{died}: resume with the same command", died.code) from None


def run_here(recipe: Recipe, stages: Sequence[str], *, allow_failed_gate: bool = False) -> int:
    """Run stages in this process: as one worker of torchrun or srun, or alone for stages that only read files.

    Args:
        recipe: Resolved recipe; <run.dir>/resolved.yaml holds it.
        stages: Stage names of pipeline.STAGES.
        allow_failed_gate: Export even if the gate fails.

    Returns:
        The exit code.

    Raises:
        UserError: why this process failed, unless another of the run failed earlier and speaks for all.
    """
    from halfbyte.launch.pipeline import worker

    folder = Path(recipe.run.dir)
    rank = coordinates()[0]
    own = folder / "errors" / f"rank{rank}.json"
    with suppress(OSError):  # it may not be there; where it cannot be removed, the worker fails and says why
        own.unlink()
    code = worker(_arguments(recipe, stages, allow_failed_gate))
    reports = reported(folder) if own.exists() else {}
    if reports and min(reports, key=lambda r: reports[r]["time"]) == rank:
        return _said(reports[rank])
    return code


def _said(report: Mapping[str, Any]) -> int:
    """Pass on what a worker reported: raise its problem, or print that it was stopped and has saved."""
    if report["message"] and report["code"] != OK:
        raise UserError(report["message"], report["code"])
    if report["message"]:
        print(report["message"], file=sys.stderr, flush=True)
    return report["code"]


def _arguments(recipe: Recipe, stages: Sequence[str], allow_failed_gate: bool) -> list[str]:
    """A worker's command line after the module's name."""
    resolved = str(Path(recipe.run.dir) / RESOLVED)
    return [resolved, *stages, *(["--allow-failed-gate"] if allow_failed_gate else [])]


def clear_errors(folder: Path) -> None:
    """Remove what workers of an earlier start reported."""
    for pattern in ("rank*", "stalled*", CAUSE):
        for path in (folder / "errors").glob(pattern):
            path.unlink()


def reported(folder: Path) -> dict[int, dict[str, Any]]:
    """Rank -> {"time", "message", "code", "died"} of every worker that reported its end."""
    reports = {}
    for path in (folder / "errors").glob("rank*.json"):
        reports[int(path.stem.removeprefix("rank"))] = json.loads(path.read_text())
    return reports


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            reason = f"cannot be used on this machine ({error.strerror})"
            raise UserError(f"launch.port = {port}: {reason}; choose another, or 0 for a free one") from error


def _supervise(world: int, port: int, command: list[str], folder: Path) -> int:
    # A C++ warning about each address that localhost does not resolve to; errors still show.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // world)))
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world,
        run_id=f"halfbyte-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint=f"localhost:{port}",
        local_addr="localhost",
        max_restarts=0,
        signals_to_handle="SIGQUIT",  # ours are the others
    )
    with _forwarded_signals() as received, _quiet():
        try:
            elastic_launch(config, command[0])(*command[1:])
            stopped = list(reported(folder).values())  # saved on SIGTERM, which is no failure
            return _said(min(stopped, key=lambda report: report["time"])) if stopped else OK
        except ChildFailedError as error:
            failures = {rank: (failure.exitcode, failure.timestamp) for rank, failure in error.failures.items()}
        except SignalException as error:
            raise UserError(f"stopped by {error.sigval.name}: the workers were stopped without saving") from None
        except RendezvousError as error:
            reason = f"{error}".splitlines()[0]
            raise UserError(f"launch.port = {port}: rendezvous failed ({reason}); choose another port") from None
    return explain(failures, reported(folder), received)


def explain(
    failures: Mapping[int, tuple[int, float]], reports: Mapping[int, dict[str, Any]], received: list[str]
) -> int:
    """One cause out of many dead workers.

    Args:
        failures: Rank -> (exit code, negative for a signal; time of death, whole seconds since 1970).
        reports: What workers left in the errors folder.
        received: Names of the signals that were passed on.

    Returns:
        The first dead worker's exit code, if it had nothing to say.

    Raises:
        Died: the cause, where another start may help.
        UserError: the cause, with its exit code.
    """
    first_time = min(at for _, at in failures.values())
    first = [rank for rank, (_, at) in failures.items() if at <= first_time + TOGETHER_S]
    # A worker killed from outside leaves no report, but its peers soon report a lost connection: blame the victim.
    asked = {-signal.SIGTERM, -signal.SIGINT}
    killed = [r for r in first if failures[r][0] < 0 and failures[r][0] not in asked and r not in reports]
    if killed and not received:
        name = signal.Signals(-failures[killed[0]][0]).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        raise Died(f"rank {killed[0]} was killed by {name}{hint}", LOST)
    # The agent stops the others when one has failed: what they say then is no cause.
    causes = [report for report in reports.values() if received or report["code"] != OK]
    if causes:
        report = min(causes, key=lambda item: item["time"])
        if report["died"] and not received:
            raise Died(report["message"], report["code"])
        return _said(report)
    if len(received) > 1:
        raise UserError(f"killed by a second {received[1]}: the newest complete checkpoint stands")
    if received:
        raise UserError(f"stopped by {received[0]}: finished stages are kept, the running one is not saved")
    code = failures[first[0]][0]
    if code == FAILED or code < 0:
        log = f"logs/rank{first[0]}.log"
        raise UserError(f"rank {first[0]} ended with code {code} and left no message: its output is above or in {log}")
    return code


@contextmanager
def _forwarded_signals() -> Iterator[list[str]]:
    """Pass the first SIGINT, SIGTERM or SIGHUP on to the workers, which save and end by themselves; a second one kills.

    Workers live in sessions of their own, so a Ctrl-C on the terminal reaches them only through here.
    """
    import psutil

    received: list[str] = []
    this = psutil.Process()

    def handle(number: int, _frame: object) -> None:
        name = signal.Signals(number).name
        workers = this.children()
        if not workers:
            raise UserError(f"stopped by {name} before the workers started")
        received.append(name)
        # A closed terminal asks for the same as SIGTERM does, and workers need not know a third signal.
        passed = signal.SIGTERM if number == signal.SIGHUP else number
        for process in workers:
            with suppress(ProcessLookupError, psutil.NoSuchProcess):  # it may just have ended
                if len(received) == 1:
                    process.send_signal(passed)
                else:
                    os.killpg(process.pid, signal.SIGKILL)  # the group, so that its checkpoint writers end too
        if len(received) == 1:
            print(f"{name}: waiting for the workers to save; once more kills them", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the agent's own logging off the screen: each worker already says what went wrong, in one line."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
