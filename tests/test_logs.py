"""Everything that libraries say goes to a process's own file; the terminal gets the run's lines."""

import os
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from halfbyte.launch.console import Console
from halfbyte.training import logs

SCRIPT = """
import logging, os, sys, warnings
from pathlib import Path
from halfbyte.training import logs

if {full}:
    logs.log_file = lambda folder, rank: Path("/dev/full")
with logs.captured(Path({folder!r}), 3) as in_file:
    print(in_file, logs.to_file())
    if not {full}:
        os.write(2, b"from C\\n")
    print("printed", file=sys.stderr, flush=not {full})
    warnings.warn("a warning", UserWarning)
    logging.getLogger("megatron").warning("a record")
    logging.getLogger("megatron").info("too quiet")
    logs.OWN.info("a stage")
    logs.tell("error: said aloud")
print(logs.to_file())
os.write(2, b"after\\n")
"""


def speak(folder: Path, *, full: bool = False) -> tuple[list[str], list[str]]:
    """Lines of the standard output and of the standard error stream of a process that logs into `folder`."""
    code = SCRIPT.format(folder=str(folder), full=full)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines(), done.stderr.splitlines()


def test_the_terminal_stays_clean_and_the_file_has_it_all(tmp_path):
    assert speak(tmp_path) == (["True True", "False"], ["error: said aloud", "after"])
    text = (tmp_path / "logs" / "rank3.log").read_text()
    for line in ("INFO halfbyte: rank 3 starts", "from C\n", "printed\n", "UserWarning: a warning"):
        assert line in text
    for line in ("WARNING megatron: a record", "INFO halfbyte: a stage", "INFO halfbyte: error: said aloud"):
        assert line in text
    assert "too quiet" not in text
    speak(tmp_path)
    again = (tmp_path / "logs" / "rank3.log").read_text()
    assert again.startswith(text)  # a second start appends
    assert again.count("rank 3 starts") == 2


@pytest.mark.parametrize("lost", ["pipe", "disk"])
def test_a_run_outlives_who_reads_it(lost, nobody_reads, monkeypatch, caplog):
    """`halfbyte run ... | head -1` ended in the middle of its work, hours of training included."""
    if lost == "disk":
        monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: SIM115 - monkeypatch takes it back
    else:
        nobody_reads()
    with logs.lasting_output():
        for line in ("first", "second"):
            Console(loud=True).say(line)
        assert not sys.stdout.isatty()
    sys.stdout.close()  # what waits in its buffer is gone as well
    reason = "No space left on device" if lost == "disk" else "Broken pipe"
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert said == [f"standard output is lost ({reason}): the run goes on, and its lines stand here"]


def test_where_there_can_be_no_file_nothing_changes(tmp_path):
    (tmp_path / "logs").write_text("in the way")
    out, err = speak(tmp_path)
    assert out == ["False False", "False"]
    assert err == ["from C", "printed", "a record", "error: said aloud", "after"]


def test_a_full_disk_ends_nothing(tmp_path):
    assert speak(tmp_path, full=True) == (["True True", "False"], ["error: said aloud", "after"])


@pytest.mark.parametrize(("loud", "to_terminal"), [(True, True), (False, True), (True, False)])
def test_a_bar_is_for_the_terminal_of_rank_0(monkeypatch: pytest.MonkeyPatch, loud: bool, to_terminal: bool):
    """Also while standard error goes to the log file."""
    reading, writing = os.openpty() if to_terminal else os.pipe()
    if to_terminal:
        termios.tcsetwinsize(writing, (24, 80))
    monkeypatch.setattr(logs, "_terminal", [writing])
    with Console(loud).progress("export", 4_000_000) as advance:
        advance(1_000_000)
        advance(3_000_000)
    os.write(writing, b"end\n")
    shown = ""
    while not shown.replace("\r\n", "\n").endswith("end\n"):  # a terminal gives what it has, not all that was written
        shown += os.read(reading, 10_000).decode()
    assert ("export:   0%" in shown and "4.00M" in shown) is (loud and to_terminal)
    if not (loud and to_terminal):
        assert shown.replace("\r\n", "\n") == "end\n"
    for descriptor in (reading, writing):
        os.close(descriptor)
