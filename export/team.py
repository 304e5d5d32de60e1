"""The processes that write one export together, and how they wait for each other."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfbyte.training.runtime import Runtime


def _here(work: Callable[[], Any]) -> Any:
    return work()


def _here_alone(work: Callable[[], Any]) -> list[Any]:
    return [work()]


@dataclass(frozen=True)
class Team:
    """This process among those that write together; by default it is alone.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        on_first: Runs work on rank 0 only and gives its result to all; an error there is an error everywhere.
        on_every: Runs work on every rank and gives all the results, by rank; an error on one is an error everywhere.
    """

    rank: int = 0
    size: int = 1
    on_first: Callable[[Callable[[], Any]], Any] = _here
    on_every: Callable[[Callable[[], Any]], list[Any]] = _here_alone


ALONE = Team()


def team_of(runtime: "Runtime") -> Team:
    """All processes of a run."""
    # imported here, for it brings torch, which those do not need who write alone
    from halfbyte.training.runtime import on_every_rank, on_first_rank

    return Team(runtime.rank, runtime.world, partial(on_first_rank, runtime), partial(on_every_rank, runtime))
