"""Starting workers: exit codes, messages, signals, ports. The workers are small scripts that play their parts."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from halfbyte.launch import pipeline
from halfbyte.launch.start import Died, clear_errors, explain, inside_launcher, launch
from halfbyte.training import environment, resolve
from halfbyte.training.config import Recipe
from halfbyte.training.errors import (
    CAUSE,
    FAILED,
    GATE_FAILED,
    GATE_INCONCLUSIVE,
    HUNG,
    LOST,
    OK,
    USAGE,
    RecipeError,
    UserError,
)
from halfbyte.training.interrupt import Interrupted

WORKER = """\
import json, os, pathlib, signal, sys, time

rank, part, folder = int(os.environ["RANK"]), sys.argv[1], pathlib.Path(sys.argv[2]).parent


def report(message, code):
    (folder / "errors").mkdir(exist_ok=True)
    content = json.dumps({"time": time.time(), "message": message, "code": code, "died": False})
    (folder / "errors" / f"rank{rank}.json").write_text(content)


def save(number, frame):
    time.sleep(0.5)
    (folder / f"saved{rank}").write_text(signal.Signals(number).name)
    report(f"saved on {signal.Signals(number).name}", 1)
    sys.exit(1)


def obey(handler):
    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)
    (folder / f"ready{rank}").touch()
    time.sleep(60)


if part == "facts":
    facts = {"argv": sys.argv[2:], "world": os.environ["WORLD_SIZE"], "threads": os.environ["OMP_NUM_THREADS"]}
    (folder / f"facts{rank}.json").write_text(json.dumps(facts))
elif part == "exits" and rank == 0:
    sys.exit(int(sys.argv[3]))
elif part == "reports":
    if rank == 0:  # loses its peer, and says so later
        time.sleep(0.3)
        report("connection closed by peer", 1)
    else:
        report("data.jsonl line 3: not JSON", 2)
    sys.exit(2 if rank else 1)
elif part == "killed":
    with (folder / f"starts{rank}").open("a") as starts:
        starts.write(".")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3)
    report("connection closed by peer", 1)
    sys.exit(1)
elif part == "saves":
    obey(save)
