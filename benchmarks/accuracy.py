"""`python -m halfbyte.bench.accuracy --text text.jsonl.gz`: the accuracy table of SmolLM2-135M, row by row.

Every row is a `halfbyte run` of its own, several at a time on each GPU. What a row scored is appended to OUT.json as
soon as it is done, so a run that is stopped keeps what it has, and the same command goes on with the rest; the table
(OUT.md) is written from all of it.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median_high
from typing import Any

from halfbyte.bench.accuracy_table import table
from halfbyte.bench.arms import RECIPE, ROWS, Row
from halfbyte.training.errors import OK, USAGE
from halfbyte.training.files import read_json, write_json

JUDGED = (0, 3, 4)
"""Exit codes of a run that reached its gate."""


@dataclass(frozen=True)
class Job:
    """One run: a row, and a seed for rows that are trained."""

    row: Row
    seed: int
    export: bool = True
    """Whether the checkpoint is exported and verified as well; it doubles the time of a short run."""

    @property
    def key(self) -> str:
        """Name of its run folder."""
        return f"{self.row.name}-{self.seed}" if self.row.trained else self.row.name

    def command(self, text: Path, folder: Path) -> list[str]:
        """The command line that a user would type."""
        keys = [f"data.train={text}", f"run.dir={folder}", "run.wandb=disabled", f"train.seed={self.seed}"]
        flags = [] if self.export else ["--no-export"]
        return [sys.executable, "-m", "halfbyte.launch.cli", "run", RECIPE, *self.row.keys, *keys, *flags]


def jobs(names: list[str], seeds: list[int], done: set[str], *, export: bool = True) -> list[Job]:
    """What is left to do, seed by seed, so that a stopped run has as many rows as possible."""
    rows = [row for name in names for row in ROWS if row.name == name]
    wanted = [Job(row, seed, export) for seed in seeds for row in rows if row.trained or seed == seeds[0]]
    return [job for job in wanted if job.key not in done]


def result(job: Job, folder: Path, command: list[str]) -> dict[str, Any]:
    """What a finished run's folder says."""
    scores = read_json(folder / "evaluate.json")
    stage = next(name for name in ("qad", "qat", "bf16_trained", "ptq") if name in scores)
    verify = _read(folder / "verify.json")
    found = {
        "row": job.row.name,
        "seed": job.seed,
        "command": " ".join(["halfbyte", *map(_without_folders, command[3:])]),
        "bf16": scores["bf16"],
        "scores": scores[stage],
        "mismatches": verify.get("mismatches"),
    }
    if (folder / "train.json").exists():
        train = read_json(folder / "train.json")
        steady = median_high(train["seconds_per_step"])
        found |= {
            "steps": train["steps"],
            "tokens": train["steps"] * train["tokens_per_step"],
            "tokens_per_second": train["tokens_per_step"] / steady,
            "train_seconds": sum(train["seconds_per_step"]),
            "losses": train["losses"][:: max(1, train["steps"] // 50)],
            "peak_gpu_bytes": train["peak_gpu_bytes_rank0"],
        }
    return found


def _without_folders(word: str) -> str:
    """A word of a command line; of data.train and run.dir only the last part of the path."""
    key, equals, value = word.partition("=")
    return f"{key}={Path(value).name}" if equals and key in ("data.train", "run.dir") else word


def run(left: list[Job], *, text: Path, work: Path, gpus: int, per_gpu: int, seconds: float, out: Path) -> list[str]:
    """Run jobs, `per_gpu` at a time on each GPU, until all are done or the time is up.

    Returns:
        A line for every job that failed or was stopped.
    """
    started, problems = time.monotonic(), []
    running: dict[int, tuple[Job, subprocess.Popen[bytes], list[str]]] = {}
    left = list(left)
    common = work / "common"
    while left or running:
        over = time.monotonic() - started > seconds
        for lane in range(gpus * per_gpu):
            # The first run alone scores BF16; the others take its scores, which are the same for every row.
            if lane not in running and left and not over and (share(running, work, common) or not running):
                job = left.pop(0)
                folder = work / job.key
                if common.exists() and not folder.exists():
                    shutil.copytree(common, folder)
                folder.parent.mkdir(parents=True, exist_ok=True)
                command = job.command(text, folder)
                environment = os.environ | {"CUDA_VISIBLE_DEVICES": _visible(lane % gpus), "OMP_NUM_THREADS": "4"}
                log = (work / f"{job.key}.log").open("wb")
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
                running[lane] = (job, process, command)
        time.sleep(0.5)
        for lane, (job, process, command) in list(running.items()):
            if process.poll() is None and not over:
                continue
            del running[lane]
            if process.poll() is None:
                process.terminate()
                process.wait()
                problems.append(f"{job.key}: stopped, time is up")
            elif process.returncode in JUDGED:
                write_json(out, _read(out) | {job.key: result(job, work / job.key, command)})
                print(f"{time.monotonic() - started:5.0f} s  {job.key}", flush=True)
                shutil.rmtree(work / job.key)
            else:
                last = (work / f"{job.key}.log").read_text(errors="replace").strip().splitlines()[-1:]
                problems.append(f"{job.key}: exit code {process.returncode}: {''.join(last)}")
        if over and not running:
            return [*problems, *(f"{job.key}: not started, time is up" for job in left)]
    return problems


def share(running: Mapping[int, tuple[Job, Any, Any]], work: Path, common: Path) -> bool:
    """Copy what all jobs share from one that has calibrated: BF16's scores, the reference for KL, the text's tokens.

    Args:
        running: Lane -> job and its process.
        work: Holds the jobs' run folders.
        common: Made by this function; a run folder copied from it goes on after the BF16 evaluation.

    Returns:
        Whether `common` is there.
    """
    if common.exists():
        return True
    for job, *_ in running.values():
        folder = work / job.key
        marks = _read(folder / "state.json")
        if "evaluate.bf16" not in marks or not (folder / "quantize.json").exists():
            continue
        temporary = common.with_suffix(".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(folder / "cache", temporary / "cache")
        shutil.copytree(folder / "evaluate", temporary / "evaluate")
        write_json(temporary / "evaluate.json", {"bf16": read_json(folder / "evaluate.json")["bf16"]})
        write_json(temporary / "state.json", {"evaluate.bf16": marks["evaluate.bf16"]})
        temporary.rename(common)
        return True
    return False


def _visible(index: int) -> str:
    """The index-th of the GPUs that this process may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[index] if named else str(index)


def _read(path: Path) -> dict[str, Any]:
    """A JSON file that may not be there yet."""
    return read_json(path) if path.exists() else {}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(prog="python -m halfbyte.bench.accuracy", description=__doc__)
    options.add_argument("--text", type=Path, required=True, help="JSONL made by python -m halfbyte.bench.text")
    options.add_argument("--rows", default=",".join(row.name for row in ROWS), help="names of rows, in order")
    options.add_argument("--seeds", default="1,2,3", help="of the trained rows")
    options.add_argument("--no-export", action="store_true", help="only score; nothing is exported and verified")
    options.add_argument("--gpus", type=int, default=1)
    options.add_argument("--per-gpu", type=int, default=3, help="runs at a time on one GPU")
    options.add_argument("--seconds", type=float, default=1e9, help="after this, what still runs is stopped")
    options.add_argument("--work", type=Path, default=Path("runs/accuracy"), help="run folders")
    options.add_argument("--out", type=Path, default=Path("accuracy.json"), help="results; the table is beside it")
    return options


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing, write the table; returns the exit code."""
    args = parser().parse_args(argv)
    names, known = args.rows.split(","), {row.name for row in ROWS}
    for name in names:
        if name not in known:
            print(f"error: --rows {name}: no such row; there are {', '.join(sorted(known))}", file=sys.stderr)
            return USAGE
    if not args.text.is_file():
        print(f"error: --text {args.text}: no such file; make it with python -m halfbyte.bench.text", file=sys.stderr)
        return USAGE
    done = set(_read(args.out))
    problems = run(
        jobs(names, [int(seed) for seed in args.seeds.split(",")], done, export=not args.no_export),
        text=args.text.absolute(),
        work=args.work.absolute(),
        gpus=args.gpus,
        per_gpu=args.per_gpu,
        seconds=args.seconds,
        out=args.out,
    )
    if args.out.exists():
        text = table(read_json(args.out))
        args.out.with_suffix(".md").write_text(text)
        print(text)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else OK


if __name__ == "__main__":
    sys.exit(main())
