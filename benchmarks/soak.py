"""A run whose processes are killed at random, again and again: does it end where the undisturbed one ends?

    python -m halfbyte.bench.soak MINUTES [--ranks 2] [--seed 0] [--recipe NAME] [--folder DIR] [key=value ...]

The recipe (tiny by default) runs once undisturbed. Then, until the minutes are over, it runs again and again in new
folders while one of its processes at a time gets SIGKILL, at random moments: at the start, in a step, in a save, in an
evaluation. Losses and exported weights are compared. Exit code: 0 if every run ended with the same bytes (on a GPU,
where reductions have no fixed order: if every run ended; the differences are printed), 1 otherwise.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

LONGEST_WAIT_S = 30.0
"""Between two kills, uniformly from 0."""
MOST_KILLS = 5
"""Of one run, 1 .. 5 by chance, so that it comes to its end."""
OPTIONS = (
    *("train.steps=120", "checkpoint.every_steps=10", "launch.max_restarts=1000", "run.wandb=disabled"),
    *("evaluate.tasks.lambada.limit=8", "evaluate.tasks.english.limit=4", "verify.items=0", "gate.judges=trained"),
    "gate.perplexity_ratio=1e100",
)


@dataclass
class Outcome:
    """What a run left.

    Attributes:
        code: Its exit code.
        seconds: From start to end.
        losses: Of every training step.
        weights: SHA-256 of the exported weights.
        kills: Rank and newest checkpoint at each kill.
    """

    code: int
    seconds: float
    losses: list[float]
    weights: str
    kills: list[str] = field(default_factory=list)


def run(recipe: str, options: Sequence[str], folder: Path, chance: random.Random | None) -> Outcome:
    """One run of a recipe to its end.

    Args:
        recipe: Its name or file.
        options: key=value strings.
        folder: The run folder, which does not exist yet.
        chance: Decides about kills; None disturbs nothing.
    """
    line = [str(Path(sys.executable).with_name("halfbyte")), "run", recipe, *options, f"run.dir={folder}"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with (folder.parent / f"{folder.name}.log").open("w") as log:
        process = subprocess.Popen([*line, "--allow-failed-gate"], stdout=log, stderr=subprocess.STDOUT)
        kills = [] if chance is None else _disturb(process, folder, chance)
        code = process.wait()
    seconds = time.perf_counter() - started
    train, export = folder / "train.json", folder / "export" / "hf"
    losses = json.loads(train.read_text())["losses"] if train.exists() else []
    digest = hashlib.sha256()
    for path in sorted(export.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return Outcome(code, seconds, losses, digest.hexdigest(), kills)


def _disturb(process: subprocess.Popen, folder: Path, chance: random.Random) -> list[str]:
    """Kill processes of a run at random moments; returns what was killed."""
    kills: list[str] = []
    wanted = chance.randint(1, MOST_KILLS)
    while len(kills) < wanted:
        try:
            process.wait(chance.uniform(0, LONGEST_WAIT_S))
            break
        except subprocess.TimeoutExpired:
            victim = _worker(process.pid, chance)
            if victim is not None:
                newest = folder / "checkpoints" / "last"
                kills.append(f"rank {victim[0]} after {newest.resolve().name if newest.exists() else 'no checkpoint'}")
                victim[1].kill()
    return kills


def _worker(launcher: int, chance: random.Random) -> tuple[str, psutil.Process] | None:
    """One of the run's workers with its rank, by chance; None while none runs."""
    found = []
    try:
        for child in psutil.Process(launcher).children():
            if "halfbyte.launch.pipeline" in child.cmdline():
                found.append((child.environ()["RANK"], child))
    except psutil.NoSuchProcess:
        return None
    return chance.choice(sorted(found, key=lambda pair: pair[0])) if found else None


def row(name: str, outcome: Outcome, reference: Outcome) -> str:
    """One line of the table."""
    same = outcome.losses == reference.losses and outcome.weights == reference.weights
    pairs = zip(outcome.losses, reference.losses, strict=False)
    apart = max((abs(one - other) for one, other in pairs), default=float("nan"))
    lost = outcome.seconds - reference.seconds
    each = f"{lost / len(outcome.kills):.0f}" if outcome.kills else "-"
    killed = ", ".join(outcome.kills) or "nothing"
    equal = "equal" if same else f"differ, losses by {apart:.3g}"
    return f"| {name} | {killed} | {outcome.code} | {outcome.seconds:.0f} | {each} | {equal} |"


def main(argv: Sequence[str]) -> int:
    """Run the soak; prints a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m halfbyte.bench.soak", description=__doc__)
    parser.add_argument("minutes", type=float)
    parser.add_argument("--ranks", type=int, default=2, help="processes, as pipeline stages")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--folder", type=Path, help="where to; none makes a temporary one")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    place = args.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    options = [*OPTIONS, f"parallel.pipeline={args.ranks}", *args.overrides]
    gpu = torch.cuda.is_available()
    print(f"{args.recipe}, {args.ranks} ranks on {'GPU' if gpu else 'CPU'}, seed {args.seed}, logs in {place}\n")
    print("| run | killed | exit code | seconds | lost per kill, s | losses and weights |\n|---|---|---|---|---|---|")
    started, chance, good = time.perf_counter(), random.Random(args.seed), True
    reference = run(args.recipe, options, place / "undisturbed", None)
    print(row("undisturbed", reference, reference), flush=True)
    number = 0
    while reference.code == 0 and time.perf_counter() - started < 60 * args.minutes:
        number += 1
        outcome = run(args.recipe, options, place / f"run{number}", chance)
        print(row(str(number), outcome, reference), flush=True)
        same = (outcome.losses, outcome.weights) == (reference.losses, reference.weights)
        good = good and outcome.code == 0 and (same or gpu)
    return 0 if good and number else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
