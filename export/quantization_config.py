"""What tells a runtime how the tensors of a checkpoint are quantized, in the two shapes that runtimes look for.

One format in the whole checkpoint: `quant_algo` names it. Several: `quant_algo` is MIXED_PRECISION and
`quantized_layers` names every quantized linear with its own. Linears in BF16 are listed as excluded in both cases.

Servers hold q, k and v as one linear, and gate and up. What is said of all members is said of that linear as well:
SGLang's dense models do not tell which members it has, and older TensorRT-LLM looks for nothing else.
"""

from collections.abc import Iterable
from importlib import metadata
from typing import Any

from halfbyte.training.config import Format
from halfbyte.training.formats import GRIDS, SPECS, Grid
from halfbyte.training.kv_format import KVCache
from halfbyte.training.shape import GATE_UP, QKV

FUSED = {"self_attn.qkv_proj": QKV, "mlp.gate_up_proj": GATE_UP}
"""A linear as every server names it inside a layer -> the Hugging Face linears in it."""
CACHE_ALGO = {KVCache.none: None, KVCache.fp8: "FP8", KVCache.nvfp4: "NVFP4"}
"""Formats of the key/value cache in ModelOpt's nested file."""
CACHE_SCHEME = {KVCache.fp8: {"dynamic": False, "num_bits": 8, "type": "float"}, KVCache.nvfp4: "NVFP4"}
"""The same in config.json, where NVFP4 is a bare word."""


def quantization_configs(
    formats: dict[str, Format], dense_modules: list[str], cache: KVCache
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The `quantization_config` of config.json and the content of hf_quant_config.json (None for MXFP4).

    Args:
        formats: Exact Hugging Face name of every quantized linear -> its format; at least one.
        dense_modules: Exact Hugging Face names of the modules that stay BF16.
        cache: Format of the key/value cache.

    Raises:
        ValueError: A mix that no runtime reads, or a quantized cache beside MXFP4 (the recipe check refuses these
            earlier).
    """
    distinct = sorted(set(formats.values()))
    if len(distinct) > 1 and not all(SPECS[number_format].mixes for number_format in distinct):
        raise ValueError(f"no runtime reads this mix: {', '.join(distinct)}")
    dense_modules = sorted({*dense_modules, *fused_names(dense_modules)})
    if SPECS[distinct[0]].quant_algo is None:  # it has no reader in ModelOpt's layout
        if cache is not KVCache.none:
            raise ValueError(f"no runtime is known to read a {cache} cache beside MXFP4")
        return _compressed_tensors_config(distinct[0], dense_modules), None
    # Readers look for this producer's name; the version is the one whose layout this is.
    producer = {"name": "modelopt", "version": metadata.version("nvidia-modelopt")}
    flat, nested = (
        _one_format(distinct[0], dense_modules, cache) if len(distinct) == 1 else _mixed(formats, dense_modules, cache)
    )
    if cache is not KVCache.none:
        flat["kv_cache_scheme"] = CACHE_SCHEME[cache]
    return flat | {"producer": producer}, {"producer": producer, "quantization": nested}


def fused_names(modules: Iterable[str]) -> dict[str, str]:
    """The linears of FUSED of which all members are among the modules: full name -> the first member's."""
    given = set(modules)
    return {
        layer + fused: layer + first
        for fused, (first, *others) in FUSED.items()
        for layer in (name.removesuffix(first) for name in given if name.endswith(first))
        if all(layer + other in given for other in others)
    }


def _one_format(
    number_format: Format, dense_modules: list[str], cache: KVCache
) -> tuple[dict[str, Any], dict[str, Any]]:
    flat = {
        "quant_method": "modelopt",
        "quant_algo": SPECS[number_format].quant_algo,
        "ignore": dense_modules,
        "config_groups": {"group_0": _group(number_format, ["Linear"])},
    }
    nested = {
        # vLLM wants this key also where the cache is not quantized.
        **_algorithm(number_format, kv_cache_quant_algo=CACHE_ALGO[cache]),
        "exclude_modules": dense_modules,
    }
    return flat, nested


def _mixed(
    formats: dict[str, Format], dense_modules: list[str], cache: KVCache
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Servers take a layer's format from `quantized_layers`, compressed-tensors from the targets."""
    formats = formats | {fused: formats[member] for fused, member in fused_names(formats).items()}
    layers = {name: _algorithm(number_format) for name, number_format in sorted(formats.items())}
    members = {
        number_format: [name for name in layers if formats[name] is number_format]
        for number_format in sorted(set(formats.values()))
    }
    groups = {f"group_{i}": _group(number_format, names) for i, (number_format, names) in enumerate(members.items())}
    flat = {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "ignore": dense_modules,
        "config_groups": groups,
        "quantized_layers": layers,
    }
    nested = {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": CACHE_ALGO[cache],
        "exclude_modules": dense_modules,
        "quantized_layers": layers,
    }
    return flat, nested


def _algorithm(number_format: Format, **further: Any) -> dict[str, Any]:
    """A format as ModelOpt's nested file names it; only block formats have a group size."""
    return {"quant_algo": SPECS[number_format].quant_algo, **further} | _group_size(SPECS[number_format].grid)


def _group(number_format: Format, targets: list[str]) -> dict[str, Any]:
    """A config group: the elements of weights and, unless they stay BF16, of activations."""
    spec = SPECS[number_format]
    activations = {} if spec.inputs is None else {"input_activations": _elements(GRIDS[spec.inputs])}
    return {**activations, "weights": _elements(spec.grid), "targets": targets}


def _elements(grid: Grid) -> dict[str, Any]:
    return {"dynamic": False, "num_bits": grid.bits, "type": "float", **_group_size(grid)}


def _group_size(grid: Grid) -> dict[str, int]:
    return {"group_size": grid.block} if grid.block > 1 else {}


def _compressed_tensors_config(number_format: Format, dense_modules: list[str]) -> dict[str, Any]:
    """compressed-tensors' scheme for MXFP4 weights and, unless they stay BF16, dynamically scaled MXFP4 activations."""
    spec = SPECS[number_format]
    container = "mxfp4-pack-quantized"
    elements = {
        "num_bits": 4,
        "type": "float",
        "strategy": "group",
        "group_size": spec.grid.block,
        "symmetric": True,
        "scale_dtype": "torch.uint8",
        "zp_dtype": "torch.uint8",
    }
    group = {
        "targets": ["Linear"],
        "weights": {**elements, "dynamic": False},
        "input_activations": None if spec.inputs is None else {**elements, "dynamic": True},
        "output_activations": None,
        "format": container,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": container,
        "quantization_status": "compressed",
        "ignore": dense_modules,
        "config_groups": {"group_0": group},
    }
