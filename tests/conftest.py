"""What several test files share: the command line in a subprocess, and a tiny model."""

import os
import subprocess
import sys
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


@pytest.fixture
def halfbyte(command, environment, tmp_path):
    """Run the command line to its end: halfbyte("run", "tiny", ...) -> CompletedProcess with text output."""

    def run(*args: str, cwd: Path = tmp_path, timeout: float = 240, env: dict | None = None, preexec_fn=None):
        return subprocess.run(
            [*command, *map(str, args)],
            cwd=cwd,
            env=environment | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
            preexec_fn=preexec_fn,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A fetched tiny Llama; copy it before changing it."""
    from halfbyte.training.fetch import fetch

    return fetch("tiny", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def reported_run(command, environment, tmp_path_factory) -> Path:
    """A finished run of the tiny recipe with its report; copy it before changing it."""
    place = tmp_path_factory.mktemp("reported")
    options = ("train.steps=3", "evaluate.tasks.english.limit=8", "verify.items=2", "gate.judges=trained")
    done = subprocess.run(
        [*command, "run", "tiny", *options, "run.wandb=disabled", "run.dir=run", "--allow-failed-gate"],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return place / "run"
