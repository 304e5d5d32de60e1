"""Seconds of a training step and what crosses the links, from FLOPs, bytes and peak rates. Torch-free.

A GEMM takes its FLOPs at the tensor cores' rate plus its operands at the memory's (they overlap only in part);
everything else is bound by the memory. Letters as in plan_memory.py.
"""

from dataclasses import dataclass

from halfbyte.launch.plan_memory import Trained, loads_teacher, parameters_of_stage, rounds_inputs, trained_shares
from halfbyte.launch.plan_model import Architecture, Layout
from halfbyte.training.config import Method, Recipe
from halfbyte.training.graph_rules import captures
from halfbyte.training.hardware import REACHED, Gpu, Reached
from halfbyte.training.shape import model_flops

BACKWARD_OF_ATTENTION = 2.5
"""FLOPs of fused attention's backward pass over its forward pass: five products instead of two (arXiv 2205.14135)."""


@dataclass(frozen=True)
class Step:
    """One training step on paper.

    Attributes:
        compute: Seconds in kernels of the busiest stage, all its micro-batches.
        waiting: Seconds that the GPU waits for Python.
        tensor: Seconds in tensor-parallel collectives.
        bubble: Seconds in which the pipeline fills and empties, transfers between stages included.
        data: Seconds in which gradients are reduced and weights gathered.
        optimizer: Seconds of norm, clipping, Adam and rounding of weights.
        nvlink_bytes: Sent by one GPU over NVLink.
        network_bytes: Sent by one GPU over the network.
        model_flops: Of the whole step, all GPUs, without recomputation and teacher; of full training also under LoRA.
    """

    compute: float
    waiting: float
    tensor: float
    bubble: float
    data: float
    optimizer: float
    nvlink_bytes: float
    network_bytes: float
    model_flops: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.compute + self.waiting + self.tensor + self.bubble + self.data + self.optimizer


def step_flops(model: Architecture, tokens: int, sequence: int) -> float:
    """shape.model_flops, also of an MLP without a gate."""
    shape = model.sizes
    gates = 0 if model.gated else shape.layers * shape.ffn * shape.hidden
    return model_flops(shape, tokens, sequence) - 6.0 * tokens * gates


def step_time(recipe: Recipe, model: Architecture, layout: Layout, gpu: Gpu, reached: Reached = REACHED) -> Step:
    """A step of the recipe under a layout on GPUs of one kind.

    Ranks lie as Megatron lays them: tensor, then data, then pipeline neighbours. 1F1B takes (m + p - 1) times the
    busiest stage's micro-batch. Collectives, also those that Megatron overlaps with GEMMs, count in full.

    Args:
        recipe: Method, formats, batch.
        model: A dense model.
        layout: Taken instead of the recipe's own.
        gpu: The hardware.
        reached: Shares of its peaks.
    """
    count, trained = layout.micro_batches(recipe), trained_shares(recipe, model.sizes)
    layer = _layer(recipe, model, layout, gpu, reached, trained)
    stages = [_micro_batch(recipe, model, layout, stage, gpu, reached, trained, layer) for stage in layout.stages()]
    kernels, waiting, gathers = max(stages, key=sum)
    gathered = gathers * gpu.nvlink * reached.nvlink
    nvlink, network = count * gathered, 0.0
    handed, over_network = _handed_on(recipe, model, layout, gpu)
    hop = handed / ((gpu.network * reached.network) if over_network else (gpu.nvlink * reached.nvlink))
    bubble = (layout.pipeline - 1) * (kernels + waiting + gathers) + 2 * (count + layout.pipeline - 1) * hop
    reduced, data_seconds, data_network = _data_parallel(model, layout, gpu, reached, trained)
    nvlink += (0.0 if data_network else reduced) + (0.0 if over_network else count * handed)
    network += (reduced if data_network else 0.0) + (count * handed if over_network else 0.0)
    train = recipe.train
    return Step(
        compute=count * kernels,
        waiting=count * waiting,
        tensor=count * gathers * (1.0 if layout.at_once(recipe) == 1 else 1.0 - reached.hidden),
        bubble=bubble if layout.pipeline > 1 else 0.0,
        data=data_seconds,
        optimizer=max(_update(recipe, model, layout, stage, gpu, reached, trained) for stage in layout.stages()),
        nvlink_bytes=nvlink,
        network_bytes=network,
        model_flops=step_flops(model, train.global_batch * train.sequence_length, train.sequence_length),
    )


