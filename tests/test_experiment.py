"""What surrounds the trainer: a W&B server out of reach, and who gets a stop signal."""

import os
import signal
from types import SimpleNamespace

import pytest

from halfbyte.training.config import Recipe, Wandb
from halfbyte.training.errors import StoppedTogether, UserError
from halfbyte.training.interrupt import Interrupted, Stop


@pytest.mark.slow
def test_a_server_out_of_reach_is_one_line(tmp_path, monkeypatch, capfd):
    from halfbyte.training import experiment

    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: nobody listens
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_SILENT", "true")  # as every run has it
    monkeypatch.setattr(experiment, "WANDB_S", 1.0)
    recipe = Recipe()
    recipe.run.dir, recipe.run.wandb = str(tmp_path), Wandb.online
    assert experiment.reach_wandb(recipe) is False
    (said,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: W&B"))
    assert said.startswith("warning: W&B cannot be reached (")
    assert said.endswith(f"): logging offline to {tmp_path}/wandb; `wandb sync` sends it later")
    assert not list((tmp_path / "wandb").glob("run-*"))
    run = experiment._report_run(recipe)
    assert run.offline
    run.finish()


@pytest.mark.slow
def test_a_stop_signal_in_training_is_ours_alone():
    """Lightning puts a handler of its own in front, which ends training without a checkpoint."""
    from halfbyte.training.saving import Checkpoints

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    theirs, stop = [], Stop()
    try:
        signal.signal(signal.SIGTERM, lambda *_: theirs.append("ended"))
        Checkpoints(Recipe(), None, stop).on_train_start(None, None)
        with stop.graceful():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (stop.requested, theirs) == ("SIGTERM", [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "together"),
    [(StoppedTogether("loss"), True), (Interrupted("saved"), True), (UserError("mine"), False), (OSError(), False)],
    ids=["together", "signal", "one rank", "fault"],
)
def test_graphs_are_freed_where_every_rank_stops_and_nowhere_else(error, together):
    """One that is left to the interpreter's end keeps its communicator; one rank alone would wait for the others."""
    from halfbyte.training.saving import Checkpoints

    freed = []
    module = SimpleNamespace(on_train_end=lambda: freed.append(True))
    Checkpoints(Recipe(), None, Stop()).on_exception(None, module, error)
    assert bool(freed) == together
