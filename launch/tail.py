"""`halfbyte tail RUN`: what a run that trains writes to metrics.jsonl, as it writes it. On a terminal one live view."""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.training.errors import OK, USAGE, UserError
from halfbyte.training.sinks import METRICS, parsed

POLL_S = 0.5
WIDTH = 60
"""Steps in the live view's curve."""
BARS = "▁▂▃▄▅▆▇█"


def options(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder of a run")
    parser.add_argument("--lines", metavar="N", type=int, default=10, help="steps to show at first (10)")
    parser.add_argument("--once", action="store_true", help="show what is there and end")


def command(args: argparse.Namespace) -> int:
    """Follow a run until its last step or Ctrl-C; returns the exit code.

    Raises:
        UserError: the folder holds no run.
    """
    folder = Path(args.run_dir)
    if args.lines < 1:
        raise UserError(f"--lines {args.lines}: must be positive; give at least 1", USAGE)
    run = Watched(folder, *_asked(folder))
    show = _live if sys.stdout.isatty() and not args.once else _plain
    try:
        show(run, args.lines, once=args.once)
    except KeyboardInterrupt:
        print()
    return OK


def _asked(folder: Path) -> tuple[str, int]:
    """Name and steps of a run, from its resolved.yaml."""
    from halfbyte.training.resolve import load

    if not (folder / "resolved.yaml").is_file():
        raise UserError(f"{folder}: holds no resolved.yaml; give the folder of a run (run.dir)", USAGE)
    recipe = load(folder / "resolved.yaml")
    return recipe.run.name, recipe.train.steps


@dataclass
class Watched:
    """A run's metrics as far as they are there.

    Attributes:
        folder: The run folder.
        name: Of the run.
        steps: Steps that it shall train.
        records: What was read so far, rising steps.
    """

    folder: Path
    name: str
    steps: int
    records: list[dict[str, Any]] = field(default_factory=list)
    _file: tuple[int, int] = (0, 0)
    """Inode, and bytes of whole lines that were read."""

    @property
    def done(self) -> bool:
        """Whether the last step is there."""
        return bool(self.records) and self.records[-1]["step"] >= self.steps

    def more(self) -> list[dict[str, Any]]:
        """New records since the last call. A resume replaces the file: then from the step that it resumes after."""
        path = self.folder / METRICS
        if not path.exists():
            return []
        status = path.stat()
        if status.st_ino != self._file[0] or status.st_size < self._file[1]:
            self._file = (status.st_ino, 0)
        with path.open("rb") as file:
            file.seek(self._file[1])
            whole = file.read().rpartition(b"\n")[0]
        self._file = (status.st_ino, self._file[1] + len(whole) + (1 if whole else 0))
        new = [r for line in whole.decode(errors="replace").splitlines() if (r := parsed(line)) is not None]
        return self._taken(new)

    def _taken(self, new: list[dict[str, Any]]) -> list[dict[str, Any]]:
        known = {record["step"]: record for record in self.records}
        fresh = [record for record in new if known.get(record["step"]) != record]
        if fresh:
            self.records = [record for record in self.records if record["step"] < fresh[0]["step"]] + fresh
        return fresh


def _plain(run: Watched, lines: int, *, once: bool) -> None:
    shown = run.more()[-lines:]
    if not shown:
        print(f"{run.name}: no step yet", flush=True)
    while True:
        for record in shown:
            print("\n".join(record_lines(record, run)), flush=True)
        if once or run.done:
            return
        time.sleep(POLL_S)
        shown = run.more()


def record_lines(record: dict[str, Any], run: Watched) -> list[str]:
    """A step as a line, and a line for each event in it."""
    words = [f"step {record['step']}/{run.steps}", *(f"{name} {value}" for name, value in _values(record))]
    return ["  ".join(words), *(f"  {line}" for line in events(record))]


def _values(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, text) of the metrics that the record has."""
    texts = {
        "loss": ("loss", lambda x: f"{x:.4f}"),
        "learning_rate": ("lr", lambda x: f"{x:.2e}"),
        "gradient_norm": ("grad", lambda x: f"{x:.3g}"),
        "tokens_per_second": ("tokens/s", lambda x: f"{x:,.0f}"),
        "mfu": ("MFU", lambda x: f"{x:.1%}"),
        "memory_bytes": ("GB", lambda x: f"{x / 1e9:.1f}"),
    }
    for key, (name, text) in texts.items():
        if isinstance(record.get(key), int | float):
            yield name, text(record[key])


def events(record: dict[str, Any]) -> list[str]:
    """Lines about what a step has beside its numbers: each value of `events`."""
    said = record.get("events", [])
    return [line for line in said if isinstance(line, str)] if isinstance(said, list) else []


def curve(values: list[float]) -> str:
    """Values as bars of eight heights, from their smallest to their largest."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(BARS[min(7, int(8 * (value - low) / span))] for value in values)


def time_left(run: Watched) -> str:
    """Hours and minutes of what is left, at the median pace of the last steps; `-` before the first."""
    recent = [record["seconds"] for record in run.records[-20:] if isinstance(record.get("seconds"), int | float)]
    if not recent:
        return "-"
    minutes = sorted(recent)[len(recent) // 2] * (run.steps - run.records[-1]["step"]) / 60
    return f"{int(minutes) // 60}:{int(minutes) % 60:02d} h"


def _live(run: Watched, lines: int, *, once: bool) -> None:
    from rich.live import Live

    with Live(refresh_per_second=2) as screen:
        while True:
            run.more()
            screen.update(view(run, lines))
            if run.done:
                return
            time.sleep(POLL_S)


def view(run: Watched, lines: int) -> Any:
    """The live view: a bar, the loss's curve, the last step's metrics and the last events.

    Returns:
        Something that rich can draw.
    """
    from rich.console import Group
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    if not run.records:
        return Panel(Text("no step yet"), title=Text(run.name))
    last = run.records[-1]
    losses = [record["loss"] for record in run.records[-WIDTH:] if isinstance(record.get("loss"), int | float)]
    recent = [line for record in run.records for line in events(record)][-lines:]
    return Panel(
        Group(
            ProgressBar(total=run.steps, completed=last["step"]),
            Text(f"step {last['step']}/{run.steps}, {time_left(run)} left"),
            Text("  ".join(f"{name} {value}" for name, value in _values(last))),
            Text(f"loss of the last {len(losses)} steps  {curve(losses)}" if losses else ""),
            *(Text(line) for line in recent),
        ),
        title=Text(run.name),
    )
