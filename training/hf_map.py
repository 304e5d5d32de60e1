"""How a Llama-family model's tensors are named and fused: Hugging Face on one side, Megatron-Core on the other."""

from dataclasses import dataclass

import torch

from halfbyte.training.shape import ModelShape


@dataclass(frozen=True)
class HFWeight:
    """One tensor of the trained model in Hugging Face naming, complete (not a shard).

    Attributes:
        name: Tensor name, e.g. `model.layers.0.mlp.up_proj.weight`.
        tensor: The training-time parameter, any float dtype; [N, K] for a linear (N = out, K = in).
        quantized: Whether the training-time model fake-quantizes it.
        weight_amax: FP32 [] calibrated absolute maximum of the (fused) weight; None where the format needs none.
        input_amax: FP32 [] calibrated absolute maximum of the input; None for weight-only formats and MXFP4.
    """

    name: str
    tensor: torch.Tensor
    quantized: bool = False
    weight_amax: torch.Tensor | None = None
    input_amax: torch.Tensor | None = None


FUSED = {
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": ("mlp.down_proj",),
}
"""Megatron's linears inside a layer -> the Hugging Face linears that each holds."""

NORMS = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}


def expected_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hugging Face checkpoint and its shape ([out, in] for linears)."""
    hidden, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not shape.tied:
        tensors["lm_head.weight"] = (shape.vocab, hidden)
    linears = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (shape.ffn, hidden),
        "mlp.up_proj": (shape.ffn, hidden),
        "mlp.down_proj": (hidden, shape.ffn),
    }
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}{name}.weight": size for name, size in linears.items()}
        tensors |= {f"{prefix}{name}.weight": (hidden,) for name in NORMS.values()}
    return tensors


def split_fused(name: str, weight: torch.Tensor, shape: ModelShape) -> dict[str, torch.Tensor]:
    """Take a complete Megatron linear apart into the Hugging Face linears it holds.

    Args:
        name: A key of FUSED.
        weight: [N, K], not a shard. linear_qkv interleaves, per key/value group, its query heads, one key head and one
            value head; linear_fc1 stacks gate over up.
        shape: The model's shape.

    Returns:
        Hugging Face module name inside the layer -> [n, K].
    """
    parts = FUSED[name]
    if len(parts) == 1:
        return {parts[0]: weight}
    if name == "mlp.linear_fc1":
        return dict(zip(parts, weight.chunk(2), strict=True))
    per_group = shape.heads // shape.kv_heads
    groups = weight.view(shape.kv_heads, (per_group + 2) * shape.head_dim, weight.shape[-1])
    sizes = [per_group * shape.head_dim, shape.head_dim, shape.head_dim]
    qkv = (part.reshape(-1, weight.shape[-1]) for part in groups.split(sizes, dim=1))
    return dict(zip(parts, qkv, strict=True))
