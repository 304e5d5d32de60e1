"""`python -m halfbyte.bench.plan_measure --out plan.json`: seconds and peak memory of the steps in plan_cases.py.

Cases of one layout share a set of processes, which this module also is: LAYOUT-CASES OUT.json STEPS after torchrun.
Cases that need more GPUs than there are are named as skipped. Without CUDA it says so and measures nothing.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from halfbyte.bench.common import about, torchrun, unknown
from halfbyte.bench.plan_cases import CASES, Case
from halfbyte.training.config import Method
from halfbyte.training.errors import OK, USAGE

WARM_UP = 3
"""Steps before the clock runs: compilation, allocator, graphs."""
INSIDE = "--inside"
"""First word of the command line of a measuring process."""


def main(argv: list[str] | None = None) -> int:
    """Measure all cases that the machine's GPUs allow; returns the exit code."""
    options = argparse.ArgumentParser(prog="python -m halfbyte.bench.plan_measure", description="Measure for the plan.")
    options.add_argument("--cases", default=",".join(case.name for case in CASES), help="some of the default")
    options.add_argument("--steps", type=int, default=6, help="timed steps per case")
    options.add_argument("--out", type=Path, default=Path("plan_measured.json"), help="JSON to write")
    args = options.parse_args(argv)
    known = {case.name: case for case in CASES}
    if unknown("--cases", args.cases.split(","), known):
        return USAGE
    import torch

    if not torch.cuda.is_available():
        print("skipped: needs CUDA")
        return OK
    gpus = torch.cuda.device_count()
    found: dict[str, Any] = {"about": about("python -m halfbyte.bench.plan_measure"), "cases": {}, "skipped": []}
    for cases in by_layout([known[name] for name in args.cases.split(",")]):
        if cases[0].gpus > gpus:
            found["skipped"] += [f"{case.name}: needs {case.gpus} GPUs, {gpus} found" for case in cases]
            continue
        found["cases"] |= _start(cases, args.steps)
        args.out.write_text(json.dumps(found, indent=1) + "\n")  # what is there stays, whatever the next layout does
    print(json.dumps({name: entry.get("median") for name, entry in found["cases"].items()}, indent=1))
    return OK


def by_layout(cases: list[Case]) -> list[list[Case]]:
    """Cases that can share processes, those of few GPUs first."""
    layouts: dict[str, list[Case]] = {}
    for case in sorted(cases, key=lambda case: case.gpus):
        layouts.setdefault(case.layout, []).append(case)
    return list(layouts.values())


def _start(cases: list[Case], steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        words = [INSIDE, ",".join(case.name for case in cases), str(out), str(steps)]
        torchrun(cases[0].gpus, "halfbyte.bench.plan_measure", words)
        return json.loads(out.read_text())


def inside(names: str, out: str, steps: str) -> None:
    """One process of one layout: all its cases, one after the other; rank 0 writes the JSON."""
    import torch

    from halfbyte.training import environment
    from halfbyte.training.runtime import close_runtime, open_runtime

    environment.die_with_parent()  # torchrun stopped by force must not leave the GPUs busy
    environment.set_process_environment()
    environment.quiet_libraries()
    cases = [case for case in CASES if case.name in names.split(",")]
    runtime = open_runtime(cases[0].recipe())
    found = {}
    for case in cases:
        found[case.name] = measure(case, runtime, int(steps))
        gc.collect()  # a trained module refers to itself
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()
    if runtime.first:
        Path(out).write_text(json.dumps(found))
    close_runtime()


def measure(case: Case, runtime: Any, steps: int) -> dict[str, Any]:
    """Build, calibrate and train a case.

    Returns:
        seconds (of every timed step), median, loss; of the fullest rank, on a GPU, in bytes: held (what was allocated
        before), peak_allocated (tensors, from the first step on, without `held`), peak_reserved (with what torch's
        allocator keeps), outside (memory of the GPU that is not torch's); on a CPU these are missing. failed: the
        reason, where memory did not suffice.
    """
    import torch

    from halfbyte.bench import worker

    cuda = runtime.device.type == "cuda"
    held = torch.cuda.memory_allocated() if cuda else 0  # an earlier case's tensors, where something keeps them alive
    try:
        trained, parts = _prepare(case, runtime)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        worker.time_steps(trained, parts, WARM_UP, runtime)
        seconds = worker.time_steps(trained, parts, steps, runtime)
        found = {"seconds": seconds, "median": statistics.median(seconds), "loss": trained.progress.losses[-1]}
    except torch.cuda.OutOfMemoryError as error:
        return {"failed": str(error).splitlines()[0]}
    if cuda:
        free, total = torch.cuda.mem_get_info()
        peaks = {
            "held": held,
            "peak_allocated": torch.cuda.max_memory_allocated() - held,
            "peak_reserved": torch.cuda.max_memory_reserved(),
            "outside": total - free - torch.cuda.memory_reserved(),
        }
        found |= dict(zip(peaks, worker.fullest(list(peaks.values()), runtime), strict=True))
    trained.on_train_end()
    return found


def _prepare(case: Case, runtime: Any) -> tuple[Any, list[Any]]:
    """A Training module, and the micro-batches of one step."""
    from halfbyte.bench import worker
    from halfbyte.bench.random_model import random_model
    from halfbyte.training import quantize
    from halfbyte.training.schedule import collect

    recipe, shape = case.recipe(), case.shape
    parts = worker.batches(shape.vocab, case.sequence, case.rows, case.count, runtime)
    gpt, teacher = random_model(shape, recipe, runtime), None
    if case.method is Method.qad:
        teacher = random_model(shape, recipe, runtime)
        teacher.requires_grad_(False)
    if case.method is not Method.bf16:
        quantize.quantize(gpt, recipe, lambda stage: collect(stage, parts[:1], None))
    return worker.without_trainer(gpt, teacher, recipe, runtime), parts


if __name__ == "__main__":
    if sys.argv[1:2] == [INSIDE]:
        inside(*sys.argv[2:])
    else:
        sys.exit(main())
