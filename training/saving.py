"""When training saves: every N steps, at the end, and when a signal asks it to stop; and when it waits for that."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from halfbyte.training import retention
from halfbyte.training.checkpoint_write import HostMemory, Write
from halfbyte.training.config import Recipe
from halfbyte.training.errors import StoppedTogether, UserError
from halfbyte.training.interrupt import Interrupted, Stop
from halfbyte.training.runtime import Runtime, agree


class Checkpoints(Callback):
    """Saves every N steps, at the end, and when a signal asks to stop. At most one save is under way."""

    def __init__(self, recipe: Recipe, runtime: Runtime, stop: Stop):
        self.recipe, self.runtime, self.stop = recipe, runtime, stop
        self.folder = Path(recipe.run.dir) / "checkpoints"
        self._host = HostMemory() if recipe.checkpoint.background else None
        self._write: Write | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Take SIGTERM back: Lightning's handler, put in front of ours, ends training without a checkpoint.

        It does so on the ranks that the signal reaches between `on_train_batch_end` and the end of the loop's body.
        """
        self.stop.install()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Save if it is time to; raise Interrupted after saving if SIGINT or SIGTERM came."""
        step = len(pl_module.progress.losses)
        every = self.recipe.checkpoint.every_steps
        pl_module.phase = "agreeing to go on"
        stopping, busy = agree(self.stop.requested is not None, self._write is not None and not self._write.done)
        last = stopping or step == self.recipe.train.steps
        due = last or (every > 0 and step % every == 0)
        if due or not busy:
            self._finish(pl_module)
        if due:
            pl_module.phase = "checkpoint"
            # After the last one nothing changes any more: it needs no copy.
            trainer.save_checkpoint(
                self.folder / retention.folder_name(step), storage_options=None if last else self._host
            )
            self._write = trainer.strategy.write  # type: ignore[attr-defined]
            if last or self._host is None:
                self._finish(pl_module)
        if stopping and step < self.recipe.train.steps:
            reason = self.stop.requested or "another rank"
            (by_hand,) = agree(self.stop.requested == "SIGINT")
            raise Interrupted(
                f"stopped by {reason} after step {step} of {self.recipe.train.steps}: checkpoint saved; "
                f"halfbyte run with run.dir={self.recipe.run.dir} goes on from there",
                announced=not by_hand,
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Complete what is being written, where all ranks can; the exception is what the user is told."""
        if isinstance(exception, StoppedTogether):
            with suppress(UserError):
                self._finish(pl_module)

    def _finish(self, pl_module: Any) -> None:
        """Wait for the save that is under way, if one is, and delete what need not stay; collective."""
        write, self._write = self._write, None
        if write is None:
            return
        pl_module.phase = "completing a checkpoint"
        write.finish()
        pl_module.saves.append({"step": write.step, "seconds": write.seconds, "stall_seconds": write.stall_seconds})
        if self.runtime.first:
            retention.prune(self.folder, self.recipe.checkpoint, pl_module.progress.losses)
