"""The accuracy table: its arithmetic, which runs are left, and what happens to runs that fail or take too long."""

import json
import sys
from pathlib import Path

import pytest

from halfbyte.bench import accuracy, accuracy_table, arms, text
from halfbyte.bench.accuracy import Job
from halfbyte.bench.arms import ROWS
from halfbyte.training.resolve import load
from halfbyte.training.rules import problems

BY_NAME = {row.name: row for row in ROWS}
SCORES = {"lambada": {"acc": 0.2, "perplexity": 100.0, "kl": 0.4}, "english": {"bits_per_byte": 1.2, "kl": 0.4}}
BF16 = {"lambada": {"acc": 0.28, "perplexity": 50.0}, "english": {"bits_per_byte": 1.0}}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_is_a_recipe_that_can_run(row, tmp_path):
    sample = Path(arms.__file__).parents[1] / "recipes" / "data" / "english_sample.jsonl.gz"
    recipe = load(sample.parents[1] / f"{arms.RECIPE}.yaml", [*row.keys, f"data.train={sample}", f"run.dir={tmp_path}"])
    assert problems(recipe) == []


@pytest.mark.parametrize(("perplexity", "closed"), [(100.0, 0.0), (50.0, 1.0), (5000**0.5, 0.5), (200.0, -1.0)])
def test_the_gap(perplexity, closed):
    assert accuracy_table.gap_closed(perplexity, ptq=100.0, bf16=50.0) == pytest.approx(closed)


def test_the_table_has_means_and_spreads():
    def entry(name: str, perplexity: float, seed: int) -> dict:
        scores = SCORES | {"lambada": SCORES["lambada"] | {"perplexity": perplexity}}
        return {"row": name, "seed": seed, "bf16": BF16, "scores": scores}

    results = {
        "nvfp4_max": entry("nvfp4_max", 100.0, 1),
        "nvfp4_qad-1": entry("nvfp4_qad", 70.0, 1) | {"tokens": 6_000_000, "tokens_per_second": 200_000.0},
        "nvfp4_qad-2": entry("nvfp4_qad", 72.0, 2) | {"tokens": 6_000_000, "tokens_per_second": 210_000.0},
    }
    head, _, bf16, ptq, qad = accuracy_table.table(results).splitlines()
    assert head.startswith("| row | seeds | LAMBADA perplexity |")
    assert bf16.startswith("| BF16 |  | 50.0 | 28.00 |")
    assert ptq.startswith("| NVFP4 PTQ, max |  | 100.0 | 20.00 |")
    assert "| 0.0 |" in ptq
    assert qad.startswith("| NVFP4 QAD, full KL | 2 | 71.0 ± 1.4 |")
    assert qad.endswith("| 49.4 ± 2.9 | 6.0 | 205,000 |")  # ln(100/70) and ln(100/72) over ln 2
    assert accuracy_table.table({}) == "nothing measured\n"


def test_what_is_left_goes_seed_by_seed():
    left = accuracy.jobs(["nvfp4_max", "nvfp4_qad", "control"], [1, 2], done={"nvfp4_qad-1"})
    assert [job.key for job in left] == ["nvfp4_max", "control-1", "nvfp4_qad-2", "control-2"]


SCORED = f"""
folder = pathlib.Path(folder)
if not folder.exists():
    for name in ("cache", "evaluate"):
        (folder / name).mkdir(parents=True)
    (folder / "cache" / "reference.lambada.0.pt").write_text(row)
    (folder / "evaluate.json").write_text(json.dumps({{"bf16": {BF16!r}, "qad": {SCORES!r}}}))
    (folder / "quantize.json").write_text("{{}}")
    (folder / "state.json").write_text(json.dumps({{"evaluate.bf16": 0, "train": 9}}))
"""


def _script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Every job becomes a Python script that gets its row, seed and folder."""
    file = tmp_path / "job.py"
    file.write_text("import json, pathlib, sys, time\nrow, seed, folder = sys.argv[1:]\n" + body)

    def command(self: Job, data: Path, folder: Path) -> list[str]:
        return [sys.executable, str(file), self.row.name, str(self.seed), str(folder)]

    monkeypatch.setattr(Job, "command", command)


def _run(tmp_path: Path, names: list[str], seconds: float = 60.0) -> tuple[dict, list[str]]:
    out = tmp_path / "out.json"
    left = [Job(BY_NAME[name], 1) for name in names]
    work = {"text": tmp_path / "text", "work": tmp_path / "work", "gpus": 1, "per_gpu": 2}
    problems = accuracy.run(left, **work, seconds=seconds, out=out)
    return json.loads(out.read_text()) if out.exists() else {}, problems


def test_results_are_kept_and_failures_named(tmp_path, monkeypatch):
    body = f"""
