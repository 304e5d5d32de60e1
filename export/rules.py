"""What the serving runtimes demand of a checkpoint, checked on the files alone (export/reader.py).

Each rule yields lines that name the tensor or the key, what is there and what should be. Sources: the loaders of
TensorRT-LLM (NVFP4LinearMethod), vLLM (ModelOptQuantConfigBase, ModelOptMixedPrecisionConfig,
CompressedTensorsW4A4Mxfp4) and SGLang. The configs are config_rules.py's.
"""

from collections.abc import Iterator

import numpy as np

from halfbyte.export.config_rules import broken_configs
from halfbyte.export.reader import Checkpoint
from halfbyte.training.config import Format, Method, Recipe, SecondScale
from halfbyte.training.kv_format import KVCache
from halfbyte.training.shape import FUSED_GROUPS, layer_format

DTYPES = {
    Format.nvfp4: {"weight": "U8", "weight_scale": "F8_E4M3", "weight_scale_2": "F32", "input_scale": "F32"},
    Format.w4a16_nvfp4: {"weight": "U8", "weight_scale": "F8_E4M3", "weight_scale_2": "F32"},
    Format.w4a8_nvfp4_fp8: {"weight": "U8", "weight_scale": "F8_E4M3", "weight_scale_2": "F32", "input_scale": "F32"},
    Format.mxfp4: {"weight_packed": "U8", "weight_scale": "U8"},
    Format.w4a16_mxfp4: {"weight_packed": "U8", "weight_scale": "U8"},
    Format.fp8: {"weight": "F8_E4M3", "weight_scale": "F32", "input_scale": "F32"},
}
"""Suffix -> safetensors dtype of every tensor of a quantized linear."""
BLOCK = dict.fromkeys(DTYPES, 32) | {Format.nvfp4: 16, Format.w4a16_nvfp4: 16}
"""Elements along K that share a block scale; FP8 has none."""
SCALARS = ("weight_scale", "weight_scale_2", "input_scale")
"""Suffixes of the scales per tensor, where they are F32: weight_scale is that in FP8 only."""


def broken_rules(checkpoint: Checkpoint, recipe: Recipe) -> list[str]:
    """Every violation, one line each; empty for a checkpoint that the runtimes can load and will compute right.

    Args:
        checkpoint: The opened files.
        recipe: The recipe they were made from: method, formats, kind of second-level scale.

    Raises:
        UserError: A config file is missing or damaged.
    """
    if recipe.method is Method.bf16:
        return [*_dense_only(checkpoint), *_other_tensors(checkpoint, set())]
    modules = checkpoint.quantized_modules()
    chosen = {module: layer_format(module, recipe.quantize) for module in modules}
    formats = {module: number_format for module, number_format in chosen.items() if number_format is not None}
    owned = {f"{module}.{suffix}" for module, number_format in formats.items() for suffix in DTYPES[number_format]}
    problems = [f"{name} is quantized, but the recipe leaves it in BF16" for name in chosen if name not in formats]
    for module, number_format in formats.items():
        problems += _linear(checkpoint, module, number_format, recipe.quantize.scale_2)
    problems += _fused(checkpoint, set(modules))
    if recipe.quantize.kv_cache is not KVCache.none:
        scales = _cache_scales(checkpoint)
        owned |= set(scales)
        for name in scales:
            problems += _scalar(checkpoint, name, pow2=False)
    problems += _other_tensors(checkpoint, owned)
    problems += broken_configs(checkpoint, formats, recipe.quantize.kv_cache)
    return problems if modules else ["no quantized linear in the files", *problems]


def _linear(checkpoint: Checkpoint, module: str, number_format: Format, kind: SecondScale) -> Iterator[str]:
    """Names, dtypes, shapes and scale values of one quantized linear."""
    expected = DTYPES[number_format]
    present = {s: checkpoint.entries[f"{module}.{s}"] for s in expected if f"{module}.{s}" in checkpoint.entries}
    yield from (f"{module}.{suffix} is missing" for suffix in expected.keys() - present.keys())
    for suffix, entry in present.items():
        if entry.dtype != expected[suffix]:
            yield f"{module}.{suffix} is {entry.dtype}, not {expected[suffix]}"
            return
    for suffix in SCALARS:
        if suffix in present and expected[suffix] == "F32":
            of_fp8 = number_format is Format.fp8 or (number_format, suffix) == (Format.w4a8_nvfp4_fp8, "input_scale")
            pow2 = kind is SecondScale.pow2 and not of_fp8
            yield from _scalar(checkpoint, f"{module}.{suffix}", pow2=pow2)
    codes = present.get("weight") or present.get("weight_packed")
    if codes is None or "weight_scale" not in present:
        return
    if number_format is Format.fp8:
        yield from _fp8_codes(checkpoint, f"{module}.weight")
    else:
        yield from _blocks(checkpoint, module, number_format)


