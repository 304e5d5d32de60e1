"""Whether a task file of lm-eval can be used, before any process starts: torch-free, and without lm-eval itself."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from halfbyte.training.metrics import METRICS

KINDS = ("loglikelihood", "multiple_choice", "generate_until", "loglikelihood_rolling")
"""What lm-eval has as output_type."""
ROLLING = ("word_perplexity", "byte_perplexity", "bits_per_byte")
"""Metrics of whole texts; we report perplexity per token and bits per byte in their place."""


class _Loader(yaml.SafeLoader):
    """YAML in which `!function module.name` is text."""


_Loader.add_constructor("!function", lambda loader, node: str(node.value))


def task_file_problems(key: str, data: str) -> Iterator[str]:
    """What would stop lm-eval or the gate later.

    Args:
        key: Of the task in the recipe, e.g. `evaluate.tasks.0`.
        data: Path of an existing task file.

    Yields:
        `field = value: what is wrong; remedy`.
    """
    where = f"{key}.data = {data}"
    try:
        content = _read(Path(data), ())
    except OSError as error:
        yield f"{where}: {error.filename} cannot be read ({error.strerror}); give a task file of lm-eval"
        return
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        reason = " ".join(str(error).split())
        yield f"{where}: not a task file of lm-eval ({reason}); give a YAML file"
        return
    yield from (f"{where}: {problem}" for problem in _content_problems(content))


def _content_problems(content: dict[str, Any]) -> Iterator[str]:
    if "group" in content or not isinstance(content.get("task"), str):
        yield "`task` is not one name; groups are not supported, list their tasks in the recipe"
    if "class" in content:
        yield "`class`: tasks in Python are not supported; write output_type, doc_to_text and so on"
    kind = content.get("output_type", "generate_until")
    if kind not in KINDS:
        yield f"output_type = {kind}: unknown; use one of {', '.join(KINDS)}"
        return
    if content.get("unsafe_code"):
        yield "`unsafe_code`: tasks that run generated programs are not supported"
    if any(content.get(name) for name in ("doc_to_image", "doc_to_audio")):
        yield "`doc_to_image` and `doc_to_audio` are not supported; the model reads text"
    filters = content.get("filter_list") or []
    if not isinstance(filters, list) or len(filters) > 1:
        yield "filter_list has more than one pipeline, so a metric has several values; keep one"
    yield from _metric_problems(content.get("metric_list"), kind)


def _metric_problems(listed: Any, kind: str) -> Iterator[str]:
    if listed is None:
        return
    if not isinstance(listed, list) or not all(isinstance(entry, dict) and "metric" in entry for entry in listed):
        yield "metric_list is not a list of {metric: NAME}; write one entry per metric"
        return
    known = ROLLING if kind == "loglikelihood_rolling" else tuple(METRICS)
    for entry in listed:
        if entry["metric"] not in known:
            yield f"metric_list: {entry['metric']}: cannot be judged; use one of {', '.join(known)}"
    if not listed:
        yield "metric_list = []: nothing would be scored; name a metric"


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """A task file with what it includes, as lm-eval merges them."""
    if path in seen:
        raise ValueError(f"{path} includes itself")
    content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no keys")
    includes = content.pop("include", [])
    merged: dict[str, Any] = {}
    for name in includes if isinstance(includes, list) else [includes]:
        merged |= _read(path.parent / str(name), (*seen, path))
    return merged | content
