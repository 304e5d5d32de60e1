"""What a pickle in a checkpoint may name: torch reads a sharded checkpoint's index with a plain pickle.load.

Everything else in a checkpoint is loaded with `weights_only=True` (torch's shards, Megatron's plain values), and the
BF16 weights come from safetensors. The index is therefore read once more beforehand, by an unpickler that knows the
index's own classes and nothing that does anything.
"""

import importlib
import pickle
from pathlib import Path
from typing import Any

import torch

INDEX = ".metadata"
CLASSES = ("torch.distributed.checkpoint.metadata",)
"""Modules whose own classes may be made: plain data."""
NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),  # a look-up in a table
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
}


def check_index(checkpoint: Path) -> None:
    """Read a checkpoint's index without running anything that it names.

    Raises:
        OSError, EOFError, pickle.UnpicklingError: it cannot be read, or names something that no index needs.
    """
    with (checkpoint / INDEX).open("rb") as file:
        _Unpickler(file).load()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if not _harmless(module, name):
            raise pickle.UnpicklingError(f"{INDEX} names {module}.{name}: not a checkpoint that torch wrote")
        return super().find_class(module, name)


def _harmless(module: str, name: str) -> bool:
    """Whether a name is data. A dotted name would walk through what a module has imported."""
    if not name.isidentifier():
        return False
    if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
        return True
    if module in CLASSES:
        found = vars(importlib.import_module(module)).get(name)
        return isinstance(found, type) and found.__module__ == module
    return (module, name) in NAMES
