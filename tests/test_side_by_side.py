"""Micro-batches side by side: what a recipe may ask, who waits for whom, and what copy engines are told to do.

That the walk gives the gradients of one micro-batch after the other is in test_methods.py; on GPUs, in test_graphs.py.
"""

import random
import threading
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from halfbyte.training.config import Recipe
from halfbyte.training.errors import UserError
from halfbyte.training.side_by_side_rules import side_by_side_problems


def asked(**keys) -> list[str]:
    """The problems of a recipe that can run two at once, with a few keys changed."""
    recipe = Recipe()
    good = {"train__micro_batches_at_once": 2, "train__global_batch": 8, "parallel__tensor": 4}
    for name, value in (good | {"parallel__sequence": True} | keys).items():
        section, key = name.split("__")
        setattr(getattr(recipe, section), key, value)
    return list(side_by_side_problems(recipe))


def test_a_tensor_parallel_recipe_may_ask():
    from halfbyte.training.choices import CudaGraphs

    assert asked() == []
    assert asked(train__micro_batches_at_once=1, parallel__tensor=1, train__global_batch=7) == []
    assert asked(parallel__data=2) == []
    assert asked(train__micro_batches_at_once=4) == []
    assert asked(parallel__data=4, train__global_batch=16, train__cuda_graphs=CudaGraphs.always) == []


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"train__micro_batches_at_once": 9}, "train.micro_batches_at_once = 9: give 1 to 8"),
        ({"train__micro_batches_at_once": 0}, "train.micro_batches_at_once = 0: give 1 to 8"),
        ({"train__micro_batches_at_once": 3}, "a rank has 8 micro-batches of train.micro_batch = 1"),
        ({"parallel__tensor": 1}, "parallel.tensor to 2 or more"),
        ({"parallel__sequence": False}, "parallel.sequence=true"),
        ({"parallel__pipeline": 2}, "parallel.pipeline=1"),
        ({"parallel__data": 4, "train__global_batch": 16}, "train.cuda_graphs=always"),
        ({"train__recompute": True}, "train.recompute=false"),
        ({"distill__teacher": "folder"}, "distill.teacher=null"),
        ({"distill__hidden": 0.5}, "does not go with distill.hidden"),
        ({"train__global_batch": 7}, "a rank has 7 micro-batches"),
        ({"train__micro_batch": 8}, "a rank has 1 micro-batches"),
    ],
)
def test_what_cannot_run_side_by_side_is_one_line(keys, said):
    (line,) = asked(**keys)
    assert line.startswith("train.micro_batches_at_once = ")
    assert said in line


@pytest.mark.parametrize(("ranks", "linked"), [([0, 1], False), ([0, 4], True)])
def test_gpus_that_cannot_reach_each_other_are_named(ranks, linked):
    """Not linked; or on two hosts of two GPUs."""
    from halfbyte.training import side_by_side
    from halfbyte.training.runtime import Runtime

    runtime = Runtime(rank=0, world=8, local_rank=0, local_world=4, dtype=torch.bfloat16, device=torch.device("cuda"))
    recipe = Recipe()
    assert side_by_side.open_lanes(recipe, runtime) == []
    recipe.train.micro_batches_at_once = 2
    with (
        mock.patch.object(side_by_side.typed, "tensor_group"),
        mock.patch.object(side_by_side.dist, "get_process_group_ranks", return_value=ranks),
        mock.patch.object(torch.cuda, "can_device_access_peer", return_value=linked),
        pytest.raises(UserError, match=r"train.micro_batches_at_once = 2: .* GPU 0 of this host .*; set it to 1"),
    ):
        side_by_side.open_lanes(recipe, runtime)


class Stream:
    """Remembers what it was told to wait for; its events are numbered over all streams."""

    events = 0

    def __init__(self, name):
        self.name, self.waits = name, []

    def record_event(self):
        Stream.events += 1
        return (self.name, Stream.events)

    def wait_event(self, event):
        self.waits.append(event)

    def wait_stream(self, other): ...


@pytest.fixture
def crew(monkeypatch):
    """Turns of two lanes on streams that only remember, and a function that makes one of them the current."""
    from halfbyte.training import side_by_side

    current = [Stream("main")]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "stream", lambda _: mock.MagicMock())
    exchange = SimpleNamespace(stream=Stream("copies"), serves=lambda _: True, gather=mock.Mock(), scatter=mock.Mock())
    lanes = [SimpleNamespace(stream=Stream(name), exchange=exchange, computed=None) for name in "ab"]
    turns = side_by_side.Turns(lanes)

    def take(lane):
        current[0] = lane.stream

    return turns, lanes, take


def test_half_a_layer_waits_for_the_other_micro_batchs_half(crew):
    turns, (a, b), take = crew
    x, group = torch.zeros(1), None
    take(a)
    turns._gather(x, x, group=group)  # nothing to wait for but the gather itself
    assert [name for name, _ in a.stream.waits] == ["copies"]
    turns._scatter(x, x, group=group)
    end_of_a = a.computed
    assert [name for name, _ in a.stream.waits] == ["copies"] * 2
    take(b)
    turns._gather(x, x, group=group)
    assert b.stream.waits[-1] == end_of_a  # a's half, and not a's scatter
    assert end_of_a not in a.stream.waits


