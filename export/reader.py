"""A second opinion on an exported checkpoint: its files read and decoded with the standard library and numpy alone.

Shares no code with what wrote them (no torch, no safetensors, not training/numerics.py), so that verify compares two
independent implementations of the container and of the number formats.

The container: 8 bytes little-endian length H; H bytes of JSON {name: {dtype, shape, data_offsets: [start, end]}} with
an optional "__metadata__"; then the tensor data, offsets counted from its start.
"""

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.training.errors import UserError

_STORAGE = {"U8": np.uint8, "F8_E4M3": np.uint8, "BF16": np.uint16, "F16": np.float16, "F32": np.float32}
"""Safetensors dtype -> numpy dtype of the stored bits; E4M3 and BF16 have no numpy type of their own."""

MOST_LAYERS = 10_000
"""Far beyond any model: a damaged number must not become a list of that length."""
MOST_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library: a header is read as a whole."""

# E2M1: bit 3 sign, bits 2-1 exponent (bias 1), bit 0 mantissa.
E2M1 = np.array(
    [s * (m / 2 if e == 0 else (1 + m / 2) * 2 ** (e - 1)) for s in (1, -1) for e in range(4) for m in range(2)],
    np.float32,
)
_PAIRS = np.array([[E2M1[byte & 15], E2M1[byte >> 4]] for byte in range(256)], np.float32)  # low half first
# E4M3 (the "fn" variant): bit 7 sign, bits 6-3 exponent (bias 7), bits 2-0 mantissa; no infinity, S.1111.111 is NaN.
E4M3 = np.array(
    [
        s * (m / 8 * 2**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7))
        for s in (1, -1)
        for e in range(16)
        for m in range(8)
    ],
    np.float32,
)
E4M3[[0x7F, 0xFF]] = np.nan
# E8M0: exponent + 127; 255 is NaN. 2^-127 is a subnormal FP32 number.
E8M0 = np.array([2.0 ** (code - 127) for code in range(255)] + [np.nan], np.float32)


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies.

    Attributes:
        file: Safetensors file.
        dtype: Safetensors dtype, e.g. "F8_E4M3".
        shape: Sizes.
        offset: First byte, from the start of the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def stored(entry: Entry) -> np.ndarray:
    """Stored bits, memory-mapped and read-only: the entry's shape, in the numpy dtype of its dtype's bits."""
    if not prod(entry.shape):
        return np.empty(entry.shape, _STORAGE[entry.dtype])
    return np.memmap(entry.file, _STORAGE[entry.dtype], "r", entry.offset, entry.shape)


class Checkpoint:
    """An exported checkpoint; tensors are read from the files when asked for. Made by open_checkpoint."""

    def __init__(self, folder: Path, config: dict[str, Any], entries: dict[str, Entry]):
        self.folder, self.config, self.entries = folder, config, entries

    def names(self) -> list[str]:
        """Tensor names, sorted."""
        return sorted(self.entries)

    def raw(self, name: str) -> np.ndarray:
        """Stored bits of a tensor, memory-mapped and read-only.

        Returns:
            Its shape; uint8 for U8 and F8_E4M3, uint16 for BF16, else the numpy dtype of the same name.

        Raises:
            UserError: No such tensor.
        """
        if name not in self.entries:
            raise UserError(f"{self.folder}: no tensor {name}; export again")
        return stored(self.entries[name])

    def quantized_modules(self) -> list[str]:
        """Modules that have a weight_scale, sorted."""
        return [name.removesuffix(".weight_scale") for name in self.names() if name.endswith(".weight_scale")]

    def decode(self, module: str) -> np.ndarray:
        """Weight of a module (model.layers.0.mlp.up_proj; also a norm or the embedding) as a server computes with it.

        Returns:
            float32, the weight's shape ([N, K] for a linear).

        Raises:
            UserError: Tensors of the module are missing, or their dtypes or shapes do not belong together.
        """
        if f"{module}.weight_packed" in self.entries:
            return self._decode_mxfp4(module)
        if f"{module}.weight_scale" in self.entries:
            is_fp8 = f"{module}.weight" in self.entries and self.entries[f"{module}.weight"].dtype == "F8_E4M3"
            return self._decode_fp8(module) if is_fp8 else self._decode_nvfp4(module)
        return self.decode_dense(f"{module}.weight")

    def decode_dense(self, name: str) -> np.ndarray:
        """An unquantized tensor as float32."""
        bits = self.raw(name)
        if self.entries[name].dtype == "BF16":
            return (bits.astype(np.uint32) << 16).view(np.float32)
        if self.entries[name].dtype in ("U8", "F8_E4M3"):
            raise UserError(f"{self.entries[name].file}: {name} holds codes but has no weight_scale; export again")
        return bits.astype(np.float32)

    def _decode_nvfp4(self, module: str) -> np.ndarray:
        weight, scale, scale_2 = f"{module}.weight", f"{module}.weight_scale", f"{module}.weight_scale_2"
        codes, scale_codes, second = self.raw(weight), self.raw(scale), self.raw(scale_2)
        self._expect({weight: "U8", scale: "F8_E4M3", scale_2: "F32"})
        self._expect_blocks(weight, scale, blocks=(16, 32))
        return _blocks(codes, E4M3[scale_codes] * self._one(scale_2, second))

    def _decode_fp8(self, module: str) -> np.ndarray:
        weight, scale = f"{module}.weight", f"{module}.weight_scale"
        codes, per_tensor = self.raw(weight), self.raw(scale)
        self._expect({weight: "F8_E4M3", scale: "F32"})
        return E4M3[codes] * self._one(scale, per_tensor)

    def _decode_mxfp4(self, module: str) -> np.ndarray:
        weight, scale = f"{module}.weight_packed", f"{module}.weight_scale"
        codes, scale_codes = self.raw(weight), self.raw(scale)
        self._expect({weight: "U8", scale: "U8"})
        self._expect_blocks(weight, scale, blocks=(32,))
        return _blocks(codes, E8M0[scale_codes])

    def _one(self, name: str, value: np.ndarray) -> np.ndarray:
        """The only element of a scale per tensor."""
        if value.size != 1:
            raise UserError(f"{self.entries[name].file}: {name} has shape {value.shape}, not []; export again")
        return value.reshape(())

    def _expect(self, dtypes: dict[str, str]) -> None:
        for name, dtype in dtypes.items():
            entry = self.entries[name]
            if entry.dtype != dtype:
                raise UserError(f"{entry.file}: {name} is {entry.dtype}, not {dtype}; export again")

    def _expect_blocks(self, weight: str, scale: str, *, blocks: tuple[int, ...]) -> None:
        """The codes are [N, K/2] and the scales [N, K/block] for one of the blocks."""
        entry, shape = self.entries[weight], self.entries[scale].shape
        if len(entry.shape) != 2 or (2 * entry.shape[1]) % blocks[0]:
            raise UserError(
                f"{entry.file}: {weight} has shape {list(entry.shape)}, not [N, K/2] with K % {blocks[0]} = 0"
            )
        expected = [(entry.shape[0], 2 * entry.shape[1] // block) for block in blocks]
        if shape not in expected:
            wanted = " or ".join(str(list(size)) for size in expected)
            raise UserError(f"{entry.file}: {scale} has shape {list(shape)}, not {wanted}; export again")


def _blocks(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """E2M1 codes [N, K/2] times block scales [N, G] -> float32 [N, K]."""
    values = _PAIRS[codes].reshape(*scale.shape, -1)
    values *= scale[..., None]
    return values.reshape(len(codes), -1)


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Read config.json and every safetensors header; tensor data stays on disk.

    Args:
        folder: An exported checkpoint, one file or sharded with an index.

    Raises:
        UserError: No checkpoint there, a damaged or truncated file, an index that does not fit the files.
    """
    folder = Path(folder)
    config = _read_json(folder / "config.json")
    layers = config.get("num_hidden_layers", 0)
    if not isinstance(layers, int) or not 0 <= layers <= MOST_LAYERS:
        raise UserError(f"{folder / 'config.json'}: num_hidden_layers = {layers}: no number of layers; export again")
    index_path = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no *.safetensors there; export first (halfbyte export RUN_DIR)")
    if len(files) > 1 and not index_path.exists():
        raise UserError(f"{index_path}: missing beside {len(files)} safetensors files; export again")
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in entries:
                raise UserError(f"{file}: {name} is also in {entries[name].file.name}; export again")
            entries[name] = entry
    if index_path.exists():
        _check_index(index_path, entries)
    return Checkpoint(folder, config, entries)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); export again (halfbyte export RUN_DIR)") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); export again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; export again")
    return content


