"""The soak's kills and its verdict; the soak itself runs by hand (docs/evidence/faults.md)."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from halfbyte.bench import soak, soak_table
from halfbyte.training import retention

LAUNCHER = """
import subprocess, sys
worker = [sys.executable, "-c", "import time; time.sleep(30)", "halfbyte.launch.pipeline"]
for rank in "0102":
    code = subprocess.run(worker, env={"RANK": rank}).returncode
    assert code == -9, code
"""
"""Starts a worker again when it is killed; done with the fourth kill."""


def outcome(folder, losses=(2.0, 1.0), seconds=40.0, kills=(), saves=()):
    return soak_table.Outcome(folder, 0, seconds, 10.0, list(losses), list(kills), len(kills), list(saves))


def test_workers_are_killed_in_training_and_in_saves_until_the_run_ends(tmp_path):
    run = tmp_path / "disturbed"
    (run / "checkpoints" / "step_00000005").mkdir(parents=True)
    retention.point(run / "checkpoints" / "step_00000005")
    (run / "checkpoints" / ".step_00000004.tmp").mkdir()
    os.utime(run / "checkpoints" / ".step_00000004.tmp", (1, 1))  # left by an earlier kill: no save
    later = time.time() + 1e6
    (run / "metrics.jsonl").write_text(json.dumps({"step": 7, "time": later}) + "\n")
    busy = soak.Soak([], tmp_path, time.monotonic() + 1e6, 10)
    kills = soak.Kills(busy, random.Random(0), 0.3, outcome(run))
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER])
    struck = kills.until_done(process, run)
    assert process.wait() == 0
    assert [(kill.rank, kill.moment, kill.checkpoint, kill.repeated) for kill in struck] == [
        (rank, "training", 5, 2) for rank in "0102"
    ]
    (run / "checkpoints" / ".step_00000010.tmp").mkdir()
    assert [soak_table.moment(0, saving=False), soak_table.moment(7, saving=soak.saves(run, 0))] == ["start", "save"]


def test_a_run_that_needs_all_the_time_that_is_left_is_not_killed(tmp_path):
    busy = soak.Soak([], tmp_path, time.monotonic() + 50, 10)  # 1.5 x 40 s are needed
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER], start_new_session=True)
    try:
        assert soak.Kills(busy, random.Random(0), 0.1, outcome(tmp_path)).until_done(process, tmp_path) == []
        assert soak.worker(process.pid, random.Random(0)) is not None
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_nothing_but_workers_is_killed():
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(30)'])"
    launcher = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    try:
        time.sleep(0.5)
        assert soak.worker(launcher.pid, random.Random(0)) is None  # a helper, not a worker
    finally:
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
    assert soak.worker(launcher.pid, random.Random(0)) is None  # gone


@pytest.fixture
def judged(monkeypatch, tmp_path):
    """judge() of three runs: what their final weights are beside those of the first, their losses."""

    def make(second: float, third: float, loss: float = 1.0) -> dict:
        runs = {}
        for name, moved in (("undisturbed_1", 0.0), ("undisturbed_2", second), ("disturbed", third)):
            folder = tmp_path / name / "checkpoints" / "step_00000002"
            folder.mkdir(parents=True)
            runs[folder] = moved
        weights = torch.tensor([1.0, 2.0, 3.0, 4.0])

        def read_weights(path, *_):
            yield SimpleNamespace(tensor=weights.bfloat16())
            yield SimpleNamespace(tensor=weights + torch.tensor([0.0, 0.0, 0.0, runs[path]]))

        monkeypatch.setattr(soak_table, "read_shape", lambda _: None)
        monkeypatch.setattr(soak_table, "read_weights", read_weights)
        kills = [soak_table.Kill(9.0, "0", "save", 1, 1), soak_table.Kill(20.0, "0", "start", 1, 0)]
        first, second_run = outcome(tmp_path / "undisturbed_1"), outcome(tmp_path / "undisturbed_2", seconds=42.0)
        third_run = outcome(tmp_path / "disturbed", (2.0, loss), 61.0, kills)
        return soak_table.judge([first, second_run, third_run], tmp_path)

    return make


@pytest.mark.parametrize(
    ("second", "third", "loss", "on_cpu", "on_gpu"),
    [
        (0.0, 0.0, 1.0, True, True),
        (0.0, 0.5, 1.0, False, False),
        (0.0, 0.0, 1.5, False, True),  # on a GPU the weights decide
        (0.5, 1.5, 1.0, False, True),  # 1.0 from the nearer one
        (0.5, 2.0, 1.0, False, False),
    ],
)
def test_the_spread_of_undisturbed_runs_decides(judged, second, third, loss, on_cpu, on_gpu):
    content = judged(second, third, loss)
    assert soak_table.verdict(content, gpu=False) is on_cpu
    assert soak_table.verdict(content, gpu=True) is on_gpu


def test_the_table_says_what_a_kill_costs(judged):
    content = judged(0.5, 1.5)
    assert content["spread"] == {"largest": 0.5, "rms": pytest.approx(0.5 / 8**0.5), "loss": 0.0}
    assert content["disturbed"]["largest"] == 1.0
    text = soak_table.document(content, {"CPU": "2 x some"})
    assert "| disturbed | 0 | 61 | 2 | 1.000000 | 2 | 2 | 1 |" in text
    assert "Lost per kill: 10.0 s." in text
    assert "| 1 | 9 | 0 | save | 1 | 1 |" in text


def test_the_table_says_what_saves_cost_training_without_the_last_one_which_it_waits_for(tmp_path):
    """Saves of 1 s, 2 s and 4 s; the last, of 9 s, is in the foreground."""
    stalls = {1.0: (0.1, 0.0), 2.0: (0.1, 0.0), 4.0: (3.0, 2.5), 9.0: (9.0, 0.0)}
    saves = [{"seconds": s, "stall_seconds": stall, "wait_seconds": wait} for s, (stall, wait) in stalls.items()]
    train = {"losses": [2.0], "seconds_per_step": [1.0], "checkpoints": saves}
    (tmp_path / "train.json").write_text(json.dumps(train))
    run = soak_table.left_by(tmp_path, 0, 20.0, [], 0)
    text = soak_table.document(soak_table.judge([run], tmp_path), {})
    assert "Saves beside training: 3; medians: 2.00 s, of which training stood still for 0.100 s (10.0%); at" in text
    assert "at most 3.000 s. 1 waited for" in text
    assert soak_table.cost_of_saves([]) is None


def test_a_soak_that_was_cut_off_keeps_what_it_has(monkeypatch, tmp_path):
    runs = iter([outcome(tmp_path / "undisturbed_1"), soak_table.Outcome(tmp_path / "b", -9, 5.0, 5.0, [], [], 0, [])])
    monkeypatch.setattr(soak, "write_model", lambda folder, gpu: folder)
    monkeypatch.setattr(soak, "run", lambda *_: next(runs))
    out = tmp_path / "soak.md"
    assert soak.main(["--seconds", "9", "--out", str(out), "--folder", str(tmp_path)]) == 1
    assert "| undisturbed_1 | 0 | 40 | 2 | 1.000000 | 0 | 0 | 0 |" in out.read_text()
    assert "| b | -9 | 5 | 0 | - | 0 | 0 | 0 |" in out.read_text()
    assert len(json.loads(out.with_suffix(".json").read_text())["runs"]) == 2
