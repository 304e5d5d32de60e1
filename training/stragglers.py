"""Which rank is slow: every rank's time for a step without its waiting for others, compared inside a pipeline stage.

In synchronous training every rank takes the same time for a step, because the fast ones wait inside collectives. What
tells them apart is the time outside: the slow rank is the one that waits least. Pipeline stages do different work, so
a rank is compared with those of its own stage. What a CUDA graph replays cannot be timed inside: where its passes hold
tensor-parallel collectives, fast and slow ranks of such a group take equally long, and only groups can be compared.
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
    """One rank's step.

    Attributes:
        stage: Its pipeline stage.
        group: Number of those in its stage that it cannot be told apart from.
        seconds: Its seconds without waiting.
    """

    stage: int
    group: int
    seconds: float


def slow_groups(times: Sequence[RankTime], ratio: float) -> dict[tuple[int, ...], float]:
    """Groups that take more than `ratio` times the (lower) median of their pipeline stage.

    Args:
        times: Of every rank, in their order.
        ratio: From how many medians on a group is slow.

    Returns:
        Ranks of a slow group, mostly a single one -> how many medians its slowest rank takes.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for rank, time_of in enumerate(times):
        groups.setdefault((time_of.stage, time_of.group), []).append(rank)
    seconds = {key: max(times[rank].seconds for rank in ranks) for key, ranks in groups.items()}
    stages: dict[int, list[float]] = {}
    for (stage, _), own in seconds.items():
        stages.setdefault(stage, []).append(own)
    medians = {stage: statistics.median_low(own) for stage, own in stages.items()}
    factors = {tuple(ranks): seconds[key] / max(medians[key[0]], 1e-9) for key, ranks in groups.items()}
    return {ranks: factor for ranks, factor in factors.items() if factor > ratio}


def compare(seconds: float, device: torch.device, ratio: float, *, apart: bool) -> tuple[dict[str, float], list[str]]:
    """Compare all ranks' own seconds of a step; collective.

    Args:
        seconds: This rank's.
        device: Where collectives want their tensors.
        ratio: From how many medians on a rank is named.
        apart: Whether this rank's waiting for its tensor-parallel peers was seen. Else their group is compared as one.

    Returns:
        Metrics (median and largest seconds without waiting, with `apart` the slowest rank), and a line per slow rank,
        or group, with its hosts.
    """
    stage = parallel_state.get_pipeline_model_parallel_rank()
    group = dist.get_rank() if apart else parallel_state.get_data_parallel_rank()
    mine = torch.tensor([stage, group, seconds], dtype=torch.float64, device=device)
    every = torch.empty(3 * dist.get_world_size(), dtype=torch.float64, device=device)
    dist.all_gather_into_tensor(every, mine)
    times = [RankTime(int(stage), int(group), own) for stage, group, own in every.view(-1, 3).tolist()]
    slow, hosts = slow_groups(times, ratio), [""] * len(times)
    if slow:  # the same on every rank
        dist.all_gather_object(hosts, socket.gethostname())
    slowest = max(range(len(times)), key=lambda rank: times[rank].seconds)
    metrics = {
        "median_seconds": statistics.median(t.seconds for t in times),
        "largest_seconds": times[slowest].seconds,
    }
    lines = [_line(ranks, [hosts[rank] for rank in ranks], times, factor) for ranks, factor in slow.items()]
    return metrics | ({"slowest_rank": slowest} if apart else {}), lines


def _line(ranks: Sequence[int], hosts: Sequence[str], times: Sequence[RankTime], factor: float) -> str:
    seconds, where = max(times[rank].seconds for rank in ranks), ", ".join(dict.fromkeys(hosts))
    much = f"{seconds:.3g} s without waiting, {factor:.2f} x the median of"
    if len(ranks) == 1:
        return f"rank {ranks[0]} on {where} takes {much} its pipeline stage"
    names = ", ".join(map(str, ranks))
    return f"one of the tensor-parallel ranks {names} on {where} makes all of them take {much} their pipeline stage"
