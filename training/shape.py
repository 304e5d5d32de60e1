"""The facts of a model that planning needs, read from its Hugging Face config.json. Torch-free."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from halfbyte.training.config import Format, LayerFormat, Method, Quantize, Recipe
from halfbyte.training.errors import RecipeError
from halfbyte.training.families import FAMILIES, Family
from halfbyte.training.formats import BITS
from halfbyte.training.model_config import read_config
from halfbyte.training.rope import rope_of, rope_problems

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
FUSED_GROUPS = (QKV, GATE_UP)
"""Linears that are one layer at training time and share one second-level scale."""
NORMS = {
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
}
"""Megatron's norms inside a layer -> Hugging Face module name inside the layer; the last two only with qk_norm."""
ROW_PARALLEL = ("self_attn.o_proj", "mlp.down_proj")
"""Linears whose K is split over tensor-parallel ranks; the others split N."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model.

    Attributes:
        layers: Transformer layers.
        hidden: Width of the residual stream.
        ffn: Width of the MLP.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Elements per head.
        vocab: Rows of the embedding.
        tied: Whether lm_head is the embedding.
        max_positions: Longest sequence, tokens.
        rope_theta: Base of the rotary frequencies.
        rope_scaling_factor: Factor of Llama-3 frequency scaling; None without scaling.
        norm_eps: Epsilon of RMSNorm.
        qkv_bias: Whether the q, k and v projections have a bias.
        qk_norm: Whether every head of q and k goes through an RMSNorm before its rotation.
        sliding_window: Tokens that attention looks back at most; None without such a limit. Attention here is causal
            without a window, so max_positions is at most this: up to there both are the same.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    max_positions: int
    rope_theta: float
    rope_scaling_factor: float | None
    norm_eps: float
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None

    @property
    def parameters(self) -> int:
        """Number of parameters; a tied lm_head counts once."""
        linear = sum(n * k for n, k in linear_sizes(self).values())
        norms = (2 * self.layers + 1) * self.hidden + self.layers * (2 * self.head_dim if self.qk_norm else 0)
        biases = self.layers * (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        return linear + norms + biases + self.vocab * self.hidden * (1 if self.tied else 2)


def linear_sizes(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Every linear of the decoder layers by Hugging Face module name -> (N = out, K = in), in model order."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {
        "self_attn.q_proj": (q, shape.hidden),
        "self_attn.k_proj": (kv, shape.hidden),
        "self_attn.v_proj": (kv, shape.hidden),
        "self_attn.o_proj": (shape.hidden, q),
        "mlp.gate_proj": (shape.ffn, shape.hidden),
        "mlp.up_proj": (shape.ffn, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.ffn),
    }
    return {f"model.layers.{i}.{name}": size for i in range(shape.layers) for name, size in sizes.items()}


def model_flops(shape: ModelShape, tokens: int, sequence: int) -> float:
    """FLOPs of training on `tokens` tokens, forward and backward, without recomputation and teacher.

    6 per parameter of a matrix and token (arXiv 2001.08361, 2.1; the embedding is a lookup), and causal attention:
    two products of 2 S^2 q per sequence and layer, half of them masked, three times.

    Args:
        shape: The model.
        tokens: How many.
        sequence: Tokens of a sequence, S.
    """
    matrices = sum(n * k for n, k in linear_sizes(shape).values()) + shape.vocab * shape.hidden
    return 6.0 * tokens * (matrices + shape.layers * sequence * shape.heads * shape.head_dim)


def excluded(name: str, patterns: list[str]) -> bool:
    """Whether a Hugging Face module name matches one of the case-sensitive fnmatch patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def deciding_pattern(name: str, quantize: Quantize) -> str | None:
    """The key of quantize.layers that decides about a linear; None where quantize.format does."""
    return next((pattern for pattern in quantize.layers if fnmatchcase(name, pattern)), None)


def layer_format(name: str, quantize: Quantize) -> Format | None:
    """THE rule which format a linear has: quantize.exclude, then the first match in quantize.layers, then the default.

    Args:
        name: Hugging Face module name, model.layers.0.mlp.down_proj.
        quantize: The recipe's section.

    Returns:
        The format; None for a linear that stays BF16.
    """
    if excluded(name, quantize.exclude):
        return None
    pattern = deciding_pattern(name, quantize)
    if pattern is None:
        return quantize.format
    chosen = quantize.layers[pattern]
    return None if chosen is LayerFormat.bf16 else Format(chosen.value)


def planned_linears(shape: ModelShape, recipe: Recipe) -> dict[str, Format]:
    """Hugging Face module name -> format of every linear that the recipe quantizes; empty for the BF16 control."""
    if recipe.method == Method.bf16:
        return {}
    chosen = {name: layer_format(name, recipe.quantize) for name in linear_sizes(shape)}
    return {name: number_format for name, number_format in chosen.items() if number_format is not None}


