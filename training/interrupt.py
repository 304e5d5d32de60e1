"""SIGINT (Ctrl-C) and SIGTERM (preemption): save first where there is something to save. Torch-free."""

import signal
from contextlib import contextmanager

from halfbyte.training.errors import FAILED, OK, UserError


class Interrupted(UserError):
    """SIGINT or SIGTERM ended the run; the message says what was saved.

    Args:
        message: What was saved, and how to go on.
        announced: A checkpoint was saved on SIGTERM, which is how schedulers take a machine back: exit code 0.
    """

    def __init__(self, message: str, *, announced: bool = False):
        super().__init__(message, OK if announced else FAILED)


class Stop:
    """What SIGINT (Ctrl-C) and SIGTERM (preemption) do: raise at once, or, inside `graceful()`, only leave a note.

    Training runs inside `graceful()`: it finishes the step, saves a checkpoint and stops. Any other stage has nothing
    to save, so it stops where it is.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._graceful = False
        self._over = False

    def install(self) -> None:
        """Take over both signals; call once, from the main thread."""
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)

    @contextmanager
    def graceful(self):
        """Within this context a signal is only noted in `requested`."""
        self._graceful = True
        try:
            yield self
        finally:
            self._graceful = False

    def close(self) -> None:
        """From now on both signals do nothing: the work has ended, its exit code stands, the process only has to leave.

        The launcher sends SIGTERM to every worker as soon as one has ended, which may be while this one is reporting
        its own end or is deep in the interpreter's shutdown: raising there would only print a traceback.
        """
        self._over = True

    def _handle(self, number: int, _frame: object) -> None:
        if self._over:
            return
        self.requested = signal.Signals(number).name
        if not self._graceful:
            raise Interrupted(f"stopped by {self.requested}: finished stages are kept, the running one is not saved")
