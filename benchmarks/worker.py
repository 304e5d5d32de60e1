"""One process of one layout: every arm's steps, in turn, a few rounds; rank 0 writes what it measured as JSON.

Run by __main__.py under torchrun: LAYOUT ARM,ARM,... OUT.json SIZE.json STEPS ROUNDS, and `profile` if one step more of
every arm is to be traced.
"""

import contextlib
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import layers

from halfbyte.bench.plan import ARMS, LAYOUTS, Arm, Layout, Size, recipe, shape_of
from halfbyte.bench.profile import profile
from halfbyte.bench.random_model import random_model
from halfbyte.training import environment, module, quantize
from halfbyte.training.config import Recipe
from halfbyte.training.data import MicroBatch
from halfbyte.training.graph_rules import captures
from halfbyte.training.runtime import Runtime, close_runtime, open_runtime
from halfbyte.training.schedule import collect
from halfbyte.training.shape import ModelShape

WARM_UP = 3
"""Steps before the clock runs: compilation, allocator, optimizer state."""
REPLACED = ("linear_with_grad_accumulation_and_async_allreduce", "linear_with_frozen_weight")
FAILURES = (RuntimeError, AssertionError, NotImplementedError, ImportError, AttributeError, TypeError, ValueError)
"""What ModelOpt's arms may fail with, by format and layout; the table then names the reason."""


def batches(vocab: int, sequence: int, rows: int, count: int, runtime: Runtime) -> list[MicroBatch]:
    """`count` micro-batches of `rows` x `sequence` random tokens, all with loss, on the runtime's device."""
    generator = torch.Generator().manual_seed(1)
    windows = torch.randint(vocab, (count, rows, sequence + 1), generator=generator)
    mask = torch.ones(rows, sequence)
    return [MicroBatch(w[:, :-1].contiguous(), w[:, 1:].contiguous(), mask, None).to(runtime.device) for w in windows]


def own_share(parts: list[MicroBatch], layout: Layout) -> list[MicroBatch]:
    """This data-parallel rank's part of a global batch."""
    return parts[parallel_state.get_data_parallel_rank() :: layout.data]


@contextlib.contextmanager
def training(plan: Recipe, shape: ModelShape, arm: Arm, runtime: Runtime, parts: list[MicroBatch]) -> Iterator[Any]:
    """A Training module of an arm, calibrated on the first of the batch's parts."""
    gpt = random_model(shape, plan, runtime)
    with _modelopt_as_it_is(arm):
        if arm.format is not None:
            quantize.quantize(gpt, plan, lambda stage: collect(stage, parts[:1], None))
        elif arm.modelopt is not None:
            import modelopt.torch.quantization as mtq

            with contextlib.redirect_stdout(None):
                mtq.quantize(gpt, getattr(mtq, arm.modelopt), lambda stage: collect(stage, parts[:1], None))
        trained = without_trainer(gpt, None, plan, runtime)
        yield trained
        trained.on_train_end()


def without_trainer(gpt: GPTModel, teacher: GPTModel | None, plan: Recipe, runtime: Runtime) -> Any:
    """A Training module whose training_step can be called by itself: what Lightning's trainer would give is there."""
    trained = module.Training(gpt, teacher=teacher, recipe=plan, runtime=runtime, data=None)  # type: ignore[arg-type]
    trained.optimizers = lambda: trained.optimizer  # type: ignore[method-assign]
    trained.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    return trained


@contextlib.contextmanager
def _modelopt_as_it_is(arm: Arm) -> Iterator[None]:
    """ModelOpt's arms keep its own path per call, and its gradients unfused, as it sets them.

    It replaces functions of Megatron during each call and, when that call fails, leaves them replaced.
    """
    if arm.modelopt is None:
        yield
        return
    with (
        mock.patch.object(module, "weights_once", return_value=contextlib.nullcontext()),
        mock.patch.object(module.gradients, "fuse"),
        mock.patch.multiple(layers, **{name: getattr(layers, name) for name in REPLACED}),
    ):
        yield


