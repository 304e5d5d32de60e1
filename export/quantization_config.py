"""What tells a runtime how the tensors of a checkpoint are quantized, in the two shapes that runtimes look for.

One format in the whole checkpoint: `quant_algo` names it. Several: `quant_algo` is MIXED_PRECISION and
`quantized_layers` names every quantized linear with its own. Linears in BF16 are listed as excluded in both cases.
"""

from importlib import metadata
from typing import Any

from halfbyte.training.config import BLOCK, Format

QUANT_ALGO = {Format.nvfp4: "NVFP4", Format.w4a16_nvfp4: "W4A16_NVFP4", Format.fp8: "FP8"}
"""Names of the formats in ModelOpt's files. MXFP4 has no reader in that layout and goes out as compressed-tensors."""


def quantization_configs(
    formats: dict[str, Format], dense_modules: list[str]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The `quantization_config` of config.json and the content of hf_quant_config.json (None for MXFP4).

    Args:
        formats: Exact Hugging Face name of every quantized linear -> its format; at least one.
        dense_modules: Exact Hugging Face names of the modules that stay BF16.

    Raises:
        ValueError: MXFP4 beside another format (the recipe check refuses this earlier).
    """
    distinct = sorted(set(formats.values()))
    if distinct == [Format.mxfp4]:
        return _compressed_tensors_config(dense_modules), None
    if Format.mxfp4 in distinct:
        raise ValueError(f"no runtime reads MXFP4 in a mix: {', '.join(distinct)}")
    # Readers look for this producer's name; the version is the one whose layout this is.
    producer = {"name": "modelopt", "version": metadata.version("nvidia-modelopt")}
    flat, nested = _one_format(distinct[0], dense_modules) if len(distinct) == 1 else _mixed(formats, dense_modules)
    return flat | {"producer": producer}, {"producer": producer, "quantization": nested}


def _one_format(number_format: Format, dense_modules: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    flat = {
        "quant_method": "modelopt",
        "quant_algo": QUANT_ALGO[number_format],
        "ignore": dense_modules,
        "config_groups": {"group_0": _group(number_format, ["Linear"])},
    }
    nested = {
        **_algorithm(number_format, kv_cache_quant_algo=None),  # vLLM wants the key without KV-cache quantization too
        "exclude_modules": dense_modules,
    }
    return flat, nested


def _mixed(formats: dict[str, Format], dense_modules: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """TensorRT-LLM and vLLM take a layer's format from `quantized_layers`, compressed-tensors from the targets."""
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
        "kv_cache_quant_algo": None,
        "exclude_modules": dense_modules,
        "quantized_layers": layers,
    }
    return flat, nested


def _algorithm(number_format: Format, **further: Any) -> dict[str, Any]:
    """A format as ModelOpt's nested file names it; only block formats have a group size."""
    block = BLOCK[number_format]
    return {"quant_algo": QUANT_ALGO[number_format], **further} | ({"group_size": block} if block > 1 else {})


def _group(number_format: Format, targets: list[str]) -> dict[str, Any]:
    """A config group: the elements of weights and, unless they stay BF16, of activations."""
    bits, block = (8, {}) if number_format is Format.fp8 else (4, {"group_size": BLOCK[number_format]})
    elements = {"dynamic": False, "num_bits": bits, "type": "float", **block}
    activations = {} if number_format is Format.w4a16_nvfp4 else {"input_activations": dict(elements)}
    return {**activations, "weights": elements, "targets": targets}


def _compressed_tensors_config(dense_modules: list[str]) -> dict[str, Any]:
    """compressed-tensors' scheme for MXFP4 weights and dynamically scaled MXFP4 activations."""
    container = "mxfp4-pack-quantized"
    elements = {
        "num_bits": 4,
        "type": "float",
        "strategy": "group",
        "group_size": BLOCK[Format.mxfp4],
        "symmetric": True,
        "scale_dtype": "torch.uint8",
        "zp_dtype": "torch.uint8",
    }
    group = {
        "targets": ["Linear"],
        "weights": {**elements, "dynamic": False},
        "input_activations": {**elements, "dynamic": True},
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