def _micro_batch(
    recipe: Recipe,
    model: Architecture,
    layout: Layout,
    stage: int,
    gpu: Gpu,
    reached: Reached,
    trained: Trained,
    layer: tuple[float, float],
) -> tuple[float, float, float]:
    """Seconds of a micro-batch on one stage, of whose layers each takes `layer`: kernels, Python, collectives."""
    shape, last, first = model.sizes, stage == layout.pipeline - 1, stage == 0
    rate, memory = gpu.bf16 * reached.gemm, gpu.memory * reached.memory
    tokens = layout.micro_batch * recipe.train.sequence_length
    layers = layout.layers(shape, stage)
    student, teacher = recipe.method is not Method.bf16, loads_teacher(recipe)
    forward, backward = layer
    repeats = 1 + int(layout.recompute) + int(teacher)
    kernels = layers * (repeats * forward + backward)
    python = layers * reached.layer * (0.5 * repeats + 0.5) * (1.2 if student else 1.0)
    unit = 2 * tokens * shape.hidden * (layout.tensor - 1) / layout.tensor
    gathers = layers * unit * (4 * repeats + (6 if layout.sequence else 4))
    if first:  # the embedding's gradient is written as a whole and added to main_grad
        kernels += trained.whole * 12 * shape.vocab * shape.hidden / layout.tensor / memory
        gathers += 2 * unit
    if last:
        columns = shape.vocab / layout.tensor
        ahead, into_input, into_weight = _linear(tokens, columns, shape.hidden, rate, memory)
        logits = 2 * tokens * columns * (5 if recipe.method is Method.qad else 3) / memory
        kernels += ahead * (1 + int(teacher)) + into_input + trained.whole * into_weight + logits
        gathers += unit * (2 + int(teacher))
    waiting = max(0.0, python - kernels)
    if captures(layout.written_into(recipe)):
        # Only a pipeline's teacher, which goes ahead of the graphs, is called from Python.
        ahead_of_all = teacher and layout.pipeline > 1
        waiting = max(0.0, layers * (0.5 * reached.layer - forward)) if ahead_of_all else 0.0
    return kernels, waiting, gathers / (gpu.nvlink * reached.nvlink)


def _linear(tokens: float, n: float, k: float, rate: float, memory: float) -> tuple[float, float, float]:
    """Seconds of [T, K] -> [T, N], of its input's gradient and of its weight's, added to FP32 main_grad in place."""
    flops, operands = 2 * tokens * n * k, 2 * (tokens * k + n * k + tokens * n)
    product = flops / rate + operands / memory
    return product, product, product + 6 * n * k / memory


