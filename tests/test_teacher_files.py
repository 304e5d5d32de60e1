"""Teacher logits on disk: what a folder refuses, and runs from files and a run from files; layouts: test_methods.py."""

import dataclasses
import itertools
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from halfbyte.launch.teacher import prepare
from halfbyte.training.config import Method, Model, Recipe, Train
from halfbyte.training.config_distill import Distill
from halfbyte.training.corpus import PackedDataset
from halfbyte.training.data import window_batch
from halfbyte.training.errors import RecipeError, UserError
from halfbyte.training.packing import PackingReport
from halfbyte.training.resolve import resolve

WINDOWS, LENGTH, VOCAB = 12, 9, 64


# ---- before any process starts


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["method=qat", "distill.top_k=4"], "method = qat: has no teacher"),
        (["method=qad"], "distill.top_k = null: whole vocabularies do not go to disk"),
    ],
)
def test_what_has_no_files_is_one_line(overrides, says):
    with pytest.raises(RecipeError) as caught:
        prepare(resolve("tiny", overrides), Path("out"))
    (line,) = caught.value.problems
    assert line.startswith(says)


def test_a_run_needs_files_and_top_k_and_no_hidden_states(tmp_path):
    with pytest.raises(RecipeError) as caught:
        resolve("tiny", ["method=qad", f"distill.teacher={tmp_path}", "distill.hidden=1"])
    assert [line.partition(": ")[2].partition(";")[0] for line in caught.value.problems] == [
        "holds no teacher.json",
        "holds top-k only",
        "holds no hidden states",
    ]
    made = {"distill.top_k": 4, "distill.temperature": 1.0, "sequence length": 64}
    (tmp_path / "teacher.json").write_text(json.dumps({"made from": made}))
    fitting = ["method=qad", f"distill.teacher={tmp_path}", "distill.top_k=4"]
    assert resolve("tiny", fitting).distill.top_k == 4
    with pytest.raises(RecipeError) as caught:
        resolve("tiny", [*fitting, "distill.top_k=8", "distill.temperature=2", "train.sequence_length=32"])
    assert [line.partition(": ")[2].partition(";")[0] for line in caught.value.problems] == [
        "made with distill.top_k = 4, not 8",
        "made with distill.temperature = 1.0, not 2.0",
        "made with sequence length = 64, not 32",
    ]
    (tmp_path / "teacher.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"^distill.teacher = .*teacher.json: damaged \(no 'made from'\); delete it"):
        resolve("tiny", fitting)
    recipe = Recipe(method=Method.qad, distill=Distill(top_k=4, teacher="x"))
    with pytest.raises(RecipeError, match="there are files already"):
        prepare(recipe, tmp_path)


# ---- the files themselves


@pytest.fixture(scope="module")
def world():
    helpers = runpy.run_path(str(Path(__file__).with_name("workers") / "world.py"))
    with helpers["world_of_one"]() as runtime:
        yield lambda recipe: helpers["random_model"](runtime, recipe, seed=1)


def corpus(seed: int = 0, **changes) -> PackedDataset:
    random = np.random.default_rng(seed)
    tokens = random.integers(0, VOCAB, (WINDOWS, LENGTH + 1), dtype=np.int32)
    segments = np.sort(random.integers(0, 3, (WINDOWS, LENGTH)).astype(np.int32))
    data = PackedDataset(tokens, np.ones((WINDOWS, LENGTH), np.uint8), segments, True, PackingReport(), Path("x"))
    return dataclasses.replace(data, **changes)


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "model" / name).write_text(name)
    save_file({"weight": torch.zeros(2)}, tmp_path / "model" / "model.safetensors")
    train = Train(steps=2, global_batch=4, sequence_length=LENGTH, seed=3)
    distill = Distill(top_k=5, temperature=2.0)
    return Recipe(method=Method.qad, model=Model(path=str(tmp_path / "model")), train=train, distill=distill)


@pytest.fixture
def written(world, recipe, tmp_path, monkeypatch) -> tuple[Path, torch.nn.Module]:
    """A complete folder of three-window files, and the teacher."""
    from halfbyte.training import teacher_files

    monkeypatch.setattr(teacher_files, "FILE_BYTES", 3 * LENGTH * (6 * 5 + 4))
    data, folder, teacher = corpus(), tmp_path / "teacher", world(recipe)
    recipe.evaluate.tokens_per_batch = 2 * LENGTH  # two windows at a time: three do not fill two batches
    windows = teacher_files.needed_windows(recipe, data)
    groups = teacher_files.begin(folder, teacher_files.fingerprint(recipe, data, torch.float32), windows)
    assert [len(group) for group in groups] == [3, 3, 2]
    for number, group in enumerate(groups):
        said = teacher_files.ask(teacher, recipe, data, group, torch.device("cpu"))
        assert said is not None
        teacher_files.write_file(folder, number, said)
    return folder, teacher


def reader(folder: Path, recipe: Recipe, data: PackedDataset):
    from halfbyte.training.teacher_files import TeacherFiles, fingerprint, needed_windows

    return TeacherFiles(folder, fingerprint(recipe, data, torch.float32), needed_windows(recipe, data))


