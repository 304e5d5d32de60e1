"""What the benchmarks share: processes of their own, and what they ran on."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "triton", "megatron-core", "nvidia-modelopt", "halfbyte")


def unknown(option: str, names: Sequence[str], known: Iterable[str]) -> bool:
    """Whether a list on the command line holds a name that there is not; says which, and which there are."""
    known = list(known)
    for name in names:
        if name not in known:
            print(f"error: {option} {name}: not known; use some of {', '.join(known)}", file=sys.stderr)
            return True
    return False


def torchrun(processes: int, module: str, words: Sequence[str]) -> None:
    """Run a module in so many processes of this machine.

    Raises:
        subprocess.CalledProcessError: one of them failed.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", module]
    subprocess.run([*launcher, *words], check=True)


def about(program: str) -> dict[str, str]:
    """The command that is running, its GPUs (or its CPU, without one) and the versions of PACKAGES."""
    import torch

    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    if torch.cuda.is_available():
        device = {"GPU": f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"}
    else:
        device = {"CPU": f"{os.cpu_count()} x {_processor()}"}
    return {
        "command": " ".join([program, *sys.argv[1:]]),
        **device,
        "versions": f"Python {platform.python_version()}, {versions}",
    }


def _processor() -> str:
    """The processor's name as Linux has it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
