"""`halfbyte tail`: what it shows of a run that goes on, resumes and ends."""

import io
import json
import threading
import time

import pytest

from halfbyte.launch import cli, tail
from halfbyte.training.errors import OK, USAGE
from halfbyte.training.resolve import resolve, save
from halfbyte.training.sinks import METRICS, JsonLines


@pytest.fixture
def folder(tmp_path):
    save(resolve("tiny", ["train.steps=4", f"run.dir={tmp_path}"]), tmp_path / "resolved.yaml")
    return tmp_path


def record(step, loss=2.0, **more):
    return {"step": step, "loss": loss, "learning_rate": 1e-5, "seconds": 30.0, "tokens_per_second": 1234.5} | more


def test_a_resumed_run_continues_where_its_file_does(folder):
    run = tail.Watched(folder, "tiny", 4)
    assert run.more() == []
    lines = JsonLines(folder, 0)
    lines.write(record(1))
    lines.write(record(2))
    assert [r["step"] for r in run.more()] == [1, 2]
    with (folder / METRICS).open("a") as file:
        file.write('{"step": 3, "loss"')
    assert run.more() == []  # half a line
    lines = JsonLines(folder, 1)  # killed, and resumed after step 1
    lines.write(record(2, loss=1.9))
    lines.write(record(3))
    assert [(r["step"], r["loss"]) for r in run.more()] == [(2, 1.9), (3, 2.0)]
    assert [r["step"] for r in run.records] == [1, 2, 3]
    assert not run.done
    lines.write(record(4))
    run.more()
    assert run.done


def test_plain_lines_until_the_last_step(folder, capsys):
    lines = JsonLines(folder, 0)
    for step in (1, 2, 3):
        lines.write(
            record(step, mfu=0.413, memory_bytes=31.25e9, events=["rank 3 takes 1.5 x the median"][: step // 3])
        )

    def finish():
        time.sleep(0.7)
        lines.write(record(4))

    thread = threading.Thread(target=finish)
    thread.start()
    assert cli.main(["tail", str(folder), "--lines", "2"]) == OK
    thread.join()
    assert capsys.readouterr().out.splitlines() == [
        "step 2/4  loss 2.0000  lr 1.00e-05  tokens/s 1,234  MFU 41.3%  GB 31.2",
        "step 3/4  loss 2.0000  lr 1.00e-05  tokens/s 1,234  MFU 41.3%  GB 31.2",
        "  rank 3 takes 1.5 x the median",
        "step 4/4  loss 2.0000  lr 1.00e-05  tokens/s 1,234",
    ]


def test_before_the_first_step(folder, capsys):
    assert cli.main(["tail", str(folder), "--once"]) == OK
    assert capsys.readouterr().out == "tiny: no step yet\n"


def test_the_live_view(folder):
    from rich.console import Console

    run = tail.Watched(folder, "[red]tiny", 4)
    console = Console(file=io.StringIO(), width=100)
    console.print(tail.view(run, 5))
    run.records = [record(1, loss=3.0), record(2, loss=1.0, events=["[bold]rank 3"], gradient_norm=float("nan"))]
    console.print(tail.view(run, 5))
    shown = console.file.getvalue()
    for text in ("no step yet", "[red]tiny", "step 2/4, 0:01 h left", "█▁", "[bold]rank 3", "grad nan"):
        assert text in shown


def test_curve_and_time():
    assert tail.curve([1.0, 1.0]) == "▁▁"
    assert tail.curve([0.0, 0.5, 1.0]) == "▁▅█"
    run = tail.Watched(None, "tiny", 241)
    assert tail.time_left(run) == "-"
    run.records = [record(1)]
    assert tail.time_left(run) == "2:00 h"


def test_bad_words_are_named(tmp_path, folder, capsys):
    assert cli.main(["tail", str(tmp_path / "nothing")]) == USAGE
    assert "holds no resolved.yaml; give the folder of a run" in capsys.readouterr().err
    assert cli.main(["tail", str(folder), "--lines", "0"]) == USAGE
    assert capsys.readouterr().err == "error: --lines 0: must be positive; give at least 1\n"
    (folder / METRICS).write_text(json.dumps([1]) + "\n")
    assert cli.main(["tail", str(folder), "--once"]) == OK
