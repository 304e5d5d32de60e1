"""What a training run says about itself after every step, and where it goes: sinks.py, W&B, one line per event."""

import resource
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from halfbyte.training import quantization_stats
from halfbyte.training.config import Method, Recipe
from halfbyte.training.data import MicroBatch
from halfbyte.training.graph_rules import captures
from halfbyte.training.hardware import gpu_of
from halfbyte.training.runtime import Runtime
from halfbyte.training.shape import ModelShape, model_flops
from halfbyte.training.sinks import DETAIL, JsonLines, Prometheus, Sink, TensorBoard, flat
from halfbyte.training.stragglers import WaitClock, compare

IN_LIGHTNING = ("step", "time", "loss", "learning_rate", "gradient_norm")
"""What Lightning's loggers have from the training step itself, or count by."""
GRAPHS_HIDE = (
    "slow ranks are looked for among tensor-parallel groups, not inside them: CUDA graphs replay their passes, and "
    "waiting inside a graph is not seen (train.cuda_graphs=never shows it)"
)
"""Said once, in the first step in which ranks are compared."""


class Telemetry(Callback):
    """Metrics of every step, written by rank 0.

    Args:
        recipe: The recipe.
        runtime: This process.
        shape: The model's sizes.
        say: Prints one line; called on rank 0 only.
    """

    def __init__(self, recipe: Recipe, runtime: Runtime, shape: ModelShape, say: Callable[[str], None]):
        self.recipe, self.runtime, self.say = recipe, runtime, say
        train = recipe.train
        self.tokens = train.global_batch * train.sequence_length
        self.flops = model_flops(shape, self.tokens, train.sequence_length)
        self.peak = _peak_flops(runtime)
        self.sinks: list[Sink] = []
        self._started = 0.0
        self._waits: WaitClock | None = None
        graphs = runtime.device.type == "cuda" and captures(recipe)
        self._apart = not graphs or recipe.parallel.tensor == 1
        """Whether tensor-parallel ranks wait for each other outside CUDA graphs, where it is seen."""
        self._compared_before = False
        self._saves = 0
        """How many of the module's were written."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Open what is written to."""
        if not self.runtime.first:
            return
        folder, done = Path(self.recipe.run.dir), len(pl_module.progress.losses)
        try:
            self.sinks = [JsonLines(folder, done), Prometheus(folder, self.recipe.run.name, done)]
        except OSError as error:
            self._without(error)
        if self.recipe.telemetry.tensorboard:
            self.sinks.append(TensorBoard(folder, done))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Start the clock of a step: its data is there."""
        every = self.recipe.telemetry.stragglers_every_steps
        if self.runtime.world > 1 and _due(len(pl_module.progress.losses) + 1, every):
            clock = self._waits = WaitClock(self.runtime.device)
            clock.start()
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write the step's metrics."""
        seconds = time.perf_counter() - self._started
        more, lines = self._compared(seconds)
        rounding, about = self._rounding(pl_module, batch[0])
        lines += about
        if self.runtime.first:
            record = self._record(pl_module, seconds) | more | rounding
            for line in lines:
                self.say(f"  step {record['step']}: {line}")
            self._write(trainer, record | ({"events": lines} if lines else {}))

    def close(self, pl_module: Any) -> None:
        """Close the files, however training ended; only then is it known which checkpoint was its last."""
        if self._waits is not None:
            self._waits.stop()
        try:
            for sink in self.sinks:
                sink.close(self._unwritten(pl_module))
        except OSError as error:
            self._without(error)
        self.sinks = []

    def _compared(self, seconds: float) -> tuple[dict[str, Any], list[str]]:
        """Metrics and lines about slow ranks, in a step that was timed for them; collective."""
        if self._waits is None:
            return {}, []
        own, self._waits = seconds - self._waits.stop(), None
        metrics, lines = compare(own, self.runtime.device, self.recipe.telemetry.straggler_ratio, apart=self._apart)
        first, self._compared_before = not self._compared_before, True
        return {"ranks": metrics}, [*([GRAPHS_HIDE] if first and not self._apart else []), *lines]

    def _rounding(self, pl_module: Any, batch: MicroBatch) -> tuple[dict[str, Any], list[str]]:
        """Metrics and lines about quantization, in a step that it is due in; collective."""
        step = len(pl_module.progress.losses)
        trains = self.recipe.method in (Method.qat, Method.qad) and step > self.recipe.train.fake_quant_after_steps
        if not trains or not _due(step, self.recipe.telemetry.quantization_every_steps):
            return {}, []
        started = time.perf_counter()
        layers = quantization_stats.measure(pl_module.gpt, batch, self.recipe.quantize)
        seconds = {"seconds": time.perf_counter() - started}
        found = {"quantization": quantization_stats.summary(layers) | seconds, DETAIL: layers}
        return found, quantization_stats.lines(layers)

    def _record(self, pl_module: Any, seconds: float) -> dict[str, Any]:
        record = {
            "step": len(pl_module.progress.losses),
            "time": round(time.time(), 3),
            "loss": pl_module.progress.losses[-1],
            "learning_rate": pl_module.optimizer.param_groups[0]["lr"],
            "gradient_norm": pl_module.optimizer.gradient_norm,
            "seconds": seconds,
            "tokens_per_second": self.tokens / seconds,
        }
        if self.peak is not None:
            record["mfu"] = self.flops / seconds / self.peak
        saved, self._saves = self._unwritten(pl_module), len(pl_module.saves)
        return record | saved | {"memory_bytes": self._memory()}

    def _unwritten(self, pl_module: Any) -> dict[str, Any]:
        """The newest checkpoint, if it was completed since the last record: between two steps at most one is."""
        return {"checkpoint": pl_module.saves[-1]} if len(pl_module.saves) > self._saves else {}

    def _memory(self) -> int:
        """Peak bytes so far: on the GPU, or of this process."""
        on_gpu = peak_gpu_bytes(self.recipe, self.runtime.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if on_gpu is None else on_gpu  # in KiB there

    def _write(self, trainer: pl.Trainer, record: Mapping[str, Any]) -> None:
        more = {name: value for name, value in flat(record) if name not in IN_LIGHTNING}
        with suppress(ConnectionError):  # Slurm's SIGTERM ends W&B's service too, and the checkpoint is yet to be saved
            for logger in trainer.loggers:
                logger.log_metrics(more, step=record["step"])
        try:
            for sink in self.sinks:
                sink.write(record)
        except OSError as error:
            self._without(error)

    def _without(self, error: OSError) -> None:
        self.sinks = []
        self.say(f"  metrics cannot be written ({error.strerror}): training goes on without them")


def _due(step: int, every: int) -> bool:
    """Whether step number `step`, counted from 1, is a multiple of `every`; never for 0."""
    return every > 0 and step % every == 0


def _peak_flops(runtime: Runtime) -> float | None:
    """BF16 FLOP/s of all GPUs of the run; None on a CPU or on a GPU that training/hardware.py lacks."""
    if runtime.device.type != "cuda":
        return None
    gpu = gpu_of(torch.cuda.get_device_name(runtime.device))
    return None if gpu is None else gpu.bf16 * runtime.world


def peak_gpu_bytes(recipe: Recipe, device: torch.device) -> int | None:
    """Peak bytes that this process had of its GPU so far; None on a CPU.

    Of tensors. Where CUDA graphs replay the passes, of all that torch's allocator held: a graph's memory counts as free
    between two replays, though nothing else gets it.
    """
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_reserved if captures(recipe) else torch.cuda.max_memory_allocated
    return peak(device)
