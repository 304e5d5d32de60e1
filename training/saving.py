"""When training saves: every N steps, at the end, and when a signal asks it to stop; and when it waits for that."""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from halfbyte.training import retention
from halfbyte.training.checkpoint_memory import HostMemory
from halfbyte.training.checkpoint_write import Write
from halfbyte.training.config import Recipe
from halfbyte.training.errors import StoppedTogether, UserError
from halfbyte.training.interrupt import Interrupted, Stop
from halfbyte.training.logs import tell
from halfbyte.training.runtime import Runtime, agree


class Checkpoints(Callback):
    """Saves every N steps, at the end, and when a signal asks to stop. At most one save is under way."""

    def __init__(self, recipe: Recipe, runtime: Runtime, stop: Stop):
        self.recipe, self.runtime, self.stop = recipe, runtime, stop
        self.folder = Path(recipe.run.dir) / "checkpoints"
        self._host = HostMemory() if recipe.checkpoint.background else None
        self._write: Write | None = None
        self._deletion: threading.Thread | None = None
        self._stall = 0.0
        """Seconds that training has stood still for the save that is under way."""
        self._waited = 0.0
        """Of them, for the deletion of an old one."""
        self._told = False

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
        if due and busy:
            self._wait(pl_module, step, tells=not last)
        elif due:
            self._finish(pl_module)
        elif not busy:
            self._advance(pl_module)
        if due:
            self._begin(trainer, pl_module, step, copied=not last)
        elif self._wants_memory(step):
            with self._stalled():
                trainer.strategy.reserve(self._host)  # type: ignore[attr-defined]
        if stopping and step < self.recipe.train.steps:
            reason = self.stop.requested or "another rank"
            (by_hand,) = agree(self.stop.requested == "SIGINT")
            raise Interrupted(
                f"stopped by {reason} after step {step} of {self.recipe.train.steps}: checkpoint saved; "
                f"halfbyte run with run.dir={self.recipe.run.dir} goes on from there",
                announced=not by_hand,
            )

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        """Wait for the copy of what the step will change; backward has run."""
        if self._write is not None:
            with self._stalled():
                self._write.wait_until_copied()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Free CUDA graphs and complete what is being written, where all ranks can.

        The exception is what the user is told.
        """
        if isinstance(exception, StoppedTogether | Interrupted):
            pl_module.on_train_end()
            with suppress(UserError):
                self._finish(pl_module)

    def _wants_memory(self, step: int) -> bool:
        """Whether memory that has to be pinned is needed for a save to come, and none was taken in this start."""
        every, host = self.recipe.checkpoint.every_steps, self._host
        if host is None or every == 0 or self.runtime.device.type != "cuda":
            return False
        return host.empty and step + every - step % every < self.recipe.train.steps

    def _begin(self, trainer: pl.Trainer, pl_module: Any, step: int, *, copied: bool) -> None:
        """Save; without a copy this returns when the checkpoint is complete."""
        pl_module.phase = "checkpoint"
        host = self._host if copied else None
        with self._stalled():
            self._waited = self._wait_for_deletion()  # the disk need not hold one more checkpoint than before
            trainer.save_checkpoint(self.folder / retention.folder_name(step), storage_options=host)
        self._write = trainer.strategy.write  # type: ignore[attr-defined]
        if host is None:
            self._finish(pl_module)
            self._wait_for_deletion()

    def _advance(self, pl_module: Any) -> None:
        """Take the save that is under way, if one is, a step further: all ranks are ready, nobody waits."""
        if self._write is None:
            return
        if self._write.handed_over:
            self._finish(pl_module)
            return
        pl_module.phase = "completing a checkpoint"
        with self._stalled():
            self._write.hand_over()

    def _wait(self, pl_module: Any, step: int, *, tells: bool) -> None:
        """Wait for a save that the next one found still being written; a line says so, once in a start."""
        if self._write is None:
            return
        started, steps = time.perf_counter(), step - self._write.step
        self._finish(pl_module)
        waited, save = time.perf_counter() - started, pl_module.saves[-1]
        save["wait_seconds"] += waited
        if tells and self.runtime.first and not self._told:
            self._told = True
            enough = math.ceil(steps * save["seconds"] / max(save["seconds"] - waited, 1e-9))
            tell(
                f"warning: checkpoint.every_steps = {self.recipe.checkpoint.every_steps}: the save after step "
                f"{save['step']} took {save['seconds']:.1f} s, longer than the {steps} steps to the next one, which "
                f"waited {waited:.1f} s for it; set checkpoint.every_steps={enough + 1} or more"
            )

    def _finish(self, pl_module: Any) -> None:
        """Wait for the save that is under way, if one is, and begin to delete what need not stay; collective."""
        write, self._write = self._write, None
        if write is None:
            return
        pl_module.phase = "completing a checkpoint"
        with self._stalled():
            write.finish()
            if self.runtime.first:
                removed = retention.prune(self.folder, self.recipe.checkpoint, pl_module.progress.losses)
                self._deletion = threading.Thread(target=retention.delete, args=(removed,), daemon=True)
                self._deletion.start()
        cost = {"stall_seconds": self._stall, "wait_seconds": self._waited}
        pl_module.saves.append({"step": write.step, "seconds": write.seconds} | cost)
        self._stall = self._waited = 0.0

    def _wait_for_deletion(self) -> float:
        """Returns how long that took, seconds."""
        if self._deletion is None or not self._deletion.is_alive():
            return 0.0
        started = time.perf_counter()
        self._deletion.join()
        return time.perf_counter() - started

    @contextmanager
    def _stalled(self) -> Iterator[None]:
        """What runs in here keeps training waiting."""
        started = time.perf_counter()
        yield
        self._stall += time.perf_counter() - started
