"""Where a training run's metrics go: JSON lines, a Prometheus text file, TensorBoard. Rank 0 only.

A metric is a number under a name; nested mappings become names with slashes. Writing never stops a run: where a disk
is full the caller is told, once, and training goes on. Torch is imported for TensorBoard only.
"""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from halfbyte.training.errors import UserError
from halfbyte.training.files import replace_file

METRICS = "metrics.jsonl"
PROMETHEUS = "metrics.prom"
DETAIL = "layers"
"""A part of a record with numbers per layer: too many for Prometheus."""
PROMETHEUS_S = 5.0
"""Least seconds between two versions of metrics.prom; collectors read it every 15 s or so."""
HELP = {
    "step": "Optimizer steps done.",
    "time": "Seconds since 1970 of the last step.",
    "loss": "Mean loss per token of the last step, nats.",
    "learning_rate": "Learning rate of the last step.",
    "gradient_norm": "Gradient norm over all ranks before clipping.",
    "seconds": "Duration of the last step, seconds.",
    "tokens_per_second": "Tokens per second of the last step, all ranks.",
    "mfu": "Model FLOPs of the last step over the BF16 peak of all GPUs, 0 to 1.",
    "checkpoint/step": "Optimizer steps in the last checkpoint that was completed.",
    "checkpoint/seconds": "From its begin until it was complete, seconds.",
    "checkpoint/stall_seconds": "Of them, training stood still for it.",
    "checkpoint/wait_seconds": "Of these, it waited for the deletion of an old one, or the next save for it.",
    "memory_bytes": "Peak memory of rank 0 so far: tensors on a GPU (with graphs all it holds), the process on a CPU.",
}
"""Metric -> what a Prometheus server shows about it; others are exported without."""


class Sink(Protocol):
    """Takes the metrics of a step."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one step's metrics; `step` is among them.

        Raises:
            OSError: they cannot be written.
        """
        ...

    def close(self, after: Mapping[str, Any]) -> None:
        """Leave complete files.

        Args:
            after: Metrics that came about after the last step; a record of steps has no place for them.
        """
        ...


def flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a record, nested ones as `outer/inner`; what is no number is left out."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, as far as they are whole: a killed run may end in half a line.

    Raises:
        OSError: the file cannot be read.
    """
    lines = path.read_text(errors="replace").splitlines()
    return [record for line in lines if (record := parsed(line)) is not None]


def parsed(line: str) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None if it is not a whole record."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


class JsonLines:
    """<run.dir>/metrics.jsonl: one line per step, steps rising, each step once.

    Args:
        folder: The run folder.
        done: Steps that the run resumes after; lines of later ones, from before the resume, are dropped.
    """

    def __init__(self, folder: Path, done: int):
        path = folder / METRICS
        kept = [record for record in read_metrics(path) if record["step"] <= done] if path.exists() else []
        replace_file(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self._file = path.open("a", buffering=1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line."""
        self._file.write(json.dumps(record) + "\n")

    def close(self, after: Mapping[str, Any]) -> None:
        """Close the file."""
        self._file.close()


class Prometheus:
    """<run.dir>/metrics.prom, for node_exporter's textfile collector: the newest value of every metric.

    What not every step has (a checkpoint, a comparison of ranks) stays until the next one: a collector that reads every
    15 s would hardly ever see it otherwise. The file is replaced atomically.

    Args:
        folder: The run folder.
        run: The run's name, the label of every gauge.
        done: Steps that the run resumes after; 0 if it begins.
    """

    def __init__(self, folder: Path, run: str, done: int):
        self._path, self._label = folder / PROMETHEUS, _escaped(run)
        self._written = 0.0
        self._newest: dict[str, Any] = {"checkpoint": {"step": done}} if done else {}

    def write(self, record: Mapping[str, Any]) -> None:
        """Replace the file, unless that was done moments ago."""
        self._newest |= record
        if time.monotonic() - self._written >= PROMETHEUS_S:
            self._replace()

    def close(self, after: Mapping[str, Any]) -> None:
        """Write the last step and what came after it, if there was a step."""
        if "step" in self._newest:
            self._newest |= after
            self._replace()

    def _replace(self) -> None:
        replace_file(self._path, prometheus_text(self._newest, self._label).encode())
        self._written = time.monotonic()


def prometheus_text(record: Mapping[str, Any], label: str) -> str:
    """Metrics in Prometheus' text exposition format 0.0.4.

    Args:
        record: Metrics, nested ones under their names.
        label: The run's name, escaped.
    """
    lines = []
    for name, value in flat({name: value for name, value in record.items() if name != DETAIL}):
        metric = "halfbyte_" + "".join(c if c.isalnum() and c.isascii() else "_" for c in name)
        lines += [f"# HELP {metric} {HELP[name]}"] if name in HELP else []
        lines += [f"# TYPE {metric} gauge", f'{metric}{{run="{label}"}} {float(value)!r}']
    return "\n".join(lines) + "\n"


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class TensorBoard:
    """<run.dir>/tensorboard.

    Args:
        folder: The run folder.
        done: Steps that the run resumes after; TensorBoard hides later ones of an earlier start.

    Raises:
        UserError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, done: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"telemetry.tensorboard = true: not installed ({error}); pip install tensorboard, or set it false"
            ) from error
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Add one point to every curve."""
        for name, value in flat(record):
            if name not in ("step", "time"):
                self._writer.add_scalar(name, value, record["step"], walltime=record["time"])

    def close(self, after: Mapping[str, Any]) -> None:
        """Flush and close."""
        self._writer.close()
