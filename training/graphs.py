"""Forward and backward pass of a micro-batch as one CUDA graph: captured once, replayed for every one after it.

Python takes a few milliseconds to issue a layer's kernels. Where a GPU needs less to run them (small models, tensor
parallelism, several processes on slow cores), it waits. A replayed graph issues the same kernels on the same memory,
collectives included, with no Python in between; losses and gradients are those of the plain path.

What a graph needs: fixed addresses. Inputs are copied into the tensors that were captured, rounded weights are kept
between steps (fast_path.weights_once), gradients go to Megatron's buffers, which stay where they are. A pipeline's
passes wait for other stages and are captured apart (stage_graphs.py); graph_rules.py says what is not captured at all.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from halfbyte.training.config import Recipe
from halfbyte.training.data import MicroBatch
from halfbyte.training.graph_rules import captures
from halfbyte.training.runtime import Runtime
from halfbyte.training.schedule import Loss, Part, forward, part_of


class Replay:
    """The captured passes of one model and loss; a training run has one.

    The first global batch of every kind runs uncaptured: it compiles kernels and opens communicators, which nothing
    may do during a capture.
    """

    def __init__(self) -> None:
        self._captured: dict[Any, _Captured | None] = {}

    def run(
        self, model: torch.nn.Module, batches: Sequence[MicroBatch], loss: Loss, *, needs_logits: bool, kind: Any
    ) -> torch.Tensor | None:
        """Forward and backward of a global batch, gradients finalized; None the first time: the caller has to do it.

        Args:
            model: The DDP-wrapped model, without pipeline.
            batches: This data-parallel rank's micro-batches, equal shapes, on the GPU.
            loss: Loss per token; what it reads beside its arguments must not move.
            needs_logits: As in schedule.train_batch.
            kind: Whatever else changes the computation (hashable).

        Returns:
            FP64 [2]: this rank's sum of losses and its number of tokens.
        """
        key = (kind, tuple(batches[0].tokens.shape), batches[0].segments is None)
        if key not in self._captured:
            self._captured[key] = None
            return None
        captured = self._captured[key]
        if captured is None:
            captured = self._captured[key] = _Captured(model, batches[0], loss, needs_logits=needs_logits)
        captured.total.zero_()
        for batch in batches:
            captured.replay(batch)
        model.config.finalize_model_grads_func([model], captured.total[1].to(torch.int32))  # type: ignore[union-attr]
        return captured.total

    def close(self) -> None:
        """Free the graphs, when nothing of them runs any more; every rank at the same place.

        A graph that holds a communicator's kernels keeps the communicator: left to the garbage collector, which each
        rank runs at another moment, it can stop a collective under way, and `destroy_process_group` waits for it.
        """
        free([one.graph for one in self._captured.values() if one is not None])
        self._captured.clear()


class _Captured:
    """One graph, with the tensors that it reads (`inputs`) and adds to (`total`)."""

    def __init__(self, model: torch.nn.Module, example: MicroBatch, loss: Loss, *, needs_logits: bool):
        self.inputs = held(example)
        self.total = torch.zeros(2, dtype=torch.float64, device=example.tokens.device)
        self.graph = torch.cuda.CUDAGraph()
        with capture(self.graph):
            out = forward(model, self.inputs, None if needs_logits else self.inputs.labels)
            part: Part = part_of(loss(out, self.inputs, 0), self.inputs)
            part.loss.backward()
            self.total += torch.stack([part.total, part.tokens.double()])

    def replay(self, batch: MicroBatch) -> None:
        """The pass for another micro-batch of the same shape."""
        fill(self.inputs, batch)
        self.graph.replay()


@contextmanager
def capture(graph: torch.cuda.CUDAGraph, pool: Any = None) -> Iterator[None]:
    """Around what `graph` is to repeat: nothing of it is computed yet.

    Args:
        graph: A new one.
        pool: Memory that it shares with other graphs (torch.cuda.graph_pool_handle); None: its own.
    """
    # Other threads (NCCL's watchdog, the autograd engine) go on with calls that a global capture would refuse.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"), without_generator():
        yield


def free(graphs: Sequence[torch.cuda.CUDAGraph]) -> None:
    """Free graphs, when nothing runs on the GPU any more."""
    if graphs:
        torch.cuda.synchronize()
    for graph in graphs:
        graph.reset()


def held(example: MicroBatch) -> MicroBatch:
    """A copy of a micro-batch in tensors for a graph to read, which `fill` gives other values."""
    return MicroBatch(*(None if x is None else x.clone() for x in _tensors(example)))


def fill(inputs: MicroBatch, batch: MicroBatch) -> None:
    """Copy a micro-batch of the same shape into the tensors that a graph reads."""
    for place, value in zip(_tensors(inputs), _tensors(batch), strict=True):
        if place is not None and value is not None:
            place.copy_(value)


def _tensors(batch: MicroBatch) -> tuple[torch.Tensor | None, ...]:
    """A micro-batch's tensors, in the order of its fields."""
    return batch.tokens, batch.labels, batch.loss_mask, batch.segments


def wanted(recipe: Recipe, runtime: Runtime) -> bool:
    """Whether this run captures both passes of a micro-batch as one graph: on a GPU, without a pipeline."""
    return captures(recipe) and recipe.parallel.pipeline == 1 and runtime.device.type == "cuda"


@contextmanager
def without_generator() -> Iterator[None]:
    """Megatron's switches of the random generator do nothing in here: no capture can contain one.

    Under sequence parallelism it makes one around each dropout, also around those of probability 0, and this project's
    models have no others.
    """
    tracker: Any = get_cuda_rng_tracker()
    tracker.fork = lambda *_, **__: nullcontext()
    try:
        yield
    finally:
        del tracker.fork


@contextmanager
def capturable_hooks(device: torch.device) -> Iterator[None]:
    """Around the construction of Megatron's DDP: its gradient hooks then live on a stream that a capture can take in.

    An AccumulateGrad node runs on the stream that was current when it was made, and the default stream cannot be
    captured.
    """
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)
