"""Where one training step's time goes on a GPU: computing, waiting for other GPUs, waiting for Python."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

Span = tuple[str, int, int]
"""Kernel name, start and end in nanoseconds."""
SHOWN = 15
"""Kernels that are named one by one."""


def profile(step: Callable[[], Any]) -> dict[str, Any]:
    """Run `step` once under CUDA's own trace (kernels only, so that Python runs at its usual speed).

    Returns:
        What summary says, and wall_ms, the step's time by the host's clock, trace included.
    """
    activities = [torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as trace:
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        wall = time.perf_counter() - started
    spans = [
        (event.name(), event.start_ns(), event.start_ns() + event.duration_ns())
        for event in trace.profiler.kineto_results.events()  # type: ignore[union-attr]
        if event.device_type() == torch.autograd.DeviceType.CUDA
    ]
    return {"wall_ms": 1e3 * wall} | summary(spans)


def summary(spans: Iterable[Span]) -> dict[str, Any]:
    """The shares of a step.

    Args:
        spans: Everything that ran on the GPU, on any stream.

    Returns:
        In milliseconds: extent_ms, from the first start to the last end; computing_ms, while anything but a collective
        ran; exposed_ms, while collectives ran alone (transfer and waiting for a slower rank); idle_ms, while nothing
        ran: the GPU waited for Python. Also launches, and kernels, name -> [count, total ms] of the longest.
    """
    spans = list(spans)
    computing = _covered((start, end) for name, start, end in spans if not _collective(name))
    busy = _covered((start, end) for _, start, end in spans)
    extent = max(end for *_, end in spans) - min(start for _, start, _ in spans)
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for name, start, end in spans:
        totals[name][0] += 1
        totals[name][1] += (end - start) / 1e6
    longest = sorted(totals.items(), key=lambda item: -item[1][1])[:SHOWN]
    return {
        "extent_ms": extent / 1e6,
        "computing_ms": computing / 1e6,
        "exposed_ms": (busy - computing) / 1e6,
        "idle_ms": (extent - busy) / 1e6,
        "launches": len(spans),
        "kernels": {name[:120]: total for name, total in longest},
    }


def _collective(name: str) -> bool:
    return "nccl" in name.lower()


def _covered(spans: Iterable[tuple[int, int]]) -> int:
    """Length of the union of intervals."""
    total, until = 0, None
    for start, end in sorted(spans):
        if until is None or start > until:
            until = start
        total += max(0, end - until)
        until = max(until, end)
    return total
