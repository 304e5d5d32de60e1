"""A task of lm-evaluation-harness from its YAML file, with its data."""

import contextlib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import jinja2
import yaml
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from halfbyte.training.config import Task
from halfbyte.training.crew import Crew
from halfbyte.training.errors import UserError
from halfbyte.training.harness import quiet
from halfbyte.training.metrics import METRICS

BAD_TASK = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, TypeError, ValueError),
    *(jinja2.TemplateError, yaml.YAMLError, datasets.exceptions.DatasetsError),
)
"""What lm-eval and a task's own functions raise on a wrong task file or data set."""


@dataclass(frozen=True)
class LoadedTask:
    """A task with its data.

    Attributes:
        lm: lm-eval's task.
        items: Places of the items in its data set.
        metrics: Names of its metrics, as in metrics.py.
        gold_field: Field of a document with the right answer as text, to be scored in bits per byte where a task
            generates; from `metadata.gold_continuation`.
    """

    lm: ConfigurableTask
    items: range
    metrics: tuple[str, ...]
    gold_field: str | None


def load_task(task: Task, cache: Path) -> LoadedTask:
    """Read a task's YAML and its data set.

    Args:
        task: `data` is the YAML; `first` and `limit` choose items.
        cache: Folder for what the datasets library writes.

    Raises:
        UserError: lm-eval cannot make a task of it, or no items are left.
    """
    path = Path(task.data)
    datasets.disable_progress_bars()
    with blamed(task), quiet():
        config = load_yaml(path) | {"task": task.name}
        if "dataset_path" in config:
            config["dataset_kwargs"] = _local(config.get("dataset_kwargs") or {}, path.parent, cache)
        lm = ConfigurableTask(config=config)
        if lm.config.num_fewshot is None:
            lm.set_config("num_fewshot", 0)
        there = len(lm.eval_docs)
    end = there if task.limit is None else min(there, task.first + task.limit)
    items = range(task.first, end)
    if not items:
        raise UserError(
            f"task {task.name}: no items (first={task.first}, limit={task.limit} of {there} in {path}); lower first "
            "or raise limit"
        )
    names = ("perplexity",) if lm.OUTPUT_TYPE == "loglikelihood_rolling" else tuple(lm._metric_fn_list)
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise UserError(
            f"task {task.name}: {path}: metric {unknown[0]} cannot be judged; use one of {', '.join(METRICS)}"
        )
    return LoadedTask(lm, items, names, (lm.config.metadata or {}).get("gold_continuation"))


def _local(settings: dict[str, Any], folder: Path, cache: Path) -> dict[str, Any]:
    """dataset_kwargs with data_files beside the YAML, and with our cache."""

    def beside(files: Any) -> Any:
        if isinstance(files, dict):
            return {split: beside(part) for split, part in files.items()}
        if isinstance(files, list):
            return [beside(file) for file in files]
        path = folder / files
        if path.is_file() and not path.stat().st_size:
            raise UserError(f"{path}: holds no records; write one JSON object per line")
        return str(path)

    found = {key: beside(value) if key == "data_files" else value for key, value in settings.items()}
    return found | {"cache_dir": str(cache / "datasets")}


@contextlib.contextmanager
def blamed(task: Task, crew: Crew | None = None) -> Iterator[None]:
    """What goes wrong in lm-eval or the task's functions becomes one line; a failing pass is not the task's fault.

    Raises:
        UserError: Instead of BAD_TASK.
    """
    try:
        yield
    except BAD_TASK as error:
        if crew is not None and crew.working:
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        line = (str(error).strip().splitlines() or ["no message"])[0]
        raise UserError(
            f"task {task.name}: {task.data}: lm-eval stopped ({type(error).__name__}: {line}, at "
            f"{Path(frame.filename).name}:{frame.lineno}); fix the task file or its data"
        ) from error
