"""Whether a path still holds the model that a run began with."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.training import model_identity
from halfbyte.training.config import Model, Recipe
from halfbyte.training.errors import UserError
from halfbyte.training.resolve import resume_problems

WEIGHTS = {
    "embed": torch.arange(40, dtype=torch.float32).reshape(10, 4).bfloat16(),
    "norm": torch.ones(5),
    "scale": torch.tensor(2.0),
    "codes": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
    "empty": torch.zeros(0, 3),
}

HALF = torch.ones(5).half()


def model(folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "README.md"):
        (folder / name).write_text(f"{{}} {name}")
    save_file(WEIGHTS, folder / "model.safetensors")
    return folder


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    """A recipe whose run has begun and has scored something."""
    made = Recipe(model=Model(path=str(model(tmp_path / "model")), reference=str(model(tmp_path / "reference"))))
    made.run.dir = str(tmp_path / "run")
    model_identity.begin(made, tmp_path / "run")
    (tmp_path / "run" / "state.json").write_text("{}")
    return made


def put(folder: Path, name: str, place: tuple, value: float) -> None:
    """Change one value of one tensor."""
    weights = load_file(folder / "model.safetensors")
    weights[name][place] = value
    save_file(weights, folder / "model.safetensors")


CHANGES = {
    "first row": (lambda folder: put(folder, "embed", (0, 3), 9.0), "weights"),
    "middle row": (lambda folder: put(folder, "embed", (5, 0), 9.0), "weights"),
    "last row": (lambda folder: put(folder, "embed", (9, 1), 9.0), "weights"),
    "anywhere in a vector": (lambda folder: put(folder, "norm", (3,), 9.0), "weights"),
    "a scalar": (lambda folder: put(folder, "scale", (), 9.0), "weights"),
    "the type": (lambda folder: save_file(WEIGHTS | {"norm": HALF}, folder / "model.safetensors"), "weights"),
    "a further file": (lambda folder: save_file({"more": torch.ones(1)}, folder / "more.safetensors"), "weights"),
    "the sizes": (lambda folder: (folder / "config.json").write_text("{1}"), "config.json"),
    "the tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    "a chat template": (lambda folder: (folder / "chat_template.jinja").write_text("x"), "chat_template.jinja"),
}


@pytest.mark.parametrize("key", ["path", "reference"])
@pytest.mark.parametrize("what", CHANGES)
def test_another_model_is_one_line(recipe, tmp_path, key, what):
    change, named = CHANGES[what]
    folder = Path(getattr(recipe.model, key))
    change(folder)
    with pytest.raises(UserError) as caught:
        model_identity.check(recipe, tmp_path / "run")
    assert str(caught.value) == (
        f"model.{key} = {folder}: not the model that the run at {tmp_path}/run began with (other: {named}); put the "
        "old files back, or choose a new run.dir"
    )


def test_what_is_no_other_model_goes_on(recipe, tmp_path):
    folder = Path(recipe.model.path)
    (folder / "model.safetensors").touch()
    (folder / "README.md").write_text("another card")
    (folder / "halfbyte.json").write_text('{"gate": "a new verdict"}')
    (folder / "tokenizer").mkdir()
    model_identity.check(recipe, tmp_path / "run")
    recipe.model.path = shutil.move(folder, tmp_path / "moved")
    model_identity.check(recipe, tmp_path / "run")
    names = sorted(WEIGHTS)  # the same tensors in two files
    for part in (names[:2], names[2:]):
        save_file({name: WEIGHTS[name] for name in part}, tmp_path / "moved" / f"{part[0]}.safetensors")
    (tmp_path / "moved" / "model.safetensors").unlink()
    model_identity.check(recipe, tmp_path / "run")
    for path in (tmp_path / "moved").glob("*.safetensors"):  # an export needs none of them
        path.unlink()
    model_identity.check(recipe, tmp_path / "run")
    model_identity.check(recipe, tmp_path / "a run of an earlier version")


def test_until_a_run_has_results_its_model_may_be_mended(recipe, tmp_path):
    run, record = tmp_path / "run", tmp_path / "run" / "model.json"
    began = record.read_text()
    (run / "state.json").unlink()
    put(Path(recipe.model.path), "norm", (3,), 9.0)
    model_identity.check(recipe, run)
    model_identity.begin(recipe, run)
    assert record.read_text() != began
    (run / "quantize.json").write_text("{}")
    put(Path(recipe.model.path), "norm", (3,), 1.0)
    model_identity.begin(recipe, run)  # as it is called by a start that goes on
    assert record.read_text() != began
    with pytest.raises(UserError, match="not the model that the run"):
        model_identity.check(recipe, run)


def test_a_damaged_file_is_one_line(recipe, tmp_path):
    file = Path(recipe.model.path) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    with pytest.raises(UserError, match=r"model.safetensors: corrupt weight file .*; copy it again"):
        model_identity.check(recipe, tmp_path / "run")
    file.write_bytes(whole)
    record = tmp_path / "run" / "model.json"
    record.write_text(json.dumps({"model.path": 3}))
    with pytest.raises(UserError, match=r"model.json: damaged .*; delete it"):
        model_identity.check(recipe, tmp_path / "run")


def test_a_model_may_move_where_the_run_folder_knows_what_it_held(recipe, tmp_path):
    new = Recipe(model=Model(path="elsewhere", reference="there"))
    new.run.dir = recipe.run.dir
    assert resume_problems(recipe, new) == []
    new.model.reference = None  # a teacher that was not there, or is not there any more, is another run
    assert [line.split(" = ")[0] for line in resume_problems(recipe, new)] == ["model.reference"]
    assert [line.split(" = ")[0] for line in resume_problems(new, recipe)] == ["model.reference"]
    (tmp_path / "run" / "model.json").unlink()
    assert [line.split(" = ")[0] for line in resume_problems(recipe, new)] == ["model.path", "model.reference"]
