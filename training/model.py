"""The Megatron-Core GPT model of a checkpoint, with our own layer spec, and its import from Hugging Face.

Megatron-Core's local spec refuses sequence parallelism and materialises the [S, S] attention scores; ours is made of
the same parallel linears, an RMSNorm that marks its weight sequence-parallel, and torch's scaled_dot_product_attention.
Neither TransformerEngine nor Apex is needed. Shapes: S sequence, B batch, N heads, G key/value heads, D head dimension.
"""

import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch.nn import functional
from tqdm import tqdm

from halfbyte.training import typed
from halfbyte.training.config import Recipe
from halfbyte.training.errors import UserError
from halfbyte.training.runtime import Runtime, on_first_rank
from halfbyte.training.shape import ModelShape
from halfbyte.training.weight_files import check_weights


class Rounding(Protocol):
    """Fake quantization of a linear's input; arithmetic.Arithmetic is the one implementation."""

    def fake(self, x: torch.Tensor) -> torch.Tensor:
        """Fake-quantized x, its shape and dtype; the gradient passes straight through."""
        ...

    def rule(self) -> tuple[Any, torch.Tensor | None]:
        """The same for a kernel: how it rounds (kernels.rule_of), and the FP32 [] scale per tensor."""
        ...


class RMSNorm(torch.nn.Module):
    """Root mean square normalization over the last axis, weight only (arXiv 1910.07467).

    Under sequence parallelism each tensor-parallel rank sees a part of the sequence, so the weight's gradient is a
    partial sum: the `sequence_parallel` mark makes Megatron reduce it. `rounding` is set while the linear behind it
    takes quantized inputs (fast_path.py).
    """

    rounding: Rounding | None = None

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x_SBH: torch.Tensor) -> torch.Tensor:
        """[S, B, H] -> [S, B, H], same dtype; the mean is taken in FP32 for BF16 inputs."""
        if x_SBH.is_cuda:
            from halfbyte.training import fused  # Triton comes with torch's CUDA builds only

            return fused.rms_norm(x_SBH, self.weight, self.eps, *_rule(self.rounding))
        out = functional.rms_norm(x_SBH, (x_SBH.shape[-1],), self.weight, self.eps)
        return out if self.rounding is None else self.rounding.fake(out)


class SwiGLU(torch.nn.Module):
    """silu(gate) * up of a linear's output [gate, up] (arXiv 2002.05202); `rounding` as in RMSNorm."""

    rounding: Rounding | None = None

    def __init__(self, config: TransformerConfig):
        super().__init__()

    def forward(self, h_SBF: torch.Tensor) -> torch.Tensor:
        """[S, B, 2F/tp] -> [S, B, F/tp], same dtype."""
        if h_SBF.is_cuda:
            from halfbyte.training import fused

            return fused.swiglu(h_SBF, *_rule(self.rounding))
        gate, up = h_SBF.chunk(2, dim=-1)
        out = functional.silu(gate) * up
        return out if self.rounding is None else self.rounding.fake(out)


def rotary(x_SBND: torch.Tensor, freqs: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Megatron's fused rotary embedding, which it takes from TransformerEngine: the same in one kernel on a GPU.

    Args:
        x_SBND: Queries or keys, [S, B, N, D].
        freqs: FP32 angles [S, 1, 1, D], or [1, B, 1, D] while decoding.
        interleaved: Never, here.
    """
    width = x_SBND.shape[-1]
    if x_SBND.is_cuda and freqs.shape == (x_SBND.shape[0], 1, 1, width) and width & (width - 1) == 0:
        from halfbyte.training import fused

        return fused.rotary(x_SBND, *_cos_sin(freqs, x_SBND.dtype))
    return rope_utils._apply_rotary_pos_emb_bshd(x_SBND, freqs, rotary_interleaved=interleaved)


@functools.lru_cache(maxsize=2)  # every layer asks with the same tensor: Megatron keeps it
def _cos_sin(freqs: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """[S, D] cosines and sines, in the type in which Megatron multiplies by them."""
    angles_SD = freqs[:, 0, 0]
    return angles_SD.cos().to(dtype), angles_SD.sin().to(dtype)


def _rule(rounding: Rounding | None) -> tuple[Any, torch.Tensor | None]:
    from halfbyte.training import kernels

    return (kernels.NONE, None) if rounding is None else rounding.rule()


class KeyValues(Protocol):
    """Keys and values of earlier tokens; generate.py has the one implementation."""

    def update(
        self, layer: int, k_BGSD: torch.Tensor, v_BGSD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Add a step's keys and values; return all to attend to, and where (None: causal)."""
        ...


class Attention(MegatronModule):
    """Causal grouped-query attention through torch's fused kernels: no [S, S] tensor unless documents are isolated.

    `cache` is set only while text is generated; `key_rounding` and `value_rounding` (kv_cache.CacheRounding) where the
    cache is quantized.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_: object):
        super().__init__(config=config)
        self.layer_number = layer_number
        self.scale = softmax_scale
        self.cache: KeyValues | None = None
        self.key_rounding: torch.nn.Module | None = None
        self.value_rounding: torch.nn.Module | None = None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **_: object,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [S, B, N/tp, D].
            key: [S, B, G/tp, D].
            value: [S, B, G/tp, D].
            attention_mask: None for plain causal attention, or bool [B, 1, S, S], True where attention is allowed.

        Returns:
            [S, B, N/tp * D], dtype of query.
        """
        if self.key_rounding is not None and self.value_rounding is not None:
            key, value = self.key_rounding(key), self.value_rounding(value)
        q_BNSD, k_BGSD, v_BGSD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if self.cache is not None:
            k_BGSD, v_BGSD, attention_mask = self.cache.update(self.layer_number, k_BGSD, v_BGSD)
        out = functional.scaled_dot_product_attention(
            q_BNSD,
            k_BGSD,
            v_BGSD,
            attn_mask=attention_mask,
            is_causal=attention_mask is None,
            scale=self.scale,
            enable_gqa=q_BNSD.shape[1] != k_BGSD.shape[1],
        )
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


def layer_spec(shape: ModelShape) -> ModuleSpec:
    """One pre-norm transformer layer: RMSNorm, attention (with norms of q and k, if any), RMSNorm, SwiGLU MLP."""
    head_norm = RMSNorm if shape.qk_norm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=Attention,
            linear_proj=RowParallelLinear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    mlp = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear, activation_func=SwiGLU),
    )
    bias_dropout_add: Any = get_bias_dropout_add  # Megatron's own specs pass the function; it is annotated as a class
    submodules = TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=attention,
        self_attn_bda=bias_dropout_add,
        pre_mlp_layernorm=RMSNorm,
        mlp=mlp,
        mlp_bda=bias_dropout_add,
    )
    return ModuleSpec(module=TransformerLayer, submodules=submodules)


