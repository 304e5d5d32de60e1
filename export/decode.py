"""An exported checkpoint as plain weights again: what a server computes with, in a form that every importer reads.

Only the exported files are read (export/reader.py). The gate scores the model that comes out of this.
"""

import json
from pathlib import Path

import numpy as np
import torch

from halfbyte.export.folder import disk_errors, replacing
from halfbyte.export.hf import Shards
from halfbyte.export.reader import Checkpoint, open_checkpoint
from halfbyte.training.errors import UserError

SHARD_BYTES = 2_000_000_000


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
    shards, dtype = Shards(folder, limit=SHARD_BYTES), "bfloat16"
    for module in modules:
        values = torch.from_numpy(np.ascontiguousarray(checkpoint.decode(module)))
        if not torch.isfinite(values).all():
            raise UserError(f"{checkpoint.folder}: {module} decodes to NaN or Inf; the file is damaged")
        rounded = values.to(torch.bfloat16)
        exact = torch.equal(rounded.float(), values)
        shards.add({f"{module}.weight": rounded if exact else values})
        dtype = dtype if exact else "float32"
        if f"{module}.bias" in checkpoint.entries:
            shards.add({f"{module}.bias": torch.from_numpy(checkpoint.decode_dense(f"{module}.bias")).bfloat16()})
    shards.finish()
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    config |= {"dtype": dtype, "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
