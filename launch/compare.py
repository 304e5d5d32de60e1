"""One run's result against another's, with the gate's statistics: `halfbyte compare` and `halfbyte gate --against`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from halfbyte.export.verdict_text import waived
from halfbyte.launch.scored import kinds, read_result, read_run
from halfbyte.launch.summary import columns
from halfbyte.training import gate
from halfbyte.training.config import Recipe
from halfbyte.training.errors import RecipeError, UserError
from halfbyte.training.files import write_json
from halfbyte.training.rules import problems

AGAINST = "gate.against.json"
LABELS = {"kl_bound": "KL to BF16, nats", "agreement_bound": "top-1 agreement, %"}
UNITS = {
    "pp": ("{:.2f}", 100.0, "{:+.2f}", 1.0, " pp"),
    "ratio": ("{:.4g}", 1.0, "{:.4f}", 1.0, " x"),
    "nats": ("{:.4f}", 1.0, "{:.4f}", 1.0, ""),
    "share": ("{:.2f}", 100.0, "{:.2f}", 100.0, ""),
}
"""Unit of a measure -> format and factor of a score, then of a change, and what stands behind the change."""


def compare(run_a: Path, run_b: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Judge run B's result against run A's, within the thresholds of B's recipe.

    Args:
        run_a: Folder of the baseline.
        run_b: Folder of the run that is judged.
        overrides: `gate.key=value` strings.

    Returns:
        The content of gate.compare, and for baseline and candidate the run and the stage.

    Raises:
        UserError: a folder is no run or was not scored, or the two were scored on other items.
        RecipeError: an override is not a sane value of the gate.
    """
    recipe = _with_gate(run_b, overrides)
    baseline = read_run(run_a)
    ours, theirs = kinds(recipe), kinds(baseline)
    if ours != theirs:
        shown = [", ".join(f"{name} ({kind})" for name, kind in sorted(tasks.items())) for tasks in (theirs, ours)]
        raise UserError(f"compare: {run_a} has the tasks {shown[0]}, {run_b} {shown[1]}; compare runs of equal tasks")
    before, baseline_stage = read_result(baseline, run_a, recipe.gate.judges)
    after, candidate_stage = read_result(recipe, run_b, recipe.gate.judges)
    result = gate.compare(recipe.gate, ours, candidate_stage, baseline_stage, str(run_a))
    sides = {"baseline": _side(run_a, baseline, before), "candidate": _side(run_b, recipe, after)}
    return result | {"judges": str(recipe.gate.judges)} | sides


def judge_against(run: Path, baseline: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """As `compare`, of the run's newest checkpoint only, kept as <run>/gate.against.json; gate.json stays.

    Raises:
        UserError: as `compare`, or the newest checkpoint is not the one that was scored.
    """
    from halfbyte.launch import handover  # imports Megatron, which `compare` can do without

    recipe = _with_gate(run, overrides)
    checkpoint = handover.scored_checkpoint(recipe, run)
    result = compare(baseline, run, overrides) | {"checkpoint": checkpoint}
    write_json(run / AGAINST, result)
    return result


def _with_gate(folder: Path, overrides: Sequence[str]) -> Recipe:
    keys = [word.partition("=")[0] for word in overrides]
    foreign = [key for key in keys if not key.startswith("gate.")]
    if foreign:
        raise RecipeError([f"{key}: a comparison takes gate.* only; the rest is in the run" for key in foreign])
    recipe = read_run(folder, overrides)
    found = [line for line in problems(recipe) if line.startswith(tuple(keys))]
    if found:
        raise RecipeError(found)
    return recipe


def _side(folder: Path, recipe: Recipe, stage: str) -> dict[str, str]:
    return {"run": str(folder), "method": str(recipe.method), "stage": stage}


def comparison_text(result: dict[str, Any]) -> str:
    """The table and the verdict of `compare`, for people."""
    sides = [(letter, result[name]) for letter, name in (("A", "baseline"), ("B", "candidate"))]
    lines = [f"  {letter}  {side['run']} ({side['method']}, {side['stage']})" for letter, side in sides]
    heading = ["task", "score", "A", "B", "change", "interval", "tolerated", "verdict"]
    lines += ["", *columns([heading, *_rows(result)]), ""]
    level = f"{100 * result['confidence']:g} %"
    if result["corrected_confidence"] != result["confidence"]:
        level += f" for all {result['intervals']} intervals together, {100 * result['corrected_confidence']:.3f} % each"
    lines += [f"  intervals: {level}", f"  B against A: {result['verdict'].upper()}{waived(result)}"]
    return "\n".join([*lines, *(f"    {reason}" for reason in result["reasons"])])


def _rows(result: dict[str, Any]) -> Iterator[list[str]]:
    for task, entry in result["tasks"].items():
        for name, numbers in entry["numbers"].items():
            score, factor, change, times, unit = UNITS[numbers["unit"]]
            values = [numbers["baseline"], numbers["candidate"]]
            low, high = (_shown(end, change, times) for end in numbers["interval"])
            yield [
                f"{task} ({entry['n']})",
                LABELS.get(name, f"{name}, %" if unit == " pp" else name),
                *("-" if value is None else score.format(value * factor) for value in values),
                _shown(numbers["delta"], change, times) + unit,
                f"[{low}, {high}]",
                _shown(numbers["bound"], change, times),
                entry["measures"][name],
            ]


def _shown(value: float | None, pattern: str, factor: float) -> str:
    return "inf" if value is None else pattern.format(value * factor)
