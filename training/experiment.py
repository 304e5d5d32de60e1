"""The only file that knows NeMo and W&B: experiment folder, loggers, resume, and the trainer around them.

NeMo's exp_manager keeps <run.dir>/experiment (its logs, the command, the commit), creates the W&B logger, and points
the trainer at the checkpoint that the link <run.dir>/checkpoints/last names.
"""

import gc
import io
import logging
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from halfbyte.training import checkpoint
from halfbyte.training.config import Recipe, Wandb
from halfbyte.training.errors import UserError
from halfbyte.training.interrupt import Stop
from halfbyte.training.logs import OWN, tell, to_file
from halfbyte.training.module import Training
from halfbyte.training.runtime import Runtime, collectives_begun
from halfbyte.training.saving import Checkpoints
from halfbyte.training.shape import ModelShape
from halfbyte.training.strategy import MegatronStrategy
from halfbyte.training.telemetry import Telemetry
from halfbyte.training.watchdog import Watchdog

WANDB_S = 30.0
"""Seconds that W&B's server has to answer, at the start and for what is left at the end."""


def make_trainer(recipe: Recipe, runtime: Runtime, callbacks: list[Callback]) -> pl.Trainer:
    """A Lightning trainer on Megatron, set up by exp_manager; `trainer.ckpt_path` names what to resume from, if any."""
    from nemo.utils import logging as nemo_logging
    from nemo.utils.exp_manager import exp_manager

    nemo_logging.setLevel(logging.CRITICAL)  # it calls every strategy but DDP untested, at level ERROR
    trainer = pl.Trainer(
        strategy=MegatronStrategy(runtime),
        accelerator="gpu" if runtime.device.type == "cuda" else "cpu",
        devices=runtime.local_world,
        num_nodes=runtime.world // runtime.local_world,
        max_steps=recipe.train.steps,
        max_epochs=-1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
    )
    folder = Path(recipe.run.dir)
    online = recipe.run.wandb is Wandb.online and runtime.first and reach_wandb(recipe)
    exp_manager(
        trainer,
        {
            "explicit_log_dir": str(folder / "experiment"),
            "name": recipe.run.name,
            "create_tensorboard_logger": False,
            "create_checkpoint_callback": False,
            "create_wandb_logger": recipe.run.wandb != Wandb.disabled and runtime.first,
            "wandb_logger_kwargs": {
                "name": recipe.run.name,
                "project": recipe.run.project,
                "save_dir": str(folder),
                "offline": not online,
                "settings": {"silent": True, "console": "off"},
            },
            "checkpoint_callback_params": {"dirpath": str(folder / "checkpoints")},
            "resume_if_exists": True,
            "resume_ignore_no_checkpoint": True,
            "log_step_timing": False,
            "seconds_to_sleep": 0,
        },
    )
    for logger in trainer.loggers:
        logger._wandb_init.pop("anonymous", None)  # Lightning 2.4 passes it, W&B 0.31 warns about it
        _outlive_service(logger)
    return trainer


def reach_wandb(recipe: Recipe) -> bool:
    """Open the run at the W&B server, which the logger then takes; one warning line if that cannot be done.

    Once it is open, W&B itself keeps what it cannot send and tries again.

    Returns:
        Whether it is open. If not, the run is logged offline.
    """
    import wandb

    folder = Path(recipe.run.dir) / "wandb"
    before = set(folder.glob("run-*"))
    try:
        wandb.init(
            project=recipe.run.project,
            name=recipe.run.name,
            dir=recipe.run.dir,
            settings=wandb.Settings(silent=True, console="off", init_timeout=WANDB_S, finish_timeout=WANDB_S),
        )
    except wandb.Error as error:
        reason = (str(error).splitlines() or ["?"])[0]
        wandb.teardown()
        for path in set(folder.glob("run-*")) - before:  # of a run that never was: the report would take its id
            shutil.rmtree(path, ignore_errors=True)
        remedy = f"logging offline to {folder}; `wandb sync` sends it later"
        tell(f"warning: W&B cannot be reached ({reason}): {remedy}")
        return False
    return True


