"""Bad input through the command line: one line that says what to do, the documented exit code, and nothing lost.

Cases that end before a process starts take a second each. The others start the tiny recipe on a small corpus, mostly
as the only worker of a launcher (`ONE`), which saves the start of a second process.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

ONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
SMALL = (
    "run.wandb=disabled",
    "quantize.calibration_samples=2",
    "train.global_batch=2",
    "evaluate.tasks.lambada.limit=2",
    "evaluate.tasks.english.limit=2",
    "verify.items=1",
    "gate.judges=trained",
    "gate.perplexity_ratio=1e100",  # two items of random weights
)
LIMIT = 1 << 20
"""Bytes that a file may have on the `full` disk: JSON fits, a checkpoint does not."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bad")


@pytest.fixture(scope="module")
def text(place) -> Path:
    """A corpus of a few windows."""
    path = place / "text.jsonl"
    path.write_text('{"text": "the cat sat on the mat and looked at the moon, and the moon looked back"}\n' * 60)
    return path


@pytest.fixture
def run(halfbyte, tiny_model, place, text):
    """halfbyte run tiny on the small corpus, in the shared folder."""

    def start(*args: str, alone: bool = True, **options):
        fixed = (*SMALL, f"data.train={text}", f"model.path={tiny_model}")
        return halfbyte("run", "tiny", *fixed, *args, cwd=place, env=ONE if alone else None, **options)

    return start


@pytest.fixture
def here(monkeypatch, capsys):
    """A command on files in this process, which has imported torch already; it puts signal handlers back."""
    from halfbyte.launch.cli import main

    monkeypatch.setattr("os.environ", os.environ.copy())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def start(*args: str) -> subprocess.CompletedProcess:
        code = main(args)
        said = capsys.readouterr()
        return subprocess.CompletedProcess(args, code, said.out, said.err)

    yield start
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def damaged_model(tiny_model, tmp_path):
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def error_lines(done, code: int, lines: int = 1) -> str:
    """Assert the exit code and that stderr holds `lines` lines, each an error; return them."""
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    assert "Traceback" not in output
    assert "traceback:" not in output
    found = done.stderr.splitlines()
    assert len(found) == lines, done.stderr
    assert all(line.startswith("error: ") for line in found), done.stderr
    return done.stderr


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# Recipes: exit code 2, before anything starts -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("quantize.calibration_samples=0", "quantize.calibration_samples = 0: .*give at least 1"),
        ("train.stepz=3", "train.stepz = 3: no such key; did you mean train.steps?"),
        ("train.steps=many", "train.steps = many: must be a whole number"),
        ("parallel.tensor=3", r"parallel.tensor = 3: does not divide .*heads \(\d+\).*use 1, 2"),
        ("parallel.pipeline=3", "parallel.pipeline = 3: does not divide the model's 4 layers; use 1, 2, 4"),
        ("data.train=nowhere.jsonl", "data.train = .*nowhere.jsonl: no such file; give"),
        ("train.steps", "train.steps: not of the form key=value"),
    ],
)
def test_a_bad_value_is_one_line_with_its_remedy(run, place, override, says):
    said = error_lines(run(override, "run.dir=runs/refused"), 2)
    assert re.search(f"^error: {says}", said), said
    assert not (place / "runs" / "refused").exists()


def test_several_problems_are_listed_at_once(run):
    bad = ("train.steps=many", "parallel.tensor=3", "quantize.calibration_samples=0", "gate.treshold_pp=1")
    said = error_lines(run(*bad), 2, lines=4)
    assert all(f"error: {word.replace('=', ' = ')}: " in said for word in bad)


def test_a_model_that_is_not_there(run, tmp_path):
    said = error_lines(run(f"model.path={tmp_path}/none", "model.fetch=null"), 2)
    assert f"model.path = {tmp_path}/none: lacks config.json, tokenizer.json, *.safetensors; put" in said


def test_fp4_blocks_must_divide_k(run, damaged_model):
    edit_json(damaged_model / "config.json", lambda config: config.update(intermediate_size=200))
    said = error_lines(run(f"model.path={damaged_model}"), 2)
    assert "quantize.format = nvfp4: blocks of 16 do not divide K = 200 of mlp.down_proj; exclude" in said


