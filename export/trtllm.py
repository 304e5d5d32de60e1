"""NVFP4 as a TensorRT-LLM checkpoint directory, the input of `trtllm-build` up to TensorRT-LLM 1.2.1.

    config.json             sizes, quantization, mapping
    rank<R>.safetensors     the part of tensor-parallel rank R of the engine

Per layer, from the Hugging Face names (N = out, K = in; every rank has a part of the axis in brackets):

    attention.qkv [N]   q_proj, k_proj, v_proj, one below the other       mlp.fc [N]     gate_proj
    attention.dense [K] o_proj                                            mlp.gate [N]   up_proj
                                                                          mlp.proj [K]   down_proj

Each of these has weight (uint8 [N, K/2]), weights_scaling_factor (E4M3 [N, K/16], not swizzled: the builder does that),
weights_scaling_factor_2 and activation_scaling_factor (float32 []), bit for bit those of the source. An FP8 cache adds
k_cache_scaling_factor, v_cache_scaling_factor and kv_cache_scaling_factor, their maximum (float32 [1]).
"""

from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np

from halfbyte.export.container import Planned
from halfbyte.export.reader import Checkpoint, Entry
from halfbyte.export.source import cache_of
from halfbyte.training.errors import UserError
from halfbyte.training.kv_format import KVCache
from halfbyte.training.shape import read_shape

ARCHITECTURE = "LlamaForCausalLM"
BLOCK = 16
LINEARS = {
    "attention.qkv": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), 0),
    "attention.dense": (("self_attn.o_proj",), 1),
    "mlp.fc": (("mlp.gate_proj",), 0),
    "mlp.gate": (("mlp.up_proj",), 0),
    "mlp.proj": (("mlp.down_proj",), 1),
}
"""TensorRT-LLM linear -> the Hugging Face linears in it, and the axis of [N, K] that ranks share."""
SPLIT = {"weight": "weight", "weights_scaling_factor": "weight_scale"}
SCALARS = {"weights_scaling_factor_2": "weight_scale_2", "activation_scaling_factor": "input_scale"}
NORMS = ("input_layernorm", "post_attention_layernorm")


def tensors(checkpoint: Checkpoint, rank: int, ranks: int) -> dict[str, Planned]:
    """Every tensor of one rank's file, by its name there."""

    def part(sources: Sequence[str], axis: int | None = None) -> Planned:
        return _part(checkpoint, sources, axis, rank, ranks)

    embedding = "model.embed_tokens.weight"
    head = "lm_head.weight" if "lm_head.weight" in checkpoint.entries else embedding  # a tied one is written out
    planned = {"transformer.vocab_embedding.weight": part([embedding], 0)}
    for layer in range(checkpoint.config["num_hidden_layers"]):
        ours, theirs = f"transformer.layers.{layer}.", f"model.layers.{layer}."
        for norm in NORMS:
            planned[f"{ours}{norm}.weight"] = part([f"{theirs}{norm}.weight"])
        for name, (members, axis) in LINEARS.items():
            for target, suffix in SPLIT.items():
                planned[f"{ours}{name}.{target}"] = part([f"{theirs}{m}.{suffix}" for m in members], axis)
            for target, suffix in SCALARS.items():  # the same in all members
                planned[f"{ours}{name}.{target}"] = part([f"{theirs}{members[0]}.{suffix}"])
        planned |= {f"{ours}attention.{name}": scale for name, scale in _cache(checkpoint, theirs).items()}
    planned["transformer.ln_f.weight"] = part(["model.norm.weight"])
    planned["lm_head.weight"] = part([head], 0)
    return planned


def _cache(checkpoint: Checkpoint, layer: str) -> dict[str, Planned]:
    """Scales of an FP8 key/value cache, as trained: ModelOpt's own writer raises those below 1 to 1."""
    if cache_of(checkpoint) is KVCache.none:
        return {}
    names = [f"{layer}self_attn.k_proj.k_scale", f"{layer}self_attn.v_proj.v_scale"]

    def larger() -> np.ndarray:
        return np.maximum(*(checkpoint.raw(name).reshape(1) for name in names))

    def of(name: str) -> Planned:
        return Planned("F32", (1,), lambda: checkpoint.raw(name).reshape(1))

    return {
        "kv_cache_scaling_factor": Planned("F32", (1,), larger),
        "k_cache_scaling_factor": of(names[0]),
        "v_cache_scaling_factor": of(names[1]),
    }


def _part(checkpoint: Checkpoint, sources: Sequence[str], axis: int | None, rank: int, ranks: int) -> Planned:
    """This rank's part of each source along `axis` (all of it without one), joined along the first axis."""
    entries = [_entry(checkpoint, name) for name in sources]
    shape = list(entries[0].shape)
    if axis is not None:
        shape[axis] //= ranks
    if len(entries) > 1:
        shape[0] = sum(entry.shape[0] for entry in entries) // ranks

    def read() -> np.ndarray:
        parts = [checkpoint.raw(name) for name in sources]
        if axis is not None:
            parts = [np.split(bits, ranks, axis)[rank] for bits in parts]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    return Planned(entries[0].dtype, tuple(shape), read)


def _entry(checkpoint: Checkpoint, name: str) -> Entry:
    if name not in checkpoint.entries:
        raise UserError(f"{checkpoint.folder}: no tensor {name}; export again")
    return checkpoint.entries[name]


def config(checkpoint: Checkpoint, ranks: int) -> dict[str, Any]:
    """Content of config.json."""
    shape, source = read_shape(checkpoint.folder / "config.json"), checkpoint.config
    rope = source.get("rope_parameters") or source.get("rope_scaling") or {}
    scaled = shape.rope_scaling_factor is not None
    return {
        # the builder knows this producer by name; the version is the one whose layout this is
        "producer": {"name": "modelopt", "version": metadata.version("nvidia-modelopt")},
        "architecture": ARCHITECTURE,
        "dtype": "bfloat16",
        "logits_dtype": "float32",
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "head_size": shape.head_dim,
        "norm_epsilon": shape.norm_eps,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.max_positions,
        "hidden_act": "silu",
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": shape.rope_theta,
        "rotary_scaling": {key: value for key, value in rope.items() if key != "rope_theta"} if scaled else None,
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "share_embedding_table": False,
        "mapping": {"world_size": ranks, "tp_size": ranks, "pp_size": 1},
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": "FP8" if cache_of(checkpoint) is KVCache.fp8 else None,
            "group_size": BLOCK,
            "exclude_modules": ["lm_head"],
        },
    }
