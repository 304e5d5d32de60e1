"""What several test files share: the command line in a subprocess, and a tiny model."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

THREADS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}


SLOW_FIRST = (
    "test_layouts.py",
    "test_run.py",
    "test_bad_input.py",
    "test_ptq_layouts.py",
    "test_ptq_run.py",
    "test_families.py",
    "test_report.py",
    "test_sensitivity.py",
    "test_methods.py",
    "test_four.py",
    "test_teacher_files.py",
    "test_freeze.py",
    "test_kernels.py",
    "test_lm_tasks.py",
    "test_lm_eval_run.py",
    "test_model.py",
    "test_harness.py",
    "test_generate.py",
)
"""A file runs in one of two workers: slow ones first, so that none is left over when the other worker is done."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first, otherwise as they are."""
    places = {name: place for place, name in enumerate(SLOW_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session")
def command() -> list[str]:
    """Start of a `halfbyte` command line: the console script of this environment."""
    return [str(Path(sys.executable).with_name("halfbyte"))]


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Environment of a started command: one thread per process, no launcher's variables."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MASTER_"))} | THREADS


class Forks:
    """Command lines in forks of a process that has imported everything already (workers/forks.py)."""

    def __init__(self, environment: dict[str, str]):
        self.environment = environment
        self.server: subprocess.Popen[str] | None = None

    def halfbyte(
        self, args: Sequence[str], cwd: Path, timeout: float, **further: object
    ) -> subprocess.CompletedProcess[str]:
        """As subprocess.run(["halfbyte", *args], capture_output=True, text=True, check=False).

        Args:
            args, cwd, timeout: As there.
            further: "env", variables on top of the usual ones; "file_size", bytes that no file may exceed.
        """
        return self._run(args, None, 1, cwd, timeout, **further)

    def script(
        self, path: Path, *args: object, ranks: int = 1, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a file of workers/ with its arguments, in one process or under a process group; it must succeed."""
        done = self._run([*map(str, args)], path, ranks, cwd or path.parent, 300)
        assert done.returncode == 0, done.stderr[-4000:]
        return done

    def _run(
        self,
        args: Sequence[str],
        script: Path | None,
        ranks: int,
        cwd: Path,
        timeout: float,
        *,
        env: dict[str, str] | None = None,
        file_size: int | None = None,
    ) -> subprocess.CompletedProcess[str]:
        server = self.server or self._start()
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder) / "stdout", Path(folder) / "stderr"
            request = {"argv": args, "script": script and str(script), "ranks": ranks, "cwd": str(cwd)}
            request |= {
                "env": self.environment | (env or {}),
                "file_size": file_size,
                "stdout": str(out),
                "stderr": str(err),
            }
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
            pid = int(server.stdout.readline())
            late = threading.Timer(timeout, os.killpg, (pid, signal.SIGKILL))
            late.start()
            code = int(server.stdout.readline())
            late.cancel()
            if code == -signal.SIGKILL:
                raise subprocess.TimeoutExpired(args, timeout, out.read_text(), err.read_text())
            return subprocess.CompletedProcess(args, code, out.read_text(), err.read_text())

    def _start(self) -> subprocess.Popen[str]:
        path = Path(__file__).parent / "workers" / "forks.py"
        line, pipe = [sys.executable, "-W", "ignore", str(path)], subprocess.PIPE
        self.server = subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True, env=self.environment)
        assert self.server.stdout.readline() == "ready\n"
        return self.server

    def close(self) -> None:
        """End the server, if it was needed."""
        if self.server is not None:
            self.server.stdin.close()
            self.server.wait(10)


@pytest.fixture(scope="session")
def forks(environment):
    """One Forks for all tests of this pytest process."""
    made = Forks(environment | {"CUDA_VISIBLE_DEVICES": ""})
    yield made
    made.close()


@pytest.fixture
def nobody_reads(monkeypatch) -> Callable[[], None]:
    """Makes standard output a pipe whose reader has gone; to be called in the test, for pytest sets it before that."""

    def leave() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))

    return leave


@pytest.fixture
def halfbyte(command, environment, forks, tmp_path):
    """Run the command line to its end: halfbyte("run", "tiny", ...) -> CompletedProcess with text output.

    In a fork, unless the test wants a `fresh` process: for the real start, and for variables that libraries read when
    they are imported. `file_size`: bytes that no file may exceed, as on a full disk.
    """

    def run(
        *args: str,
        cwd: Path = tmp_path,
        timeout: float = 240,
        env: dict | None = None,
        fresh: bool = False,
        file_size: int | None = None,
    ):
        assert not (fresh and file_size)
        if not fresh:
            return forks.halfbyte([*map(str, args)], cwd, timeout, env=env, file_size=file_size)
        return subprocess.run(
            [*command, *map(str, args)],
            cwd=cwd,
            env=environment | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A fetched tiny Llama; copy it before changing it."""
    from halfbyte.training.fetch import fetch

    return fetch("tiny", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def reported_run(forks, tmp_path_factory) -> Path:
    """A finished run of the tiny recipe with its report; copy it before changing it."""
    place = tmp_path_factory.mktemp("reported")
    options = ("train.steps=3", "evaluate.tasks.english.limit=8", "verify.items=2", "gate.judges=trained")
    fixed = ("run.wandb=disabled", "run.dir=run", "--allow-failed-gate")
    done = forks.halfbyte(["run", "tiny", *options, *fixed], place, 300)
    assert done.returncode == 0, done.stdout + done.stderr
    return place / "run"
