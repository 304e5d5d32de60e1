"""Who hangs, out of what every process left; tests/test_layouts.py lets one hang."""

import sys
import threading

import pytest

from halfbyte.training.watchdog import Watchdog, blame, place


def state(waits=None, **collectives):
    return {
        "phase": "step 3, optimizer step",
        "where": "training/x.py:7 (f)",
        "waits": waits,
        "collectives": collectives,
    }


@pytest.mark.parametrize(
    ("states", "says"),
    [
        ({0: state("all_reduce", world=5)}, "rank 1 gives no sign of life; rank 0 waits in all_reduce "),
        (
            {0: state(world=5, tensor=9), 1: state(world=5, tensor=7)},  # both somewhere in the GPU's queue
            "rank 1 has not reached collective 8 of group tensor in step 3, optimizer step, at training/x.py:7 (f); "
            "rank 0 waits for the GPU",
        ),
        ({0: state(world=5), 1: state("recv_forward", world=5)}, "rank 0 hangs in step 3, optimizer step, at "),
        ({0: state("barrier", world=5), 1: state("barrier", world=5)}, "all ranks wait for each other in barrier ("),
        ({0: state(one=1), 1: state("broadcast", other=4)}, "rank 0 hangs in "),  # no group in common
    ],
)
def test_blame(states, says):
    assert blame(states, 2).startswith(says)


def test_one_process_alone_hangs():
    assert blame({0: state(world=1)}, 1).startswith("rank 0 hangs in step 3")


def test_the_place_is_halfbyte_s_innermost_line():
    reached, over = threading.Event(), threading.Event()
    dog = Watchdog.__new__(Watchdog)
    dog.seconds, dog._over, dog._progress = 10.0, over, lambda: (reached.set(), (0, ""))[1]
    thread = threading.Thread(target=dog._watch)
    thread.start()
    reached.wait()
    found = place(sys._current_frames()[thread.ident])
    over.set()
    thread.join()
    assert found["waits"] is None
    assert found["where"].startswith("training/watchdog.py:")
    assert found["where"].endswith("(_watch)")
    assert place(sys._getframe())["where"] == "outside halfbyte"


def test_progress_and_the_end_keep_it_quiet(tmp_path):
    """Ten times as long as it may stall, with progress; then the end of the work, and it is gone."""
    steps = iter(range(1_000_000))
    dog = Watchdog(tmp_path, rank=0, world=1, seconds=0.05, progress=lambda: (next(steps), "going"), collectives=dict)
    with dog.watching():
        threading.Event().wait(0.5)
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}
    assert not (tmp_path / "errors").exists()