def read_header(file: Path) -> dict[str, Entry]:
    """Entries of one safetensors file, checked: known dtypes, sizes that fit, no gap and no overlap.

    Raises:
        UserError: it is not a whole safetensors file.
    """
    try:
        total = file.stat().st_size
        stream = file.open("rb")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); export again") from error
    with stream:
        length = struct.unpack("<Q", stream.read(8))[0] if total >= 8 else 0
        if not 2 <= length <= min(total - 8, MOST_HEADER_BYTES):
            raise UserError(f"{file}: damaged: no safetensors header in its {total} bytes; export again")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            fields = [(n, t["dtype"], tuple(t["shape"]), *t["data_offsets"]) for n, t in header.items()]
            if not all(
                isinstance(number, int) and number >= 0 for field in fields for number in (*field[2], *field[3:])
            ):
                raise ValueError("sizes and offsets must be whole numbers")
            fields.sort(key=lambda field: field[3:])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"{file}: damaged safetensors header ({error!r}); export again") from error
    entries, position = {}, 0
    for name, dtype, shape, start, end in fields:
        if dtype not in _STORAGE:
            raise UserError(f"{file}: {name} has dtype {dtype}, which no FP4 checkpoint holds; export again")
        if start != position or end - start != prod(shape) * np.dtype(_STORAGE[dtype]).itemsize:
            raise UserError(f"{file}: {name}: bytes {start}..{end} do not fit {dtype} {list(shape)}; export again")
        entries[name] = Entry(file, dtype, shape, 8 + length + start)
        position = end
    if position != total - 8 - length:
        raise UserError(
            f"{file}: {total - 8 - length} bytes of data where {position} belong (truncated?); export again"
        )
    return entries


def _check_index(index_path: Path, entries: dict[str, Entry]) -> None:
    """The index names every tensor, and in the right file."""
    weight_map = _read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index_path}: no weight_map; export again")
    for name, file_name in weight_map.items():
        if not (index_path.parent / str(file_name)).exists():
            raise UserError(f"{index_path}: {name} should be in {file_name}, which is missing; export again")
        if name not in entries or entries[name].file.name != file_name:
            raise UserError(f"{index_path}: {name} is not in {file_name}; export again")
    for name in entries.keys() - weight_map.keys():
        raise UserError(f"{index_path}: {name} of {entries[name].file.name} is not in the index; export again")