elif part == "stubborn":
    obey(lambda number, frame: (folder / f"ready{rank}").touch())
    time.sleep(60)
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    for name in ("RANK", "SLURM_PROCID", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that what launch() sets is undone after the test
        monkeypatch.delenv(name)
    (tmp_path / "worker.py").write_text(WORKER)
    made = Recipe()
    made.launch.max_restarts = 0
    made.run.dir = str(tmp_path)
    made.parallel.pipeline = 2
    return made


def entry(recipe, part):
    return [sys.executable, f"{recipe.run.dir}/worker.py", part]


@pytest.mark.slow
def test_every_worker_gets_its_place_and_its_share_of_the_cores(recipe, tmp_path):
    (tmp_path / "errors").mkdir()
    (tmp_path / "errors/rank7.json").write_text('{"time": 0, "message": "of an earlier start", "code": 1}')
    stages = ["train", "gate"]
    assert launch(recipe, stages, allow_failed_gate=True, entry=entry(recipe, "facts")) == OK
    for rank in range(2):
        facts = json.loads((tmp_path / f"facts{rank}.json").read_text())
        assert facts["argv"] == [str(tmp_path / "resolved.yaml"), *stages, "--allow-failed-gate"]
        assert facts["world"] == "2"
        assert int(facts["threads"]) == max(1, len(os.sched_getaffinity(0)) // 2)
    assert not list((tmp_path / "errors").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("code", [GATE_FAILED, GATE_INCONCLUSIVE])
def test_verdicts_come_back_as_exit_codes(recipe, code, capfd):
    assert launch(recipe, [str(code)], entry=entry(recipe, "exits")) == code
    assert capfd.readouterr().err == ""  # no traceback, no agent's log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "code", "says"),
    [
        ("reports", USAGE, "data.jsonl line 3: not JSON"),  # the earliest, not the lowest rank
        ("killed", LOST, r"rank 1 was killed by SIGKILL \(out of memory\?\)"),  # not what its peer noticed
        ("exits", FAILED, "rank 0 ended with code 1 and left no message"),
    ],
)
def test_one_cause_comes_back(recipe, part, code, says, capfd):
    with pytest.raises(UserError, match=f"^{says}") as caught:
        launch(recipe, ["1"], entry=entry(recipe, part))
    assert caught.value.code == code
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_what_died_is_started_again_but_not_for_ever(recipe, tmp_path, capfd):
    recipe.launch.max_restarts = 1
    with pytest.raises(UserError, match=r"^rank 1 was killed by SIGKILL .*: resume with the same command"):
        launch(recipe, [], entry=entry(recipe, "killed"))
    assert (tmp_path / "starts1").read_text() == ".."
    said = "rank 1 was killed by SIGKILL (out of memory?): restart 1 of 1 from the newest checkpoint\n"
    assert capfd.readouterr().err == said


REPORTS = {
    "hung": ({"message": "rank 1 hangs", "code": HUNG, "died": True}, Died),
    "a full disk": ({"message": "not saved", "code": FAILED, "died": False}, UserError),
    "a lost device": ({"message": "uncorrectable ECC error", "code": LOST, "died": True}, Died),
}


@pytest.mark.parametrize("what", REPORTS)
def test_only_what_may_not_happen_again_is_started_again(what):
    report, kind = REPORTS[what]
    failures = {0: (report["code"], 10.0), 1: (-signal.SIGTERM, 12.0)}
    # The agent stopped rank 1, which says so before rank 0's file is read.
    reports = {0: report | {"time": 9.0}, 1: {"time": 8.0, "message": "stopped by SIGTERM", "code": OK, "died": False}}
    with pytest.raises(UserError, match=report["message"]) as caught:
        explain(failures, reports, [])
    assert type(caught.value) is kind
    assert caught.value.code == report["code"]
    with pytest.raises(UserError) as caught:  # somebody wants it to end
        explain(failures, {0: reports[0]}, ["SIGTERM"])
    assert type(caught.value) is UserError


def start_driver(recipe, part):
    """`launch` in a process of its own, once its workers are ready for signals."""
    code = f"""
        from halfbyte.launch.start import launch
        from halfbyte.training.config import Recipe
        from halfbyte.training.errors import UserError
        recipe = Recipe()
        recipe.run.dir, recipe.parallel.pipeline = {recipe.run.dir!r}, 2
        try:
            launch(recipe, [], entry={entry(recipe, part)!r})
        except UserError as error:
            print(error)
    """
    driver = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    wait_for(recipe, "ready")
    return driver


def wait_for(recipe, name):
    deadline = time.monotonic() + 60
    files = [os.path.join(recipe.run.dir, f"{name}{rank}") for rank in range(2)]
    while not all(map(os.path.exists, files)):
        assert time.monotonic() < deadline, f"no {name}"
        time.sleep(0.05)
    return files


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "arrives"),
    [(signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGTERM")],
)
def test_a_signal_lets_all_workers_save(recipe, tmp_path, sent, arrives):
    driver = start_driver(recipe, "saves")
    driver.send_signal(sent)
    out, _ = driver.communicate(timeout=30)
    assert out == f"saved on {arrives}\n"
    assert [(tmp_path / f"saved{rank}").read_text() for rank in range(2)] == [arrives] * 2


@pytest.mark.slow
def test_a_second_signal_kills(recipe):
    driver = start_driver(recipe, "stubborn")
    for file in wait_for(recipe, "ready"):
        os.unlink(file)
    driver.send_signal(signal.SIGINT)
    wait_for(recipe, "ready")  # both have caught the first one and go on
    driver.send_signal(signal.SIGINT)
    out, _ = driver.communicate(timeout=10)
    assert out.startswith("killed by a second SIGINT")


@pytest.mark.slow
def test_killing_the_launcher_kills_a_worker_that_asked_for_it():
    child = (
        "import time; from halfbyte.training.environment import die_with_parent; die_with_parent(); "
        "print(flush=True); time.sleep(60)"
    )
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session=True)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    parent.stdout.readline()  # the child is ready
    parent.kill()
    started = time.monotonic()
    assert parent.stdout.read() == b""  # ends when the child, which holds the pipe, is gone
    assert time.monotonic() - started < 10


def test_a_taken_port_is_one_line(recipe):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        recipe.launch.port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"launch.port = {recipe.launch.port}: .*0 for a free one") as caught:
            launch(recipe, [], entry=["false"])
    assert caught.value.code == FAILED


def test_stopped_before_anyone_reported():
    failures = {0: (-signal.SIGTERM, 10.0), 1: (-signal.SIGKILL, 40.0)}
    with pytest.raises(UserError, match="stopped by SIGTERM"):
        explain(failures, {}, ["SIGTERM"])
    # Killed half a minute later is the agent's doing, not the cause.
    with pytest.raises(UserError, match="rank 0 ended with code -15"):
        explain(failures, {}, [])


