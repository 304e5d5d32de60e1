"""A hung process is found, named and ended with all others, so that the run can start again. Torch-free.

Every process has a thread that looks at its own progress. When there was none for launch.hang_seconds, it leaves what
it knows in the run folder (its phase, its place in the program, how many collectives each of its groups has begun),
gives the others a moment to do the same, and compares: who is behind its group, who waits for nobody, who left nothing.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from halfbyte.training.errors import HUNG
from halfbyte.training.files import write_json

GRACE_S = 5.0
"""All processes stall at nearly the same time: how long one waits for what the others know."""
WAITING = ("torch/distributed/distributed_c10d.py", "megatron/core/pipeline_parallel/p2p_communication.py")
"""Files in which a process waits for others: collectives, and the pipeline's sends and receives."""


class Watchdog:
    """The thread of one process.

    Args:
        folder: The run folder.
        rank: This process.
        world: All processes.
        seconds: launch.hang_seconds; 0 starts no thread.
        progress: (number that grows with progress, what is being done), asked from the thread.
        collectives: Name of each of this process's groups -> collectives that it has begun there.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        world: int,
        seconds: float,
        progress: Callable[[], tuple[int, str]],
        collectives: Callable[[], dict[str, int]],
    ):
        self.folder, self.rank, self.world, self.seconds = folder / "errors", rank, world, seconds
        self._progress, self._collectives = progress, collectives
        self._main = threading.get_ident()
        self._over = threading.Event()

    @contextmanager
    def watching(self):
        """Watch the calling thread within this context."""
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        (self.folder / f"stalled{self.rank}.json").unlink(missing_ok=True)  # of an earlier start
        if self.seconds:
            thread.start()
        try:
            yield self
        finally:
            self._over.set()
            if self.seconds:
                thread.join()

    def _watch(self) -> None:
        seen, since = self._progress(), time.monotonic()
        while not self._over.wait(min(1.0, self.seconds / 10)):
            now = self._progress()
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > self.seconds:
                self._end(seen[1])

    def _end(self, phase: str) -> None:
        """Say who hangs, and end this process, whose main thread cannot be reached."""
        mine = {"phase": phase, **place(sys._current_frames()[self._main]), "collectives": self._collectives()}
        write_json(self.folder / f"stalled{self.rank}.json", mine)
        deadline = time.monotonic() + GRACE_S
        files = {rank: self.folder / f"stalled{rank}.json" for rank in range(self.world)}
        while time.monotonic() < deadline and not all(path.exists() for path in files.values()):
            time.sleep(0.05)
        states = {rank: json.loads(path.read_text()) for rank, path in files.items() if path.exists()}
        message = f"no progress for {self.seconds:g} s (launch.hang_seconds): {blame(states, self.world)}"
        report = {"time": time.time(), "message": message, "code": HUNG, "died": True}
        write_json(self.folder / f"rank{self.rank}.json", report)
        sys.stdout.flush()
        os._exit(HUNG)


def place(frame: FrameType | None) -> dict[str, str | None]:
    """Where a thread is.

    Args:
        frame: Its innermost frame.

    Returns:
        "where": the innermost line of halfbyte; "waits": the outermost call of a collective, or None.
    """
    where, waits = "outside halfbyte", None
    inner = frame
    while inner is not None:
        file = inner.f_code.co_filename
        if file.endswith(WAITING):
            waits = inner.f_code.co_name
        elif inner.f_globals.get("__name__", "").startswith("halfbyte."):
            where = f"{Path(file).parent.name}/{Path(file).name}:{inner.f_lineno} ({inner.f_code.co_name})"
            break
        inner = inner.f_back
    return {"where": where, "waits": waits}


def blame(states: Mapping[int, Mapping[str, Any]], world: int) -> str:
    """Who hangs, where, and who waits for it.

    Args:
        states: Rank -> what it left: "phase", "where", "waits", "collectives".
        world: All processes.
    """
    hung = {rank: "gives no sign of life" for rank in range(world) if rank not in states}
    hung = hung or _behind(states) or _not_waiting(states)
    if not hung:
        return f"all ranks wait for each other in {states[0]['waits']} ({states[0]['phase']})"
    said = [
        f"rank {rank} {reason}" + (f" in {states[rank]['phase']}, at {states[rank]['where']}" if rank in states else "")
        for rank, reason in hung.items()
    ]
    others = sorted(states.keys() - hung.keys())
    if others:
        first = states[others[0]]
        what = f"in {first['waits']}" if first["waits"] else "for the GPU"
        said.append(f"rank {', '.join(map(str, others))} waits {what} ({first['phase']}, at {first['where']})")
    return "; ".join(said)


def _behind(states: Mapping[int, Mapping[str, Any]]) -> dict[int, str]:
    """Ranks that have begun fewer collectives of a group than another member."""
    hung = {}
    for group in sorted({group for state in states.values() for group in state["collectives"]}):
        counts = {rank: state["collectives"][group] for rank, state in states.items() if group in state["collectives"]}
        for rank, count in counts.items():
            if count < max(counts.values()):
                hung.setdefault(rank, f"has not reached collective {count + 1} of group {group}")
    return hung


def _not_waiting(states: Mapping[int, Mapping[str, Any]]) -> dict[int, str]:
    """Ranks outside every collective, where others are inside one."""
    busy = {rank: "hangs" for rank, state in states.items() if state["waits"] is None}
    return busy if len(busy) < len(states) or len(states) == 1 else {}
