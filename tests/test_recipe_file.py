"""A recipe file as YAML: text stays what was written, places are known, and no file takes the machine with it."""

import time

import pytest

from halfbyte.training import recipe_file
from halfbyte.training.errors import USAGE, RecipeError
from halfbyte.training.resolve import resolve, save


@pytest.mark.parametrize("name", ["no", "on", "1e3", "0123", "2026-11-30", "1.10", "0x1f", "12_000"])
def test_text_is_what_stands_there(name, tmp_path):
    """YAML reads them as false, true, 1000.0, 83, ...; on the command line they were text already."""
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"base: tiny\nrun:\n  name: {name}\nlaunch:\n  partition: {name}\n  time: 4:00:00\n  account: null\n"
    )
    made = resolve(str(file), [])
    assert (made.run.name, made.launch.partition, made.run.dir) == (name, name, f"runs/{name}")
    assert (made.launch.time, made.launch.account) == ("4:00:00", None)
    assert made == resolve("tiny", [f"run.name={name}", f"launch.partition={name}", "launch.time=4:00:00"])
    save(made, tmp_path / "saved.yaml")
    assert resolve(str(tmp_path / "saved.yaml"), []) == made


def test_quotes_blocks_and_aliases_are_yaml(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text('base: tiny\ndescription: >-\n  two\n  lines\nrun:\n  name: &a "\\u0041"\n  project: *a\n')
    made = resolve(str(file), [])
    assert (made.description, made.run.name, made.run.project) == ("two lines", "A", "A")
    read = recipe_file.read(file)
    assert read.places["run.project"] == " (mine.yaml line 7)"
    assert read.texts["run.project"] == "A"


@pytest.mark.parametrize("head", ["\ufeff", ""])
@pytest.mark.parametrize("end", ["\r\n", "\n"])
def test_a_file_from_another_system(head, end, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_bytes(f"{head}base: tiny{end}train:{end}  steps: 7{end}".encode())
    assert resolve(str(file), []).train.steps == 7


def test_aliases_of_aliases_are_counted_not_written_out(tmp_path):
    """A kilobyte that would be 3.5 billion values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    file = tmp_path / "bomb.yaml"
    file.write_text("\n".join(lines))
    started = time.monotonic()
    with pytest.raises(RecipeError, match=r"bomb\.yaml: its aliases .* stand for more than 100,000 values") as caught:
        recipe_file.read(file)
    assert caught.value.code == USAGE
    assert time.monotonic() - started < 5
