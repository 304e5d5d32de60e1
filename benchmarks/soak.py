"""A training run whose processes are killed at random, again and again: does it end where the undisturbed one ends?

    python -m halfbyte.bench.soak --seconds 1200 --out soak.md [--steps N] [--kill-every S] [--checkpoint-every N]
                                  [--model PATH] [--ranks N] [--seed N] [--folder DIR] [key=value ...]

Three runs of `halfbyte train` on a random Llama: two undisturbed, whose difference is the spread from run to run, and
one whose processes get SIGKILL at random moments, every other time while it saves, and which has to finish by itself.
--out and the JSON beside it are written after every run. Exit code: 0 if the third ended with the weights of the first
two, bit for bit on a CPU, on a GPU at most TOLERATED times as far from them as they are from each other; 1 otherwise.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from halfbyte.bench.common import about
from halfbyte.bench.soak_table import Kill, Outcome, document, judge, left_by, moment, verdict
from halfbyte.training import environment, fetch, retention
from halfbyte.training.config import Recipe
from halfbyte.training.errors import FAILED, OK, UserError
from halfbyte.training.files import write_json
from halfbyte.training.resolve import resolve, save
from halfbyte.training.sinks import METRICS, read_metrics

LOOK_S = 10.0
"""Between two lines of progress."""
SPARE = 1.5
"""No more kills when the time left is this many times what the rest of the run takes."""
SAVE_S = 0.3
"""A kill that waited for a save comes at most so long after its begin."""
GPU_MEMORY = 0.1
"""Largest part of a GPU's memory that a process of the soak may take: others use it as well."""
GPU_SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
"""26 M parameters: on a GPU the tiny model would save in no time."""
GPU_OPTIONS = (
    *("train.sequence_length=256", "train.global_batch=32", "train.micro_batch=8", "train.learning_rate=3e-4"),
    "telemetry.quantization_every_steps=0",
)
OPTIONS = ("launch.max_restarts=1000", "run.wandb=disabled", "telemetry.quantization_every_steps=0")


@dataclass
class Soak:
    """What all runs share.

    Attributes:
        options: key=value strings of the recipe, without run.dir.
        place: Holds the run folders and their logs.
        deadline: time.monotonic() at which the soak has to be over.
        steps: Of training.
        started: time.monotonic() at its begin.
    """

    options: Sequence[str]
    place: Path
    deadline: float
    steps: int
    started: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        """Print a line of progress."""
        print(f"{time.monotonic() - self.started:6.0f} s  {text}", flush=True)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.deadline - time.monotonic()


def write_model(folder: Path, *, gpu: bool) -> Path:
    """Write a random Llama in BF16: tiny, or for a GPU one of GPU_SHAPE with tiny's tokenizer."""
    fetch.fetch("tiny", folder)
    if gpu:
        from transformers import AutoConfig, LlamaForCausalLM

        config = AutoConfig.from_pretrained(folder)
        config.update(GPU_SHAPE)
        torch.manual_seed(0)
        made = LlamaForCausalLM(config)
        torch.nn.Module.to(made, torch.bfloat16)  # transformers decorates its own, which hides the arguments
        made.save_pretrained(folder)
    return folder


def run(soak: Soak, name: str, kills: "Kills | None" = None) -> Outcome:
    """One `halfbyte train` to its end, or to the soak's.

    Args:
        soak: The soak.
        name: Of the run and its folder.
        kills: Decides about kills; None disturbs nothing.
    """
    folder = soak.place / name
    recipe: Recipe = resolve("tiny", [*soak.options, f"run.dir={folder}"], need_weights=True)
    save(recipe, folder / "resolved.yaml")
    line = [sys.executable, "-m", "halfbyte.launch.cli", "train", str(folder)]
    own = {"PYTORCH_CUDA_ALLOC_CONF": f"per_process_memory_fraction:{GPU_MEMORY}"}
    soak.say(f"{name} begins")
    started = time.monotonic()
    with (soak.place / f"{name}.log").open("w") as log:
        # Killed with this process, as its workers are with it: nothing trains on when a soak is stopped by force.
        process = subprocess.Popen(
            line,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | own,
            preexec_fn=environment.die_with_parent,
        )
        struck = [] if kills is None else kills.until_done(process, folder)
        if not wait(soak, process, soak.left, folder):
            process.kill()
        code = process.wait()
    restarts = len(re.findall(r": restart \d+ of ", (soak.place / f"{name}.log").read_text()))
    outcome = left_by(folder, code, time.monotonic() - started, struck, restarts)
    cut = "cut off: the time is up" if soak.left <= 0 else f"exit code {code}"
    soak.say(f"{name} ended after {outcome.seconds:.0f} s, {len(outcome.losses)} steps, {cut}")
    return outcome


def wait(soak: Soak, process: subprocess.Popen, seconds: float, folder: Path) -> bool:
    """Wait for a run's end, at most so long, and say now and then how far it is; returns whether it ended."""
    until = time.monotonic() + min(seconds, soak.left)
    while (rest := until - time.monotonic()) > 0:
        try:
            process.wait(min(rest, LOOK_S))
            return True
        except subprocess.TimeoutExpired:
            if rest > LOOK_S:
                soak.say(f"{folder.name}: step {reached(folder, 0)} of {soak.steps}")
    return process.poll() is not None


def reached(folder: Path, since: float) -> int:
    """The last step in a run's metrics that was done after a time in seconds since 1970; 0 without one."""
    path = folder / METRICS
    records = read_metrics(path) if path.exists() else []
    return max((record["step"] for record in records if record["time"] > since), default=0)


def saved(folder: Path) -> int:
    """Step of a run's newest checkpoint; 0 without one."""
    newest = retention.latest(folder / "checkpoints")
    return 0 if newest is None else retention.step_of(newest)