def transformer_config(shape: ModelShape, recipe: Recipe, dtype: torch.dtype, *, cuda: bool) -> TransformerConfig:
    """Megatron's configuration of this model under this layout.

    Losses are summed over tokens and divided once by the global token count (`calculate_per_token_loss`), so that the
    gradient does not depend on how tokens fall into micro-batches and data-parallel ranks.
    """
    uneven = recipe.parallel.last_stage_layers if recipe.parallel.pipeline > 1 else None
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        layernorm_epsilon=shape.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=functional.silu,
        use_te_activation_func=True,  # (sic) the spec's activation module, ours
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=recipe.parallel.tensor,
        pipeline_model_parallel_size=recipe.parallel.pipeline,
        num_layers_in_last_pipeline_stage=uneven,
        sequence_parallel=recipe.parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        calculate_per_token_loss=True,
        use_cpu_initialization=True,
        perform_initialization=False,
        apply_rope_fusion=cuda,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,  # needs Apex or TransformerEngine
        hetereogenous_dist_checkpoint=True,  # (sic) one checkpoint key per layer: readable one tensor at a time
        **(recompute if recipe.train.recompute else {}),
    )


def build(shape: ModelShape, recipe: Recipe, runtime: Runtime) -> GPTModel:
    """This rank's part of the model, weights not yet set, on the runtime's device.

    Raises:
        UserError: the tensor-parallel size does not divide the vocabulary.
    """
    if shape.vocab % recipe.parallel.tensor:
        raise UserError(
            f"parallel.tensor = {recipe.parallel.tensor}: does not divide the vocabulary of {shape.vocab} tokens; "
            "choose a divisor"
        )
    rope_utils.fused_apply_rotary_pos_emb = rotary
    cuda = runtime.device.type == "cuda"
    config = transformer_config(shape, recipe, runtime.dtype, cuda=cuda)
    layers = get_num_layers_to_build(config)
    blocks: Any = TransformerBlockSubmodules(layer_specs=[layer_spec(shape)] * layers, layer_norm=RMSNorm)
    model = GPTModel(
        config,
        blocks,  # Megatron takes them where the annotation asks for the spec of a single layer
        vocab_size=shape.vocab,
        max_sequence_length=shape.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,  # type: ignore[arg-type] - annotated int, used as a float
        rope_scaling=shape.rope_scaling_factor is not None,
        rope_scaling_factor=shape.rope_scaling_factor or 1.0,
    )
    if cuda:
        model.compute_language_model_loss = _cross_entropy
    return model.to(device=runtime.device, dtype=runtime.dtype)


def _cross_entropy(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """FP32 [B, S] of labels [B, S] and logits [S, B, V/tp], in one kernel each way."""
    from halfbyte.training import fused_losses

    group = parallel_state.get_tensor_model_parallel_group()
    return fused_losses.cross_entropy(logits, labels.transpose(0, 1), group).transpose(0, 1)


def import_hf(model: GPTModel, model_dir: Path, shape: ModelShape, runtime: Runtime) -> None:
    """Load a Hugging Face checkpoint into this rank's part of the model.

    Args:
        model: From `build`.
        model_dir: Directory with config.json and *.safetensors.
        shape: The model's shape, for the check of the files.
        runtime: This process.

    Raises:
        UserError: a weight file is missing, corrupt, lacks a tensor, holds another shape, or holds NaN or Inf.
    """
    from modelopt.torch.export import import_mcore_gpt_from_hf
    from modelopt.torch.export.plugins import mcore_common, megatron_importer

    on_first_rank(runtime, lambda: check_weights(model_dir, shape))
    names = mcore_common.all_mcore_hf_import_mapping
    names.setdefault("MistralForCausalLM", names["LlamaForCausalLM"])  # the same tensors; ModelOpt 0.47 lacks the entry
    megatron_importer.tqdm = _quiet_bar
    import_mcore_gpt_from_hf(model, str(model_dir), dtype=runtime.dtype)
    model.to(runtime.dtype)
    before = next((layer.layer_number - 1 for layer in typed.layers(model)), 0)  # in earlier stages
    for local, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            name = re.sub(r"(?<=layers\.)\d+", lambda match: str(int(match[0]) + before), local)
            raise UserError(
                f"model.path = {model_dir}: {name} holds NaN or Inf; the weights are damaged, get them again"
            )


def _quiet_bar(layers: Iterable[Any], **_: Any) -> tqdm:
    """ModelOpt's importer draws a bar of its own; a run prints one line per stage."""
    return tqdm(layers, disable=True)
