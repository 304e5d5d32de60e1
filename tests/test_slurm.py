"""A run under a real Slurm: submitted, preempted after its first checkpoint, requeued, resumed, done.

Needs root and Debian's slurm-wlm, which .ci/run installs; it takes about a minute.
"""

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from halfbyte.launch import sbatch
from halfbyte.training.config import Recipe

PROGRAM = Path(__file__).with_name("workers") / "one_node_slurm.sh"
OPTIONS = (
    *("launch.gpus=false", "launch.gpus_per_node=2", "launch.partition=low", "launch.time=10"),
    *("parallel.pipeline=2", "method=bf16", "evaluate.tasks=[]", "run.wandb=disabled"),
    *("train.steps=40", "checkpoint.every_steps=2", "train.dtype=float64"),
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("slurmctld") is None, reason="no Slurm here (apt-get install slurm-wlm)"),
    pytest.mark.skipif(os.getuid() != 0, reason="a Slurm of its own needs root"),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Environment of commands that talk to a Slurm on this machine."""
    folder = tmp_path_factory.mktemp("slurm")
    folder.parent.chmod(0o755)
    subprocess.run([PROGRAM, "start", folder], check=True, timeout=60)
    yield {"SLURM_CONF": str(folder / "slurm.conf")}
    subprocess.run([PROGRAM, "stop", folder], check=True, timeout=60)


def wait_for(found, what: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.1)


def test_preempted_requeued_resumed_done(halfbyte, slurm, tmp_path):
    straight, run = tmp_path / "straight", tmp_path / "my #1 run, 50% 'quoted'"
    done = halfbyte("submit", "tiny", "--nodes", "1", *OPTIONS, f"run.dir={run}", env=slurm, fresh=True)
    assert done.returncode == 0, done.stderr
    number = re.search(r"submitted as job (\d+)", done.stdout)[1]
    wait_for((run / "checkpoints" / "step_00000002").exists, "checkpoint")
    urgent = ["sbatch", "--parsable", "--partition=high", "--ntasks=2", "--output=/dev/null", "--wrap=sleep 1"]
    subprocess.run(urgent, check=True, env=os.environ | slurm, capture_output=True)
    wait_for(lambda: "stopped by SIGTERM after step" in (run / f"slurm-{number}.log").read_text(), "saving")
    assert re.search(rf"job {number} tiny (RUN|COMPL|PEND)", halfbyte("status", str(run), env=slurm, fresh=True).stdout)
    followed = halfbyte("status", str(run), "--follow", env=slurm, fresh=True)
    assert followed.returncode == 0, followed.stderr
    assert "  no job in the queue\n  checkpoint after step 40 of 40\n  done: train, gate\n" in followed.stdout
    log = (run / f"slurm-{number}.log").read_text()
    saved = re.search(r"stopped by SIGTERM after step (\d+) of 40: checkpoint saved", log)
    assert f"40 steps (from {saved[1]})" in log
    assert "Traceback" not in log
    done = halfbyte("run", "tiny", *OPTIONS, f"run.dir={straight}")
    assert done.returncode == 0, done.stderr
    losses = [json.loads((folder / "train.json").read_text())["losses"] for folder in (run, straight)]
    assert losses[0] == losses[1]  # exactly


def test_what_would_only_come_again_ends_its_array_and_what_depends_on_it(slurm, tmp_path):
    """The script itself, with a small program in halfbyte's place: a lost process is tried again, a bad file is not."""
    made, run = Recipe(), tmp_path / "my run"
    made.run.name, made.run.dir, made.launch.max_restarts = "x", str(run), 0
    made.launch.gpus, made.launch.partition = False, "low"
    (tmp_path / "halfbyte").write_text(
        f"#!/bin/bash\ncd '{run}'\necho >> starts\n[ $(wc -l < starts) = 1 ] && exit 6\nexit 2\n"
    )
    (tmp_path / "halfbyte").chmod(0o755)
    run.mkdir()
    (job,) = sbatch.jobs(made, run / "submit.yaml", 1, array=4)
    script = run / "submit.sbatch"
    script.write_text(sbatch.text(made, job, programs=str(tmp_path), revision=None, here=tmp_path))

    def slurm_says(*command: str) -> str:
        done = subprocess.run(command, check=True, env=os.environ | slurm, capture_output=True, text=True)
        return done.stdout.strip()

    number = slurm_says("sbatch", "--parsable", str(script))
    after = ["--partition=low", f"--dependency=afterok:{number}_4", "--kill-on-invalid-dep=yes", "--output=/dev/null"]
    dependent = slurm_says("sbatch", "--parsable", *after, "--wrap=true")
    wait_for(lambda: not slurm_says("squeue", "--noheader"), "end", 60)
    assert (run / "starts").read_text() == "\n\n"
    assert "JobState=CANCELLED Reason=DependencyNeverSatisfied" in slurm_says("scontrol", "show", "job", dependent)
