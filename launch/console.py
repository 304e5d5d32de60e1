"""What a run prints: one line per finished stage."""

import time
from contextlib import contextmanager
from dataclasses import dataclass

from halfbyte.training.logs import OWN


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