def test_files_hold_what_the_teacher_says(written, recipe):
    from halfbyte.training.schedule import forward_only
    from halfbyte.training.teacher_files import needed_windows
    from halfbyte.training.topk import top_k

    folder, teacher = written
    data = corpus()
    files, windows = reader(folder, recipe, data), needed_windows(recipe, data)
    assert len(windows) == 8  # 2 steps of 4, of 12 windows
    for pair in itertools.pairwise(windows):
        said = files.read(pair, torch.device("cpu"))
        expected = top_k(forward_only(teacher, window_batch(data, pair)), 5, 2.0, None)
        assert torch.equal(said.indices, expected.indices)
        torch.testing.assert_close(said.values, expected.values, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(said.tail, expected.tail, rtol=1e-5, atol=1e-6)


MISMATCHES = {
    "data": lambda recipe: {"tokens": corpus(1).tokens},
    "sequence length": lambda recipe: {"tokens": corpus().tokens[:, :-1]},
    "tokenizer": lambda recipe: Path(recipe.model.path, "tokenizer.json").write_text("other"),
    "model": lambda recipe: save_file({"weight": torch.ones(2)}, Path(recipe.model.path, "model.safetensors")),
    "distill.temperature": lambda recipe: setattr(recipe.distill, "temperature", 1.0),
    "distill.top_k": lambda recipe: setattr(recipe.distill, "top_k", 6),
}


@pytest.mark.parametrize("what", MISMATCHES)
def test_another_teacher_is_one_line(written, recipe, what):
    changes = MISMATCHES[what](recipe)
    data = corpus(**changes) if isinstance(changes, dict) else corpus()
    with pytest.raises(UserError, match=f"made from another {what} .*; make it again: halfbyte teacher") as caught:
        reader(written[0], recipe, data)
    assert "\n" not in str(caught.value)


def test_segments_count_only_where_documents_are_isolated(written, recipe):
    other = corpus(segments=corpus(7).segments)
    with pytest.raises(UserError, match="another data"):
        reader(written[0], recipe, other)


def test_another_dtype_is_noted_and_an_older_folder_has_none(written, recipe):
    """The same teacher, rounded otherwise: no reason to refuse it, but to go on with its folder."""
    from halfbyte.training.teacher_files import TeacherFiles, begin, fingerprint, needed_windows

    folder, data = written[0], corpus()
    mine, windows = fingerprint(recipe, data, torch.bfloat16), needed_windows(recipe, data)
    assert reader(folder, recipe, data).note is None
    note = TeacherFiles(folder, mine, windows).note
    assert note is not None
    assert note.startswith(f"distill.teacher = {folder}: its logits were computed in float32, this run computes in bf")
    with pytest.raises(UserError, match="holds the logits of another teacher"):
        begin(folder, mine, windows)
    older = json.loads((folder / "teacher.json").read_text())
    del older["made from"]["train.dtype"]
    (folder / "teacher.json").write_text(json.dumps(older))
    assert TeacherFiles(folder, mine, windows).note is None
    assert begin(folder, mine, windows) == older["files"]


def test_more_steps_than_were_written_are_one_line(written, recipe):
    recipe.train.steps = 3
    with pytest.raises(UserError, match="lacks 4 of 12 windows that train"):
        reader(written[0], recipe, corpus())


def test_a_missing_or_damaged_file_is_one_line(written, recipe):
    folder, windows = written[0], slice(0, 1)
    file = folder / "windows_000001.safetensors"
    files = reader(folder, recipe, corpus())
    inside = json.loads((folder / "teacher.json").read_text())["files"][1][windows]
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match=r"windows_000001\.safetensors: damaged"):
        files.read(inside, torch.device("cpu"))
    file.unlink()
    with pytest.raises(UserError, match="1 of 3 files are missing, windows_000001"):
        reader(folder, recipe, corpus())


def test_a_folder_of_another_teacher_is_not_written_into(written, recipe):
    from halfbyte.training.teacher_files import begin, fingerprint, needed_windows

    data = corpus()
    begin(written[0], fingerprint(recipe, data, torch.float32), needed_windows(recipe, data))  # the same: goes on
    recipe.distill.temperature = 3.0
    with pytest.raises(UserError, match="holds the logits of another teacher"):
        begin(written[0], fingerprint(recipe, data, torch.float32), needed_windows(recipe, data))


# ---- whole runs


@pytest.mark.slow
def test_the_command_and_a_run_from_its_files(halfbyte, tiny_model, tmp_path):
    common = ["method=qad", "distill.top_k=16", f"model.path={tiny_model}", "train.steps=2"]
    done = halfbyte("teacher", "tiny", *common, "--out", "files")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 windows, top 16" in done.stdout
    run = [*common, "run.wandb=disabled", "evaluate.tasks.english.limit=2", "evaluate.tasks.lambada.limit=2"]
    run += [
        "verify.items=0",
        "gate.judges=trained",
        "run.dir=run",
        "distill.teacher=files",
        "gate.perplexity_ratio=1e100",
    ]
    done = halfbyte("run", "tiny", *run)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = json.loads((tmp_path / "run" / "train.json").read_text())["losses"]
    assert all(0 < loss < 1 for loss in losses)  # a divergence; the cross-entropy of random weights is log(vocabulary)
