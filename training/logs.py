"""One log file per process, <run.dir>/logs/rank<N>.log: everything that libraries say, and every line of the run.

A terminal gets the run's own lines only, and may go away while the run goes on. What anything writes to the standard
error stream goes to the file: Python's warnings and log records, C++ libraries, a crash's last words. Torch-free.
"""

import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from halfbyte.training.environment import lead_nowhere

OWN = logging.getLogger("halfbyte")
"""The run's own lines."""
_STDERR = 2
_terminal: list[int] = []
"""Descriptor of the terminal's standard error stream while it is redirected."""


class _Stderr(io.TextIOBase):
    """Text straight to descriptor 2. On a full disk it is lost; who prints a warning must not end by that."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        with suppress(OSError):
            os.write(_STDERR, text.encode(errors="replace"))
        return len(text)

    def fileno(self) -> int:
        return _STDERR


class _Stdout(io.TextIOBase):
    """Standard output that may go away: who read it has ended (| head, a closed terminal), or its disk is full."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    @property
    def encoding(self) -> str:
        return self._stream.encoding

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except OSError as error:
            OWN.warning("standard output is lost (%s): the run goes on, and its lines stand here", error.strerror)
            lead_nowhere(self._stream)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Within this context nothing ends because what it prints cannot be delivered."""
    before = sys.stdout
    if before is not None:  # Python's word for a descriptor that was closed from the start
        sys.stdout = _Stdout(before)
    try:
        yield
    finally:
        sys.stdout = before


def log_file(folder: Path, rank: int) -> Path:
    """Where a process of a run logs."""
    return folder / "logs" / f"rank{rank}.log"


@contextmanager
def captured(folder: Path, rank: int) -> Iterator[bool]:
    """Send standard error to this process's log file, which is appended to, and log records from WARNING on with it.

    Yields:
        Whether that is so: where the file cannot be written, nothing changes.
    """
    path = log_file(folder, rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError:
        yield False
        return
    before = sys.stderr
    before.flush()
    _terminal.append(os.dup(_STDERR))
    os.dup2(file, _STDERR)
    os.close(file)
    sys.stderr = _Stderr()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    OWN.setLevel(logging.INFO)
    OWN.info("rank %d starts, process %d, %s", rank, os.getpid(), time.strftime("%Z"))
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        try:
            yield True
        finally:
            logging.getLogger().removeHandler(handler)
            terminal = _terminal.pop()
            os.dup2(terminal, _STDERR)
            os.close(terminal)
            sys.stderr = before


@contextmanager
def terminal() -> Iterator[TextIO]:
    """The standard error stream as the process got it, also while that is redirected."""
    if not _terminal:
        yield sys.stderr
        return
    with open(os.dup(_terminal[-1]), "w", encoding="utf-8") as stream:
        yield stream


def to_file() -> bool:
    """Whether standard error goes to a file now."""
    return bool(_terminal)


def tell(text: str) -> None:
    """Print one line on the terminal's standard error stream, also while that is redirected, and log it."""
    OWN.info(text)
    with suppress(OSError):  # it may be gone, as standard output may
        if _terminal:
            os.write(_terminal[-1], f"{text}\n".encode())
        else:
            print(text, file=sys.stderr, flush=True)
