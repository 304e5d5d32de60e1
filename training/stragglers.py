"""Which rank is slow: every rank's time for a step without its waiting for others, compared inside a pipeline stage.

In synchronous training every rank takes the same time for a step, because the fast ones wait inside collectives. What
tells them apart is the time outside: the slow rank is the one that waits least. Pipeline stages do different work, so
a rank is compared with those of its own stage.
"""

import functools
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

COLLECTIVES = (
    *("_allgather_base", "allgather", "allgather_coalesced", "allgather_into_tensor_coalesced", "gather"),
    *("_reduce_scatter_base", "reduce_scatter", "reduce_scatter_tensor_coalesced", "scatter", "reduce"),
    *("allreduce", "allreduce_coalesced", "alltoall", "alltoall_base", "barrier", "broadcast", "recv", "send"),
)
"""Methods of torch's ProcessGroup in which a rank can wait for others."""


class WaitClock:
    """Adds up the seconds that this process waits for others, between `start` and `stop`.

    On a GPU the stream is synchronized before and after each collective: nothing overlaps, and what stands between is
    this rank's own work. Collectives inside a CUDA graph are not seen.
    """

    def __init__(self, device: torch.device):
        self.seconds = 0.0
        self._cuda = device.type == "cuda"
        self._inside = False
        self._undo = ExitStack()

    def start(self) -> None:
        """Begin: torch's collectives, and the waiting for asynchronous ones, go through this clock from now on."""
        self._replace(dist.Work, "wait")
        for name in COLLECTIVES:
            self._replace(dist.ProcessGroup, name)

    def stop(self) -> float:
        """End; returns the seconds."""
        self._undo.close()
        return self.seconds

    def _replace(self, owner: type, name: str) -> None:
        original = getattr(owner, name)
        setattr(owner, name, self._timed(original))
        self._undo.callback(setattr, owner, name, original)

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside or (self._cuda and torch.cuda.is_current_stream_capturing()):
                return call(*args, **kwargs)
            self._inside = True
            self._synchronize()
            started = time.perf_counter()
            try:
                done = call(*args, **kwargs)
                self._synchronize()
            finally:
                self.seconds += time.perf_counter() - started
                self._inside = False
            return done

        return timed

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.current_stream().synchronize()


@dataclass(frozen=True)
class RankTime:
    """One rank's step: its pipeline stage, and its seconds without waiting."""

    stage: int
    seconds: float


def slow_ranks(times: Sequence[RankTime], ratio: float) -> dict[int, float]:
    """Ranks that take more than `ratio` times the (lower) median of their pipeline stage -> how many times it."""
    stages: dict[int, list[float]] = {}
    for time_of in times:
        stages.setdefault(time_of.stage, []).append(time_of.seconds)
    medians = {stage: statistics.median_low(seconds) for stage, seconds in stages.items()}
    factors = {rank: time_of.seconds / max(medians[time_of.stage], 1e-9) for rank, time_of in enumerate(times)}
    return {rank: factor for rank, factor in factors.items() if factor > ratio}


def compare(seconds: float, device: torch.device, ratio: float) -> tuple[dict[str, float], list[str]]:
    """Compare all ranks' own seconds of a step; collective.

    Args:
        seconds: This rank's.
        device: Where collectives want their tensors.
        ratio: From how many medians on a rank is named.

    Returns:
        Metrics (median and largest seconds without waiting, the slowest rank), and a line per slow rank with its host.
    """
    stage = parallel_state.get_pipeline_model_parallel_rank()
    mine = torch.tensor([stage, seconds], dtype=torch.float64, device=device)
    every = torch.empty(2 * dist.get_world_size(), dtype=torch.float64, device=device)
    dist.all_gather_into_tensor(every, mine)
    times = [RankTime(int(stage), own) for stage, own in every.view(-1, 2).tolist()]
    slow, hosts = slow_ranks(times, ratio), [""] * len(times)
    if slow:  # the same on every rank
        dist.all_gather_object(hosts, socket.gethostname())
    slowest = max(range(len(times)), key=lambda rank: times[rank].seconds)
    metrics = {
        "median_seconds": statistics.median(t.seconds for t in times),
        "largest_seconds": times[slowest].seconds,
        "slowest_rank": slowest,
    }
    lines = [
        f"rank {rank} on {hosts[rank]} takes {times[rank].seconds:.3g} s without waiting, {factor:.2f} x the median of "
        "its pipeline stage"
        for rank, factor in slow.items()
    ]
    return metrics, lines
