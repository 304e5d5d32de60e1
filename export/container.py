"""Safetensors files written tensor by tensor: memory holds one tensor, however large the file is.

The header comes first in the file and names every tensor's place, so what will be in a file is planned before any of
it is read. Wide elements come first: readers that map the file need every tensor at a multiple of its element's size.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

STORAGE = {"U8": np.uint8, "F8_E4M3": np.uint8, "BF16": np.uint16, "F32": np.float32}
"""Safetensors dtype -> numpy dtype of the bits that are written."""
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written.

    Attributes:
        dtype: Safetensors dtype, a key of STORAGE.
        shape: Sizes.
        read: Gives its bits: numpy, of this shape, in the dtype of STORAGE.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * np.dtype(STORAGE[self.dtype]).itemsize


class TensorFile:
    """One safetensors file of planned tensors, filled in any order; a context manager.

    Raises:
        ValueError: a tensor that was not planned, or is not as planned; on leaving, one that was not written.
    """

    def __init__(self, path: Path, layout: Mapping[str, tuple[str, tuple[int, ...]]]):
        self._layout = dict(layout)
        self._missing = set(layout)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._offset: dict[str, int] = {}
        end = 0
        by_width = sorted(layout.items(), key=lambda item: -np.dtype(STORAGE[item[1][0]]).itemsize)  # stable
        for name, (dtype, shape) in by_width:
            self._offset[name] = end
            end += prod(shape) * np.dtype(STORAGE[dtype]).itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [self._offset[name], end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._put(struct.pack("<Q", len(text)) + text, 0)
        os.truncate(self._file, self._start + end)

    def write(self, name: str, bits: np.ndarray) -> None:
        """Put a tensor into its place.

        Args:
            name: A key of the layout.
            bits: Its bits, in the dtype of STORAGE.
        """
        dtype, shape = self._layout[name]
        if name not in self._missing or bits.shape != shape or bits.dtype != STORAGE[dtype]:
            raise ValueError(f"{name}: {bits.dtype} {list(bits.shape)} is not the {dtype} {list(shape)} still to come")
        self._put(memoryview(np.ascontiguousarray(bits).reshape(-1)).cast("B"), self._start + self._offset[name])
        self._missing.discard(name)

    def _put(self, content: bytes | memoryview, place: int) -> None:
        rest = memoryview(content)
        while rest:
            written = os.pwrite(self._file, rest, place)
            rest, place = rest[written:], place + written

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        os.close(self._file)
        if kind is None and self._missing:
            raise ValueError(f"{min(self._missing)} and {len(self._missing) - 1} more tensors were never written")


def file_names(count: int) -> list[str]:
    """Names of a checkpoint's weight files, as Hugging Face numbers them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def write_file(path: Path, tensors: Mapping[str, Planned]) -> None:
    """Write one file of planned tensors, in their order, each read when its turn comes."""
    with TensorFile(path, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor.read())


def index_of(files: Iterable[tuple[str, Mapping[str, Planned]]]) -> dict[str, Any]:
    """Content of model.safetensors.index.json for files of planned tensors."""
    files = list(files)
    total = sum(tensor.nbytes for _, tensors in files for tensor in tensors.values())
    places = {name: file for file, tensors in files for name in tensors}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
