"""The soak's verdict; the soak itself runs by hand (docs/evidence/faults.md)."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from halfbyte.bench import soak

REFERENCE = soak.Outcome(0, 40.0, [2.0, 1.0], "abc")


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ({}, 0, "| 1 | rank 1 after step_00000002, rank 0 after no checkpoint | 0 | 60 | 10 | equal |"),
        ({"losses": [2.0, 1.5]}, 1, "differ, losses by 0.5 |"),
        ({"weights": "abd"}, 1, "differ, losses by 0 |"),
        ({"code": 1, "losses": []}, 1, "| 1 | 60 | 10 | differ, losses by nan |"),
    ],
)
def test_one_run_that_differs_fails_the_soak(monkeypatch, capsys, tmp_path, change, code, says):
    kills = ["rank 1 after step_00000002", "rank 0 after no checkpoint"]
    disturbed = dataclasses.replace(REFERENCE, seconds=60.0, kills=kills, **change)
    monkeypatch.setattr(soak, "run", lambda *args: REFERENCE if args[3] is None else disturbed)
    monkeypatch.setattr(soak.torch.cuda, "is_available", lambda: False)
    moments = iter([0.0, 1.0, 61.0])  # the start, before the first run, and then the minute is over
    monkeypatch.setattr(soak.time, "perf_counter", lambda: next(moments))
    assert soak.main(["1", "--folder", str(tmp_path)]) == code
    assert says in capsys.readouterr().out.splitlines()[-1]


def test_nothing_but_workers_is_killed():
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(30)'])"
    launcher = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    try:
        time.sleep(0.5)
        assert soak._worker(launcher.pid, random.Random(0)) is None  # a helper, not a worker
    finally:
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
    assert soak._worker(launcher.pid, random.Random(0)) is None  # gone
