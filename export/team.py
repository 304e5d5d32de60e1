"""The processes that write one export together, and how they wait for each other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def _here(work: Callable[[], Any]) -> Any:
    return work()


@dataclass(frozen=True)
class Team:
    """This process among those that write together; by default it is alone.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        on_first: Runs work on rank 0 only and gives its result to all; an error there is an error everywhere.
        on_every: Runs work on every rank; an error on one is an error everywhere.
    """

    rank: int = 0
    size: int = 1
    on_first: Callable[[Callable[[], Any]], Any] = _here
    on_every: Callable[[Callable[[], Any]], Any] = _here
