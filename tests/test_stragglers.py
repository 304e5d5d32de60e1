"""A slow rank is named by its time outside of collectives, beside ranks of the same pipeline stage."""

import time

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from halfbyte.training import stragglers
from halfbyte.training.stragglers import RankTime, WaitClock, compare, slow_groups


def times(*seconds: float, stages: tuple[int, ...] = ()) -> list[RankTime]:
    """Of ranks that can be told apart."""
    placed = zip(stages or (0,) * len(seconds), seconds, strict=True)
    return [RankTime(stage, rank, own) for rank, (stage, own) in enumerate(placed)]


def pairs(*seconds: float, stages: tuple[int, ...] = ()) -> list[RankTime]:
    """Of ranks of which every two are a tensor-parallel group inside CUDA graphs."""
    return [RankTime(t.stage, t.group // 2, t.seconds) for t in times(*seconds, stages=stages)]


@pytest.mark.parametrize(
    ("ranks", "slow"),
    [
        (times(1.0, 1.0, 1.19, 1.0), []),
        (times(1.0, 1.0, 1.21, 1.0), [2]),
        (times(1.0, 1.5), [1]),  # of two ranks the faster one is the median
        (times(1.0, 2.0, 2.0, 2.0), []),  # one fast rank makes no others slow
        (times(1.0, 1.0, 2.0, 2.0, stages=(0, 0, 1, 1)), []),  # the last stage computes logits
        (times(1.0, 1.0, 2.0, 3.0, stages=(0, 0, 1, 1)), [3]),
        (times(1.0), []),
        (times(0.0, 0.0), []),
    ],
)
def test_who_is_slow(ranks, slow):
    assert list(slow_groups(ranks, 1.2)) == [(rank,) for rank in slow]


def test_who_cannot_be_told_apart_is_not_blamed_alone():
    """Rank 5 of TP2 DP4 is slow; rank 4 waits for it inside a graph, which looks like work."""
    seconds = (1.0, 1.0, 1.0, 1.0, 1.5, 1.6, 1.0, 1.0)
    assert slow_groups(pairs(*seconds), 1.2) == {(4, 5): 1.6}
    # TP2 PP2: every stage has one group, and nobody to compare it with.
    assert slow_groups(pairs(1.0, 1.0, 1.9, 2.0, stages=(0, 0, 1, 1)), 1.2) == {}


@pytest.fixture
def group():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_clock_sees_waiting_only_and_leaves_torch_as_it_was(group, monkeypatch):
    wait, kinds = dist.Work.wait, [getattr(dist.ProcessGroup, name) for name in stragglers.COLLECTIVES]

    def slow_wait(self, *args):
        time.sleep(0.05)
        return wait(self, *args)

    monkeypatch.setattr(dist.Work, "wait", slow_wait)
    monkeypatch.setattr(time, "time", lambda: 1e9 / time.perf_counter())  # a host's clock that runs backwards
    clock, x = WaitClock(torch.device("cpu")), torch.ones(4)
    clock.start()
    time.sleep(0.3)  # its own work
    dist.all_reduce(x)
    dist.all_reduce(x, async_op=True).wait()
    waited = clock.stop()
    assert 0.1 <= waited < 0.3
    assert dist.Work.wait is slow_wait
    dist.all_reduce(x)
    assert clock.seconds == waited
    assert [getattr(dist.ProcessGroup, name) for name in stragglers.COLLECTIVES] == kinds


def test_what_is_said(group, monkeypatch):
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda: 0)
    assert compare(0.5, torch.device("cpu"), 1.2, apart=True) == (
        {"median_seconds": 0.5, "largest_seconds": 0.5, "slowest_rank": 0},
        [],
    )
    monkeypatch.setattr(stragglers, "slow_groups", lambda ranks, ratio: {(0,): 1.5})
    monkeypatch.setattr(stragglers.socket, "gethostname", lambda: "node7")
    _, lines = compare(0.5, torch.device("cpu"), 1.2, apart=True)
    assert lines == ["rank 0 on node7 takes 0.5 s without waiting, 1.50 x the median of its pipeline stage"]


@pytest.mark.gpu
def test_on_a_gpu_its_own_kernels_do_not_count_as_waiting():
    device = torch.device("cuda")
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        x = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        dist.all_reduce(x[:1].clone())  # opens the communicator
        torch.cuda.synchronize()
        clock, started = WaitClock(device), time.perf_counter()
        clock.start()
        for _ in range(50):
            x @ x
        dist.all_reduce(x[:1].clone())
        dist.all_reduce(x[:1].clone(), async_op=True).wait()
        torch.cuda.synchronize()
        own = time.perf_counter() - started - clock.stop()
        assert 0 < clock.seconds < own / 2
    finally:
        dist.destroy_process_group()
