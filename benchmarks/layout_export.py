"""`python -m halfbyte.bench.layout_export FOLDER --layouts tp1,tp4,...`: does every layout export the same bytes?

Every layout calibrates the same BF16 model and exports it ("calibrated"); then it loads the weights that one GPU
trained, saves them again and exports that ("carried"), with all its processes. Exit code 1 where a file is not that of
one GPU, byte for byte. Training itself is not compared here: another order of summation moves a weight's last bits, and
FP4 codes with them.

Layers shaped as Llama-3-8B's on GPUs, a small model without. This module is also the process of a layout, and light:
Megatron-Core's checkpoint writer spawns processes that import it again.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from halfbyte.bench.common import about, torchrun, unknown
from halfbyte.bench.plan import LAYOUTS, Size, problems
from halfbyte.training import environment
from halfbyte.training.errors import FAILED, OK, USAGE

INSIDE = "--inside"
"""First word of the command line of a layout's process."""
SMALL = Size(layers=4, hidden=128, ffn=256, heads=8, kv_heads=4, vocab=128, sequence=64, micro_batches=4)
PARTS = ("calibrated", "carried")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(prog="python -m halfbyte.bench.layout_export", description=__doc__)
    options.add_argument("folder", type=Path, help="gets models, checkpoints, exports and result.json; new or empty")
    options.add_argument("--layouts", default="tp1,tp4,tp2pp2,dp4,pp4", help=f"of {', '.join(LAYOUTS)}")
    options.add_argument("--layers", type=int, default=4, help="number of layers")
    options.add_argument("--steps", type=int, default=2, help="steps that one GPU trains")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Export under every layout that the machine has GPUs for, and compare; returns the exit code."""
    args = parser().parse_args(argv)
    layouts = args.layouts.split(",")
    if unknown("--layouts", layouts, LAYOUTS):
        return USAGE
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else None
    size = Size(layers=args.layers, micro_batches=4) if gpus else Size(**asdict(SMALL) | {"layers": args.layers})
    wrong = problems(size, [LAYOUTS[name] for name in layouts])
    if args.folder.exists() and any(args.folder.iterdir()):
        wrong.append(f"{args.folder}: is not empty; name a new folder")
    if wrong:
        print("\n".join(f"error: {line}" for line in wrong), file=sys.stderr)
        return USAGE
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "size.json").write_text(json.dumps(asdict(size)))
    found = {}
    for name in ["tp1", *(name for name in layouts if name != "tp1")]:
        if gpus is not None and LAYOUTS[name].gpus > gpus:
            print(f"{name} skipped: needs {LAYOUTS[name].gpus} GPUs, {gpus} found", flush=True)
            continue
        torchrun(LAYOUTS[name].gpus, "halfbyte.bench.layout_export", [INSIDE, name, str(folder), str(args.steps)])
        found[name] = json.loads((folder / name / "files.json").read_text())
        print("\n".join(verdict(name, found[name], found["tp1"])), flush=True)
    program = "python -m halfbyte.bench.layout_export"
    (folder / "result.json").write_text(json.dumps({"about": about(program), "files": found}, indent=1) + "\n")
    return OK if all(entry == found["tp1"] for entry in found.values()) else FAILED


def verdict(name: str, mine: Mapping[str, Any], one: Mapping[str, Any]) -> list[str]:
    """A line for each of PARTS: how a layout's files compare with those of one GPU.

    Args:
        name: The layout's.
        mine: Its part -> file -> {"sha256", "bytes"}.
        one: The same of one GPU.
    """
    lines = []
    for part in PARTS:
        files = mine[part].keys() | one[part].keys()
        different = sorted(file for file in files if mine[part].get(file) != one[part].get(file))
        size = sum(entry["bytes"] for entry in mine[part].values())
        said = f"differ: {', '.join(different)}" if different else f"{len(files)} files, {size} bytes, all the same"
        lines.append(f"{name} {part}: {said}")
    return lines


if __name__ == "__main__":
    if sys.argv[1:2] == [INSIDE]:
        environment.die_with_parent()  # torchrun stopped by force must not leave the GPUs busy
        environment.set_process_environment()
        environment.quiet_libraries()
        from halfbyte.bench.layout_bytes import inside

        inside(*sys.argv[2:])
    else:
        sys.exit(main())
