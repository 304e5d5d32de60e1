"""What `halfbyte check` prints: what a recipe will do, with layout, tokens, layers, sizes, memory. Torch-free."""

from collections import Counter
from pathlib import Path

from halfbyte.launch.plan_memory import WIDTH, memory_per_rank
from halfbyte.launch.plan_model import Architecture, Layout
from halfbyte.launch.sbatch import links_note
from halfbyte.training.config import Activations, BlockScale, GateRule, Method, Recipe, Smoothing, Task, Weights
from halfbyte.training.config_distill import Distill
from halfbyte.training.formats import GRIDS, SPECS, Spec
from halfbyte.training.kv_format import KVCache
from halfbyte.training.rules import missing_weights, must_fetch
from halfbyte.training.shape import (
    ROW_PARALLEL,
    ModelShape,
    bits_per_weight,
    deciding_pattern,
    excluded,
    linear_sizes,
    planned_linears,
)
from halfbyte.training.unread import unread

PATTERNS = 10
"""Patterns of quantize.layers that the plan shows."""


def plan_text(recipe: Recipe, shape: ModelShape) -> str:
    """The plan that `halfbyte check` prints.

    Args:
        recipe: Resolved recipe.
        shape: The model's sizes.

    Returns:
        At most 50 lines of `heading  text`.
    """
    sections = [
        ("recipe", [recipe.run.name, *([recipe.description] if recipe.description else []), *unread(recipe)]),
        ("model", _model(recipe, shape)),
        ("layout", _layout(recipe)),
        ("training", _training(recipe)),
        ("quantize", _quantize(recipe, shape)),
        ("size", _size(recipe, shape)),
        ("memory", _memory(recipe, shape)),
        ("evaluate", [_task(task, recipe) for task in recipe.evaluate.tasks] or ["nothing"]),
        ("gate", [_gate(recipe)]),
        ("results", [_results(recipe)]),
    ]
    return "\n".join(
        f"{heading if i == 0 else '':<10}{line}" for heading, lines in sections for i, line in enumerate(lines)
    )


def export_bytes(recipe: Recipe, shape: ModelShape) -> int:
    """Bytes of the exported tensors, exactly: headers and the JSON files beside them are not counted.

    A linear [N, K] in FP4 takes N*K/2 bytes of codes, N*K/block bytes of block scales and its FP32 scalars (the layout
    of a ModelOpt checkpoint), one in FP8 N*K bytes and its scalars; every other parameter takes two bytes. A quantized
    key/value cache adds two FP32 scalars per layer.
    """
    planned, sizes = planned_linears(shape, recipe), linear_sizes(shape)
    total = 2 * shape.parameters
    for name, number_format in planned.items():
        n, k = sizes[name]
        spec = SPECS[number_format]
        codes = n * k * spec.grid.bits // 8 + (n * k // spec.grid.block if spec.grid.block_scale else 0)
        total += codes + 4 * _scalars(spec) - 2 * n * k
    cached = bool(planned) and recipe.quantize.kv_cache is not KVCache.none
    return total + (2 * 4 * shape.layers if cached else 0)


def _scalars(spec: Spec) -> int:
    """FP32 scalars per exported linear: the weight's scale per tensor and, for quantized activations, input_scale."""
    return sum(GRIDS[rounding].per_tensor for rounding in (spec.weights, spec.inputs) if rounding)


def _model(recipe: Recipe, shape: ModelShape) -> list[str]:
    lines = [_path(recipe.model.path)]
    missing = missing_weights(recipe)
    if "config.json" in missing:
        lines[0] += f" (sizes from {_path(recipe.model.config or '')})"
    if missing:
        remedy = f"fetches {recipe.model.fetch} there" if must_fetch(recipe) else "will need them"
        lines.append(f"note: {', '.join(missing)} not there yet; `halfbyte run` {remedy}")
    rope = f", Llama-3 RoPE x{shape.rope_scaling_factor:g}" if shape.rope_scaling_factor else ""
    lines.append(
        f"{shape.parameters:,} parameters: {shape.layers} layers, hidden {shape.hidden}, ffn {shape.ffn}, "
        f"{shape.heads} heads, {shape.kv_heads} key/value heads"
    )
    lines.append(f"vocabulary {shape.vocab}{', tied' if shape.tied else ''}, {shape.max_positions} positions{rope}")
    return lines


