"""`python -m halfbyte.bench`: BF16, halfbyte and ModelOpt on Llama-3-8B-shaped layers, step by step, in turn.

Writes a Markdown table with versions. Without CUDA it says so and measures nothing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from halfbyte.bench.common import about, torchrun, unknown
from halfbyte.bench.plan import ARMS, LAYOUTS, Size, problems
from halfbyte.training.errors import FAILED, OK, USAGE


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(prog="python -m halfbyte.bench", description="Time training steps in FP4.")
    options.add_argument("--layouts", default="tp1,tp2,pp2", help=f"of {', '.join(LAYOUTS)}")
    options.add_argument("--arms", default=",".join(ARMS), help=f"of {', '.join(ARMS)}; bf16 is always measured")
    options.add_argument("--layers", type=int, default=8, help="number of layers")
    options.add_argument("--micro-batches", type=int, default=8, help="micro-batches of 4096 tokens per step")
    options.add_argument("--steps", type=int, default=10, help="timed steps per arm and round")
    options.add_argument("--rounds", type=int, default=2, help="how often every arm has its turn")
    options.add_argument("--profile", action="store_true", help="trace one step more of every arm: where time goes")
    options.add_argument(
        "--out", type=Path, default=Path("bench.md"), help="Markdown file; the figures go beside it as JSON"
    )
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code: 1 where a layout failed, the others being measured all the same."""
    args = parser().parse_args(argv)
    layouts, arms = args.layouts.split(","), args.arms.split(",")
    if unknown("--layouts", layouts, LAYOUTS) or unknown("--arms", arms, ARMS):
        return USAGE
    size = Size(layers=args.layers, micro_batches=args.micro_batches)
    wrong = problems(size, [LAYOUTS[name] for name in layouts])
    if wrong:
        print("\n".join(f"error: {line}" for line in wrong), file=sys.stderr)
        return USAGE
    import torch

    if not torch.cuda.is_available():
        print("skipped: needs CUDA")
        return OK
    from halfbyte.bench import kernels

    bandwidth = kernels.measure()
    torch.cuda.empty_cache()  # the layouts' processes use the same GPU
    arms = ["bf16", *(name for name in arms if name != "bf16")]
    gpus, measured, failed = torch.cuda.device_count(), {}, False
    missing = [
        f"{name} skipped: needs {LAYOUTS[name].gpus} GPUs, {gpus} found"
        for name in layouts
        if LAYOUTS[name].gpus > gpus
    ]
    _write(args.out, size, measured, bandwidth, missing)
    for name in layouts:
        if LAYOUTS[name].gpus > gpus:
            continue
        try:
            measured[name] = _layout(name, arms, size, args)
        except subprocess.CalledProcessError as error:  # what it said stands above
            missing.append(f"{name} failed: exit code {error.returncode}")
            failed = True
        _write(args.out, size, measured, bandwidth, missing)  # what is there stays, whatever the next layout does
    print(args.out.read_text())
    return FAILED if failed else OK


def _write(out: Path, size: Size, measured: dict[str, Any], bandwidth: dict[str, Any], missing: list[str]) -> None:
    """The table, and the figures beside it."""
    from halfbyte.bench.table import document

    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(document(size, measured, bandwidth, about("python -m halfbyte.bench"), missing))
    figures = {"size": asdict(size), "steps": measured, "kernels": bandwidth}
    out.with_suffix(".json").write_text(json.dumps(figures) + "\n")


def _layout(name: str, arms: list[str], size: Size, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one layout, in processes of its own for each number of micro-batches side by side."""
    possible = [arm for arm in arms if ARMS[arm].at_once == 1 or LAYOUTS[name].exchanges]
    found: dict[str, Any] = {}
    for at_once in sorted({ARMS[arm].at_once for arm in possible}):
        found |= _processes(name, [arm for arm in possible if ARMS[arm].at_once == at_once], size, args)
    return found


def _processes(name: str, arms: list[str], size: Size, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out, shape = Path(folder) / "out.json", Path(folder) / "size.json"
        shape.write_text(json.dumps(asdict(size)))
        words = [name, ",".join(arms), str(out), str(shape), str(args.steps), str(args.rounds)]
        words += ["profile"] if args.profile else []
        torchrun(LAYOUTS[name].gpus, "halfbyte.bench.worker", words)
        return json.loads(out.read_text())


if __name__ == "__main__":
    sys.exit(main())