def bits_per_weight(shape: ModelShape, recipe: Recipe) -> float:
    """Mean bits per weight of the recipe's plan, block scales included, over the linears that quantize.exclude leaves.

    Layers that quantize.layers keeps in BF16 count with 16 bits. NaN if quantize.exclude leaves nothing.
    """
    planned = planned_linears(shape, recipe)
    linears = linear_sizes(shape).items()
    sizes = {name: n * k for name, (n, k) in linears if not excluded(name, recipe.quantize.exclude)}
    bits = sum(BITS[planned.get(name)] * size for name, size in sizes.items())
    return bits / sum(sizes.values()) if sizes else math.nan


def read_shape(config_json: str | Path) -> ModelShape:
    """Read a Hugging Face config.json.

    transformers 5 keeps rotary settings in `rope_parameters`; older files have `rope_theta` and `rope_scaling`.

    Args:
        config_json: Path of the file.

    Returns:
        The model's sizes.

    Raises:
        RecipeError: the file is missing, is not JSON, lacks a key, or describes a model that halfbyte cannot train;
            one line per reason.
    """
    return shape_of(read_config(Path(config_json)), str(config_json))


def shape_of(config: dict[str, Any], where: str) -> ModelShape:
    """The sizes in the content of a config.json; `where` names it in messages. Returns and raises as read_shape."""
    try:
        return _shape_of(config, where)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, ArithmeticError) as error:
        reason = f"a value is of another kind than models have ({error})"
        raise RecipeError([f"{where}: {reason}; take the model's own file"]) from error


def _shape_of(config: dict[str, Any], where: str) -> ModelShape:
    architecture = (config.get("architectures") or ["none"])[0]
    family = FAMILIES.get(architecture, Family())
    given = [key for key in ("head_dim", "num_key_value_heads") if config.get(key)]
    missing = [key for key in dict.fromkeys((*_REQUIRED, *family.required, *given)) if not is_size(config.get(key))]
    problems = [f"{where}: {key} is missing or no positive number; take the model's own file" for key in missing]
    if not missing and config["num_hidden_layers"] > MOST_LAYERS:
        problems.append(f"{where}: num_hidden_layers = {config['num_hidden_layers']}: more than {MOST_LAYERS}")
    problems += [f"{where}: {reason}" for reason in _unsupported(config)]
    problems += [] if missing else [f"{where}: {reason}" for reason in _heads(config)]
    if problems:
        raise RecipeError(problems)
    heads, window, rope = config["num_attention_heads"], family.window(config), rope_of(config)
    return ModelShape(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        ffn=config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=min(config["max_position_embeddings"], window or config["max_position_embeddings"]),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        rope_scaling_factor=float(rope["factor"]) if rope["rope_type"] == "llama3" else None,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        sliding_window=window,
    )


_REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)


MOST_LAYERS = 10_000
"""Far beyond any model: a damaged number must not become a list of that length."""


def is_size(value: Any) -> bool:
    """Whether a value of a config.json can be the size of something."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _heads(config: dict[str, Any]) -> Iterator[str]:
    """Heads that no attention can have."""
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads")
    size = config.get("head_dim") or config["hidden_size"] // heads
    if not size:
        yield f"num_attention_heads = {heads}: more than hidden_size"
    if size % 2:
        yield f"head_dim = {size}: the rotation turns pairs of values, so it must be even; take the model's own file"
    if groups and heads % groups:
        yield f"num_key_value_heads = {groups}: no divisor of num_attention_heads = {heads}; take the model's own file"


def _unsupported(config: dict[str, Any]) -> list[str]:
    """What in the config has no counterpart in training/model.py, one reason each."""
    reasons = []
    architecture = (config.get("architectures") or ["none"])[0]
    # A family with a bias of its own does not read attention_bias, which elsewhere gives o_proj one as well.
    biases = ("mlp_bias",) if FAMILIES.get(architecture, Family()).qkv_bias else ("attention_bias", "mlp_bias")
    if architecture not in FAMILIES:
        reasons.append(f"architectures = {architecture}: only {', '.join(FAMILIES)} models can be trained")
    if config.get("sliding_window") is not None and not is_size(config["sliding_window"]):
        reasons.append(
            f"sliding_window = {config['sliding_window']}: not a number of tokens; take the model's own file"
        )
    if not isinstance(config.get("tie_word_embeddings", False), bool):
        reasons.append(f"tie_word_embeddings = {config['tie_word_embeddings']!r}: neither true nor false")
    if config.get("hidden_act", "silu") != "silu":
        reasons.append(f"hidden_act = {config['hidden_act']}: only silu (SwiGLU) is supported")
    reasons += [f"{key} = true: linears with a bias are not supported" for key in biases if config.get(key)]
    reasons += rope_problems(config)
    return reasons


def layer_norms(shape: ModelShape) -> dict[str, tuple[str, int]]:
    """The norms of NORMS that the model has: Hugging Face module name inside the layer, and elements of its weight."""
    return {
        name: (hf, shape.head_dim if hf.startswith("self_attn.") else shape.hidden)
        for name, hf in NORMS.items()
        if shape.qk_norm or not hf.startswith("self_attn.")
    }
