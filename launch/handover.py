"""Gate, export, verify: the stages on files, in one process without a process group."""

import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from halfbyte.launch.pipeline import trained_name
from halfbyte.training import gate, scoring, tasks
from halfbyte.training.config import Format, Method, Recipe
from halfbyte.training.errors import UserError
from halfbyte.training.files import damage, read_json, write_json
from halfbyte.training.hf_map import HFWeight
from halfbyte.training.shape import planned_linears, read_shape
from halfbyte.training.statistics import paired_ratio

PACKAGES = ("torch", "megatron-core", "nvidia-modelopt", "nemo-toolkit", "lightning", "transformers", "halfbyte")


def versions() -> dict[str, str]:
    """Versions of what made the files."""
    return {name: metadata.version(name) for name in PACKAGES}


def judge(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Compare per-item scores and write gate.json.

    Raises:
        UserError: a stage was not evaluated, stages were scored on different items, or the newest checkpoint was not
            the one scored.
    """
    judged = _scored_checkpoint(recipe, folder)
    summaries = read_json(folder / "evaluate.json") if recipe.evaluate.tasks else {}
    with damage(folder / "evaluate.json"):
        files = {stage: {task: f"{stage}.{task}.jsonl" for task in dict(tasks)} for stage, tasks in summaries.items()}
        scores = {
            stage: {task: scoring.read_scores(folder / "evaluate" / name) for task, name in by_task.items()}
            for stage, by_task in files.items()
        }
        verdict = gate.judge(recipe.gate, method=recipe.method.value, stages=scores, summaries=summaries)
    verdict["checkpoint"] = judged
    write_json(folder / "gate.json", verdict)
    return verdict


def _scored_checkpoint(recipe: Recipe, folder: Path) -> str:
    """Name of the newest checkpoint, if it is the one that evaluate.json scores."""
    newest = newest_checkpoint(folder).name
    if not recipe.evaluate.tasks:  # only a BF16 control may have none
        return newest
    marks = read_json(folder / "state.json")
    scored = marks.get("keep_weights" if recipe.method == Method.ptq else f"evaluate.{trained_name(recipe)}")
    if scored is None or newest != f"step_{scored:08d}":
        state = "no trained model" if scored is None else f"the model after step {scored}"
        raise UserError(f"{folder}: evaluate.json scores {state}, the newest checkpoint is {newest}; evaluate it first")
    return newest


def newest_checkpoint(folder: Path) -> Path:
    """The newest complete checkpoint.

    Raises:
        UserError: there is none.
    """
    from halfbyte.training import checkpoint

    last = checkpoint.latest(folder / "checkpoints")
    if last is None:
        raise UserError(f"{folder / 'checkpoints'}: no checkpoint; train first (halfbyte train {folder})")
    return last


def trained_weights(recipe: Recipe, folder: Path) -> Iterator[HFWeight]:
    """The newest checkpoint's tensors in Hugging Face naming.

    Raises:
        UserError: there is no checkpoint.
    """
    from halfbyte.training import checkpoint

    last = newest_checkpoint(folder)
    return checkpoint.read_weights(last, read_shape(Path(recipe.model.path) / "config.json"), _formats(recipe))


def _formats(recipe: Recipe) -> dict[str, Format]:
    """Module name -> format of every quantized linear."""
    return planned_linears(read_shape(Path(recipe.model.path) / "config.json"), recipe)


def out_folder(folder: Path) -> Path:
    """Where the checkpoint for serving stands."""
    return folder / "export" / "hf"


def export(recipe: Recipe, folder: Path, verdict: dict[str, Any], *, resume: bool) -> dict[str, Any]:
    """Write export/hf and export/HANDOFF.md.

    Returns:
        Sizes: bytes_before (BF16), bytes_after, files, tensors, quantized.

    Raises:
        UserError: the verdict is about another checkpoint.
    """
    from halfbyte.export import handoff, hf

    newest = newest_checkpoint(folder).name
    if verdict["checkpoint"] != newest:
        raise UserError(
            f"{folder}: gate.json judges {verdict['checkpoint']}, the newest checkpoint is {newest}; gate it first"
        )
    out, record = out_folder(folder), folder / "export" / "export.json"
    made_for = {"checkpoint": newest, "verdict": verdict["verdict"]}
    if resume and out.exists() and record.exists() and read_json(record).get("made_for") == made_for:
        return read_json(record)["sizes"]
    out.parent.mkdir(parents=True, exist_ok=True)
    sizes = hf.write(
        trained_weights(recipe, folder),
        recipe,
        model_dir=Path(recipe.model.path),
        out=out,
        verdict=verdict,
        versions=versions(),
    )
    handoff.write_handoff(out, recipe, _formats(recipe).values(), verdict, sizes, versions())
    write_json(record, {"made_for": made_for, "sizes": sizes})
    return sizes


def withdraw(folder: Path) -> None:
    """A gate that does not pass leaves nothing to ship, not even an older export."""
    shutil.rmtree(out_folder(folder), ignore_errors=True)
    (folder / "export" / "HANDOFF.md").unlink(missing_ok=True)
    (folder / "export" / "export.json").unlink(missing_ok=True)


def verify(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Compare the files with the trained weights, score the decoded model on a few items, write verify.json."""
    from halfbyte.export import verify as check

    out = out_folder(folder)
    report = check.verify(out, trained_weights(recipe, folder), recipe)
    if report["ok"] and recipe.verify.items and recipe.evaluate.tasks:
        report["rescored"] = _rescore(recipe, folder, out)
        off = [name for name, task in report["rescored"].items() if not task["ok"]]
        if off:
            report["ok"] = False
            report["problems"] += [
                f"{name}: the decoded model scores differently: {report['rescored'][name]}" for name in off
            ]
    write_json(folder / "verify.json", report)
    return report


TOLERANCE = 0.05
"""Nats per token by which the decoded model may differ on average from the training-time model. The weights are equal
bit for bit; FP4 activations flip codes where another order of summation moves a value across a rounding border. In
FP32 on the CPU the two agree to the last digit; in BF16 single tokens differ by tenths of a nat, so the mean is
judged by its 99 % interval: the check fails when the whole interval lies outside the tolerance."""
CONFIDENCE = 0.99


def _rescore(recipe: Recipe, folder: Path, out: Path) -> dict[str, Any]:
    """Score the decoded checkpoint in transformers, without Megatron, on the first items of every task."""
    import torch

    from halfbyte.export.verify import decoded_model
    from halfbyte.training.evaluate import item_limit
    from halfbyte.training.fetch import load_tokenizer

    cuda = torch.cuda.is_available()
    name = "bfloat16" if cuda else "float32"
    model = decoded_model(out, dtype=getattr(torch, name)).to("cuda" if cuda else "cpu")
    tokenizer = load_tokenizer(out)
    limit = read_shape(out / "config.json").max_positions
    stage = "ptq" if recipe.method == Method.ptq else trained_name(recipe)
    report: dict[str, Any] = {}
    for task in recipe.evaluate.tasks:
        items = tasks.load_items(task, tokenizer, item_limit(task, recipe, limit))[: recipe.verify.items]
        before = {row["item"]: row for row in scoring.read_scores(folder / "evaluate" / f"{stage}.{task.name}.jsonl")}
        scores = []
        for item in items:
            with torch.no_grad():
                logits = model(tasks.pad([item], tokenizer.eos_token_id, 1).to(model.device)).logits
            scores += scoring.score_batch(logits, [item], reference=None, kl_positions=0)
        report[task.name] = _drift(scores, before) | {"compute": name}
    return report


def _drift(scores: list[scoring.Score], before: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Mean difference of the log-likelihood per token between two scorings of the same items, with its interval."""
    differences = [score.loglikelihood - before[score.item]["loglikelihood"] for score in scores]
    interval = paired_ratio(differences, [score.tokens for score in scores], CONFIDENCE)
    low, high = (interval.low, interval.high) if len(scores) > 1 else (interval.estimate, interval.estimate)
    return {
        "n": len(scores),
        "nats_per_token_difference": interval.estimate,
        "interval": [low, high],
        "greedy_matches_equal": sum(score.correct == before[score.item]["correct"] for score in scores),
        "tolerance": TOLERANCE,
        "ok": low <= TOLERANCE and high >= -TOLERANCE,
    }
