"""The plain parts of a report: sizes, verification, throughput, recipe, versions, hashes, and how to repeat the run."""

import re
import shlex
import statistics
from typing import Any

from halfbyte.launch.report_blocks import Block, Cell, Code, Group, Table, Text
from halfbyte.launch.report_numbers import bytes_text, interval_text
from halfbyte.launch.report_run import RunFiles
from halfbyte.training.config import Method


def sizes(files: RunFiles) -> list[Block]:
    """Bytes before and after."""
    record = files.sizes()["sizes"]
    before, after = record["bytes_before"], record["bytes_after"]
    rows = [
        ("tensors in BF16", bytes_text(before), before),
        ("tensors as exported", bytes_text(after), after),
        ("compression", f"{before / after:.2f}×", before / after),
        ("bits per parameter, over all tensors", f"{16 * after / before:.2f}", 16 * after / before),
        ("linears in FP4", f"{record['quantized']:,}", record["quantized"]),
        ("tensors in files", f"{record['tensors']:,} in {record['files']:,}", record["tensors"]),
        ("released", "yes, at export/hf" if files.checkpoint().name == "hf" else "no, a candidate only", None),
    ]
    return [_facts("Sizes", rows)]


def verification(files: RunFiles) -> list[Block]:
    """What verify compared, and the decoded model's scores."""
    report = files.verify()
    rows = [
        ("result", "verified" if report["ok"] else "NOT VERIFIED", None),
        ("tensors compared", f"{report['tensors']:,}", report["tensors"]),
        ("elements compared", f"{report['elements']:,}", report["elements"]),
        ("mismatches", f"{report['mismatches']:,}", report["mismatches"]),
    ]
    blocks: list[Block] = [_facts("Verified bit for bit", rows)]
    blocks += [Text(f"Problem: {problem}") for problem in report["problems"]]
    if report.get("rescored"):
        blocks.append(_rescored(report["rescored"]))
    return blocks


def _rescored(tasks: dict[str, Any]) -> Table:
    rows = [
        [
            Cell(f"{name} ({task['n']} items)"),
            Cell(
                interval_text(task["nats_per_token_difference"], task["interval"], "{:+.5f}"),
                task["nats_per_token_difference"],
                "pass" if task["ok"] else "fail",
            ),
            Cell(f"±{task['tolerance']:g}", task["tolerance"]),
        ]
        for name, task in tasks.items()
    ]
    head = ["task", "difference, nats per token", "tolerance"]
    return Table("Decoded files scored again in transformers, without Megatron", head, [Group("", rows)])


def throughput(files: RunFiles) -> list[Block]:
    """Speed and memory of training."""
    train = files.train()
    seconds, tokens = [float(value) for value in train["seconds_per_step"]], train["tokens_per_step"]
    peak = train["peak_gpu_bytes_rank0"]
    median = statistics.median(seconds)
    rows: list[tuple[str, str, float | None]] = [
        ("steps", f"{train['steps']:,}", train["steps"]),
        ("tokens per step", f"{tokens:,}", tokens),
        ("seconds per step, median", f"{median:.3f}", median),
        ("tokens/s, all steps", f"{tokens * len(seconds) / sum(seconds):,.0f}", tokens * len(seconds) / sum(seconds)),
        ("peak GPU memory, rank 0", "no GPU" if peak is None else bytes_text(peak), peak),
    ]
    blocks: list[Block] = [_facts("Training", rows)]
    if len(seconds) < train["steps"]:
        blocks.append(Text(f"Times are of the last {len(seconds)} steps, after the run was resumed."))
    return blocks


def recipe(files: RunFiles) -> list[Block]:
    """The resolved recipe, word for word."""
    path = files.folder / "resolved.yaml"
    return [Code(path.read_text().rstrip(), "yaml", "resolved.yaml: every key, defaults included")]


def versions(files: RunFiles) -> list[Block]:
    """Packages that made the files, the code's revision, SHA-256 of every file."""
    record = files.record()
    rows: list[tuple[str, str, float | None]] = [(name, str(v), None) for name, v in record["versions"].items()]
    rows.append(("git revision of the folder it ran in", _revision(files), None))
    rows.append(("SHA-256 of the recipe", str(record["recipe_sha256"]), None))
    hashes = [
        [Cell(name), Cell(f"{entry['bytes']:,}", entry["bytes"]), Cell(str(entry["sha256"]))]
        for name, entry in record["files"].items()
    ]
    return [
        _facts("Versions", rows, numbers=False),
        Table("Files of the checkpoint", ["file", "bytes", "SHA-256"], [Group("", hashes)], numbers=False),
    ]


def _revision(files: RunFiles) -> str:
    """The commit that NeMo found at the start of training (of several, the last); its diff follows without a break."""
    path = files.folder / "experiment" / "git-info.log"
    found = re.findall(r"commit hash: ([0-9a-f]{40})", path.read_text(errors="replace")) if path.exists() else []
    return found[-1] if found else "not recorded (no git repository, or nothing was trained)"


def reproduce(files: RunFiles) -> list[Block]:
    """The commands that make this run and this report again."""
    here = shlex.quote(str(files.folder))
    lines = [
        f"halfbyte run {shlex.quote(str(files.folder / 'resolved.yaml'))} run.dir=NEW_FOLDER",
        f"halfbyte report {here}",
    ]
    text = "resolved.yaml is a complete recipe: paths, seed and layout included."
    if files.recipe.method is not Method.bf16:
        text += " Losses repeat bit for bit on a CPU."
    return [Text(text), Code("\n".join(lines), "bash")]


def _facts(caption: str, rows: list[tuple[str, str, float | None]], *, numbers: bool = True) -> Table:
    cells = [[Cell(label), Cell(text, value)] for label, text, value in rows]
    return Table(caption, ["", ""], [Group("", cells)], numbers=numbers)
