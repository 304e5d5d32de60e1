"""What the benchmarks of four GPUs do, on a small model: steps in FP32, exports in float64.

Usage: start.py four.py FOLDER, alone or in four ranks. FOLDER/<ranks>.json gets
{layout: {"measured", "files", "early", "slow"}}, that of four "slow group" as well.
"""

import dataclasses
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as BucketGroup

from halfbyte.bench import layout_bytes, worker
from halfbyte.bench.layout_export import SMALL
from halfbyte.bench.plan import ARMS, LAYOUTS, recipe
from halfbyte.training import environment
from halfbyte.training.files import write_json
from halfbyte.training.runtime import close_runtime, on_first_rank, open_runtime
from halfbyte.training.stragglers import WaitClock, compare


@contextmanager
def sums_watched():
    """Gives a list; for every bucket of every step it gets whether its sum had begun before the backward pass ended."""
    begun, finish = [], BucketGroup.finish_grad_sync

    def watched(group, *args, **options):
        begun.append(group.grad_reduce_handle is not None)
        return finish(group, *args, **options)

    with mock.patch.object(BucketGroup, "finish_grad_sync", watched):
        yield begun


def said_of_a_slow_rank() -> list[str]:
    """The straggler report of a step in which rank 2 works ten times as long as the others, who wait; collective."""
    clock, began = WaitClock(torch.device("cpu")), time.perf_counter()
    clock.start()
    time.sleep(0.5 if dist.get_rank() == 2 else 0.05)
    dist.all_reduce(torch.ones(1))
    seconds = time.perf_counter() - began
    return compare(seconds - clock.stop(), torch.device("cpu"), 3.0, apart=True)[1]


def said_of_a_slow_group() -> list[list[str]]:
    """The report under TP2 DP2 where rank 3 waits for rank 2 inside a graph: told apart, and together; collective."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(2, 1)
    seconds = 0.05 if dist.get_rank() < 2 else 0.5
    return [compare(seconds, torch.device("cpu"), 3.0, apart=apart)[1] for apart in (True, False)]


def main(folder: Path) -> None:
    """Every layout of this world size."""
    ranks, found, runtime = environment.coordinates()[1], {}, None
    worker.WARM_UP = 1  # nothing is timed here
    for name, layout in LAYOUTS.items():
        if layout.gpus != ranks:
            continue
        if runtime is None:
            runtime = open_runtime(recipe(SMALL, layout, ARMS["bf16"]))
        else:  # other groups of the same processes
            parallel_state.destroy_model_parallel()
            parallel_state.initialize_model_parallel(layout.tensor, layout.pipeline)
        arms = [ARMS["bf16"], ARMS["nvfp4"]]
        with sums_watched() as early:
            measured = worker.measure(SMALL, layout, arms, runtime, steps=1, rounds=1)
        exact = dataclasses.replace(runtime, dtype=torch.float64)
        files = layout_bytes.exported(SMALL, layout, exact, folder, steps=2)
        slow = said_of_a_slow_rank() if layout.gpus > 1 else []
        found[name] = {"measured": measured, "files": files, "early": early, "slow": slow}
    if ranks == 4:
        found["slow group"] = said_of_a_slow_group()
    on_first_rank(runtime, lambda: write_json(folder / f"{ranks}.json", found))
    close_runtime()