def test_a_port_in_use(run):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        said = error_lines(run(f"launch.port={port}", "run.dir=runs/port", alone=False), 1)
    assert f"launch.port = {port}: cannot be used" in said
    assert "choose another" in said


@pytest.mark.parametrize("stage", ["train", "evaluate", "gate", "export", "verify"])
def test_stage_commands_need_a_run(halfbyte, tmp_path, stage):
    said = error_lines(halfbyte(stage, str(tmp_path)), 2)
    assert f"{tmp_path}: holds no resolved.yaml; give the folder of a run" in said


# Models that cannot be used -------------------------------------------------------------------------------------------


def truncate(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def other_vocabulary(model: Path) -> None:
    edit_json(model / "config.json", lambda config: config.update(vocab_size=768))


def tokens_outside(model: Path) -> None:
    def shift(tokenizer):
        vocab = tokenizer["model"]["vocab"]
        vocab[" the" if " the" in vocab else "\u0120the"] = 900

    edit_json(model / "tokenizer.json", shift)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, "model.safetensors: corrupt weight file .*copy it again"),
        (other_vocabulary, r"has shape \[512, 128\], config.json asks for \[768, 128\]; .*do not belong together"),
        (tokens_outside, r"task lambada, item \d: token id 900 is outside the model's vocabulary of 512; .*model.path"),
    ],
)
def test_a_damaged_model(run, damaged_model, tmp_path, damage, says):
    damage(damaged_model)
    said = error_lines(run(f"model.path={damaged_model}", f"run.dir={tmp_path}/run", timeout=90), 1)
    assert re.search(says, said), said


@pytest.mark.slow
def test_one_process_fails_alone_and_both_end(run, damaged_model, tmp_path):
    """A NaN in the last layer: only the second pipeline stage sees it, the first one waits in a collective."""
    from safetensors.torch import load_file, save_file

    weights = load_file(damaged_model / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"][5, 7] = float("nan")
    save_file(weights, damaged_model / "model.safetensors", metadata={"format": "pt"})
    two = ("parallel.pipeline=2", f"model.path={damaged_model}", f"run.dir={tmp_path}/run")
    said = error_lines(run(*two, alone=False, timeout=90), 1)
    assert "decoder.layers.3.mlp.linear_fc2.weight holds NaN or Inf; the weights are damaged" in said


# Data -----------------------------------------------------------------------------------------------------------------


def chat(words: int) -> str:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "the cat " * words}]
    return json.dumps({"messages": turns}) + "\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "content", "says"),
    [
        ("data.train", "", "data.jsonl: holds no records; write one JSON object per line"),
        ("data.train", '{"text": "a"}\n\n{"text": \n', r"data.jsonl:3: not valid JSON \(.*; fix or drop it"),
        ("evaluate.tasks.english.data", '{"body": "a"}\n', "data.jsonl:1: no key 'text' .*among: body.*; set the key"),
        ("data.train", chat(3) + chat(80), r"data.jsonl:2: the conversation has \d+ tokens, a window 65 .*too_long"),
    ],
)
def test_bad_data_names_file_and_line(run, tmp_path, key, content, says):
    (tmp_path / "data.jsonl").write_text(content)
    said = error_lines(run(f"{key}={tmp_path}/data.jsonl", f"run.dir={tmp_path}/run", timeout=90), 1)
    assert re.search(says, said), said