def test_a_weights_gradient_does_not_keep_the_other_waiting(crew):
    """Backward: gather(asynchronous), GEMM, wait, scatter(asynchronous), weight's gradient."""
    turns, (a, b), take = crew
    x, group = torch.zeros(1), None
    take(a)
    gathered = turns._gather(x, x, group=group, async_op=True)
    assert a.stream.waits == []
    assert a.computed is None
    before = Stream.events
    gathered.wait()
    end_of_a = a.computed
    assert end_of_a == ("a", before + 1)  # the GEMM's end, noted before a waits for the gather
    scattered = turns._scatter(x, x, group=group, async_op=True)
    scattered.wait()
    assert a.computed == end_of_a
    take(b)
    turns._gather(x, x, group=group)
    assert b.stream.waits[-1] == end_of_a


def test_each_weights_gradient_takes_micro_batches_in_their_order(crew, monkeypatch):
    from halfbyte.training import gradients

    added = []
    monkeypatch.setattr(gradients, "accumulate", lambda *tensors: added.append(tensors))
    turns, (a, b), take = crew
    one, other = torch.zeros(2), torch.zeros(2)
    for lane, place in ((a, one), (a, other), (b, one)):
        take(lane)
        turns._accumulate(one, one, place)
    assert len(added) == 3
    assert a.stream.waits == []
    assert [name for name, _ in b.stream.waits] == ["a"]


class Neighbours:
    """Symmetric memory of threads: every rank's tensors in one list, and a barrier that some reach late.

    As torch's, it writes addresses into memory of the current stream at once: nothing may run there any more.
    """

    def __init__(self, ranks):
        self.ranks, self.made = ranks, [[] for _ in range(ranks)]
        self.barrier = threading.Barrier(ranks)
        self.local = threading.local()

    def empty(self, size, dtype, device):
        self.made[self.local.rank].append(torch.zeros(size, dtype=dtype))
        return self.made[self.local.rank][-1]

    def current_stream(self, device):
        def synchronize():
            self.local.idle = True

        return SimpleNamespace(synchronize=synchronize)

    def rendezvous(self, memory, group):
        assert self.local.idle
        number = len(self.made[self.local.rank]) - 1
        noise = random.Random(self.local.rank)

        def barrier():
            time.sleep(noise.random() * 2e-3)
            self.barrier.wait(timeout=20)
            time.sleep(noise.random() * 2e-3)

        def buffer(rank, sizes, dtype, offset=0):
            flat = self.made[rank][number]
            return flat[offset : offset + torch.Size(sizes).numel()].view(sizes)

        return SimpleNamespace(barrier=barrier, get_buffer=buffer)


def test_every_rank_gets_every_part_and_the_sum_of_its_own(monkeypatch):
    """Collectives in turn, as ranks that run ahead of each other issue them: no buffer is written too early."""
    from halfbyte.training import copy_engines

    ranks, rounds, shape = 4, 12, (8, 1, 6)
    world = Neighbours(ranks)
    monkeypatch.setattr(copy_engines, "symmetric_memory", world)
    monkeypatch.setattr(torch.cuda, "Stream", mock.Mock())
    monkeypatch.setattr(torch.cuda, "current_stream", world.current_stream)
    wholes = torch.randn(rounds, ranks, *shape, generator=torch.Generator().manual_seed(1))
    wrong: list[str] = []

    def rank_of(rank):
        world.local.rank = rank
        group = SimpleNamespace(rank=lambda: rank, size=lambda: ranks)
        exchange = copy_engines.Exchange(group, wholes[0, 0])
        assert exchange.serves(wholes[0, 0])
        assert not exchange.serves(wholes[0, 0, 1:])
        kinds = random.Random(7)
        for one in wholes:
            own = one[rank]
            rows = slice(rank * 2, rank * 2 + 2)
            if kinds.random() < 0.5:
                whole = torch.empty(shape)
                exchange.gather(whole, own[rows])
                wanted = torch.cat([one[r, r * 2 : r * 2 + 2] for r in range(ranks)])
                same = torch.equal(whole, wanted)
            else:
                part = torch.empty(2, *shape[1:])
                exchange.scatter(part, own.clone())
                same = torch.allclose(part, one.sum(0)[rows], rtol=1e-6, atol=1e-6)
            if not same:
                wrong.append(f"rank {rank}")
        exchange.settle()

    threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


@pytest.mark.gpu
@pytest.mark.parametrize(("ranks", "rank", "size"), [(2, 1, 4096), (4, 0, 5000), (8, 7, 1 << 20)])
def test_pieces_are_added_up_in_fp32_and_in_the_order_of_ranks(ranks, rank, size):
    from halfbyte.training.copy_engines import add_up

    pieces = torch.randn(ranks, size, device="cuda").bfloat16()
    own, out = pieces[rank].clone(), torch.empty(size, device="cuda", dtype=torch.bfloat16)
    wanted = torch.zeros(size, device="cuda")
    for piece in pieces:
        wanted += piece.float()
    pieces[rank] = float("nan")  # what is there is not read
    add_up(pieces, own, rank, out)
    assert torch.equal(out, wanted.bfloat16())
