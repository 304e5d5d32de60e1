"""Files and recipes from somebody else: nothing is executed, nothing leaks, nothing is written elsewhere."""

import os
import pickle
import sys
from pathlib import Path

import pytest

from halfbyte.launch import cli
from halfbyte.training import untrusted
from halfbyte.training.errors import RecipeError
from halfbyte.training.resolve import resolve

SECRET = "planted-3f1c77"


class Evil:
    """Unpickled, it would leave a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def dotted(module: str, name: str) -> bytes:
    """A pickle that only looks a name up, in the form whose name may hold dots."""
    words = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name))
    return b"\x80\x04" + words + b"\x93."


@pytest.mark.parametrize("form", ["plain", "inside the index's own class"])
def test_an_index_that_would_run_something(tmp_path, form):
    from torch.distributed.checkpoint.metadata import Metadata

    evil = Evil(tmp_path / "run")
    content = evil if form == "plain" else Metadata(state_dict_metadata={"a": evil})  # type: ignore[dict-item]
    (tmp_path / untrusted.INDEX).write_bytes(pickle.dumps(content))
    with pytest.raises(pickle.UnpicklingError, match=r"\.metadata names (posix|os)\.mkdir: not a checkpoint"):
        untrusted.check_index(tmp_path)
    assert not (tmp_path / "run").exists()
    with (tmp_path / untrusted.INDEX).open("rb") as file:  # torch's own way
        pickle.load(file)
    assert (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.distributed.checkpoint.metadata", "os.system"),  # what the module has imported
        ("torch.distributed.checkpoint.metadata", "field"),
        ("torch.distributed.checkpoint.metadata", "dataclass"),
        ("torch", "load"),
        ("torch", "hub.load"),
        ("builtins", "eval"),
        ("torch.distributed.checkpoint.filesystem", "os"),
    ],
)
def test_names_that_an_index_does_not_need(tmp_path, module, name):
    (tmp_path / untrusted.INDEX).write_bytes(dotted(module, name))
    with pytest.raises(pickle.UnpicklingError, match="not a checkpoint that torch wrote"):
        untrusted.check_index(tmp_path)


def test_an_index_s_own_names(tmp_path):
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    size = torch.Size([2, 3])
    entries = {
        str(dtype): TensorStorageMetadata(
            TensorProperties(dtype=dtype), size, [ChunkStorageMetadata(torch.Size([0, 0]), size)]
        )
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int32)
    }
    content = Metadata(entries, storage_data={MetadataIndex("a"): _StorageInfo("__0_0.distcp", 0, 9)})
    (tmp_path / untrusted.INDEX).write_bytes(pickle.dumps(content))
    untrusted.check_index(tmp_path)


@pytest.mark.slow
def test_a_checkpoint_that_would_run_something_is_one_line(tmp_path):
    from halfbyte.training.errors import UserError
    from halfbyte.training.saved_weights import read_weights

    (tmp_path / untrusted.INDEX).write_bytes(pickle.dumps(Evil(tmp_path / "run")))
    with pytest.raises(UserError, match=r"cannot be read \(UnpicklingError: \.metadata names") as caught:
        next(iter(read_weights(tmp_path, None, ())))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def problems(*overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        resolve("tiny", list(overrides))
    return caught.value.problems


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:HF_TOKEN}",
        "x-${oc.env:HF_TOKEN,none}",
        "${oc.decode:${oc.env:HF_TOKEN}}",
        "${oc.${run.project}:HF_TOKEN}",
        "${run.${oc.env:HF_TOKEN}}",
    ],
)
def test_a_recipe_reads_no_environment(tmp_path, monkeypatch, value):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    for key in ("run.project", "description", "run.dir", "data.train"):
        assert problems(f"{key}={value}") == [
            f"{key} = {value}: a recipe may not call a resolver of OmegaConf; use "
            "${group.key}, ${recipe:PATH} or ${package:PATH}"
        ]
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"base: tiny\nquantize:\n  exclude: [lm_head, '{value}']\n")
    with pytest.raises(RecipeError, match=r"r\.yaml line 3.: a recipe may not call a resolver") as caught:
        resolve(str(recipe), [])
    assert SECRET not in str(caught.value)


def test_a_recipe_imports_no_package(tmp_path, monkeypatch):
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "takes the name of a top-level Python package" in problems("data.train=${package:evil.sub/x.jsonl}")[0]
    assert "no such file" in problems("data.train=${package:evil/x.jsonl}")[0]
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("run.name=../../x", "run.name = ../../x: becomes the run folder's and the job's name"),
        ("run.name=/etc/x", "run.name = /etc/x: becomes"),
        ("run.name=..", "run.name = ..: becomes"),
        ("run.name=a\nb", "run.name = 'a\\nb': becomes"),
        ("run.dir=runs/a\nrm -rf x", "run.dir = 'runs/a\\nrm -rf x': not the path of a folder"),
        ("launch.partition=gpu\ntouch x", "launch.partition = 'gpu\\ntouch x': stands in the sbatch file"),
        ("launch.container=a b", "launch.container = a b: stands in"),
        ("evaluate.tasks.0.name=../x", "evaluate.tasks.0.name = ../x: becomes a file name"),
    ],
)
def test_names_stay_inside(override, says):
    assert [line for line in problems(override) if line.startswith(says)]


def test_no_secret_in_what_submit_writes(tmp_path, monkeypatch, capsys):
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["submit", "tiny", "--nodes", "1", "--separate", "--dry-run"]) == 0
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 4
    assert SECRET not in "".join(written) + capsys.readouterr().out