def saves(folder: Path, since: float) -> bool:
    """Whether a run is saving: a checkpoint without its name is there that was begun after a time in seconds."""
    with suppress(FileNotFoundError):  # it may just have got its name
        return any(path.stat().st_mtime > since for path in (folder / "checkpoints").glob(".step_*.tmp"))
    return False


@dataclass
class Kills:
    """Kills at random moments.

    Attributes:
        soak: The soak.
        chance: Decides when and whom.
        every: Mean seconds between two kills, which are uniform from 0 to twice that.
        undisturbed: The run that says how long the rest takes.
    """

    soak: Soak
    chance: random.Random
    every: float
    undisturbed: Outcome

    def until_done(self, process: subprocess.Popen, folder: Path) -> list[Kill]:
        """Kill workers of a run until it ends or has only the time left that it needs; returns the kills."""
        struck: list[Kill] = []
        began = time.time()
        while not wait(self.soak, process, self.chance.uniform(0, 2 * self.every), folder):
            if self.soak.left < SPARE * self._needs(saved(folder)):
                self.soak.say(f"{folder.name}: no more kills, {self.soak.left:.0f} s are left")
                break
            since = began + struck[-1].seconds if struck else began
            if len(struck) % 2:
                self._await_save(process, folder, since)
            rank, victim = worker(process.pid, self.chance) or ("", None)
            if victim is None:
                continue
            saving, step = saves(folder, since), reached(folder, since)
            with suppress(psutil.NoSuchProcess):  # it may just have ended
                victim.kill()
            newest = saved(folder)
            kill = Kill(time.time() - began, rank, moment(step, saving=saving), newest, max(0, step - newest))
            struck.append(kill)
            self.soak.say(f"{folder.name}: kill {len(struck)}, rank {rank} in {kill.moment}, last saved step {newest}")
        return struck

    def _await_save(self, process: subprocess.Popen, folder: Path, since: float) -> None:
        """Wait for the begin of a save, and then a moment; no longer than `every`, and not beyond the run's end."""
        until = time.monotonic() + min(self.every, self.soak.left)
        while time.monotonic() < until and process.poll() is None:
            if saves(folder, since):
                time.sleep(self.chance.uniform(0, SAVE_S))
                return
            time.sleep(0.01)

    def _needs(self, done: int) -> float:
        """Seconds from a start after `done` steps to the end."""
        whole = self.undisturbed
        return whole.start_seconds + (whole.seconds - whole.start_seconds) * (1 - done / self.soak.steps)


def worker(launcher: int, chance: random.Random) -> tuple[str, psutil.Process] | None:
    """One of the run's workers with its rank, by chance; None while none runs."""
    found = []
    try:
        for child in psutil.Process(launcher).children():
            if "halfbyte.launch.pipeline" in child.cmdline():
                found.append((child.environ()["RANK"], child))
    except psutil.NoSuchProcess:
        return None
    return chance.choice(sorted(found, key=lambda pair: pair[0])) if found else None


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(prog="python -m halfbyte.bench.soak", description="Kill a run again and again.")
    options.add_argument("--seconds", type=float, required=True, help="for all three runs")
    options.add_argument("--out", type=Path, required=True, help="Markdown file; the figures go beside it as JSON")
    options.add_argument("--steps", type=int, default=400, help="of training, in each run")
    options.add_argument("--kill-every", type=float, default=45.0, help="mean seconds between two kills")
    options.add_argument("--checkpoint-every", type=int, default=20, help="steps between two checkpoints")
    options.add_argument("--model", type=Path, help="Hugging Face directory; none makes a random Llama")
    options.add_argument("--ranks", type=int, default=1, help="processes, as pipeline stages")
    options.add_argument("--seed", type=int, default=0, help="of the kills")
    options.add_argument("--folder", type=Path, help="for the run folders, kept; none makes a temporary one")
    options.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe tiny")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the soak; returns the exit code."""
    environment.set_process_environment()
    environment.quiet_libraries()
    args = parser().parse_args(argv)
    gpu = torch.cuda.is_available()
    place = (args.folder or Path(tempfile.mkdtemp(prefix="soak-"))).absolute()
    try:
        model = args.model.absolute() if args.model else write_model(place / "model", gpu=gpu)
        options = [*OPTIONS, *(GPU_OPTIONS if gpu else ()), f"model.path={model}", f"train.steps={args.steps}"]
        options += [f"checkpoint.every_steps={args.checkpoint_every}", f"parallel.pipeline={args.ranks}"]
        soak = Soak([*options, *args.overrides], place, time.monotonic() + args.seconds, args.steps)
        good = three_runs(soak, args, model, gpu=gpu)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    if good and args.folder is None:
        shutil.rmtree(place)
    else:
        print(f"run folders and logs: {place}")
    return OK if good else FAILED


def three_runs(soak: Soak, args: argparse.Namespace, model: Path, *, gpu: bool) -> bool:
    """Run all, or as many as end; the table is written after each. Returns whether the third ended as it should."""
    outcomes: list[Outcome] = []
    content, ran_on = {}, about("python -m halfbyte.bench.soak")
    for name in ("undisturbed_1", "undisturbed_2", "disturbed"):
        disturbs = name == "disturbed"
        kills = Kills(soak, random.Random(args.seed), args.kill_every, outcomes[0]) if disturbs else None
        outcomes.append(run(soak, name, kills))
        content = judge(outcomes, model)
        write_json(args.out.with_suffix(".json"), ran_on | content)
        args.out.write_text(document(content, ran_on))
        if outcomes[-1].code != OK:
            break
    print(args.out.read_text())
    return verdict(content, gpu=gpu)


if __name__ == "__main__":
    sys.exit(main())
