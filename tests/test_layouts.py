"""The layout does not change the numbers, and a stop does not either: runs of the tiny recipe on gloo.

Float64, because FP4 rounding is discontinuous: in FP32 another summation order may flip a code (docs/decisions.md).
"""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
FAST = (
    "run.wandb=disabled",
    "verify.items=0",
    "evaluate.tasks.lambada.limit=8",
    "evaluate.tasks.english.limit=4",
    "gate.judges=trained",
    "quantize.kv_cache=nvfp4",
    "train.block_scale_lr_mult=50",
    "gate.perplexity_ratio=1e100",  # a few items of random weights
    "telemetry.quantization_every_steps=3",
)
LAYOUTS = {
    "tp2_sp": ("parallel.tensor=2", "parallel.sequence=true"),
    "pp2": ("parallel.pipeline=2",),
    "pp2_uneven": ("parallel.pipeline=2", "parallel.last_stage_layers=1"),
    "dp2": ("parallel.data=2",),
}


def statistics(run: Path, *sides: str) -> dict[str, float]:
    """What the last step of a run recorded about every quantized layer."""
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    layers = last["layers"].items()
    return {f"{k}.{s}.{name}": x for k, layer in layers for s in sides for name, x in layer[s].items()}


def losses(run: Path) -> list[float]:
    return json.loads((run / "train.json").read_text())["losses"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def reference(place) -> Path:
    """Folder of the float64 run in one process; test_one_process makes it."""
    return place / "one"


def test_one_process(halfbyte, place, reference):
    done = halfbyte("run", "tiny", *FAST, "train.steps=6", "train.dtype=float64", f"run.dir={reference}", cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    values = losses(reference)
    assert len(values) == 6
    assert len(set(values)) == 6  # the weights move


@pytest.fixture
def finished(halfbyte, place):
    """Folder of the float64 run of six steps under a layout; the first test that asks for it makes it."""

    def make(layout: str) -> Path:
        run = place / layout
        if not (run / "train.json").exists():
            options = (*FAST, *LAYOUTS[layout], "train.steps=6", "train.dtype=float64", f"run.dir={run}")
            done = halfbyte("run", "tiny", *options, cwd=place)
            assert done.returncode == 0, done.stdout + done.stderr
        return run

    return make


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_losses_and_scales(finished, reference, layout):
    run = finished(layout)
    assert losses(run) == pytest.approx(losses(reference), abs=1e-6)
    mine, one = (json.loads((folder / "quantize.json").read_text()) for folder in (run, reference))
    scales = [{key: layer["scale_2"] for key, layer in content["layers"].items()} for content in (mine, one)]
    assert scales[0] == scales[1]
    sides = ("weight",) if layout == "dp2" else ("weight", "input")  # a data-parallel rank looks at its own micro-batch
    assert len(statistics(reference, *sides)) == 16 * 3 * len(sides)
    assert statistics(run, *sides) == pytest.approx(statistics(reference, *sides), rel=1e-5)
    assert len(one["caches"]) == 4
    assert mine["caches"] == one["caches"]


def test_a_run_of_tp2_from_the_archive_of_pp2_exports_the_same_bytes(halfbyte, finished, place):
    """Through a .nemo archive, learned block scales and the cache's scales included."""
    run, again = finished("pp2"), place / "again"
    done = halfbyte("export", run, "--format", "nemo", cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    plain = tuple(option for option in FAST if not option.startswith(("quantize.", "train.")))
    source = (f"model.path={run / 'export' / 'model.nemo'}", f"run.dir={again}", "method=ptq", "train.dtype=float64")
    done = halfbyte("run", "tiny", *plain, *source, "parallel.tensor=2", "verify.items=2", cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    files = [(folder / "export" / "hf" / "model.safetensors").read_bytes() for folder in (run, again)]
    assert files[0] == files[1]
    reports = [json.loads((folder / "quantize.json").read_text()) for folder in (run, again)]
    scales = [{key: layer["scale_2"] for key, layer in report["layers"].items()} for report in reports]
    assert scales[0] == scales[1]
    cached = [[side["scale"] for layer in report["caches"].values() for side in layer.values()] for report in reports]
    assert cached[0] == cached[1]
    before, after = (json.loads((folder / "evaluate.json").read_text()) for folder in (run, again))
    for task in ("lambada", "english"):
        assert after["ptq"][task]["perplexity"] == pytest.approx(before["qat"][task]["perplexity"], rel=1e-4), task


def start(command, environment, place: Path, *args: str) -> subprocess.Popen:
    """`halfbyte run tiny ...` in the background."""
    line = [*command, "run", "tiny", *FAST, *args]
    output = subprocess.PIPE
    return subprocess.Popen(line, cwd=place, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Return as soon as a folder of the run stands; fail if the run ends before."""
    deadline = time.monotonic() + 180
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, f"no {path} in three minutes"
        time.sleep(0.005)


RESTARTS = (
    r"rank 1 was killed by SIGKILL \(out of memory\?\): restart 1 of 4 from the newest checkpoint",  # in an update
    r"rank 0 was killed by SIGKILL .*: restart 2 of 4",  # in a layer's forward pass
    r"rank 0 was killed by SIGKILL .*: restart 3 of 4",  # while it writes step 4, and both train
    r"no progress for 12 s \(launch.hang_seconds\): rank 1 has not reached collective \d+ of group \d+ "
    r"\(PIPELINE_MODEL_PARALLEL_GROUP, ranks 0, 1\) in step 4, forward and backward, at training/module.py:\d+ "
    r"\(training_step\); rank 0 waits in send_forward .*: restart 4 of 4",
)


def test_a_run_that_is_killed_and_hangs_needs_nobody_and_is_bit_for_bit(place, finished, forks):
    straight, broken = finished("pp2"), place / "broken"
    options = ("train.steps=6", "train.dtype=float64", "checkpoint.every_steps=2", *LAYOUTS["pp2"])
    faults = ("launch.max_restarts=4", "launch.hang_seconds=12")
    worker = Path(__file__).with_name("workers") / "broken_run.py"
    done = forks.script(worker, *FAST, *options, *faults, f"run.dir={broken}", cwd=place)
    said = done.stderr.splitlines()
    assert len(said) == len(RESTARTS), done.stderr
    for line, expected in zip(said, RESTARTS, strict=True):
        assert re.match(expected, line), line
    # The starts before did not end, and the save of step 4 was completed in none of them.
    assert re.findall(r"steps \((from .*?)\)", done.stdout) == ["from 2"]
    assert losses(broken) == losses(straight)  # exactly
    weights = [(run / "export" / "hf" / "model.safetensors").read_bytes() for run in (straight, broken)]
    assert weights[0] == weights[1]
    assert not list((broken / "checkpoints").glob(".step_*"))


def test_ctrl_c_saves_under_tp2_and_pp2_goes_on(halfbyte, command, environment, place, reference):
    run = place / "moved"
    options = ("train.steps=6", "train.dtype=float64", "checkpoint.every_steps=2", f"run.dir={run}")
    process = start(command, environment, place, *options, *LAYOUTS["tp2_sp"])
    wait_for(run / "checkpoints" / "step_00000002", process)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert "checkpoint saved" in output
    assert "Traceback" not in output
    done = halfbyte("run", "tiny", *FAST, *options, *LAYOUTS["pp2"], cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(run) == pytest.approx(losses(reference), abs=1e-6)
