"""`python -m halfbyte.bench.plan_check MEASURED.json ...`: what `halfbyte plan` says against what was measured.

Reads the JSON of halfbyte.bench (whole steps of one GPU) and of halfbyte.bench.plan_measure, prints a Markdown table.
Needs no GPU and no torch.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.bench import plan as bench
from halfbyte.bench.plan_cases import CASES
from halfbyte.launch.plan_memory import memory_per_rank
from halfbyte.launch.plan_model import Architecture, Layout
from halfbyte.launch.plan_time import step_time
from halfbyte.training.choices import CudaGraphs
from halfbyte.training.config import Recipe
from halfbyte.training.errors import OK, USAGE
from halfbyte.training.hardware import GPUS, Gpu
from halfbyte.training.shape import ModelShape

MEMORY, SECONDS = 0.10, 0.20
"""How far a prediction may be off, as a share of what was measured."""


@dataclass(frozen=True)
class Compared:
    """One step, predicted and measured: bytes of tensors on the fullest rank, seconds."""

    name: str
    memory: float
    measured_memory: float
    seconds: float
    measured_seconds: float

    @property
    def memory_error(self) -> float:
        """Relative."""
        return self.memory / self.measured_memory - 1

    @property
    def seconds_error(self) -> float:
        """Relative."""
        return self.seconds / self.measured_seconds - 1


def compare(name: str, recipe: Recipe, shape: ModelShape, gpu: Gpu, memory: float, seconds: float) -> Compared:
    """Predict a step and set it beside its measured bytes and seconds."""
    model, layout = Architecture.dense(name, shape), Layout.of(recipe)
    said = sum(memory_per_rank(recipe, model, layout).values())
    return Compared(name, said, memory, step_time(recipe, model, layout, gpu).seconds, seconds)


def of_steps(found: dict[str, Any], gpu: Gpu) -> Iterator[Compared]:
    """The arms of ours in a JSON of halfbyte.bench."""
    size = bench.Size(**found["size"])
    for layout, arms in found["steps"].items():
        for arm, entry in arms.items():
            if bench.ARMS[arm].modelopt is not None:
                continue
            recipe = bench.recipe(size, bench.LAYOUTS[layout], bench.ARMS[arm])
            recipe.train.cuda_graphs = _replayed(entry, bench.ARMS[arm])
            yield compare(f"{layout} {arm}", recipe, bench.shape_of(size), gpu, entry["peak_bytes"], entry["median"])


def _replayed(entry: dict[str, Any], arm: bench.Arm) -> CudaGraphs:
    """Whether a measured step was replayed from graphs: it says so; older ones were only where their arm asked."""
    replayed = entry.get("graphs", arm.graphs is CudaGraphs.always or arm.at_once > 1)
    return CudaGraphs.always if replayed else CudaGraphs.never


def of_cases(found: dict[str, Any], gpu: Gpu) -> Iterator[Compared]:
    """The cases of a JSON of halfbyte.bench.plan_measure that ran."""
    known = {case.name: case for case in CASES}
    for name, entry in found["cases"].items():
        if "failed" not in entry:
            case = known[name]
            yield compare(name, case.recipe(), case.shape, gpu, entry["peak_allocated"], entry["median"])


def table(rows: list[Compared]) -> str:
    """Markdown; a miss of the targets is bold, and counted below."""
    head = "| step | peak GB, plan | measured | error | step ms, plan | measured | error |"
    lines = [head, "|" + "---|" * 7]
    for row in rows:
        memory = f"| {row.memory / 1e9:.2f} | {row.measured_memory / 1e9:.2f} | {_error(row.memory_error, MEMORY)} "
        seconds = f"| {1e3 * row.seconds:.1f} | {1e3 * row.measured_seconds:.1f} "
        lines.append(f"| {row.name} {memory}{seconds}| {_error(row.seconds_error, SECONDS)} |")
    memory_met = sum(abs(row.memory_error) <= MEMORY for row in rows)
    seconds_met = sum(abs(row.seconds_error) <= SECONDS for row in rows)
    lines += [
        "",
        f"Memory within {MEMORY:.0%}: {memory_met} of {len(rows)}; step time within {SECONDS:.0%}: {seconds_met} of "
        f"{len(rows)}.",
    ]
    return "\n".join(lines)


def _error(value: float, bound: float) -> str:
    return f"{value:+.1%}" if abs(value) <= bound else f"**{value:+.1%}**"


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    options = argparse.ArgumentParser(prog="python -m halfbyte.bench.plan_check", description="Check the plan.")
    options.add_argument("measured", type=Path, nargs="+", help="JSON of halfbyte.bench or halfbyte.bench.plan_measure")
    options.add_argument("--gpu", default="H200", choices=sorted(GPUS), help="where it was measured")
    args = options.parse_args(argv)
    rows: list[Compared] = []
    for path in args.measured:
        try:
            found = json.loads(path.read_text())
            rows += of_cases(found, GPUS[args.gpu]) if "cases" in found else of_steps(found, GPUS[args.gpu])
        except (OSError, ValueError, KeyError) as error:
            print(f"error: {path}: cannot be used ({error}); give a JSON that a benchmark wrote", file=sys.stderr)
            return USAGE
    print(table(rows))
    return OK


if __name__ == "__main__":
    sys.exit(main())
