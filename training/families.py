"""The model families that training/model.py can build, and what tells them apart. Torch-free.

All are pre-norm decoders with RMSNorm, rotary embedding, grouped-query attention and SwiGLU. The differences are those
of the families' model classes in transformers, whose config.json is the input.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def _no_window(config: dict[str, Any]) -> int | None:
    return None


def _window(config: dict[str, Any]) -> int | None:
    return config.get("sliding_window")


def _switched_window(config: dict[str, Any]) -> int | None:
    """Qwen's files carry a window that `use_sliding_window` switches on, and only from one layer on."""
    if not config.get("use_sliding_window", False):
        return None
    if config.get("layer_types") is not None:
        slides = "sliding_attention" in config["layer_types"]
    else:
        slides = config.get("max_window_layers", 28) < config["num_hidden_layers"]  # 28: transformers' default
    return _window(config) if slides else None


@dataclass(frozen=True)
class Family:
    """What a family has beyond Llama, or reads otherwise from config.json.

    Attributes:
        qkv_bias: The q, k and v projections have a bias; no other linear ever does.
        qk_norm: RMSNorm over every head of q and k, before the rotation.
        required: Keys of config.json that have no default here, because this family's differs from Llama's.
        window: config.json -> tokens that attention looks back at most, in some layer; None where nothing ends it.
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    required: tuple[str, ...] = ()
    window: Callable[[dict[str, Any]], int | None] = _no_window


FAMILIES = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(required=("num_key_value_heads",), window=_window),
    "Qwen2ForCausalLM": Family(qkv_bias=True, required=("num_key_value_heads",), window=_switched_window),
    "Qwen3ForCausalLM": Family(qk_norm=True, required=("num_key_value_heads", "head_dim"), window=_switched_window),
}
"""`architectures[0]` of config.json -> family. Qwen2.5 models say Qwen2ForCausalLM."""

TINY = {
    "tiny": {},
    "tiny_mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
    "tiny_qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True},
    "tiny_qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 48},
}
"""What `halfbyte fetch` makes with random weights -> how its config.json differs from recipes/shapes/tiny.json."""
