"""A process that has imported everything once and forks for every command line that a test gives it.

What runs is `halfbyte`, but for two things: nothing is imported again (8 s of CPU in every process), and the workers of
a run are forks too instead of torchrun's children. Tests of starting, stopping and killing use the real command.

Reads one JSON per line, {"argv", "script", "ranks", "cwd", "env", "file_size", "stdout", "stderr"}; answers with the
child's process id, which leads a process group, and with its exit code. With "script" the child runs that file in so
many ranks; with "file_size" (bytes) no file may grow beyond it.
"""

import atexit
import json
import os
import resource
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    """Serve until standard input ends."""
    import lm_eval.api.task  # noqa: F401 - imported for the children
    from wandb.sdk.data_types._private import MEDIA_TMP

    import halfbyte.launch.report
    import halfbyte.launch.stages
    import halfbyte.training.experiment
    import halfbyte.training.lm_tasks  # noqa: F401

    MEDIA_TMP._finalizer.detach()  # a folder made at import, which the first child to exit would remove
    atexit.unregister(MEDIA_TMP.cleanup)
    print("ready", flush=True)
    for line in sys.stdin:
        pid = _fork(lambda line=line: _command(**json.loads(line)))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    MEDIA_TMP.cleanup()
    os._exit(0)


def _fork(work: Callable[[], int]) -> int:
    """Run `work` in a child, which exits with what it returns; the child's process id."""
    pid = os.fork()
    if pid == 0:
        sys.exit(work())  # not os._exit: what libraries do at exit belongs to a run
    return pid


def _command(
    argv: list[str],
    script: str | None,
    ranks: int,
    cwd: str,
    env: dict[str, str],
    file_size: int | None,
    stdout: str,
    stderr: str,
) -> int:
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, stdout, os.O_WRONLY), (2, stderr, os.O_WRONLY)):
        os.dup2(os.open(name, flags | (os.O_CREAT if number else 0)), number)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if script is None:
        from halfbyte.launch import cli, start

        start._supervise = _supervise
        return cli.main(argv)
    sys.argv = [script, *argv]
    if ranks == 1:
        runpy.run_path(script, run_name="__main__")
        return 0
    failures = _together(ranks, 0, lambda: runpy.run_path(script, run_name="__main__"))
    return max((abs(code) for code, _ in failures.values()), default=0)


def _together(world: int, port: int, work: Callable[[], Any]) -> dict[int, tuple[int, float]]:
    """Run `work` in `world` ranks; rank -> (exit code, time) of those that failed, after which all others are ended."""
    with socket.socket() as probe:
        probe.bind(("localhost", port))
        port = port or probe.getsockname()[1]
    ranks = {_fork(lambda rank=rank: _rank(rank, world, port, work)): rank for rank in range(world)}
    failures: dict[int, tuple[int, float]] = {}
    while ranks:
        pid, status = os.wait()
        rank, code = ranks.pop(pid), os.waitstatus_to_exitcode(status)
        if code:
            failures[rank] = (code, int(time.time()))
            for other in ranks:
                os.kill(other, signal.SIGTERM)
    return failures


def _rank(rank: int, world: int, port: int, work: Callable[[], Any]) -> int:
    from halfbyte.training import environment

    environment.die_with_parent()
    layout = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(value) for name, value in layout.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    code = work()
    return code if isinstance(code, int) else 0


def _supervise(world: int, port: int, command: list[str], folder: Path) -> int:
    """As start._supervise: all workers or, after the first failure, none; one exit code or one message."""
    from halfbyte.launch import pipeline, start

    words = command[command.index("halfbyte.launch.pipeline") + 1 :]
    failures = _together(world, port, lambda: pipeline.worker(words))
    if failures:
        return start.explain(failures, start.reported(folder), [])
    stopped = list(start.reported(folder).values())
    return start._said(min(stopped, key=lambda report: report["time"])) if stopped else 0


if __name__ == "__main__":
    main()
