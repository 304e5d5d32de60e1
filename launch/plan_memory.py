"""Peak memory of a training process on a GPU, part by part. Torch-free.

T = tokens of a micro-batch, h = hidden size, q = heads x head size, kv = key/value heads x head size, F = width of the
MLP, V = vocabulary, t = tensor-parallel ranks, split = t under sequence parallelism and 1 without.
"""

import math
from dataclasses import dataclass

from halfbyte.launch.plan_model import Architecture, Layout
from halfbyte.training.choices import Dtype
from halfbyte.training.config import Method, Recipe, Smoothing, Weights
from halfbyte.training.formats import SPECS
from halfbyte.training.graph_rules import captures
from halfbyte.training.shape import ROW_PARALLEL, ModelShape, excluded, linear_sizes, planned_linears

WIDTH = {Dtype.auto: 2, Dtype.bfloat16: 2, Dtype.float32: 4, Dtype.float64: 8}
"""Bytes of a weight, activation or logit by train.dtype; auto as on a GPU."""

SAMPLED = 512
"""Tokens that AWQ samples at least: SAMPLE_TOKENS of training/smoothing.py, which needs torch."""


def memory_per_rank(recipe: Recipe, model: Architecture, layout: Layout) -> dict[str, float]:
    """Peak bytes of the fullest process while it calibrates or trains in the recipe's type; auto is BF16, as on a GPU.

    With P parameters on the rank (the layers of its stage, the embedding on the first, lm_head on the last one), in
    BF16: weights 2 P; FP32 gradients 4 P; FP32 master copy and two Adam moments 12 P, over the data-parallel ranks
    under the distributed optimizer. FP32 needs no master copy: 4 P, 4 P and 8 P; FP64, never distributed, 8 P, 8 P and
    16 P. Fake quantization holds one rounded copy of its linears. `activations`: what autograd keeps of every
    micro-batch in flight (stage i of p has p - i). `logits`: the vocabulary's tensors of one micro-batch, or the
    temporaries of a layer's backward pass where those are larger. `CUDA graphs`: what their pools hold beyond that
    (`_pools`). What train.freeze names counts as the rest does;
    under train.lora only weights with an adapter have gradients, and none is in the optimizer. `beside`: FP32 adapters
    and learned block scales, 8 each with their gradients, and two Adam moments, 8, over the data-parallel ranks as
    above. Calibration comes before there are gradients (`_calibration`); for method ptq it is all there is.

    Args:
        recipe: Method, formats and batch.
        model: A dense model.
        layout: Taken instead of the recipe's own.

    Returns:
        Part -> bytes, of the stage and the time with the largest sum.
    """
    moments = [_calibration(recipe, model, layout, stage) for stage in layout.stages() if recipe.method != Method.bf16]
    if recipe.method is not Method.ptq:
        moments += [_training(recipe, model, layout, stage) for stage in layout.stages()]
    return max(moments, key=lambda parts: sum(parts.values()))


def loads_teacher(recipe: Recipe) -> bool:
    """Whether a teacher stands beside the student in memory."""
    return recipe.method is Method.qad and recipe.distill.teacher is None


def parameters_of_stage(model: Architecture, layout: Layout, stage: int) -> tuple[float, float]:
    """Parameters of one rank: (of its layers' linears, of its embedding and lm_head). Norms are not counted."""
    shape = model.sizes
    first, last = stage == 0, stage == layout.pipeline - 1
    tables = 2 if first and last and not shape.tied else int(first or last)
    layers = layout.layers(shape, stage) * model.linears / shape.layers
    return layers / layout.tensor, tables * shape.vocab * shape.hidden / layout.tensor


