"""Safetensors files written tensor by tensor: memory holds one tensor, however large the file is.

The header comes first in the file and names every tensor's place, so what will be in a file is planned before any of
it is read. Wide elements come first: readers that map the file need every tensor at a multiple of its element's size.
"""

import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from halfbyte.export.folder import write_plain_json

STORAGE = {"U8": np.uint8, "F8_E4M3": np.uint8, "BF16": np.uint16, "F32": np.float32, "F64": np.float64}
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
        ValueError: a tensor that was not planned, or is not as planned; on closing, one that was not written.
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
        self._closed = False
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._put(struct.pack("<Q", len(text)) + text, 0)
        os.truncate(self._file, self._start + end)

    @property
    def full(self) -> bool:
        """Whether every tensor was written."""
        return not self._missing

    def check(self, name: str, bits: np.ndarray) -> None:
        """Raise ValueError unless these are the bits of a tensor that is still to come; see write."""
        if name not in self._layout:
            raise ValueError(f"{name}: not one of the tensors planned for this file")
        dtype, shape = self._layout[name]
        if name not in self._missing or bits.shape != shape or bits.dtype != STORAGE[dtype]:
            raise ValueError(f"{name}: {bits.dtype} {list(bits.shape)} is not the {dtype} {list(shape)} still to come")

    def write(self, name: str, bits: np.ndarray) -> None:
        """Put a tensor into its place.

        Args:
            name: A key of the layout.
            bits: Its bits, in the dtype of STORAGE.
        """
        self.check(name, bits)
        self._put(memoryview(np.ascontiguousarray(bits).reshape(-1)).cast("B"), self._start + self._offset[name])
        self._missing.discard(name)

    def close(self) -> None:
        """Flush to disk and close."""
        if self._missing:
            raise ValueError(f"{min(self._missing)} and {len(self._missing) - 1} more tensors were never written")
        os.fsync(self._file)
        self.abandon()

    def abandon(self) -> None:
        """Close as it is."""
        if not self._closed:
            self._closed = True
            os.close(self._file)

    def _put(self, content: bytes | memoryview, place: int) -> None:
        rest = memoryview(content)
        while rest:
            written = os.pwrite(self._file, rest, place)
            rest, place = rest[written:], place + written

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.abandon()


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


def write_shards(folder: Path, tensors: Mapping[str, Planned], *, count: int | None, limit: int) -> None:
    """Write planned tensors into as many files as `share_out` says, and the index where that is more than one."""
    groups = share_out({name: tensor.nbytes for name, tensor in tensors.items()}, count=count, limit=limit)
    names = file_names(len(groups))
    for file, group in zip(names, groups, strict=True):
        write_file(folder / file, {name: tensors[name] for name in group})
    if len(names) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_index(folder, {name: file for file, group in zip(names, groups, strict=True) for name in group}, total)


def write_index(folder: Path, places: Mapping[str, str], total: int) -> None:
    """Write model.safetensors.index.json.

    Args:
        folder: The checkpoint.
        places: Tensor -> name of its file.
        total: Bytes of all tensors.
    """
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_plain_json(folder / INDEX, content)


def share_out(sizes: Mapping[str, int], *, count: int | None, limit: int) -> list[list[str]]:
    """Names in order, cut into files.

    Args:
        sizes: Name -> bytes.
        count: Number of files, of about the same size where names allow it; at most one per name. None cuts by `limit`.
        limit: Most bytes of a file; a name that is larger gets its own.
    """
    if count is not None:
        groups: list[list[str]] = []
        wanted, total, filled = min(count, len(sizes)), max(sum(sizes.values()), 1), 0
        for place, (name, size) in enumerate(sizes.items()):
            short = len(sizes) - place <= wanted - len(groups)  # every name left has to begin a file
            if not groups or short or filled * wanted >= len(groups) * total:
                groups.append([])
            groups[-1].append(name)
            filled += size
        return groups
    files: list[list[str]] = []
    filled = limit
    for name, size in sizes.items():
        if not files or filled + size > limit:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    return files
