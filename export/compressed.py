"""NVFP4 as compressed-tensors `nvfp4-pack-quantized`: the same codes and block scales under that library's names.

    ModelOpt's layout   here                  value
    P.weight            P.weight_packed       as it is
    P.weight_scale      P.weight_scale        as it is
    P.weight_scale_2    P.weight_global_scale [1], its reciprocal
    P.input_scale       P.input_global_scale  [1], its reciprocal
    k_proj.k_scale      self_attn.k_scale     [1], as it is (FP8 cache); likewise v_scale

A reciprocal is exact where the scale is a power of two (quantize.scale_2 = pow2); elsewhere it moves the decoded values
by at most 2^-23 of themselves.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from halfbyte.export.container import Planned
from halfbyte.export.quantization_config import fused_names
from halfbyte.export.reader import Checkpoint
from halfbyte.export.source import cache_of, formats_of
from halfbyte.training.config import Format
from halfbyte.training.kv_format import KVCache

FORMAT = "nvfp4-pack-quantized"


def tensors(checkpoint: Checkpoint) -> dict[str, Planned]:
    """Every tensor of the converted checkpoint, by its new name, in the source's order of names."""
    quantized = set(checkpoint.quantized_modules())
    planned: dict[str, Planned] = {}
    for name in checkpoint.names():
        module, _, suffix = name.rpartition(".")
        if module in quantized and suffix == "weight":
            planned[f"{module}.weight_packed"] = as_it_is(checkpoint, name)
        elif suffix in ("weight_scale_2", "input_scale"):
            target = {"weight_scale_2": "weight_global_scale", "input_scale": "input_global_scale"}[suffix]
            planned[f"{module}.{target}"] = Planned("F32", (1,), _reciprocal(checkpoint, name))
        elif suffix in ("k_scale", "v_scale"):
            attention = module.rpartition(".")[0]
            planned[f"{attention}.{suffix}"] = Planned("F32", (1,), _one(checkpoint, name))
        else:
            planned[name] = as_it_is(checkpoint, name)
    return planned


def quantization_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """`quantization_config` of config.json in compressed-tensors' schema."""
    elements = {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "symmetric": True,
        "scale_dtype": "torch.float8_e4m3fn",
        "zp_dtype": "torch.float8_e4m3fn",
    }
    rounds_inputs = Format.nvfp4 in formats_of(checkpoint).values()
    group = {
        "targets": ["Linear"],
        "weights": {**elements, "dynamic": False},
        # "local": the block scales are computed on the fly, below the static scale of the tensor
        "input_activations": {**elements, "dynamic": "local"} if rounds_inputs else None,
        "output_activations": None,
        "format": FORMAT,
    }
    fp8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "ignore": dense_modules(checkpoint),
        "kv_cache_scheme": fp8 if cache_of(checkpoint) is KVCache.fp8 else None,
        "config_groups": {"group_0": group},
    }


def dense_modules(checkpoint: Checkpoint) -> list[str]:
    """Exact names of the modules in BF16 and of linears fused from them, and lm_head: a tied one has no tensor."""
    matrices = {
        name.removesuffix(".weight")
        for name, entry in checkpoint.entries.items()
        if name.endswith(".weight") and len(entry.shape) == 2
    }
    dense = (matrices | {"lm_head"}) - set(checkpoint.quantized_modules())
    return sorted({*dense, *fused_names(dense)})


def as_it_is(checkpoint: Checkpoint, name: str) -> Planned:
    """A tensor of the source, to be copied."""
    entry = checkpoint.entries[name]
    return Planned(entry.dtype, entry.shape, lambda: checkpoint.raw(name))


def _one(checkpoint: Checkpoint, name: str) -> Callable[[], np.ndarray]:
    return lambda: checkpoint.raw(name).reshape(1)


def _reciprocal(checkpoint: Checkpoint, name: str) -> Callable[[], np.ndarray]:
    return lambda: np.float32(1) / checkpoint.raw(name).reshape(1)
