"""A pipeline stage's passes as CUDA graphs: a pair, forward and backward, for every micro-batch that can be in flight.

A pipeline's forward and backward pass of a micro-batch are apart: others come in between, and activations wait. Under
1F1B a stage of p has at most p - (its number) micro-batches waiting and finishes them in the order in which it began
them, so micro-batch i can use the tensors of pair i mod that number again. Of backward passes one runs at a time, so
what they make on the way lies in one memory. Everything between the stages stays Megatron's: its schedule calls a stage
as before and gets a tensor with a gradient; behind it stand the two graphs.

Teacher and loss are outside: a pipeline's teacher has spoken before (distillation.py), into memory that moves.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state

from halfbyte.training import gradients, graphs
from halfbyte.training.config import Recipe
from halfbyte.training.data import MicroBatch
from halfbyte.training.graph_rules import captures
from halfbyte.training.runtime import Runtime
from halfbyte.training.schedule import Forward, forward


class StageReplay:
    """The recorded passes of one pipeline stage; a training run has one.

    As in graphs.Replay the first global batch of every kind runs unrecorded.
    """

    def __init__(self, recorder: Callable[[], graphs.Recorder] = graphs.Capture) -> None:
        self._recorder = recorder
        self._pairs: dict[Any, _Pairs | None] = {}

    def call(
        self, gpt: torch.nn.Module, batches: Sequence[MicroBatch], *, needs_logits: bool, kind: Any
    ) -> Forward | None:
        """How this stage is to be called for the micro-batches of a global batch, in their order.

        Args:
            gpt: This rank's GPTModel; its trained parameters and their `main_grad` keep their addresses.
            batches: This data-parallel rank's micro-batches, equal shapes.
            needs_logits: As in schedule.train_batch.
            kind: Whatever else changes the computation (hashable).

        Returns:
            None the first time: the caller calls the model itself.
        """
        key = (kind, tuple(batches[0].tokens.shape), batches[0].segments is None, len(batches))
        if key not in self._pairs:
            self._pairs[key] = None
            return None
        pairs = self._pairs[key]
        if pairs is None:
            count = min(_in_flight(), len(batches))
            pairs = self._pairs[key] = _Pairs(gpt, count, self._recorder, needs_logits=needs_logits)
        return pairs.call

    @property
    def recorded(self) -> int:
        """How many pairs there are."""
        return sum(len(pairs.made) for pairs in self._pairs.values() if pairs is not None)

    def close(self) -> None:
        """Free the graphs, when nothing of them runs any more; every rank at the same place (graphs.Replay.close)."""
        for pairs in filter(None, self._pairs.values()):
            pairs.close()
        self._pairs.clear()


def _in_flight() -> int:
    """Micro-batches whose backward pass this stage has not done when it begins another, that one included."""
    return parallel_state.get_pipeline_model_parallel_world_size() - parallel_state.get_pipeline_model_parallel_rank()


class _Pairs:
    """The pairs of one kind of global batch, `count` of them, each recorded when a micro-batch first needs it.

    Memory: a forward pass leaves what its backward pass needs while others run, so every pair has its own. Backward
    passes share another one: what one leaves there, the gradient of what was received, autograd copies at once
    (_Replayed). A single pair has nobody to share with, and its backward pass takes what its activations free.
    """

    def __init__(self, gpt: Any, count: int, recorder: Callable[[], graphs.Recorder], *, needs_logits: bool) -> None:
        self._gpt, self._count, self._recorder, self._needs_logits = gpt, count, recorder, needs_logits
        self.made: list[_Pair] = []
        self._open: list[graphs.Recorder] = []
        self._shared = self._another() if count > 1 else None

    def _another(self) -> graphs.Recorder:
        self._open.append(self._recorder())
        return self._open[-1]

    def call(self, stage: torch.nn.Module, batch: MicroBatch, index: int) -> torch.Tensor:
        """As schedule.Forward."""
        received = None if self._gpt.pre_process else self._gpt.decoder.input_tensor
        if len(self.made) < self._count:
            own = self._another()
            recorders = own, self._shared or own
            self.made.append(_Pair(self._gpt, batch, received, recorders, needs_logits=self._needs_logits))
        pair = self.made[index % self._count]
        return _Replayed.apply(pair, batch, received, pair.anchor)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Free the graphs."""
        for recorder in self._open:
            recorder.close()


class _Pair:
    """The two recorded passes, and the tensors that they read and write.

    Args:
        gpt: The stage's model.
        example: A micro-batch of the shapes to come.
        received: [S, B, H] from the stage before, this rank's part of S under sequence parallelism; None: the first.
        recorders: Of the forward pass and of the backward pass.
        needs_logits: As in schedule.train_batch.
    """

    def __init__(
        self,
        gpt: torch.nn.Module,
        example: MicroBatch,
        received: torch.Tensor | None,
        recorders: tuple[graphs.Recorder, graphs.Recorder],
        *,
        needs_logits: bool,
    ):
        self.gpt, self.needs_logits = gpt, needs_logits
        self.anchor = torch.zeros((), device=example.tokens.device, requires_grad=True)
        """Gives the first stage's output a gradient: nothing that it receives has one."""
        self.leaves = gradients.Leaves(gpt.modules())
        self.inputs = graphs.held(example)
        self.received = None if received is None else received.detach().clone().requires_grad_()
        self.handed_back: torch.Tensor | None = None
        """The gradient of `received`."""
        self.forward = recorders[0].record(self._forward)
        self.gradient = torch.empty_like(self.out)
        self.backward = recorders[1].record(self._backward)

    def _forward(self) -> None:
        self.gpt.set_input_tensor(self.received)  # type: ignore[operator]
        with self.leaves.taken():
            self.out = forward(self.gpt, self.inputs, None if self.needs_logits else self.inputs.labels)

    def _backward(self) -> None:
        if self.received is not None:
            self.received.grad = None
        if self.out.requires_grad:  # else all of the stage is frozen
            self.out.backward(self.gradient)
        self.leaves.add_gradients()
        if self.received is not None:
            self.handed_back = self.received.grad


class _Replayed(torch.autograd.Function):
    """A stage's output [S, B, H] (the last one's: as schedule.forward) from a pair's graphs."""

    @staticmethod
    def forward(
        ctx: Any, pair: _Pair, batch: MicroBatch, received: torch.Tensor | None, anchor: torch.Tensor
    ) -> torch.Tensor:
        ctx.pair = pair
        graphs.fill(pair.inputs, batch)
        if pair.received is not None and received is not None:
            pair.received.data.copy_(received)
        pair.forward()
        return pair.out.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        pair: _Pair = ctx.pair
        pair.gradient.copy_(gradients[0])
        pair.backward()
        return None, None, pair.handed_back, None  # copied where it is accumulated: the pair refers to it as well


def wanted(recipe: Recipe, runtime: Runtime) -> bool:
    """Whether this run records its pipeline's stages: on GPUs."""
    return captures(recipe) and recipe.parallel.pipeline > 1 and runtime.device.type == "cuda"