def _outlive_service(logger: Any) -> None:
    """W&B's own process gets the SIGTERM that Slurm sends to a whole job, and ends: training has yet to save."""

    def without_service(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with suppress(ConnectionError):
                return method(*args, **kwargs)

        return call

    for name in ("log_metrics", "log_hyperparams", "save", "finalize"):
        setattr(logger, name, without_service(getattr(logger, name)))


class Bar(Callback):
    """One line of progress on rank 0: loss, tokens per second, time left."""

    def __init__(self, recipe: Recipe, runtime: Runtime):
        self.recipe, self.runtime = recipe, runtime
        self.bar: tqdm | None = None
        self.seconds: list[float] = []
        self._started = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Open the bar at the step that training resumes from."""
        self._started = time.perf_counter()
        if self.runtime.first:
            done = len(pl_module.progress.losses)
            self.bar = tqdm(
                total=self.recipe.train.steps,
                initial=done,
                desc=f"  {self.recipe.method.value}",
                disable=False,
                unit="step",
                file=sys.stdout,
                dynamic_ncols=True,
                mininterval=0.5 if sys.stdout.isatty() else 15.0,
            )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Advance by one optimizer step."""
        now = time.perf_counter()
        self.seconds.append(now - self._started)
        self._started = now
        if self.bar is not None:
            tokens = self.recipe.train.global_batch * self.recipe.train.sequence_length
            recent = self.seconds[-10:]
            rate = tokens * len(recent) / sum(recent)
            self.bar.set_postfix_str(f"loss {pl_module.progress.losses[-1]:.4f}, {rate:,.0f} tokens/s", refresh=False)
            self.bar.update()

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Leave the finished bar on the screen."""
        if self.bar is not None:
            self.bar.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Close the bar before the error line."""
        if self.bar is not None:
            self.bar.close()


def fit(module: Training, recipe: Recipe, runtime: Runtime, stop: Stop, shape: ModelShape) -> list[float]:
    """Train to recipe.train.steps, from the last checkpoint if there is one.

    Returns:
        Seconds of each step that this process ran.

    Raises:
        UserError: training stopped; Interrupted says what was saved.
    """
    checkpoint.tolerate_plain_adam()
    bar = Bar(recipe, runtime)
    watchdog = Watchdog(
        Path(recipe.run.dir),
        rank=runtime.rank,
        world=runtime.world,
        seconds=recipe.launch.hang_seconds,
        progress=lambda: (len(module.progress.losses), f"step {len(module.progress.losses)}, {module.phase}"),
        collectives=collectives_begun,
    )
    with quiet():
        watched = Telemetry(recipe, runtime, shape, _say)
        trainer = make_trainer(recipe, runtime, [bar, watched, Checkpoints(recipe, runtime, stop)])
    gc.freeze()  # what was imported and built is no garbage: Megatron collects in a planned save, 0.7 s without this
    try:
        with stop.graceful(), quiet(), watchdog.watching():
            trainer.fit(module, ckpt_path=trainer.ckpt_path)
    finally:
        gc.unfreeze()
        watched.close(module)
        finish_logging(trainer)
    return bar.seconds


def _say(line: str) -> None:
    """Print a line above the bar, and log it."""
    OWN.info(line.strip())
    tqdm.write(line)


@contextmanager
def quiet():
    """Log records up to ERROR stay off the terminal: NeMo's telemetry and Lightning comment on every start.

    They are dropped where no log file takes them; failures raise.
    """
    logging.disable(logging.NOTSET if to_file() else logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def finish_logging(trainer: pl.Trainer) -> None:
    """Close the W&B run, so that its files are complete before the process ends.

    W&B's own service also gets the SIGTERM that Slurm sends to every process of a job, and ends by it: what it had not
    yet written is lost to W&B (losses are in the checkpoint), and closing must not fail because of it.
    """
    if not trainer.loggers:
        return
    import wandb

    if wandb.run is None:
        return
    try:
        wandb.finish()
    except ConnectionError:
        with suppress(ConnectionError):
            wandb.teardown()  # which also takes back its exit hook


def log_report(
    recipe: Recipe,
    *,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    images: Sequence[tuple[str, str, bytes]],
    summary: Mapping[str, str | float],
) -> None:
    """Put a report's table, plots and main figures into the run's own W&B run, or into a new one if it has none.

    Offline, W&B cannot reopen a run: what is logged lands in a second folder with the run's id, which `wandb sync
    --append` adds to it.

    Args:
        recipe: run.wandb says where to; disabled logs nothing.
        columns: Headings of the table of scores.
        rows: Its cells; no rows, no table.
        images: (name, caption, PNG) of every plot.
        summary: Figures for the run's summary.

    Raises:
        UserError: W&B cannot be reached or refuses.
    """
    if recipe.run.wandb is Wandb.disabled:
        return
    import wandb
    from PIL import Image

    content: dict[str, Any] = {
        f"report/{name}": wandb.Image(Image.open(io.BytesIO(png)), caption=caption) for name, caption, png in images
    }
    if rows:
        content["report/scores"] = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
    try:
        with quiet():
            run = _report_run(recipe)
            run.log(content)
            run.summary.update(dict(summary))
            run.finish()
    except wandb.Error as error:
        reason = (str(error).splitlines() or ["?"])[0]
        raise UserError(f"run.wandb = {recipe.run.wandb}: W&B refused the report ({reason}); use offline") from error


def _report_run(recipe: Recipe) -> Any:
    """The W&B run that takes a report: the one that training opened, or where its server is away, an offline one."""
    import wandb

    folder = Path(recipe.run.dir)

    def opened(mode: Wandb) -> Any:
        return wandb.init(
            project=recipe.run.project,
            name=recipe.run.name,
            dir=str(folder),
            id=wandb_id(folder),
            resume="allow" if mode is Wandb.online else None,
            mode=mode.value,
            settings=wandb.Settings(silent=True, console="off", init_timeout=WANDB_S, finish_timeout=WANDB_S),
        )

    if recipe.run.wandb is Wandb.online:
        try:
            return opened(Wandb.online)
        except wandb.errors.CommError:
            wandb.teardown()
    return opened(Wandb.offline)


def wandb_id(folder: Path) -> str | None:
    """Id of the W&B run that a run folder holds, the oldest one: it is the one that training opened."""
    runs = sorted((path.name for path in (folder / "wandb").glob("*run-*-*") if path.is_dir()), key=_started)
    return runs[0].rpartition("-")[2] if runs else None


def _started(name: str) -> str:
    return name.partition("run-")[2]  # date and time, after `offline-` or nothing