def _layout(recipe: Recipe) -> list[str]:
    layout, per_node = recipe.parallel, recipe.launch.gpus_per_node
    nodes = -(-recipe.world_size // per_node)
    sequence, note = ", sequence parallel" if layout.sequence else "", links_note(recipe)
    return [
        f"tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data} = {recipe.world_size} "
        f"{_plural(recipe.world_size, 'process')} on {nodes} {_plural(nodes, 'node')} (launch.gpus_per_node {per_node})"
        f"{sequence}",
        *([note] if note else []),
    ]


def _training(recipe: Recipe) -> list[str]:
    train = recipe.train
    if recipe.method == Method.ptq:
        return ["none: ptq only calibrates"]
    per_step = train.global_batch * train.sequence_length
    micro = train.global_batch // (train.micro_batch * recipe.parallel.data)
    return [
        f"{_method(recipe)}: {train.steps} steps of {train.global_batch} x {train.sequence_length} = {per_step:,} "
        f"tokens each, {train.steps * per_step:,} in all",
        f"per rank and step: {micro} micro-{_plural(micro, 'batch')} of {train.micro_batch}",
        f"learning rate {train.learning_rate:g} to {train.min_learning_rate:g}, {train.warmup_steps} steps of warmup, "
        f"clip {train.clip_grad:g}, dtype {train.dtype}, seed {train.seed}",
        f"text {_path(recipe.data.train or '')}",
    ]


def _method(recipe: Recipe) -> str:
    if recipe.method != Method.qad:
        return recipe.method
    distill = recipe.distill
    over = "" if distill.top_k is None else f" over the top {distill.top_k} and the rest"
    parts = [f"{distill.loss}{over} at temperature {distill.temperature:g}"]
    parts += [f"{weight:g} x {name}" for name, weight in _mixed_in(distill).items()]
    return f"qad by {' + '.join(parts)}"


def _mixed_in(distill: Distill) -> dict[str, float]:
    weights = {"cross-entropy": distill.cross_entropy, "hidden states": distill.hidden}
    return {name: weight for name, weight in weights.items() if weight}


def _quantize(recipe: Recipe, shape: ModelShape) -> list[str]:
    quantize = recipe.quantize
    if recipe.method == Method.bf16:
        return ["nothing: the BF16 control"]
    planned, sizes = planned_linears(shape, recipe), linear_sizes(shape)
    kinds = Counter(name.split(".", 3)[3] for name in sizes)
    chosen = Counter(name.split(".", 3)[3] for name in planned)
    k_of = {name.split(".", 3)[3]: size for name, size in sizes.items()}
    length = quantize.calibration_length or recipe.train.sequence_length
    left = len(sizes) - len(planned)
    return [
        *_formats(recipe, shape),
        f"calibrated on {quantize.calibration_samples} windows of {length} tokens",
        f"{'linear':<18}{'layers':>8}{'N':>8}{'K':>8}{'K per rank':>12}",
        *(
            f"{kind:<18}{f'{chosen[kind]}/{kinds[kind]}':>8}{k_of[kind][0]:>8}{k_of[kind][1]:>8}"
            f"{_k_per_rank(kind, k_of[kind][1], recipe):>12}"
            for kind in kinds
        ),
        *([] if quantize.kv_cache is KVCache.none else [f"key/value cache: {quantize.kv_cache}, two scales per layer"]),
        f"{len(planned)} of {len(sizes)} linears; not quantized: {', '.join(quantize.exclude) or 'none'}"
        + (f" ({left} linears)" if left else ""),
        f"{bits_per_weight(shape, recipe):.3f} bits per weight of the linears that quantize.exclude leaves",
    ]


def _formats(recipe: Recipe, shape: ModelShape) -> list[str]:
    """Each format that is used, and, where quantize.layers decides, what each pattern of it decides about."""
    quantize, planned = recipe.quantize, planned_linears(shape, recipe)
    lines = []
    for number_format in sorted(set(planned.values())):
        scales = f", second-level scale {quantize.scale_2}, block scale of weights {quantize.block_scale}"
        spec = SPECS[number_format]
        second = scales if spec.two_level else ""
        if not spec.grid.per_tensor and quantize.block_scale is not BlockScale.amax:
            second = f", block scale of weights {quantize.block_scale}"
        block = f"block {spec.grid.block}" if spec.grid.block > 1 else "one scale per tensor"
        count = f": {list(planned.values()).count(number_format)} linears" if quantize.layers else ""
        lines.append(f"{number_format}, {spec.words}, {block}{second}{count}")
    free = [name for name in linear_sizes(shape) if not excluded(name, quantize.exclude)]
    decided = Counter(deciding_pattern(name, quantize) for name in free)
    rules = [
        f"{pattern} -> {chosen}: {decided[pattern]} {_plural(decided[pattern], 'linear')}"
        for pattern, chosen in quantize.layers.items()
    ]
    lines += rules[:PATTERNS] + ([f"and {len(rules) - PATTERNS} more patterns"] if len(rules) > PATTERNS else [])
    if quantize.weights is Weights.gptq:
        lines.append("FP4 weights by GPTQ")
    if quantize.smoothing is not Smoothing.none:
        alpha = f" with alpha {quantize.smoothing_alpha:g}" if quantize.smoothing is Smoothing.smoothquant else ""
        lines.append(f"smoothed before quantization: {quantize.smoothing}{alpha}")
    if quantize.activations is Activations.percentile:
        lines.append(f"inputs clipped at their {quantize.percentile:g}th percentile")
    if quantize.layers:
        lines.append(f"all others -> {quantize.format}: {decided[None]} {_plural(decided[None], 'linear')}")
    return lines


def _k_per_rank(kind: str, k: int, recipe: Recipe) -> int:
    return k // recipe.parallel.tensor if kind in ROW_PARALLEL else k


def _size(recipe: Recipe, shape: ModelShape) -> list[str]:
    before, after = 2 * shape.parameters, export_bytes(recipe, shape)
    return [f"{before:,} bytes in BF16, {after:,} bytes exported ({before / after:.2f} x smaller), without headers"]


def _memory(recipe: Recipe, shape: ModelShape) -> list[str]:
    parts = memory_per_rank(recipe, Architecture.dense("", shape), Layout.of(recipe))
    bits = 8 * WIDTH[recipe.train.dtype]
    shown = ", ".join(f"{name} {_size_word(size)}" for name, size in parts.items() if size)
    return [f"about {_size_word(sum(parts.values()))} per process, {bits}-bit weights: {shown}"]


def _task(task: Task, recipe: Recipe) -> str:
    items = "all items" if task.limit is None else f"{task.limit} items"
    first = f" from item {task.first}" if task.first else ""
    tokens = f", {task.max_tokens or recipe.train.sequence_length} tokens each" if task.kind == "text" else ""
    return f"{task.name}: {task.kind}, {items}{first}{tokens}"


def _gate(recipe: Recipe) -> str:
    gate = recipe.gate
    if recipe.method == Method.bf16:
        return "none: the control ships nothing"
    own = "".join(f", {name} {value:g} pp" for name, value in gate.thresholds_pp.items())
    bounds = "" if gate.kl is None else f", KL at most {gate.kl:g} nats"
    bounds += "" if gate.agreement is None else f", agreement at least {gate.agreement:g}"
    limits = (
        f"within {gate.threshold_pp:g} pp{own} of {'BF16' if gate.control is None else gate.control} and perplexity "
        f"x{gate.perplexity_ratio:g}{bounds}, {gate.confidence:.0%} confidence, on the {gate.judges} model"
    )
    return limits if gate.rule == GateRule.bf16 else f"better than PTQ on every task (shown beside it: {limits})"


def _results(recipe: Recipe) -> str:
    there = (Path(recipe.run.dir) / "resolved.yaml").exists()
    return recipe.run.dir + (" (there already: `halfbyte run` resumes it)" if there else "")


def _path(path: str) -> str:
    """A path below the working directory without its prefix."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def _plural(count: int, word: str) -> str:
    return word if count == 1 else word + ("es" if word.endswith(("s", "ch")) else "s")


def _size_word(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
