"""Micro-batches side by side under tensor parallelism: one computes while the others' ranks exchange.

Under sequence parallelism a layer's forward pass waits four times for a gather or a scatter, and nothing of the same
micro-batch could run meanwhile. Another one could: it needs nothing of the first but the weights. So two or more are
walked in turn, half a layer at a time, into one CUDA graph (graphs.py), each on a stream, a communicator and a gather
buffer of its own. Known for inference as two-batch overlap; with four, an exchange has three halves' time.

GEMMs do not gain from running at the same time, and ranks that ran them in different orders would wait for each other's
collectives. So half a layer's computing waits until the other micro-batches have done theirs ("turns"), and only
collectives, with the residual sum and the norm between them, run beside it. Autograd takes what was made last first:
the backward pass changes turns at the same places. The last micro-batch is walked first, so that every weight's
gradient takes them in their order, and results are those of one after the other.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import layers, mappings
from megatron.core.utils import GlobalMemoryBuffer

from halfbyte.training import gradients, typed
from halfbyte.training.config import Recipe
from halfbyte.training.copy_engines import Exchange
from halfbyte.training.data import MicroBatch
from halfbyte.training.errors import UserError
from halfbyte.training.runtime import Runtime
from halfbyte.training.schedule import attention_mask, positions


def open_lanes(recipe: Recipe, runtime: Runtime) -> list["Lane"]:
    """One for each of train.micro_batches_at_once, none for 1; collective.

    Raises:
        UserError: GPUs of a tensor-parallel group cannot reach each other's memory.
    """
    count = recipe.train.micro_batches_at_once
    if count == 1:
        return []
    first = runtime.rank - runtime.local_rank  # of the processes on this host
    devices = [rank - first for rank in dist.get_process_group_ranks(typed.tensor_group())]
    own = runtime.local_rank
    here = all(0 <= device < runtime.local_world for device in devices)
    if not here or not all(device == own or torch.cuda.can_device_access_peer(own, device) for device in devices):
        raise UserError(
            f"train.micro_batches_at_once = {count}: GPUs of a tensor-parallel group write to each other's memory, and "
            f"GPU {own} of this host cannot reach all others of its group; set it to 1"
        )
    return [Lane() for _ in range(count)]


class Lane:
    """What one of the micro-batches has for itself; made by every rank at the same place."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.group = _another_tensor_group()
        self.buffer = GlobalMemoryBuffer()
        """Megatron gathers inputs into one buffer per process: micro-batches would overwrite each other's."""
        self.exchange: Exchange | None = None
        self.computed: torch.cuda.Event | None = None
        """The end of its newest turn."""
        self.leaves = gradients.Leaves([])
        """Of this micro-batch's own: of shared ones autograd would add up both gradients in BF16, before anything in
        FP32 sees them."""
        self._grouped: list[tuple[dict[str, Any], str]] = []
        """Where Megatron finds the tensor-parallel group: (namespace, name)."""

    def prepare(self, gpt: torch.nn.Module, models: Sequence[torch.nn.Module]) -> None:
        """For one pass of the trained `gpt`; `models`: all that compute in it."""
        self.computed = None
        self._grouped = [(vars(parallel_state), "_TENSOR_MODEL_PARALLEL_GROUP")]
        for module in (module for model in models for module in model.modules()):
            if "tp_group" in vars(module):
                self._grouped.append((vars(module), "tp_group"))
        self.leaves = gradients.Leaves(gpt.modules())

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Inside, forward passes use what this lane has for itself."""
        with ExitStack() as inside:
            for names, name in self._grouped:
                inside.enter_context(_put(names, name, self.group))
            inside.enter_context(self.leaves.taken())
            inside.enter_context(torch.cuda.stream(self.stream))
            yield


def _another_tensor_group() -> dist.ProcessGroup:
    """A further communicator over this rank's tensor-parallel group, whose kernels go first; collective.

    A collective's kernel needs few SMs, but behind another micro-batch's GEMM it would wait for all of that.
    """
    mine = dist.get_process_group_ranks(typed.tensor_group())
    every: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, mine)
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    groups = {ranks: dist.new_group(list(ranks), pg_options=options) for ranks in sorted({tuple(one) for one in every})}
    return cast(dist.ProcessGroup, groups[tuple(mine)])


@contextmanager
def _put(names: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, `name` in the namespace of a module or an object has another value."""
    before, names[name] = names[name], value
    try:
        yield
    finally:
        names[name] = before


@dataclass(frozen=True)
class _Waiting:
    """What an asynchronous collective gives Megatron."""

    done: torch.cuda.Event
    before: Callable[[], None] | None
    """Called when it is waited for, by a stream that does not wait yet."""

    def wait(self) -> None:
        """Let the current stream wait."""
        if self.before is not None:
            self.before()
        torch.cuda.current_stream().wait_event(self.done)