def _calibration(recipe: Recipe, model: Architecture, layout: Layout, stage: int) -> dict[str, float]:
    """While calibration windows go through the BF16 model, whose layers keep nothing for a backward pass.

    `inputs`: AWQ's sample of every linear's input, at least SAMPLED tokens of whole batches, all tokens on every rank.
    `Hessians`: GPTQ's, one [K, K] in FP32 for each linear in blocks on every tensor-parallel rank, and for the largest
    linear four FP64 [K, K] (itself, damped, inverse, factor) and two FP64 copies of the weight. AWQ is done before.
    """
    shape, last, width = model.sizes, stage == layout.pipeline - 1, WIDTH[recipe.train.dtype]
    quantize, held = recipe.quantize, sum(parameters_of_stage(model, layout, stage))
    length = quantize.calibration_length or recipe.train.sequence_length
    tokens = max(1, recipe.evaluate.tokens_per_batch // length) * length
    share = layout.layers(shape, stage) / shape.layers
    kept = {"inputs": 0.0, "Hessians": 0.0}
    if quantize.smoothing in (Smoothing.awq_lite, Smoothing.awq_duo):
        sampled = -(-SAMPLED // tokens) * tokens
        kept["inputs"] = width * sampled * share * sum(k / rows for _, k, rows in _watched(recipe, shape, layout))
    if quantize.weights is Weights.gptq:
        blocks = [(n, k) for n, k, _ in _watched(recipe, shape, layout, blocks=True)]
        work = max((8 * (4 * k * k + 2 * n * k / layout.tensor) for n, k in blocks), default=0.0)
        kept["Hessians"] = max(4, width) * share * sum(k * k for _, k in blocks) + work
    largest = max(kept, key=lambda part: kept[part])
    return {
        "weights": width * held,
        "teacher": width * held if loads_teacher(recipe) else 0.0,
        "activations": layer_activations(recipe, model, layout, tokens),
        "logits": width * tokens * shape.vocab / layout.tensor if last else 0.0,
        largest: kept[largest],
    }


def _watched(recipe: Recipe, shape: ModelShape, layout: Layout, *, blocks: bool = False) -> list[tuple[int, int, int]]:
    """(N, K, ranks that split K) of the planned linears of all layers as Megatron fuses them; `blocks`: in blocks."""
    sizes, planned = linear_sizes(shape), planned_linears(shape, recipe)
    fused = {"q_proj": ("q_proj", "k_proj", "v_proj"), "gate_proj": ("gate_proj", "up_proj")}
    found = []
    for name, number_format in planned.items():
        prefix, _, last = name.rpartition(".")
        if last in ("k_proj", "v_proj", "up_proj") or (blocks and SPECS[number_format].grid.block == 1):
            continue
        rows = sum(sizes[f"{prefix}.{member}"][0] for member in fused.get(last, (last,)))
        found.append((rows, sizes[name][1], layout.tensor if name.endswith(ROW_PARALLEL) else 1))
    return found


def _training(recipe: Recipe, model: Architecture, layout: Layout, stage: int) -> dict[str, float]:
    shape, last = model.sizes, stage == layout.pipeline - 1
    layers, count = layout.layers(shape, stage), layout.micro_batches(recipe)
    linears, tables = parameters_of_stage(model, layout, stage)
    held, width, precise = linears + tables, WIDTH[recipe.train.dtype], recipe.train.dtype is Dtype.float64
    full = 8 if precise else 4  # bytes of what is never BF16: gradients, moments, adapters
    tokens = layout.micro_batch * recipe.train.sequence_length
    at_once = layout.at_once(recipe)
    in_flight = max(at_once, min(layout.pipeline - stage, count))
    one = layer_activations(recipe, model, layout, tokens)
    end = _end(recipe, shape, layout)  # all that is kept of a layer under recomputation
    kept = in_flight * layers * end + one if layout.recompute else in_flight * layers * one
    kept += 2 * end if last else 0.0  # the last norm's input and output
    largest = at_once * max(_vocabulary(recipe, shape, layout) if last else 0.0, _passing(recipe, shape, layout))
    shards = layout.data if recipe.train.distributed_optimizer and not precise else 1
    trained = trained_shares(recipe, shape)
    copies = 2 if width >= full else 3
    parts = {
        "weights": width * held,
        "gradients": full * held if trained.whole else 4 * trained.linears * linears,
        "optimizer": copies * full * held / shards if trained.whole else 0.0,
        "beside": trained.beside * linears * full * (2 + 2 / shards),
        "rounded weights": width * linears * _planned_share(recipe, shape),
        "activations": kept,
        "logits": largest,
    }
    if captures(layout.written_into(recipe)):
        pools = _pools(recipe, model, layout, stage) if layout.pipeline > 1 else _lanes(recipe, shape, layout)
        # Graphs of steps that are not quantized yet stay when those of the others come.
        two_kinds = 0 < recipe.train.fake_quant_after_steps < recipe.train.steps
        parts["CUDA graphs"] = pools + (pools + kept + largest if two_kinds else 0.0)
    if loads_teacher(recipe):
        parts["teacher"] = width * held + (_teacher_said(recipe, shape, layout) if last else 0.0)
    return parts


def _lanes(recipe: Recipe, shape: ModelShape, layout: Layout) -> float:
    """Bytes of what micro-batches side by side exchange through, two buffers of each kind: none for one at a time."""
    at_once, end = layout.at_once(recipe), _end(recipe, shape, layout)
    return at_once * 2 * (end + end * layout.tensor) if at_once > 1 else 0.0


def _pools(recipe: Recipe, model: Architecture, layout: Layout, stage: int) -> float:
    """Bytes of a pipeline stage's pairs of graphs (training/stage_graphs.py) beyond those of the plain path.

    Each pair has a pool, in which a micro-batch's activations wait as they do without graphs; backward passes share
    another one, in which lies what goes back through a layer (counted in `logits`). Beyond that: the tensors at the
    stage's ends and their gradients, each pair's own, and once the embedding's gradient, which a lookup makes whole and
    which is larger than any tensor that is freed before it. Linears' gradients go into `main_grad` as they are
    computed (gradients.Leaves).
    """
    shape, width = model.sizes, WIDTH[recipe.train.dtype]
    count = min(layout.pipeline - stage, layout.micro_batches(recipe))
    _, tables = parameters_of_stage(model, layout, stage)
    embedding = width * trained_shares(recipe, shape).whole * tables if stage == 0 else 0.0
    ends = (2 if stage == 0 else 4) * _end(recipe, shape, layout)
    # Where the loss stands outside of the graphs, its gradient of the logits is copied into a tensor of theirs.
    outside = recipe.method is Method.qad and stage == layout.pipeline - 1
    logits = _logits(recipe, shape, layout) if outside else 0.0
    return count * ends + embedding + logits


def evaluation_memory(recipe: Recipe, model: Architecture, layout: Layout) -> tuple[float, float]:
    """Bytes that a batch of evaluate.tokens_per_batch tokens takes while it is scored, on the last stage.

    Returns:
        Logits, a shard and the gathered whole; and the key/value cache of as many tokens, where text is
        generated.
    """
    shape, tokens = model.sizes, recipe.evaluate.tokens_per_batch
    shards = 1 + 1 / layout.tensor if layout.tensor > 1 else 1
    cached = model.cached * layout.layers(shape, layout.pipeline - 1) / shape.layers / layout.tensor
    width = WIDTH[recipe.train.dtype]
    return width * tokens * shape.vocab * shards, width * tokens * cached


def evaluated(recipe: Recipe, model: Architecture, layout: Layout) -> float:
    """Bytes of the last stage while it scores: weights, the rounded copy, a teacher beside them, and logits.

    0 without tasks. Text that is generated takes a cache as well, which evaluation_memory has.
    """
    if not recipe.evaluate.tasks:
        return 0.0
    linears, tables = parameters_of_stage(model, layout, layout.pipeline - 1)
    copies = 2 if loads_teacher(recipe) else 1
    held = copies * (linears + tables) + linears * _planned_share(recipe, model.sizes)
    return WIDTH[recipe.train.dtype] * held + evaluation_memory(recipe, model, layout)[0]


def layer_activations(recipe: Recipe, model: Architecture, layout: Layout, tokens: int) -> float:
    """Bytes that autograd keeps of one layer and micro-batch of `tokens` tokens, without recomputation.

    In numbers per token: inputs and outputs of both norms 4 h; q, k, v as the linear gave them q + 2 kv; rotated
    q + kv (with norms of the heads once more); attention's result 2 q; the MLP's first linear 2 F (F without a gate),
    its activation F. FP4 or FP8 inputs add q: only the output projection's input is rounded into a tensor of its own.
    quantize.clip_gradient keeps a byte for each number that goes into a quantized linear, 2 h + q + F.
    """
    shape = model.sizes
    split = layout.tensor if layout.sequence else 1
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    heads = (q + 2 * kv) + (q + kv) * (2 if shape.qk_norm else 1) + 2 * q + (q if rounds_inputs(recipe, shape) else 0)
    mlp = shape.ffn * (3 if model.gated else 2)
    masks = 0.0
    if recipe.quantize.clip_gradient and rounds_inputs(recipe, shape):
        masks = 2 * shape.hidden / split + (q + shape.ffn) / layout.tensor
    numbers = 4 * shape.hidden / split + (heads + mlp) / layout.tensor
    return tokens * (WIDTH[recipe.train.dtype] * numbers + masks)


def rounds_inputs(recipe: Recipe, shape: ModelShape) -> bool:
    """Whether any linear's input is quantized."""
    return any(SPECS[number_format].inputs for number_format in set(planned_linears(shape, recipe).values()))


def _planned_share(recipe: Recipe, shape: ModelShape) -> float:
    """Share of the linears' parameters that are fake-quantized."""
    sizes = linear_sizes(shape)
    planned = sum(sizes[name][0] * sizes[name][1] for name in planned_linears(shape, recipe))
    return planned / sum(n * k for n, k in sizes.values())


@dataclass(frozen=True)
class Trained:
    """What of a model a step changes, as shares of the linears' parameters; the rest of it is `whole` or frozen.

    Attributes:
        whole: Whether the model's own parameters are trained; not so under train.lora.
        linears: Parameters whose gradient is computed: all of them, or those with an adapter.
        beside: Parameters of training/companions.py: adapters and learned block scales, FP32. The members of a fused
            linear share a factor A; here each has its own.
    """

    whole: bool
    linears: float
    beside: float


def trained_shares(recipe: Recipe, shape: ModelShape) -> Trained:
    """What train.lora and train.block_scale_lr_mult leave to train. What train.freeze names counts as trained."""
    train, sizes, planned = recipe.train, linear_sizes(shape), planned_linears(shape, recipe)
    rank, total = train.lora.rank, sum(n * k for n, k in sizes.values())
    names = [name for name in planned if not rank or excluded(name, train.lora.targets)]
    beside = sum(rank * sum(sizes[name]) for name in names)
    if train.block_scale_lr_mult:
        beside += sum(math.prod(sizes[name]) // SPECS[planned[name]].grid.block for name in names)
    adapted = sum(math.prod(sizes[name]) for name in names) / total if rank else 1.0
    return Trained(not rank, adapted, beside / total)


def _vocabulary(recipe: Recipe, shape: ModelShape, layout: Layout) -> float:
    """Logits and their gradient; under QAD with a teacher beside it, the teacher's logits as well."""
    return (3 if recipe.method is Method.qad else 2) * _logits(recipe, shape, layout)


def _logits(recipe: Recipe, shape: ModelShape, layout: Layout) -> float:
    """Bytes of a micro-batch's logits."""
    tokens = layout.micro_batch * recipe.train.sequence_length
    return WIDTH[recipe.train.dtype] * tokens * shape.vocab / layout.tensor


def _end(recipe: Recipe, shape: ModelShape, layout: Layout) -> float:
    """Bytes of a micro-batch between two layers."""
    tokens = layout.micro_batch * recipe.train.sequence_length
    return WIDTH[recipe.train.dtype] * tokens * shape.hidden / (layout.tensor if layout.sequence else 1)


def _passing(recipe: Recipe, shape: ModelShape, layout: Layout) -> float:
    """Bytes of what goes back through one layer."""
    tokens = layout.micro_batch * recipe.train.sequence_length
    mlp = 3 * WIDTH[recipe.train.dtype] * tokens * shape.ffn / layout.tensor
    return mlp + 2 * _end(recipe, shape, layout)


def _teacher_said(recipe: Recipe, shape: ModelShape, layout: Layout) -> float:
    """Bytes that a pipeline's last stage keeps of a teacher: all logits, or K values and indices and a tail."""
    if layout.pipeline == 1:
        return 0.0
    k, tokens = recipe.distill.top_k, layout.micro_batch * recipe.train.sequence_length
    width = WIDTH[recipe.train.dtype]
    one = width * shape.vocab / layout.tensor if k is None else (width + 4) * k + max(width, 4)
    return layout.micro_batches(recipe) * tokens * one
