"""Score the decoded checkpoint in transformers, without Megatron: what the comparison of bytes cannot tell."""

from pathlib import Path
from typing import Any

from halfbyte.launch.pipeline import trained_name
from halfbyte.training import scoring, tasks
from halfbyte.training.config import Method, Recipe, TaskKind
from halfbyte.training.jsonl import read_scores
from halfbyte.training.shape import read_shape
from halfbyte.training.statistics import paired_ratio

TOLERANCE = 0.05
"""Nats per token by which the decoded model may differ on average from the training-time model. The weights are equal
bit for bit; FP4 activations flip codes where another order of summation moves a value across a rounding border. In
FP32 on the CPU the two agree to the last digit; in BF16 single tokens differ by tenths of a nat, so the mean is
judged by its 99 % interval: the check fails when the whole interval lies outside the tolerance."""
CONFIDENCE = 0.99


def rescore(recipe: Recipe, folder: Path, out: Path) -> dict[str, Any]:
    """Score the first items of every built-in task and compare with what the run scored.

    Args:
        recipe: The recipe of the run.
        folder: The run folder.
        out: The exported directory.

    Returns:
        Task name -> n (items), nats_per_token_difference with its interval, greedy_matches_equal (items), tolerance,
        ok, compute (the type of products).

    Raises:
        UserError: the files cannot be decoded, or a task's items or scores are missing.
    """
    import torch

    from halfbyte.export.served import decoded_model
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
        if task.kind == TaskKind.lm_eval:
            continue  # lm-eval's prompts need its own code; the built-in kinds tell a wrong checkpoint as well
        items = tasks.load_items(task, tokenizer, item_limit(task, recipe, limit))[: recipe.verify.items]
        before = {row["item"]: row for row in read_scores(folder / "evaluate" / f"{stage}.{task.name}.jsonl")}
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
