"""Rank 0 leads: what only it can do (lm-eval's own code) asks all ranks for passes through the model.

The other ranks wait for work; they are let go when rank 0 is done or has failed, so that nobody hangs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from halfbyte.training.errors import UserError
from halfbyte.training.runtime import Runtime

DONE = "done"


@dataclass
class Crew:
    """All ranks of the layout.

    Attributes:
        runtime: This process.
        jobs: Name -> collective function of picklable arguments; the same on every rank.
        working: Whether this rank is inside a job.
    """

    runtime: Runtime
    jobs: dict[str, Callable[..., Any]]
    working: bool = False

    def lead[T](self, work: Callable[[], T]) -> T | None:
        """Run `work` on rank 0, which may call `do`; the other ranks do the same jobs until it ends. Collective.

        Returns:
            What `work` returned, on rank 0.

        Raises:
            UserError: on every rank, when `work` failed outside a job. One inside a job is not announced: the others
                may be in a collective, which only the end of this process breaks off.
        """
        if not self.runtime.first:
            return self._serve()
        try:
            result = work()
        except BaseException as error:
            if not self.working:
                lines = str(error).splitlines() or [type(error).__name__]
                self._tell(DONE, str(error) if isinstance(error, UserError) else f"rank 0: {lines[0]}")
            raise
        self._tell(DONE, None)
        return result

    def do(self, job: str, *arguments: Any) -> Any:
        """Run a job on all ranks; rank 0 calls this inside `lead`, and gets the job's result."""
        self._tell(job, arguments)
        self.working = True
        result = self.jobs[job](*arguments)
        self.working = False
        return result

    def _serve(self) -> None:
        while True:
            order: list[Any] = [None, None]
            dist.broadcast_object_list(order, src=0)
            job, arguments = order
            if job == DONE:
                if arguments is not None:
                    raise UserError(arguments)
                return
            self.jobs[job](*arguments)

    def _tell(self, job: str, arguments: Any) -> None:
        dist.broadcast_object_list([job, arguments], src=0)
