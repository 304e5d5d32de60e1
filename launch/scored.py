"""The scores in a run folder, as the gate takes them. Torch-free: comparing two runs takes a second."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfbyte.launch.start import RESOLVED
from halfbyte.training import gate
from halfbyte.training.config import Method, Recipe, TaskKind
from halfbyte.training.errors import USAGE, UserError
from halfbyte.training.files import damage, read_json
from halfbyte.training.jsonl import read_scores
from halfbyte.training.pairing import Stage
from halfbyte.training.resolve import of_run
from halfbyte.training.rules import leaves

SAME_TRAINING = (
    "model.path",
    "data.train",
    "train.steps",
    "train.seed",
    "train.global_batch",
    "train.sequence_length",
)
"""Keys in which a control should equal the run that it is the control of."""


def read_run(folder: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run folder, which may have been moved.

    Raises:
        UserError: the folder is no run, or its recipe is damaged; exit code 2.
    """
    if not (folder / RESOLVED).is_file():
        raise UserError(f"{folder}: holds no {RESOLVED}; give the folder of a run (run.dir)", USAGE)
    return of_run(folder / RESOLVED, overrides)


def kinds(recipe: Recipe) -> dict[str, TaskKind]:
    """Task name -> kind."""
    return {task.name: task.kind for task in recipe.evaluate.tasks}


def read_stages(folder: Path, label: str = "") -> dict[str, Stage]:
    """Every stage of evaluate.json with its scores per item.

    Args:
        folder: Run folder.
        label: What errors put before a stage's name.

    Raises:
        UserError: evaluate.json or a file of scores is missing or damaged.
    """
    path = folder / "evaluate.json"
    content = read_json(path)
    with damage(path):
        summaries = {stage: {task: dict(entry) for task, entry in tasks.items()} for stage, tasks in content.items()}
    return {
        stage: Stage(
            f"{label}{stage}",
            {task: read_scores(folder / "evaluate" / f"{stage}.{task}.jsonl") for task in summary},
            summary,
        )
        for stage, summary in summaries.items()
    }


def read_result(recipe: Recipe, folder: Path, judges: Any) -> tuple[str, Stage]:
    """A run's result: the name of its stage, and the scores.

    Args:
        recipe: The run's recipe.
        folder: Its folder.
        judges: config.Judges: the exported files or the trained model.

    Raises:
        UserError: it was not scored; the line says what to run.
    """
    name, stages = gate.candidate_stage(recipe.method, judges), read_stages(folder, f"{folder}: ")
    if name not in stages or not stages[name].rows:
        remedy = f"run halfbyte evaluate {folder}"
        if name == "exported":
            remedy += ", or set gate.judges=trained to compare the models in training"
        raise UserError(f"{folder}: stage {name} has no scores (there: {', '.join(stages) or 'none'}); {remedy}")
    return name, stages[name]


def read_control(recipe: Recipe, folder: Path) -> tuple[Stage, dict[str, Any]]:
    """The BF16 model that gate.control names.

    Args:
        recipe: The recipe that names it.
        folder: gate.control.

    Returns:
        Its scores, and for gate.json: run, and differs (`key = value, here value` for each of SAME_TRAINING).

    Raises:
        UserError: the folder is no run of method bf16, or it was not scored.
    """
    control = read_run(folder)
    if control.method != Method.bf16:
        raise UserError(f"gate.control = {folder}: a run of method {control.method}; give one of method bf16", USAGE)
    _, stage = read_result(control, folder, recipe.gate.judges)
    theirs, ours = dict(leaves(control)), dict(leaves(recipe))
    differs = [f"{key} = {theirs[key]}, here {ours[key]}" for key in SAME_TRAINING if theirs[key] != ours[key]]
    return stage, {"run": str(folder), "differs": differs}