if row == "control":
    sys.exit("no GPU")
folder = pathlib.Path(folder)
folder.mkdir(parents=True)
(folder / "evaluate.json").write_text(json.dumps({{"bf16": {BF16!r}, "qad": {SCORES!r}}}))
train = {{"steps": 3, "losses": [3, 2, 1], "seconds_per_step": [9.0, 0.5, 0.25], "tokens_per_step": 100}}
(folder / "train.json").write_text(json.dumps(train | {{"peak_gpu_bytes_rank0": 1}}))
sys.exit(4)
"""
    _script(tmp_path, monkeypatch, body)
    results, problems = _run(tmp_path, ["nvfp4_qad", "control", "mxfp4_qad"])
    assert sorted(results) == ["mxfp4_qad-1", "nvfp4_qad-1"]
    assert results["nvfp4_qad-1"]["tokens_per_second"] == 200.0  # of the median step
    assert results["nvfp4_qad-1"]["tokens"] == 300
    assert problems == ["control-1: exit code 1: no GPU"]
    assert not (tmp_path / "work" / "nvfp4_qad-1").exists()  # gigabytes of checkpoints


def test_bf16_is_scored_once(tmp_path, monkeypatch):
    """The first run alone; the others start from a folder that holds its scores and nothing that came later."""
    body = (
        SCORED + "(folder.parent / f'{row}.seen').write_text((folder / 'cache/reference.lambada.0.pt').read_text())\n"
    )
    body += "(folder.parent / f'{row}.state').write_text((folder / 'state.json').read_text())\ntime.sleep(1.5)\n"
    body += f"(folder / 'evaluate.json').write_text(json.dumps({{'bf16': {BF16!r}, 'qad': {SCORES!r}}}))"
    _script(tmp_path, monkeypatch, body)
    results, problems = _run(tmp_path, ["nvfp4_qad", "control", "mxfp4_qad"])
    assert problems == []
    assert len(results) == 3
    assert (tmp_path / "work" / "control.seen").read_text() == "nvfp4_qad"
    assert json.loads((tmp_path / "work" / "mxfp4_qad.state").read_text()) == {"evaluate.bf16": 0}


def test_time_is_up(tmp_path, monkeypatch):
    _script(tmp_path, monkeypatch, SCORED + "time.sleep(60)")
    results, problems = _run(tmp_path, ["nvfp4_qad", "control", "mxfp4_qad"], seconds=2.0)
    assert results == {}
    assert problems == [
        "nvfp4_qad-1: stopped, time is up",
        "control-1: stopped, time is up",
        "mxfp4_qad-1: not started, time is up",
    ]


def test_wrong_words(tmp_path, capsys):
    assert accuracy.main(["--text", str(tmp_path / "none.jsonl")]) == 2
    assert accuracy.main(["--text", str(tmp_path), "--rows", "nvfp5"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "no such file; make it with python -m halfbyte.bench.text" in lines[0]
    assert lines[1].startswith("error: --rows nvfp5: no such row; there are control, ")


def test_brown_is_untagged():
    line = "The/at jury/nn said/vbd ``/`` no/at evidence/nn ''/'' ,/, (/( see/vb below/rb )/) ./."
    assert text.untagged(line) == 'The jury said "no evidence", (see below).'


def test_text_from_packages(tmp_path, capsys):
    package = tmp_path / "package"
    pages = tmp_path / "usr/share/doc/anarchism/html"
    for folder in (package / "sotu" / "data", package / "moby-dick" / "data", pages):
        folder.mkdir(parents=True)
    assert text.main([str(tmp_path), str(tmp_path / "out.jsonl.gz")]) == 2
    assert "the text of sotu is not there" in capsys.readouterr().err
    (package / "sotu/data/1790_george_washington_n.txt").write_text("held out")
    (package / "sotu/data/1801_thomas_jefferson_dr.txt").write_text("Fellow  citizens\n")
    (package / "moby-dick/data/chapter_1.txt").write_text("Call me Ishmael. " * 10 + "\n\nshort\n\n" + "Whale. " * 20)
    (package / "ca01").write_text("\n\tThe/at jury/nn ./.\n\n")
    page = "<p>" + "Free <i>people</i> " * 20 + "</p><h1>no</h1><p>scrap</p>"
    (pages / "a.html").write_text(page)
    found = dict(text.documents(tmp_path))
    assert "sotu/1790_george_washington_n" not in found
    assert found["sotu/1801_thomas_jefferson_dr"] == "Fellow citizens"
    assert found["moby-dick/chapter_1"].count("\n") == 1
    assert "short" not in found["moby-dick/chapter_1"]
    assert found["brown/ca01"] == "The jury."
    assert found["anarchism/a"] == ("Free people " * 20).strip()
    assert not any("persuasion" in name for name in found)
