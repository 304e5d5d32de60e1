"""What a run prints: one line per finished stage."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tqdm import tqdm

from halfbyte.training.logs import OWN, terminal


@dataclass
class Console:
    """One line per finished stage, from rank 0."""

    loud: bool

    def say(self, text: str) -> None:
        """Print a line, and log it on every rank."""
        OWN.info(text)
        if self.loud:
            print(text, flush=True)

    @contextmanager
    def stage(self, name: str):
        """Time a stage; yields a list whose strings become the end of its line."""
        notes: list[str] = []
        started = time.perf_counter()
        yield notes
        self.say(f"{name:<18} {time.perf_counter() - started:7.1f} s  {', '.join(notes)}")

    @contextmanager
    def progress(self, name: str, total: int) -> Iterator[Callable[[int], object]]:
        """A bar on rank 0's terminal that goes when it is full; nothing in a log, a pipe or on other ranks.

        Args:
            name: What goes on.
            total: Bytes to go through.

        Yields:
            What takes the bytes that were gone through since it was called last.
        """
        with terminal() as stream:
            silent = not (self.loud and stream.isatty())
            size = {"unit": "B", "unit_scale": True, "dynamic_ncols": True}
            with tqdm(total=total, desc=f"  {name}", file=stream, leave=False, disable=silent, **size) as bar:
                yield bar.update
