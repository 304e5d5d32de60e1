"""What `halfbyte plan` prints: a recipe on a kind of GPU, as it is written and at its best. Torch-free."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace

from halfbyte.launch.plan_memory import evaluation_memory
from halfbyte.launch.plan_model import Architecture, Layout
from halfbyte.launch.plan_search import NEEDS, SPARE, Candidate, best, judge, layout_problem
from halfbyte.launch.plan_served import served_lines
from halfbyte.launch.plan_time import Step, step_time
from halfbyte.training.choices import FLOAT64_ON_GPU, CudaGraphs, Dtype
from halfbyte.training.config import Method, Recipe
from halfbyte.training.config_launch import GRACE_S
from halfbyte.training.errors import RecipeError
from halfbyte.training.hardware import GIB, GPUS, RESERVE_GIB, Gpu
from halfbyte.training.run_rules import seconds_of

MOST_GPUS = 1_000_000
"""More than any cluster has; beyond it a slip of the keyboard would be searched for hours."""
MIB = 1 << 20
NAMED = 4
"""Layouts that are named of those that were given up for the same reason."""


def named_gpu(name: str) -> Gpu:
    """The GPU of `--gpu`.

    Raises:
        RecipeError: the table has no such GPU.
    """
    known = {key.lower(): gpu for key, gpu in GPUS.items()}
    if name.lower() not in known:
        raise RecipeError([f"--gpu {name}: not known; use one of {', '.join(GPUS)}, or add it to training/hardware.py"])
    return known[name.lower()]


def plan(recipe: Recipe, model: Architecture, gpu: Gpu, nodes: int | None) -> str:
    """The whole text.

    Args:
        recipe: Resolved recipe.
        model: Its model, or another one that takes its place.
        gpu: The hardware.
        nodes: Hosts of gpu.per_node GPUs to search a layout for; None takes as many GPUs as the recipe's layout.

    Raises:
        RecipeError: nodes is not positive, or there are more GPUs than anywhere.
    """
    if nodes is not None and nodes < 1:
        raise RecipeError([f"--nodes {nodes}: must be positive; give at least 1"])
    gpus = recipe.world_size if nodes is None else nodes * gpu.per_node
    if gpus > MOST_GPUS:
        asked = "parallel" if nodes is None else f"--nodes {nodes}"
        raise RecipeError([f"{asked}: {gpus:,} GPUs are more than a plan is made for; give at most {MOST_GPUS:,}"])
    sections = [("model", _model(model)), ("hardware", _hardware(gpu, gpus))]
    if model.shape is None:
        sections.append(("training", _by_counts(model, gpu)))
    else:
        sections += [("as written", _as_written(recipe, model, gpu)), ("best", _best(recipe, model, gpu, gpus))]
    sections.append(("served", served_lines(recipe, model)))
    return "\n".join(f"{name if i == 0 else '':<11}{line}" for name, lines in sections for i, line in enumerate(lines))


def _model(model: Architecture) -> list[str]:
    active = f", {model.active / 1e9:.1f} G active per token" if model.active != model.parameters else ""
    return [f"{model.name}: {model.parameters / 1e9:.2f} G parameters{active}", *([model.note] if model.note else [])]


def _hardware(gpu: Gpu, gpus: int) -> list[str]:
    return [
        f"{gpus} x {gpu.name}: {gpu.memory_gib:g} GiB ({RESERVE_GIB:g} GiB of it not for tensors), "
        f"{gpu.bf16 / 1e12:,.0f} TFLOP/s in BF16, {gpu.memory / 1e12:g} TB/s, NVLink {gpu.nvlink / 1e9:g} GB/s among "
        f"{gpu.domain}, network {gpu.network / 1e9:g} GB/s",
        f"source: {gpu.source}",
    ]


def _by_counts(model: Architecture, gpu: Gpu) -> list[str]:
    state = 18 * model.parameters
    return [
        f"weights, FP32 gradients and Adam take {state / GIB:,.0f} GiB, the usable memory of "
        f"{-(-state // int(gpu.usable)):,.0f} {gpu.name}, before any activation; no layout is searched",
        f"one token takes {6 * model.active / 1e9:,.0f} GFLOP of training, without attention",
    ]


def _as_written(recipe: Recipe, model: Architecture, gpu: Gpu) -> list[str]:
    layout = Layout.of(recipe)
    problem = layout_problem(recipe, model.sizes, gpu, layout)
    if recipe.train.dtype is Dtype.float64:
        problem = FLOAT64_ON_GPU
    if problem is not None:
        return [layout.words(), f"cannot run: {problem}"]
    return _candidate(recipe, model, judge(recipe, model, layout, gpu), gpu)


def _best(recipe: Recipe, model: Architecture, gpu: Gpu, gpus: int) -> list[str]:
    if recipe.method is Method.ptq:
        return ["nothing to search: method ptq only calibrates"]
    if not _timed(recipe):
        return [f"nothing to search: train.dtype = {recipe.train.dtype}, layouts are compared by time in BF16"]
    candidate, refused = best(recipe, model, gpu, gpus)
    if candidate is not None:
        return _candidate(recipe, model, candidate, gpu) + _refused(refused)
    full = any(reason.startswith(NEEDS) for reason in refused.values())
    remedy = "take more GPUs (--nodes)" if full else "take another number of GPUs (--nodes) or another batch"
    return [f"none: no layout {'fits' if full else 'divides'}; {remedy}", *_refused(refused)]


def _timed(recipe: Recipe) -> bool:
    """Whether the rates of training/hardware.py are those of the recipe's type."""
    return recipe.train.dtype in (Dtype.auto, Dtype.bfloat16)


