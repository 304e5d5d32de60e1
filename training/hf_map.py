"""How a model's tensors are named and fused: Hugging Face on one side, Megatron-Core on the other."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from halfbyte.training.shape import ModelShape, layer_norms, linear_sizes


@dataclass(frozen=True)
class HFWeight:
    """One tensor of the trained model in Hugging Face naming, complete (not a shard).

    Attributes:
        name: Tensor name, e.g. `model.layers.0.mlp.up_proj.weight`.
        tensor: The training-time parameter, any float dtype; [N, K] for a linear (N = out, K = in).
        quantized: Whether the training-time model fake-quantizes it.
        weight_amax: FP32 [] calibrated absolute maximum of the (fused) weight; None where the format needs none.
        input_amax: FP32 [] calibrated absolute maximum of the input; None for weight-only formats and MXFP4.
        cache_amax: FP32 [] calibrated absolute maximum of what the linear gives the key/value cache: of the layer's
            keys for k_proj, values for v_proj. None for every other tensor, and where the cache is not quantized.
        log2_scale: [N, K / block] trained logarithms of the block scales (learned_scales.py); None where a rule chooses
            them.
        packed: Suffix -> the tensors that stand for this weight in a quantized directory that training started from,
            while the weight still has the values that they decode to; None otherwise.
    """

    name: str
    tensor: torch.Tensor
    quantized: bool = False
    weight_amax: torch.Tensor | None = None
    input_amax: torch.Tensor | None = None
    cache_amax: torch.Tensor | None = None
    log2_scale: torch.Tensor | None = None
    packed: dict[str, torch.Tensor] | None = None


FUSED = {
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": ("mlp.down_proj",),
}
"""Megatron's linears inside a layer -> the Hugging Face linears that each holds."""

BIASED = "self_attention.linear_qkv"
"""The one Megatron linear that may have a bias (shape.qkv_bias)."""


def expected_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hugging Face checkpoint and its shape ([out, in] for linears)."""
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab, shape.hidden),
        "model.norm.weight": (shape.hidden,),
    }
    if not shape.tied:
        tensors["lm_head.weight"] = (shape.vocab, shape.hidden)
    linears = linear_sizes(shape)
    for layer in range(shape.layers):
        for module in (f"model.layers.{layer}.{part}" for parts in FUSED.values() for part in parts):
            tensors[f"{module}.weight"] = linears[module]
            if shape.qkv_bias and module.endswith(FUSED[BIASED]):
                tensors[f"{module}.bias"] = linears[module][:1]
        tensors |= {f"model.layers.{layer}.{name}.weight": (size,) for name, size in layer_norms(shape).values()}
    return tensors


def split_fused(name: str, weight: torch.Tensor, shape: ModelShape) -> dict[str, torch.Tensor]:
    """Take a complete Megatron linear apart into the Hugging Face linears it holds.

    Args:
        name: A key of FUSED.
        weight: Weight [N, K] or bias [N], not a shard. linear_qkv interleaves, per key/value group, its query heads,
            one key head and one value head; linear_fc1 stacks gate over up.
        shape: The model's shape.

    Returns:
        Hugging Face module name inside the layer -> [n, K] or [n].
    """
    parts = FUSED[name]
    if len(parts) == 1:
        return {parts[0]: weight}
    if name == "mlp.linear_fc1":
        return dict(zip(parts, weight.chunk(2), strict=True))
    per_group = shape.heads // shape.kv_heads
    groups = weight.view(shape.kv_heads, (per_group + 2) * shape.head_dim, *weight.shape[1:])
    sizes = [per_group * shape.head_dim, shape.head_dim, shape.head_dim]
    qkv = (part.reshape(-1, *weight.shape[1:]) for part in groups.split(sizes, dim=1))
    return dict(zip(parts, qkv, strict=True))


def fuse(name: str, parts: Mapping[str, torch.Tensor], shape: ModelShape) -> torch.Tensor:
    """Put a complete Megatron linear together from its Hugging Face linears: the inverse of split_fused.

    Args:
        name: A key of FUSED.
        parts: Hugging Face module name inside the layer -> [n, K].
        shape: The model's shape.

    Returns:
        [N, K].
    """
    own = [parts[part] for part in FUSED[name]]
    if name != BIASED:
        return torch.cat(own)
    groups = [part.reshape(shape.kv_heads, -1, *part.shape[1:]) for part in own]
    return torch.cat(groups, dim=1).flatten(0, 1)
