"""A teacher's logits on disk: the k likeliest tokens of every window that training will see, and the rest as one.

A folder holds teacher.json (what the files were made from, and which windows) and one safetensors file per group of
windows. Windows are known by their number in the packed corpus, so any layout, any order and a resumed run find theirs.
Shapes: W windows of a file, L sequence length, k tokens.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from halfbyte.training.config import Recipe
from halfbyte.training.config_distill import TEACHER_INDEX
from halfbyte.training.corpus import PackedDataset
from halfbyte.training.data import step_windows, window_batch
from halfbyte.training.errors import UserError
from halfbyte.training.files import damage, read_json, write_json
from halfbyte.training.model_identity import TOKENIZER, file_hashes, joined
from halfbyte.training.model_identity import fingerprint as model_fingerprint
from halfbyte.training.passes import GROUP
from halfbyte.training.schedule import collect
from halfbyte.training.topk import TopK, top_k

FILE_BYTES = 1 << 28
"""About the size of one file; a stopped `halfbyte teacher` loses at most one per replica."""


DTYPE = "train.dtype"
"""In teacher.json: the type that the logits were computed in. Folders of earlier versions lack it."""


def fingerprint(recipe: Recipe, data: PackedDataset, dtype: torch.dtype) -> dict[str, Any]:
    """What a teacher's logits depend on, apart from the window's number.

    Args:
        recipe: model.path, model.reference (the teacher, where it is given), distill.top_k and distill.temperature
            count.
        data: The packed training text; its tokens, borders of documents and length count.
        dtype: What train.dtype stands for in this process.

    Raises:
        UserError: a weight file is damaged.
    """
    windows = hashlib.sha256(np.ascontiguousarray(data.tokens))
    if data.isolate_documents:
        windows.update(np.ascontiguousarray(data.segments))
    student, teacher = (Path(path) for path in (recipe.model.path, recipe.model.reference or recipe.model.path))
    return {
        "sequence length": data.sequence_length,
        "tokenizer": joined(file_hashes(student, TOKENIZER)),
        "model": joined(model_fingerprint(teacher, ("config.json",))),
        "data": windows.hexdigest(),
        "distill.temperature": recipe.distill.temperature,
        "distill.top_k": recipe.distill.top_k,
        DTYPE: str(dtype).removeprefix("torch."),
    }


def needed_windows(recipe: Recipe, data: PackedDataset) -> list[int]:
    """Numbers of the windows that train.steps steps visit, each once, in ascending order."""
    train = recipe.train
    if train.steps * train.global_batch >= len(data):
        return list(range(len(data)))  # an epoch visits all
    visited: set[int] = set()
    for step in range(train.steps):
        visited.update(step_windows(data, step, global_batch=train.global_batch, seed=train.seed))
    return sorted(visited)


def windows_per_file(length: int, k: int) -> int:
    """How many windows of BF16 values, int32 indices and FP32 tails make a file of about FILE_BYTES."""
    return max(1, FILE_BYTES // (length * (6 * k + 4)))


def begin(folder: Path, made_from: dict[str, Any], windows: Sequence[int]) -> list[list[int]]:
    """Start or go on with a folder; on one rank.

    Returns:
        The windows of every file, in order.

    Raises:
        UserError: the folder holds the logits of another teacher or other windows, or cannot be written.
    """
    size = windows_per_file(made_from["sequence length"], made_from["distill.top_k"])
    groups = [list(windows[start : start + size]) for start in range(0, len(windows), size)]
    content = {"made from": made_from, "files": groups}
    index = folder / TEACHER_INDEX
    if index.exists():
        there = read_json(index)
        with damage(index):
            there["made from"].setdefault(DTYPE, made_from[DTYPE])
        if there != content:
            raise UserError(f"{folder}: holds the logits of another teacher or of other windows; choose another folder")
    else:
        write_json(index, content)
    return groups


def file_name(number: int) -> str:
    """Name of the n-th file of a folder."""
    return f"windows_{number:06d}.safetensors"


def ask(
    teacher: torch.nn.Module, recipe: Recipe, data: PackedDataset, windows: Sequence[int], device: torch.device
) -> TopK | None:
    """Let the teacher read some windows; collective over the tensor- and pipeline-parallel ranks of a replica.

    Args:
        teacher: This rank's GPTModel.
        recipe: distill.top_k, distill.temperature and evaluate.tokens_per_batch count.
        data: The packed training text.
        windows: Numbers of W windows.
        device: Where the teacher is.

    Returns:
        Values [W, L, k] and the rest, on the CPU, on all ranks of the last pipeline stage; None elsewhere.
    """
    distill, group = recipe.distill, parallel_state.get_tensor_model_parallel_group()
    assert distill.top_k is not None  # the command has checked it
    k = distill.top_k
    rows = min(len(windows), max(1, recipe.evaluate.tokens_per_batch // data.sequence_length))
    padded = [*windows, *[windows[-1]] * (-len(windows) % rows)]  # a pipeline wants batches of one size
    batches = [window_batch(data, padded[start : start + rows]).to(device) for start in range(0, len(padded), rows)]
    said: list[TopK] = []
    for start in range(0, len(batches), GROUP):
        part = batches[start : start + GROUP]
        said += collect(teacher, part, lambda logits, index: top_k(logits, k, distill.temperature, group))
    if not said:
        return None
    columns = zip(*((part.values, part.indices, part.tail) for part in said), strict=True)
    return TopK(*(torch.cat(column)[: len(windows)].cpu() for column in columns))


def write_file(folder: Path, number: int, said: TopK) -> None:
    """Write one file, complete or not at all.

    Args:
        folder: From `begin`.
        number: Place of the file.
        said: From `ask` about its windows.

    Raises:
        UserError: the disk is full or the folder not writable.
    """
    path = folder / file_name(number)
    temporary = path.with_name(f".{path.name}.tmp")
    tensors = {"values": said.values, "indices": said.indices, "tail": said.tail}
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({error}); free space or choose another folder") from error


class TeacherFiles:
    """The logits of a folder by window; a file is mapped when first needed, and only what is asked for is read.

    Args:
        folder: distill.teacher.
        made_from: The run's own `fingerprint`.
        windows: The windows that training will ask for.

    Attributes:
        note: One line if the logits were computed in another type than this run's; None if not, or if nobody noted it.

    Raises:
        UserError: another teacher, data, tokenizer or setting, missing windows, or a folder that is not complete.
    """

    def __init__(self, folder: Path, made_from: dict[str, Any], windows: Sequence[int]):
        self.folder = folder
        content = read_json(folder / TEACHER_INDEX)
        with damage(folder / TEACHER_INDEX):
            there: dict[str, Any] = content["made from"]
            groups: list[list[int]] = content["files"]
            self._place = {w: (n, row) for n, group in enumerate(groups) for row, w in enumerate(group)}
            differing = [name for name, value in made_from.items() if name != DTYPE and there[name] != value]
            made_in = there.get(DTYPE, made_from[DTYPE])
        if differing:
            name = differing[0]
            shown = f"{there[name]}, this run has {made_from[name]}"
            raise UserError(
                f"distill.teacher = {folder}: made from another {name} ({shown}); make it again: halfbyte teacher"
            )
        self.note = None
        if made_in != made_from[DTYPE]:
            reason = f"its logits were computed in {made_in}, this run computes in {made_from[DTYPE]}"
            self.note = (
                f"distill.teacher = {folder}: {reason}; halfbyte teacher with this run's train.dtype makes its own"
            )
        missing = [w for w in windows if w not in self._place]
        if missing:
            raise UserError(
                f"distill.teacher = {folder}: lacks {len(missing)} of {len(windows)} windows that train.steps visits; "
                "run halfbyte teacher with the steps, batch and seed of this run"
            )
        absent = [number for number in range(len(groups)) if not (folder / file_name(number)).is_file()]
        if absent:
            raise UserError(
                f"distill.teacher = {folder}: {len(absent)} of {len(groups)} files are missing, "
                f"{file_name(absent[0])} first; halfbyte teacher goes on where it stopped"
            )
        self._open: dict[int, Any] = {}

    def read(self, windows: Sequence[int], device: torch.device) -> TopK:
        """What the teacher said about some windows: values [len(windows), L, k], on `device`.

        Raises:
            UserError: a file is damaged.
        """
        rows = [self._row(*self._place[window]) for window in windows]
        values, indices, tail = (torch.stack(parts).to(device) for parts in zip(*rows, strict=True))
        return TopK(values, indices, tail)

    def _row(self, number: int, row: int) -> tuple[torch.Tensor, ...]:
        path = self.folder / file_name(number)
        try:
            if number not in self._open:
                self._open[number] = safe_open(path, framework="pt")  # mapped for the whole training
            file = self._open[number]
            return tuple(file.get_slice(name)[row] for name in ("values", "indices", "tail"))
        except (SafetensorError, OSError, IndexError) as error:
            raise UserError(f"{path}: damaged ({error}); delete it and run halfbyte teacher again") from error