def _refused(refused: dict[str, str]) -> list[str]:
    """Reasons that differ in their numbers only share a line, which gives those of the last one named."""
    alike: dict[str, list[str]] = {}
    for name, reason in refused.items():
        alike.setdefault(re.sub(r"[\d., ]+", "", reason), []).append(name)
    return [
        f"not {', '.join(names[-NAMED:])}{f' and {len(names) - NAMED} more' if len(names) > NAMED else ''}: "
        f"{refused[names[-1]]}"
        for names in alike.values()
    ]


def _candidate(recipe: Recipe, model: Architecture, candidate: Candidate, gpu: Gpu) -> list[str]:
    layout, step = candidate.layout, candidate.step
    total = sum(candidate.memory.values())
    spare = candidate.spare(gpu)
    close = f" with {spare:.1%} to spare, less than the plan can promise" if spare < SPARE else ""
    verdict = candidate.problem or f"fits {gpu.usable / GIB:.0f} GiB{close}"
    said, cached = evaluation_memory(recipe, model, layout)
    unit, name = (GIB, "GiB") if total >= GIB / 10 else (MIB, "MiB")
    lines = [
        f"{layout.words()} on {layout.world} GPU{'s' if layout.world > 1 else ''}",
        f"memory per GPU {total / unit:.1f} {name}, {verdict}: {_parts(candidate.memory, unit, name)}",
        f"evaluation: logits {said / GIB:.2g} GiB and, where text is generated, key/value cache {cached / GIB:.2g} GiB "
        "instead of activations",
    ]
    if recipe.method is Method.ptq:
        return lines
    if not _timed(recipe):
        return [*lines, f"no step time: rates are known in BF16, not in train.dtype = {recipe.train.dtype}"]
    train = recipe.train
    tokens = train.global_batch * train.sequence_length
    seconds = {
        "kernels": step.compute,
        "waiting for Python": step.waiting,
        "tensor-parallel": step.tensor,
        "pipeline": step.bubble,
        "data-parallel": step.data,
        "optimizer": step.optimizer,
    }
    hours = train.steps * step.seconds / 3600
    used = step.model_flops / step.seconds / layout.world / gpu.bf16
    return [
        *lines,
        f"step {step.seconds:.3g} s: {_parts(seconds, *((1.0, 's') if step.seconds >= 0.1 else (1e-3, 'ms')))}"
        f"{_with_graphs(recipe, model, layout, gpu, step)}",
        f"sent per GPU and step: {step.nvlink_bytes / 1e9:.2f} GB over NVLink, {step.network_bytes / 1e9:.2f} GB over "
        "the network",
        f"{tokens / step.seconds:,.0f} tokens/s, {used:.1%} of the BF16 peak in model FLOPs",
        f"{train.steps:,} steps, {_number(train.steps * tokens / 1e6)} M tokens: {_duration(hours)}, "
        f"{_number(hours * layout.world)} GPU-hours; evaluation, export and checkpoints not counted",
        *_jobs(recipe, hours),
    ]


def jobs_for(seconds: float, limit: str) -> int:
    """Slurm jobs that a training takes under a time limit as Slurm writes it; each stops GRACE_S before its end."""
    whole = seconds_of(limit)
    return math.ceil(seconds / (whole - GRACE_S)) if whole else 1


def _jobs(recipe: Recipe, hours: float) -> list[str]:
    """What to ask Slurm for where one time limit is too short."""
    jobs = jobs_for(3600 * hours, recipe.launch.time)
    return [
        f"launch.time = {recipe.launch.time}: {jobs:,} jobs, beside what their starts take; halfbyte submit "
        f"--jobs {jobs} puts them in a row, without it one job goes back into the queue as often"
    ] * (jobs > 1)


def _with_graphs(recipe: Recipe, model: Architecture, layout: Layout, gpu: Gpu, step: Step) -> str:
    """What CUDA graphs would make of a step of which a tenth and more waits for Python; "" where that is little."""
    if step.waiting < 0.1 * step.seconds:
        return ""
    always = replace(recipe, train=replace(recipe.train, cuda_graphs=CudaGraphs.always))
    seconds = step_time(always, model, layout, gpu).seconds
    return f"; {seconds:.3g} s with train.cuda_graphs=always" if seconds < step.seconds else ""


def _parts(parts: dict[str, float], unit: float, name: str) -> str:
    shown: Sequence[str] = [f"{part} {value / unit:.3g}" for part, value in parts.items() if value >= 0.005 * unit]
    return ", ".join(shown) + f" {name}"


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.3g} minutes"
    return f"{hours:.3g} hours" if hours < 48 else f"{hours / 24:.3g} days"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
