"""Whether a model directory holds quantized weights. Torch-free."""

import json
from pathlib import Path

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