def _layer(
    recipe: Recipe, model: Architecture, layout: Layout, gpu: Gpu, reached: Reached, trained: Trained
) -> tuple[float, float]:
    """Forward and backward seconds of one layer and micro-batch on one rank.

    Element-wise traffic in numbers per token, forward / backward: norms 4 h / 6 h; residual sums 6 h / 6 h; copy of q
    out of the fused projection 2 q / 2 (q + 2 kv); rotation 2 (q + kv) each; SwiGLU 3 F / 5 F; rounding 2 q / 0.
    A frozen linear passes its input's gradient on; one with an adapter has its weight's as well (training/lora.py).
    """
    shape, t = model.sizes, layout.tensor
    rate, memory = gpu.bf16 * reached.gemm, gpu.memory * reached.memory
    split = t if layout.sequence else 1
    sequence = recipe.train.sequence_length
    tokens = layout.micro_batch * sequence
    q, kv, f = (size / t for size in (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.ffn))
    h = shape.hidden
    linears = ((q + 2 * kv, h), (h, q), ((2 if model.gated else 1) * f, h), (h, f))
    times = [_linear(tokens, n, k, rate, memory) for n, k in linears]
    attention = 2 * tokens * sequence * q / (gpu.bf16 * reached.attention)
    rounding = 2 * q if rounds_inputs(recipe, shape) else 0.0
    ahead = 10 * h / split + 2 * q + 2 * (q + kv) + 3 * f + rounding
    back = 12 * h / split + 2 * (q + 2 * kv) + 2 * (q + kv) + 5 * f
    forward, into_inputs, into_weights = (sum(kind) for kind in zip(*times, strict=True))
    backward = into_inputs + trained.linears * into_weights
    return (
        forward + attention + 2 * tokens * ahead / memory,
        backward + BACKWARD_OF_ATTENTION * attention + 2 * tokens * back / memory,
    )


def _handed_on(recipe: Recipe, model: Architecture, layout: Layout, gpu: Gpu) -> tuple[float, bool]:
    """Bytes that a stage sends one neighbour per micro-batch, and whether over the network."""
    if layout.pipeline == 1:
        return 0.0, False
    split = layout.tensor if layout.sequence else 1
    tokens = layout.micro_batch * recipe.train.sequence_length
    return 2 * tokens * model.sizes.hidden / split, layout.world > gpu.domain


def _data_parallel(
    model: Architecture, layout: Layout, gpu: Gpu, reached: Reached, trained: Trained
) -> tuple[float, float, bool]:
    """Bytes sent per step, their seconds, whether over the network.

    FP32 gradients and BF16 weights of the model, 6 bytes per parameter, where it is trained; FP32 both of what stands
    beside it, 8. A ring that leaves a node goes through the network cards of all its members there.
    """
    d = layout.data
    if d == 1:
        return 0.0, 0.0, False
    stages = [parameters_of_stage(model, layout, stage) for stage in layout.stages()]
    sizes = [6 * (linears + tables) * trained.whole + 8 * trained.beside * linears for linears, tables in stages]
    sent = max(sizes) * (d - 1) / d
    over_network = layout.tensor * d > gpu.domain
    rate = gpu.nvlink * reached.nvlink
    if over_network:
        members = max(1, gpu.domain // layout.tensor)
        rate = min(rate, members * gpu.network * reached.network)
    return sent, sent / rate, over_network


def _update(
    recipe: Recipe, model: Architecture, layout: Layout, stage: int, gpu: Gpu, reached: Reached, trained: Trained
) -> float:
    """Seconds of what happens once per step, on the GPU or in Python, whichever takes longer.

    Bytes per trained parameter: zeroing of gradients 4, norm 4, clipping 8, Adam 30; per quantized linear's, rounding
    4. Under train.lora also, per parameter with an adapter of rank r: its gradient zeroed and read twice 12; merging in
    FP64 16 (r + 2) and 12 at its ends, again where quantize.clip_gradient asks for the merged weight (low_rank.py).
    """
    linears, tables = parameters_of_stage(model, layout, stage)
    rank = recipe.train.lora.rank
    shards = layout.data if recipe.train.distributed_optimizer else 1
    changed = (linears + tables) * trained.whole + trained.beside * linears
    traffic = (4 + (4 + 8 + 30) / shards) * changed
    traffic += 4 * linears if recipe.method is not Method.bf16 else 0.0
    if rank:
        merges = 2 if recipe.quantize.clip_gradient else 1
        traffic += (12 + merges * (16 * (rank + 2) + 12)) * trained.linears * linears
    return max(traffic / (gpu.memory * reached.memory), layout.layers(model.sizes, stage) * reached.update)