def _fp8_codes(checkpoint: Checkpoint, name: str) -> Iterator[str]:
    codes = checkpoint.raw(name)
    if codes.ndim != 2:
        yield f"{name} has shape {list(codes.shape)}, not [N, K]"
    bad = (codes & 0x7F) == 0x7F
    if bad.any():
        yield f"{name}: {int(bad.sum())} of {bad.size} codes are NaN, first at {_first(bad)}"


def _blocks(checkpoint: Checkpoint, module: str, number_format: Format) -> Iterator[str]:
    """Shapes of codes and block scales, and the values of the scales."""
    block, name = BLOCK[number_format], "weight_packed" if "weight_packed" in DTYPES[number_format] else "weight"
    codes, scale = checkpoint.entries[f"{module}.{name}"], checkpoint.entries[f"{module}.weight_scale"]
    if len(codes.shape) != 2 or (2 * codes.shape[1]) % block:
        yield f"{module}: codes have shape {list(codes.shape)}, not [N, K/2] with K a multiple of {block}"
        return
    grid = (codes.shape[0], 2 * codes.shape[1] // block)
    if scale.shape != grid:
        yield f"{module}.weight_scale has shape {list(scale.shape)}, not {list(grid)}"
    yield from _scale_codes(checkpoint, module, number_format)


def _scale_codes(checkpoint: Checkpoint, module: str, number_format: Format) -> Iterator[str]:
    codes = checkpoint.raw(f"{module}.weight_scale")
    if DTYPES[number_format]["weight_scale"] == "U8":
        bad, rule = codes == 255, "NaN (E8M0 code 255)"
    else:
        # positive E4M3 codes in order: 0x01 is 2^-9, 0x7E is 448, 0x7F and 0xFF are NaN
        bad, rule = (codes < 0x01) | (codes > 0x7E), "outside [2^-9, 448]"
    if bad.any():
        yield f"{module}.weight_scale: {int(bad.sum())} of {bad.size} scales are {rule}, first at {_first(bad)}"


def _scalar(checkpoint: Checkpoint, name: str, *, pow2: bool) -> Iterator[str]:
    if name not in checkpoint.entries:
        yield f"{name} is missing"
        return
    if checkpoint.entries[name].dtype != "F32":
        yield f"{name} is {checkpoint.entries[name].dtype}, not F32"
        return
    value = checkpoint.raw(name)
    if value.shape != ():
        yield f"{name} has shape {list(value.shape)}, not []"
    elif not (np.isfinite(value) and value > 0):
        yield f"{name} is {float(value)}, not a positive number"
    elif pow2 and np.frexp(value)[0] != 0.5:
        yield f"{name} is {float(value)}, not a power of two (quantize.scale_2 = pow2)"


def _cache_scales(checkpoint: Checkpoint) -> list[str]:
    """Names of the key/value cache's scales: two in every layer that config.json counts."""
    layers = int(checkpoint.config.get("num_hidden_layers", 0))
    names = ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale")
    return [f"model.layers.{layer}.{name}" for layer in range(layers) for name in names]


def _fused(checkpoint: Checkpoint, modules: set[str]) -> Iterator[str]:
    """Runtimes fuse q/k/v and gate/up into one GEMM with one scale per tensor."""
    prefixes = {name.rsplit(".", 2)[0] for name in modules}
    for prefix in sorted(prefixes):
        for group in FUSED_GROUPS:
            members = [f"{prefix}.{part}" for part in group]
            quantized = [name for name in members if name in modules]
            if quantized and len(quantized) < len(members):
                yield f"{prefix}: only {', '.join(quantized)} of {', '.join(group)} are quantized; all or none must be"
            for suffix in SCALARS:
                names = [f"{name}.{suffix}" for name in quantized if f"{name}.{suffix}" in checkpoint.entries]
                names = [name for name in names if checkpoint.entries[name].dtype == "F32"]
                if len({checkpoint.raw(name).tobytes() for name in names}) > 1:
                    values = ", ".join(f"{name} = {checkpoint.raw(name).tolist()}" for name in names)
                    yield f"{suffix} differs inside one fused layer: {values}"


def _other_tensors(checkpoint: Checkpoint, owned: set[str]) -> Iterator[str]:
    """Everything that is not part of a quantized linear is BF16."""
    for name in checkpoint.names():
        entry = checkpoint.entries[name]
        if name not in owned and entry.dtype != "BF16":
            yield f"{name} is {entry.dtype} but belongs to no quantized linear; only BF16 may stand alone"


def _dense_only(checkpoint: Checkpoint) -> Iterator[str]:
    if "quantization_config" in checkpoint.config:
        yield "config.json has a quantization_config, but the method is bf16"
    if (checkpoint.folder / "hf_quant_config.json").exists():
        yield "hf_quant_config.json is there, but the method is bf16"


def _first(mask: np.ndarray) -> list[int]:
    return [int(i) for i in np.unravel_index(int(mask.argmax()), mask.shape)]