@pytest.mark.parametrize(
    ("variables", "inside"),
    [
        ({}, False),
        ({"RANK": "0"}, True),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, False),  # a plain salloc shell
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, True),
    ],
)
def test_inside_torchrun_or_srun(monkeypatch, variables, inside):
    for name in ("RANK", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert inside_launcher() is inside


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "0"}, r"WORLD_SIZE is not set, but RANK says that .* or unset RANK: halfbyte then starts its own"),
        ({"RANK": "first"}, "RANK = 'first' is no number, but RANK says"),
        ({"RANK": "-1"}, "RANK = '-1' is no number"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "many"}, "SLURM_NTASKS = 'many' is no number, but SLURM_PROCID says"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "SLURM_LOCALID is not set, but SLURM_PROCID says"),
    ],
)
def test_another_programs_variables_are_named(monkeypatch, variables, says):
    """A pod or a shell that has RANK of its own: the launcher's variables come together or not at all."""
    for name in (*environment.TORCHRUN, *environment.SRUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^{says}") as caught:
        environment.coordinates()
    assert caught.value.code == USAGE


@pytest.mark.parametrize(("rank", "speaks"), [(0, False), (1, True)])
def test_under_srun_only_the_first_to_fail_speaks(recipe, tmp_path, monkeypatch, rank, speaks):
    for name, value in {"PROCID": rank, "NTASKS": 2, "LOCALID": rank}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    called = []

    def worker(argv):
        called.extend(argv)
        (tmp_path / "errors").mkdir()
        for who, when in ((0, 2.0), (1, 1.0)):
            report = {"time": when, "message": f"of {who}", "code": USAGE, "died": False}
            (tmp_path / f"errors/rank{who}.json").write_text(json.dumps(report))
        return USAGE

    monkeypatch.setattr(pipeline, "worker", worker)
    if speaks:
        with pytest.raises(UserError, match="of 1"):
            launch(recipe, ["train"])
    else:
        assert launch(recipe, ["train"]) == USAGE
    assert called == [str(tmp_path / "resolved.yaml"), "train"]


FULL = (
    "CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has a total capacity of 139.80 GiB of which 1.06 GiB is "
    "free. Including non-PyTorch memory, this process has 24.1 GiB memory in use. See documentation."
)


def full() -> None:
    raise torch.OutOfMemoryError(FULL)


def full_in_a_capture() -> None:
    try:
        full()
    finally:
        raise torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize("fails", [full, full_in_a_capture])
def test_a_full_gpu_is_one_line_with_a_remedy_and_no_reason_to_start_again(fails, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(resolve, "load", lambda *_: recipe)
    monkeypatch.setattr(pipeline, "run_stages", lambda *_, **__: fails())
    assert pipeline.worker([str(tmp_path / "resolved.yaml"), "train"]) == FAILED
    report = json.loads((tmp_path / "errors" / "rank0.json").read_text())
    assert report["message"].startswith("GPU memory ran out (CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has")
    assert "lower train.micro_batch" in report["message"]
    assert "\n" not in report["message"]
    assert not report["died"]
    assert (tmp_path / "errors" / CAUSE).read_text() == f"{FAILED}\n"


@pytest.mark.parametrize(
    ("error", "code", "cause"),
    [
        (RecipeError(["data.train: missing"]), USAGE, True),
        (UserError("no space left"), FAILED, True),
        (Interrupted("stopped by SIGTERM: finished stages are kept"), FAILED, False),  # perhaps by srun
        (Interrupted("stopped by SIGTERM: checkpoint saved", announced=True), OK, False),
        (torch.distributed.DistBackendError("NCCL error: remote process exited"), LOST, False),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error"), LOST, False),
        (RuntimeError("Connection closed by peer"), FAILED, False),
    ],
)
def test_a_worker_leaves_a_cause_that_is_no_peers_end(error, code, cause, recipe, tmp_path, monkeypatch):
    """srun's own code may be that of a process that it killed because this one had failed."""

    def stages(*_, **__):
        raise error

    monkeypatch.setattr(resolve, "load", lambda *_: recipe)
    monkeypatch.setattr(pipeline, "run_stages", stages)
    assert pipeline.worker([str(tmp_path / "resolved.yaml"), "train"]) == code
    left = tmp_path / "errors" / CAUSE
    assert (left.read_text() if left.exists() else None) == (f"{code}\n" if cause else None)
    if cause:  # who comes second does not overwrite it
        monkeypatch.setattr(pipeline, "run_stages", lambda *_, **__: full())
        pipeline.worker([str(tmp_path / "resolved.yaml"), "train"])
        assert left.read_text() == f"{code}\n"
    clear_errors(tmp_path)
    assert not list((tmp_path / "errors").glob("cause"))