def time_steps(trained: Any, parts: list[MicroBatch], count: int, runtime: Runtime) -> list[float]:
    """Seconds of `count` whole steps: schedule, clipping, update."""
    seconds = []
    for step in range(count):
        _synchronize(runtime)
        started = time.perf_counter()
        trained.training_step(parts, step)
        _synchronize(runtime)
        seconds.append(time.perf_counter() - started)
    return seconds


def fullest(values: list[int], runtime: Runtime) -> list[int]:
    """The largest of every rank's values, place by place; collective."""
    together = torch.tensor(values, dtype=torch.int64, device=runtime.device)
    dist.all_reduce(together, op=dist.ReduceOp.MAX)
    return together.tolist()


def _synchronize(runtime: Runtime) -> None:
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()


def measure(
    size: Size, layout: Layout, arms: list[Arm], runtime: Runtime, *, steps: int, rounds: int, traced: bool = False
) -> dict[str, Any]:
    """Every arm in turn, `rounds` times over.

    Returns:
        Arm name -> seconds (of all timed steps), first_step (seconds, compilation included), graphs (whether passes
        were replayed from CUDA graphs), peak_bytes (of the fullest rank), losses (of every step of the first round,
        warm-up included), median, and profile (of the last round) where `traced`; an arm of ModelOpt that does not
        run: failed (the reason).
    """
    parts = batches(size.vocab, size.sequence, 1, size.micro_batches, runtime)
    found: dict[str, Any] = {arm.name: {"seconds": [], "first_step": None} for arm in arms}
    for _ in range(rounds):
        for arm in arms:
            entry = found[arm.name]
            if "failed" in entry:
                continue
            try:
                _one_turn(entry, size, layout, arm, runtime, parts, steps, traced=traced)
            except FAILURES as error:
                if arm.modelopt is None:
                    raise
                entry["failed"] = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
            if runtime.first:
                print(f"{layout.name} {arm.name}: {_said(entry)}", flush=True)  # a log that is cut off keeps these
            gc.collect()
            if runtime.device.type == "cuda":
                torch.cuda.empty_cache()
    for entry in found.values():
        entry["median"] = statistics.median(entry["seconds"]) if "failed" not in entry else None
    return found


def _said(entry: dict[str, Any]) -> str:
    return entry.get("failed") or f"{1e3 * statistics.median(entry['seconds']):.1f} ms"


def _one_turn(
    entry: dict[str, Any],
    size: Size,
    layout: Layout,
    arm: Arm,
    runtime: Runtime,
    parts: list[MicroBatch],
    steps: int,
    *,
    traced: bool,
) -> None:
    own, on_gpu = own_share(parts, layout), runtime.device.type == "cuda"
    plan = recipe(size, layout, arm)
    with training(plan, shape_of(size), arm, runtime, parts) as trained:
        warm = time_steps(trained, own, WARM_UP, runtime)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()  # of reserved memory: a graph's own is not "allocated" while it rests
        entry["first_step"] = entry["first_step"] or warm[0]
        entry["graphs"] = on_gpu and captures(plan)
        entry["seconds"] += time_steps(trained, own, steps, runtime)
        entry["peak_bytes"] = fullest([torch.cuda.max_memory_reserved()], runtime)[0] if on_gpu else None
        entry.setdefault("losses", list(trained.progress.losses))
        if traced:
            entry["profile"] = profile(lambda: trained.training_step(own, steps))


def main(argv: list[str]) -> None:
    """Measure one layout and write its JSON."""
    layout, arms, out, size_file, steps, rounds, *traced = argv
    environment.die_with_parent()  # torchrun stopped by force must not leave the GPUs busy
    environment.set_process_environment()
    environment.quiet_libraries()
    size = Size(**json.loads(Path(size_file).read_text()))
    chosen = LAYOUTS[layout]
    wanted = [ARMS[name] for name in arms.split(",")]
    runtime = open_runtime(recipe(size, chosen, wanted[0]))
    found = measure(size, chosen, wanted, runtime, steps=int(steps), rounds=int(rounds), traced=bool(traced))
    if runtime.first:
        Path(out).write_text(json.dumps(found))
    close_runtime()


if __name__ == "__main__":
    main(sys.argv[1:])
