"""What a model path holds: plain weights, quantized ones, or plain ones with the quantizers of a run. Torch-free."""

import json
from pathlib import Path

from halfbyte.training.nemo_archive import is_archive

QUANTIZERS = "quantizers.json"
"""Of a .nemo archive, and of the directory that one is unpacked into: the quantizers of the weights beside it."""
MODEL_RECORD = "model.json"
"""Of a run folder: fingerprints of the models that the run began with (model_identity.py)."""
UNPACKED = "unpacked"
"""Of a run folder: where a .nemo archive at model.path is unpacked."""
READABLE = ("modelopt", "compressed-tensors")
"""`quant_method` of the layouts that export/source.py reads."""


def is_quantized(model_dir: Path) -> bool:
    """Whether a directory's configs say that its weights are packed in a layout that can be read here.

    A `quantization_config` of another kind (a conversion's remark about its GGUF, say) does not count: the check of the
    tensors' shapes tells packed weights that nothing here can read.
    """
    if (model_dir / "hf_quant_config.json").is_file():
        return True
    try:
        config = json.loads((model_dir / "config.json").read_bytes())
    except (OSError, ValueError):
        return False  # reported by read_shape
    section = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(section, dict) and section.get("quant_method") in READABLE


def has_quantizers(model_path: Path) -> bool:
    """Whether a model path is a .nemo archive, or one that was unpacked."""
    return is_archive(model_path) or (model_path / QUANTIZERS).is_file()


def brings_formats(model_path: Path) -> bool:
    """Whether the formats of its linears come with the model, in place of the recipe's section `quantize`."""
    return has_quantizers(model_path) or is_quantized(model_path)
