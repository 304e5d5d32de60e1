"""What SIGINT and SIGTERM do at each moment of a process's life; the signals are real ones."""

import os
import signal
import subprocess
import sys

import pytest

from halfbyte.training.interrupt import Interrupted, Stop

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def stop():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop = Stop()
    stop.install()
    yield stop
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_stage_without_anything_to_save_ends_at_once(stop, number):
    with pytest.raises(Interrupted, match=f"stopped by {number.name}: finished stages are kept"):
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_training_is_told_and_goes_on_to_its_save(stop, number):
    with stop.graceful():
        os.kill(os.getpid(), number)
        assert stop.requested == number.name
    with pytest.raises(Interrupted):
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_end_of_the_work_is_not_disturbed(stop, number):
    stop.close()
    os.kill(os.getpid(), number)
    assert stop.requested is None


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_the_interpreter_s_exit_prints_nothing(number):
    """The launcher stops all workers when one has failed; the others may be in their exit handlers just then."""
    program = (
        "import atexit, os, sys\n"
        "from halfbyte.training.interrupt import Stop\n"
        "stop = Stop(); stop.install()\n"
        f"atexit.register(lambda: os.kill(os.getpid(), {number.value}))\n"
        "stop.close(); sys.exit(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")
