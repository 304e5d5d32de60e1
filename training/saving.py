"""When training saves: every N steps, at the end, and when a signal asks it to stop."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from halfbyte.training import retention
from halfbyte.training.config import Recipe
from halfbyte.training.interrupt import Interrupted, Stop
from halfbyte.training.runtime import Runtime, agree


class Checkpoints(Callback):
    """Saves every N steps, at the end, and when a signal asks to stop."""

    def __init__(self, recipe: Recipe, runtime: Runtime, stop: Stop):
        self.recipe, self.runtime, self.stop = recipe, runtime, stop
        self.folder = Path(recipe.run.dir) / "checkpoints"

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
        stopping = agree(self.stop.requested is not None)
        if stopping or step == self.recipe.train.steps or (every and step % every == 0):
            pl_module.phase = "checkpoint"
            trainer.save_checkpoint(self.folder / retention.folder_name(step))
            if self.runtime.first:
                retention.prune(self.folder, self.recipe.checkpoint, pl_module.progress.losses)
        if stopping and step < self.recipe.train.steps:
            reason = self.stop.requested or "another rank"
            by_hand = agree(self.stop.requested == "SIGINT")
            raise Interrupted(
                f"stopped by {reason} after step {step} of {self.recipe.train.steps}: checkpoint saved; "
                f"halfbyte run with run.dir={self.recipe.run.dir} goes on from there",
                announced=not by_hand,
            )