class Turns:
    """Who computes: what Megatron calls during the micro-batches' passes, told apart by the current stream."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = {lane.stream: lane for lane in lanes}
        self._added: dict[int, torch.cuda.Event] = {}

    def _mine(self) -> Lane:
        return self._lanes[torch.cuda.current_stream()]

    def _end(self) -> None:
        lane = self._mine()
        lane.computed = lane.stream.record_event()  # type: ignore[assignment]

    def _begin(self) -> None:
        mine = self._mine()
        for lane in self._lanes.values():
            if lane is not mine and lane.computed is not None:
                mine.stream.wait_event(lane.computed)

    def _gather(
        self, whole: torch.Tensor, part: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> "_Waiting":
        """Before half a layer in either direction; asynchronous: inside of one."""
        exchange = self._exchange(whole)
        # What it is gathered for inside, a weight's gradient, does not make the other micro-batch wait.
        handle = self._beside(exchange, lambda: exchange.gather(whole, part), self._end if async_op else None)
        if not async_op:
            handle.wait()
            self._begin()
        return handle

    def _scatter(
        self, part: torch.Tensor, whole: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> "_Waiting":
        """After half a layer; asynchronous: inside of one."""
        if not async_op:
            self._end()
        exchange = self._exchange(whole)
        handle = self._beside(exchange, lambda: exchange.scatter(part, whole))
        if not async_op:
            handle.wait()
        return handle

    def _exchange(self, whole: torch.Tensor) -> Exchange:
        lane = self._mine()
        exchange = lane.exchange = lane.exchange or Exchange(lane.group, whole)
        assert exchange.serves(whole)
        return exchange

    def _beside(
        self, exchange: Exchange, collective: Callable[[], None], before: Callable[[], None] | None = None
    ) -> "_Waiting":
        exchange.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(exchange.stream):
            collective()
        return _Waiting(exchange.stream.record_event(), before)  # type: ignore[arg-type]

    def _accumulate(self, total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        """gradients.accumulate, after the micro-batch before has added its own."""
        before, stream = self._added.get(main_grad.data_ptr()), torch.cuda.current_stream()
        if before is not None:
            stream.wait_event(before)
        gradients.accumulate(total_input, grad_output, main_grad)
        self._added[main_grad.data_ptr()] = stream.record_event()  # type: ignore[assignment]

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Inside, Megatron takes them."""
        fused = SimpleNamespace(wgrad_gemm_accum_fp32=self._accumulate)
        with ExitStack() as inside:
            inside.enter_context(_put(vars(layers), "fused_weight_gradient_mlp_cuda", fused))
            for module in (layers, mappings):
                inside.enter_context(_put(vars(module), "dist_all_gather_func", self._gather))
                inside.enter_context(_put(vars(module), "dist_reduce_scatter_func", self._scatter))
                inside.enter_context(_put(vars(module), "get_global_memory_buffer", lambda: self._mine().buffer))
            yield


class Walk:
    """One micro-batch's forward pass, half a layer at a time: GPTModel.forward for models without a pipeline."""

    def __init__(self, gpt: Any, batch: MicroBatch):
        self.gpt, self.batch = gpt, batch
        self.mask, self.positions = attention_mask(batch), positions(batch)
        self.hidden, self.rotary, *_ = gpt._preprocess(input_ids=batch.tokens, position_ids=self.positions)

    def attend(self, layer: Any) -> None:
        """The layer's attention, residual sum included."""
        self.hidden, _ = layer._forward_attention(self.hidden, attention_mask=self.mask, rotary_pos_emb=self.rotary)

    def feed_forward(self, layer: Any) -> None:
        """The layer's MLP, residual sum included."""
        self.hidden = layer._forward_mlp(self.hidden)

    def out(self, *, with_labels: bool) -> torch.Tensor:
        """As schedule.forward."""
        labels = self.batch.labels if with_labels else None
        hidden = self.gpt.decoder.final_layernorm(self.hidden)
        return self.gpt._postprocess(
            hidden, self.batch.tokens, self.positions, labels, self.rotary, None, None, attention_mask=self.mask
        )


def forward(lanes: Sequence[Lane], gpt: Any, batches: Sequence[MicroBatch], *, with_labels: bool) -> list[torch.Tensor]:
    """schedule.forward of as many micro-batches as lanes, side by side; inside of `forked`.

    Args:
        lanes: The lanes.
        gpt: This rank's GPTModel, without pipeline.
        batches: Micro-batches of equal shapes.
        with_labels: Whether the model computes its cross-entropy; else logits.

    Returns:
        Each's output, in the order of `batches`, on its lane's stream.
    """
    walks = each(lanes, batches, partial(Walk, gpt))
    for layer in typed.layers(gpt):
        for half in (Walk.attend, Walk.feed_forward):
            each(lanes, walks, partial(half, layer=layer))
    return each(lanes, walks, partial(Walk.out, with_labels=with_labels))


def each[S, T](lanes: Sequence[Lane], of: Sequence[S], compute: Callable[[S], T]) -> list[T]:
    """What `compute` gives for each lane's member of `of`, on that lane; the later micro-batch is taken first."""
    found: list[T] = []
    for lane, one in reversed(list(zip(lanes, of, strict=True))):
        with lane.taken():
            found.append(compute(one))
    return found[::-1]


@contextmanager
def forked(lanes: Sequence[Lane], gpt: torch.nn.Module, models: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Inside, what runs on the lanes comes after what the current stream has, and before what it gets afterwards.

    Args:
        lanes: The lanes.
        gpt: The model that is trained, inside of fast_path.weights_once.
        models: All models that compute.
    """
    current = torch.cuda.current_stream()
    for lane in lanes:
        lane.prepare(gpt, models)
        lane.stream.wait_stream(current)
    with Turns(lanes).taken():
        yield
    for lane in lanes:
        with torch.cuda.stream(lane.stream):
            if lane.exchange is not None:
                lane.exchange.settle()
        current.wait_stream(lane.stream)
    for lane in lanes:
        lane.leaves.add_gradients()


def close(lanes: Sequence[Lane]) -> None:
    """Close the communicators, when no graph holds them any more; every rank at the same place."""
    for lane in lanes:
        lane.exchange = None
        dist.destroy_process_group(lane.group)
