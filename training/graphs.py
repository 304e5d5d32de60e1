"""Forward and backward pass of a micro-batch as one CUDA graph: captured once, replayed for every one after it.

Python takes a few milliseconds to issue a layer's kernels. Where a GPU needs less to run them (small models, tensor
parallelism, several processes on slow cores), it waits. A replayed graph issues the same kernels on the same memory,
collectives included, with no Python in between; losses and gradients are those of the plain path.

What a graph needs: fixed addresses. Inputs are copied into the tensors that were captured, rounded weights are kept
between steps (fast_path.weights_once), gradients go to Megatron's buffers, which stay where they are. A pipeline's
passes wait for other stages and are captured apart (stage_graphs.py); graph_rules.py says what is not captured at all.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from halfbyte.training import gradients, side_by_side
from halfbyte.training.config import Recipe
from halfbyte.training.data import MicroBatch
from halfbyte.training.distillation import Distillation
from halfbyte.training.graph_rules import captures
from halfbyte.training.runtime import Runtime
from halfbyte.training.schedule import Loss, Part, forward, part_of


class Recorder(Protocol):
    """Makes a computation on fixed tensors repeatable."""

    def record(self, compute: Callable[[], None]) -> Callable[[], None]:
        """What computes it again; the tensors that `compute` made stay where they are.

        Computing it again may overwrite what later ones of the same recorder made.
        """
        ...

    def close(self) -> None:
        """Free what was recorded."""


class Capture:
    """CUDA graphs that share memory; they are replayed in the order in which they were recorded, one at a time."""

    def __init__(self) -> None:
        self._pool, self._graphs = torch.cuda.graph_pool_handle(), []

    def record(self, compute: Callable[[], None]) -> Callable[[], None]:
        """Capture it: nothing is computed yet."""
        graph = torch.cuda.CUDAGraph()
        # Other threads (NCCL's watchdog, the autograd engine) go on with calls that a global capture would refuse.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"), without_generator():
            compute()
        self._graphs.append(graph)
        return graph.replay

    def close(self) -> None:
        """Free the graphs, when nothing runs on the GPU any more."""
        if self._graphs:
            torch.cuda.synchronize()
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()


class Replay:
    """The captured passes of one model and loss; a training run has one.

    The first global batch of every kind runs uncaptured: it compiles kernels and opens communicators, which nothing
    may do during a capture.
    """

    def __init__(
        self,
        lanes: Sequence[side_by_side.Lane] = (),
        distillation: Distillation | None = None,
        recorder: Callable[[], Recorder] = Capture,
    ) -> None:
        """Nothing is captured yet.

        Args:
            lanes: As many micro-batches run side by side; none: one after the other.
            distillation: Whose teacher computes in here, where there are lanes.
            recorder: What captures.
        """
        self._captured: dict[Any, _Captured | None] = {}
        self._lanes, self._distillation, self._recorder = list(lanes), distillation, recorder

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
            captured = self._captured[key] = self._capture(model, batches, loss, needs_logits=needs_logits)
        captured.total.zero_()
        for start in range(0, len(batches), len(captured.inputs)):
            captured.replay(batches[start : start + len(captured.inputs)])
        model.config.finalize_model_grads_func([model], captured.total[1].to(torch.int32))  # type: ignore[union-attr]
        return captured.total

    def _capture(self, model: Any, batches: Sequence[MicroBatch], loss: Loss, *, needs_logits: bool) -> "_Captured":
        if not self._lanes:
            return _Captured(
                batches[:1],
                lambda inputs: [_one(model, inputs[0], loss, needs_logits=needs_logits)],
                self._recorder(),
            )

        def together(inputs: Sequence[MicroBatch]) -> list[Part]:
            return _several(self._lanes, model.module, inputs, loss, self._distillation)

        examples = batches[: len(self._lanes)]
        with torch.no_grad():  # opens the communicators, which nothing may do during a capture
            together(examples)
        return _Captured(examples, together, self._recorder())

    def close(self) -> None:
        """Free the graphs, when nothing of them runs any more; every rank at the same place.

        A graph that holds a communicator's kernels keeps the communicator: left to the garbage collector, which each
        rank runs at another moment, it can stop a collective under way, and `destroy_process_group` waits for it.
        """
        for captured in filter(None, self._captured.values()):
            captured.recorder.close()
        self._captured.clear()
        side_by_side.close(self._lanes)
        self._lanes.clear()


def _one(model: torch.nn.Module, inputs: MicroBatch, loss: Loss, *, needs_logits: bool) -> Part:
    leaves = gradients.Leaves(model.modules())
    with leaves.taken():
        out = forward(model, inputs, None if needs_logits else inputs.labels)
        part = part_of(loss(out, inputs, 0), inputs)
    part.loss.backward()
    leaves.add_gradients()
    return part


def _several(
    lanes: Sequence[side_by_side.Lane],
    gpt: torch.nn.Module,
    inputs: Sequence[MicroBatch],
    loss: Loss,
    distillation: Distillation | None,
) -> list[Part]:
    """The passes of as many micro-batches as lanes; backward only where gradients are taken."""
    teacher = None if distillation is None else distillation.teacher
    with side_by_side.forked(lanes, gpt, [gpt] if teacher is None else [gpt, teacher]):
        if distillation is not None:
            with torch.no_grad():
                loss = distillation.after(side_by_side.forward(lanes, teacher, inputs, with_labels=False))
        outs = side_by_side.forward(lanes, gpt, inputs, with_labels=distillation is None)
        done = side_by_side.each(
            lanes, range(len(lanes)), lambda number: part_of(loss(outs[number], inputs[number], number), inputs[number])
        )
        if torch.is_grad_enabled():
            torch.autograd.backward([part.loss for part in done])
    return done


class _Captured:
    """Recorded passes, with the tensors that they read (`inputs`, one for each micro-batch) and add to (`total`)."""

    def __init__(
        self,
        examples: Sequence[MicroBatch],
        passes: Callable[[Sequence[MicroBatch]], list[Part]],
        recorder: Recorder,
    ):
        self.recorder, self._passes = recorder, passes
        self.inputs = [held(example) for example in examples]
        self.total = torch.zeros(2, dtype=torch.float64, device=examples[0].tokens.device)
        self._again = recorder.record(self._add)

    def _add(self) -> None:
        for part in self._passes(self.inputs):
            self.total += torch.stack([part.total, part.tokens.double()])

    def replay(self, batches: Sequence[MicroBatch]) -> None:
        """The passes for other micro-batches of the same shape, as many as were captured."""
        for inputs, batch in zip(self.inputs, batches, strict=True):
            fill(inputs, batch)
        self._again()


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
