"""An exported checkpoint as plain weights again: what a server computes with, in a form that every importer reads.

Only the exported files are read (export/reader.py). The gate scores the model that comes out of this.
"""

from pathlib import Path

import numpy as np

from halfbyte.export.container import Planned, write_shards
from halfbyte.export.folder import disk_errors, replacing, write_plain_json
from halfbyte.export.reader import Checkpoint, open_checkpoint
from halfbyte.training.errors import UserError
from halfbyte.training.model_config import in_both_spellings

SHARD_BYTES = 2_000_000_000
SMALLEST_EXPONENT = -110
"""Of a second-level scale with which every product of E2M1 and E4M3 is a normal number."""


def write_decoded(out: Path, folder: Path) -> dict[str, float]:
    """Decode every tensor of an export into an unquantized Hugging Face directory; one shard in memory.

    Args:
        out: The exported directory.
        folder: Destination: config.json without quantization_config and *.safetensors, each tensor in BF16 if that
            holds all of its values, else in FP32. An existing folder is replaced.

    Returns:
        Tensor name -> value of every scale that is not about weights: input_scale of the linears whose format stores
        one, k_scale and v_scale where the key/value cache is quantized.

    Raises:
        UserError: the export is missing or damaged, or the disk is full.
    """
    checkpoint = open_checkpoint(out)
    with disk_errors(folder), replacing(folder) as partial:
        decode_into(checkpoint, partial)
    kinds = (".input_scale", ".k_scale", ".v_scale")
    return {name: float(checkpoint.raw(name)) for name in checkpoint.names() if name.endswith(kinds)}


def decode_into(checkpoint: Checkpoint, folder: Path) -> None:
    """Write config.json and the decoded weights into an empty folder.

    Args:
        checkpoint: An opened export.
        folder: Gets each tensor in BF16 if that holds all of its values, else in FP32; config.json's dtype is float32
            if any tensor's is.

    Raises:
        UserError: the export is damaged, or a weight decodes to NaN or Inf.
    """
    suffixes = (".weight", ".weight_packed")
    modules = sorted({name.rsplit(".", 1)[0] for name in checkpoint.names() if name.endswith(suffixes)})
    planned = {f"{module}.weight": _weight(checkpoint, module) for module in modules}
    planned |= {name: _bias(checkpoint, name) for name in checkpoint.names() if name.endswith(".bias")}
    write_shards(folder, planned, count=None, limit=SHARD_BYTES)
    dtype = "float32" if any(tensor.dtype == "F32" for tensor in planned.values()) else "bfloat16"
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    write_plain_json(folder / "config.json", in_both_spellings(config, dtype))


def _weight(checkpoint: Checkpoint, module: str) -> Planned:
    """A weight's decoded values: in BF16 where the format says that it holds them all, else in FP32."""
    exact = _fits_bfloat16(checkpoint, module)

    def read() -> np.ndarray:
        values = checkpoint.decode(module)
        if not np.isfinite(values).all():
            raise UserError(f"{checkpoint.folder}: {module} decodes to NaN or Inf; the file is damaged")
        return _upper_halves(checkpoint, module, values) if exact else values

    return Planned("BF16" if exact else "F32", _shape(checkpoint, module), read)


def _fits_bfloat16(checkpoint: Checkpoint, module: str) -> bool:
    """E2M1 times E4M3 has six significant bits, BF16 eight: a power of two more changes nothing. FP8's scale is any."""
    entries = checkpoint.entries
    if f"{module}.weight_scale_2" in entries:
        scale = np.asarray(checkpoint.raw(f"{module}.weight_scale_2"))
        return bool((np.frexp(scale)[0] == 0.5).all() and (scale >= 2.0**SMALLEST_EXPONENT).all())
    return f"{module}.weight_packed" in entries or entries[f"{module}.weight"].dtype == "BF16"


def _shape(checkpoint: Checkpoint, module: str) -> tuple[int, ...]:
    name = f"{module}.weight_packed" if f"{module}.weight_packed" in checkpoint.entries else f"{module}.weight"
    entry = checkpoint.entries[name]
    packed = entry.dtype == "U8" and len(entry.shape) == 2
    return (entry.shape[0], 2 * entry.shape[1]) if packed else entry.shape


def _bias(checkpoint: Checkpoint, name: str) -> Planned:
    def read() -> np.ndarray:
        return _upper_halves(checkpoint, name, checkpoint.decode_dense(name))

    return Planned("BF16", checkpoint.entries[name].shape, read)


def _upper_halves(checkpoint: Checkpoint, name: str, values: np.ndarray) -> np.ndarray:
    """BF16 bits of float32 values that BF16 holds exactly."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    if (bits & 0xFFFF).any():
        raise UserError(f"{checkpoint.folder}: {name} has values that BF16 does not hold; the file is damaged")
    return (bits >> 16).astype(np.uint16)
