"""The formats of the key/value cache, by the names of recipes, and of their scales in a checkpoint. Torch-free."""

from enum import StrEnum


class KVCache(StrEnum):
    """How keys and values are stored for later tokens; the arithmetic is kv_cache.py's."""

    none = "none"
    """As computed."""
    fp8 = "fp8"
    """E4M3 elements, one FP32 scale per layer for keys and one for values."""
    nvfp4 = "nvfp4"
    """E2M1 elements, blocks of 16 along a head's elements with an E4M3 scale, and the same two scales."""


BLOCK = 16
"""Elements of a head that share a block scale in nvfp4."""

SCALES = {"key": ("self_attn.k_proj", "k_scale"), "value": ("self_attn.v_proj", "v_scale")}
"""What is rounded -> linear inside a layer and suffix of its scale beside it, where serving runtimes look for it."""