@pytest.mark.slow
def test_long_conversations_can_be_cut(run, tmp_path):
    (tmp_path / "data.jsonl").write_text(chat(3) * 8 + chat(80))
    folder = tmp_path / "run"
    done = run(f"data.train={tmp_path}/data.jsonl", "data.too_long=truncate", "train.steps=1", f"run.dir={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(next((folder / "cache").glob("*/report.json")).read_text())
    assert (report["documents"], report["truncated"], report["dropped"]) == (9, 1, 0)


# A run folder: a full disk, damage, another recipe --------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_steps(place):
    """Folder of a run that has saved step 2; the first test that needs it makes it, copies are damaged."""
    return place / "two"


@pytest.fixture
def copy(run, two_steps, tmp_path) -> Path:
    """A copy of a finished run of two steps."""
    if not (two_steps / "verify.json").exists():
        done = run("train.steps=2", f"run.dir={two_steps}", alone=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return Path(shutil.copytree(two_steps, tmp_path / "run", symlinks=True))


LONGER = ("train.steps=4", "checkpoint.every_steps=2")


@pytest.mark.slow
def test_a_full_disk_keeps_the_previous_checkpoint(run, copy):
    two = ("parallel.pipeline=2", f"run.dir={copy}")
    said = error_lines(run(*LONGER, *two, alone=False, file_size=LIMIT, timeout=120), 1)
    assert f"{copy}/checkpoints/step_00000004 not saved ([Errno 27] File too large; " in said
    assert "the previous one stays; free space and start again" in said
    assert (copy / "checkpoints" / "last").resolve().name == "step_00000002"
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["last", "step_00000002"]
    done = run(*LONGER, *two, alone=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "(from 2)" in done.stdout
    assert json.loads((copy / "train.json").read_text())["steps"] == 4
    assert (copy / "checkpoints" / "last").resolve().name == "step_00000004"


@pytest.mark.slow
def test_kill_9_leaves_no_process_behind(command, environment, text, tiny_model, tmp_path):
    """Neither the worker nor what it has started outlives the launcher."""
    import psutil

    folder = tmp_path / "run"
    fixed = (*SMALL, "evaluate.tasks=[]", "method=bf16", f"data.train={text}", f"model.path={tiny_model}")
    options = ("train.steps=500", "checkpoint.every_steps=1", f"run.dir={folder}")
    line = [*command, "run", "tiny", *(word for word in fixed if not word.startswith("evaluate.tasks.")), *options]
    process = subprocess.Popen(line, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "last").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline, "no checkpoint in two minutes"
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    for left in alive:
        left.kill()
    assert not alive


@pytest.mark.slow
def test_a_stop_signal_to_every_process_saves_all_the_same(command, environment, text, tiny_model, tmp_path):
    """As Slurm preempts a job: SIGTERM to the launcher, the worker, and the helpers that it needs to save."""
    import psutil

    folder = tmp_path / "run"
    small = [word for word in SMALL if not word.startswith(("evaluate.tasks.", "run.wandb"))]
    fixed = (*small, "evaluate.tasks=[]", "method=bf16", f"data.train={text}", f"model.path={tiny_model}")
    options = ("train.steps=5000", "checkpoint.every_steps=2", "run.wandb=online", f"run.dir={folder}")
    line = [*command, "run", "tiny", *fixed, *options]
    alone = environment | {"HOME": str(tmp_path)}  # no key for W&B: it goes on offline
    process = subprocess.Popen(line, cwd=tmp_path, env=alone, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "last").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline, "no checkpoint in two minutes"
        time.sleep(0.05)
    for member in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    said = stderr.decode()
    assert process.returncode == 0, said
    found = re.search(r"^stopped by SIGTERM after step (\d+) of 5000: checkpoint saved", said, re.MULTILINE)
    assert found, said
    assert (folder / "checkpoints" / "last").resolve().name == f"step_{int(found[1]):08d}"
    assert "Traceback" not in said
    assert [line for line in said.splitlines() if line.startswith("warning: W&B cannot be reached (No API key")]
    assert list((folder / "wandb").glob("offline-run-*"))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_one_line_and_the_run_goes_on_from_an_older_one(run, copy, damaged_model):
    """The model has another place by now, which is no other model."""
    older, newer = (copy / "checkpoints" / f"step_{step:08d}" for step in (2, 3))
    shutil.copytree(older, newer)
    (copy / "checkpoints" / "last").unlink()
    (copy / "checkpoints" / "last").symlink_to(newer.name)
    shard = next(newer.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    done = run(*LONGER, f"run.dir={copy}", f"model.path={damaged_model}")
    assert done.returncode == 0, done.stdout + done.stderr
    reason = f"{shard.name} is not what was saved (SHA-256)"
    assert (
        f"  checkpoint {newer}: damaged ({reason}); set aside as damaged_{newer.name}, going on from {older.name}\n"
        in (done.stdout)
    )
    assert "(from 2)" in done.stdout
    assert sorted(path.name for path in newer.parent.iterdir()) == ["last", "step_00000002", "step_00000004"]


@pytest.mark.slow
def test_a_damaged_checkpoint_at_export(here, copy):
    last = (copy / "checkpoints" / "last").resolve()
    shard = next(last.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:1000])
    said = error_lines(here("export", str(copy)), 1)
    assert f"checkpoint {last}: damaged ({shard.name} has 1,000 bytes instead of" in said
    assert "remove it, and halfbyte run goes on from an older one" in said
    assert (copy / "export" / "hf" / "model.safetensors").exists()  # the old one stands


@pytest.mark.slow
@pytest.mark.parametrize("command", ["export", "run"])
def test_another_model_than_the_run_began_with(run, here, copy, tiny_model, command):
    edit_json(copy / "model.json", lambda content: content["model.path"].update(weights="of another model"))
    done = here("export", str(copy)) if command == "export" else run(*LONGER, f"run.dir={copy}", timeout=90)
    said = error_lines(done, 1)
    assert f"model.path = {tiny_model}: not the model that the run at {copy} began with (other: weights); put" in said
    assert (copy / "checkpoints" / "last").resolve().name == "step_00000002"
    assert (copy / "export" / "hf" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_damaged_quantize_json(run, copy):
    edit_json(copy / "quantize.json", lambda content: content.pop("layers"))
    said = error_lines(run(*LONGER, f"run.dir={copy}", timeout=90), 1)
    assert f"error: {copy}/quantize.json: damaged (no 'layers'); delete it" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("evaluate.json", '{"bf16": '),
        ("evaluate.json", "[1]"),
        ("evaluate.json", '{"bf16": 3}'),
        ("evaluate.json", '{"bf16": {"lambada": 3}}'),
        ("evaluate/qat.english.jsonl", '{"item": 0'),
        ("evaluate/qat.english.jsonl", ""),
    ],
)
def test_damaged_scores(here, copy, file, content):
    (copy / file).write_text(content)
    said = error_lines(here("gate", str(copy)), 1)
    assert re.search(rf"{file}|gate: ", said), said
    assert json.loads((copy / "gate.json").read_text())["verdict"] == "pass"  # the last good one


@pytest.mark.slow
@pytest.mark.parametrize("content", ["{}", "[]", '{"verdict": "maybe"}'])
def test_a_damaged_gate_json(here, copy, content):
    (copy / "gate.json").write_text(content)
    said = error_lines(here("export", str(copy)), 1)
    assert f"{copy}/gate.json: damaged" in said


@pytest.mark.slow
def test_a_folder_of_another_recipe(run, halfbyte, copy):
    before = (copy / "resolved.yaml").read_text()
    said = error_lines(run("train.steps=2", "train.learning_rate=0.5", f"run.dir={copy}"), 2)
    assert "train.learning_rate = 0.5: the run at" in said
    assert "has 0.001; keep that value or choose a new run.dir" in said
    error_lines(halfbyte("train", str(copy), "train.learning_rate=0.5"), 2)
    assert (copy / "resolved.yaml").read_text() == before


@pytest.mark.slow
def test_a_flipped_byte_is_found_and_its_tensor_named(halfbyte, copy):
    path = copy / "export" / "hf" / "model.safetensors"
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    name = "model.layers.2.self_attn.o_proj.weight_scale"
    begin, _ = json.loads(content[8 : 8 + header])[name]["data_offsets"]
    content[8 + header + begin + 3] ^= 1
    path.write_bytes(content)
    said = error_lines(halfbyte("verify", str(copy)), 1)
    assert said.startswith("error: verify failed: ")
    assert name.removesuffix("_scale") in said


@pytest.mark.slow
def test_a_worker_that_cannot_leave_a_report_still_speaks(halfbyte, copy):
    """What a full disk does to the folder of error reports."""
    shutil.rmtree(copy / "errors", ignore_errors=True)
    (copy / "errors").touch()
    (copy / "evaluate.json").unlink()
    said = error_lines(halfbyte("gate", str(copy)), 1)
    assert f"{copy}/evaluate.json: not there" in said
