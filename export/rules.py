"""What the serving runtimes demand of a checkpoint, checked on the files alone (export/reader.py).

Each rule yields lines that name the tensor or the key, what is there and what should be. Sources: the loaders of
TensorRT-LLM (NVFP4LinearMethod), vLLM (ModelOptQuantConfigBase, CompressedTensorsW4A4Mxfp4) and SGLang.
"""

import json
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from halfbyte.export.reader import Checkpoint
from halfbyte.training.config import BLOCK, Format, Method, Recipe, SecondScale
from halfbyte.training.shape import FUSED_GROUPS

DTYPES = {
    Format.nvfp4: {"weight": "U8", "weight_scale": "F8_E4M3", "weight_scale_2": "F32", "input_scale": "F32"},
    Format.w4a16_nvfp4: {"weight": "U8", "weight_scale": "F8_E4M3", "weight_scale_2": "F32"},
    Format.mxfp4: {"weight_packed": "U8", "weight_scale": "U8"},
}
"""Suffix -> safetensors dtype of every tensor of a quantized linear."""
SCALARS = ("weight_scale_2", "input_scale")
ALGORITHM = {Format.nvfp4: "NVFP4", Format.w4a16_nvfp4: "W4A16_NVFP4"}


def broken_rules(checkpoint: Checkpoint, recipe: Recipe) -> list[str]:
    """Every violation, one line each; empty for a checkpoint that the runtimes can load and will compute right.

    Args:
        checkpoint: The opened files.
        recipe: The recipe they were made from: method, format, kind of second-level scale.

    Raises:
        UserError: A config file is missing or damaged.
    """
    if recipe.method is Method.bf16:
        return [*_dense_only(checkpoint), *_other_tensors(checkpoint, set())]
    modules = checkpoint.quantized_modules()
    owned = {f"{module}.{suffix}" for module in modules for suffix in DTYPES[recipe.quantize.format]}
    problems = [line for module in modules for line in _linear(checkpoint, module, recipe)]
    problems += _fused(checkpoint, set(modules))
    problems += _other_tensors(checkpoint, owned)
    problems += _configs(checkpoint, modules, recipe)
    return problems if modules else ["no quantized linear in the files", *problems]


def _linear(checkpoint: Checkpoint, module: str, recipe: Recipe) -> Iterator[str]:
    """Names, dtypes, shapes and scale values of one quantized linear."""
    expected, block = DTYPES[recipe.quantize.format], BLOCK[recipe.quantize.format]
    present = {s: checkpoint.entries[f"{module}.{s}"] for s in expected if f"{module}.{s}" in checkpoint.entries}
    yield from (f"{module}.{suffix} is missing" for suffix in expected.keys() - present.keys())
    for suffix, entry in present.items():
        if entry.dtype != expected[suffix]:
            yield f"{module}.{suffix} is {entry.dtype}, not {expected[suffix]}"
            return
    codes = present.get("weight") or present.get("weight_packed")
    if codes is None or "weight_scale" not in present:
        return
    if len(codes.shape) != 2 or (2 * codes.shape[1]) % block:
        yield f"{module}: codes have shape {list(codes.shape)}, not [N, K/2] with K a multiple of {block}"
        return
    grid = (codes.shape[0], 2 * codes.shape[1] // block)
    if present["weight_scale"].shape != grid:
        yield f"{module}.weight_scale has shape {list(present['weight_scale'].shape)}, not {list(grid)}"
    yield from _scale_codes(checkpoint, module, recipe.quantize.format)
    for suffix in SCALARS:
        if suffix in present:
            yield from _scalar(checkpoint, f"{module}.{suffix}", recipe.quantize.scale_2)


def _scale_codes(checkpoint: Checkpoint, module: str, number_format: Format) -> Iterator[str]:
    codes = checkpoint.raw(f"{module}.weight_scale")
    if number_format is Format.mxfp4:
        bad, rule = codes == 255, "NaN (E8M0 code 255)"
    else:
        # positive E4M3 codes in order: 0x01 is 2^-9, 0x7E is 448, 0x7F and 0xFF are NaN
        bad, rule = (codes < 0x01) | (codes > 0x7E), "outside [2^-9, 448]"
    if bad.any():
        yield f"{module}.weight_scale: {int(bad.sum())} of {bad.size} scales are {rule}, first at {_first(bad)}"


def _scalar(checkpoint: Checkpoint, name: str, kind: SecondScale) -> Iterator[str]:
    value = checkpoint.raw(name)
    if value.shape != ():
        yield f"{name} has shape {list(value.shape)}, not []"
    elif not (np.isfinite(value) and value > 0):
        yield f"{name} is {float(value)}, not a positive number"
    elif kind is SecondScale.pow2 and np.frexp(value)[0] != 0.5:
        yield f"{name} is {float(value)}, not a power of two (quantize.scale_2 = pow2)"


def _fused(checkpoint: Checkpoint, modules: set[str]) -> Iterator[str]:
    """Runtimes fuse q/k/v and gate/up into one GEMM with one second-level scale."""
    prefixes = {name.rsplit(".", 2)[0] for name in modules}
    for prefix in sorted(prefixes):
        for group in FUSED_GROUPS:
            members = [f"{prefix}.{part}" for part in group]
            quantized = [name for name in members if name in modules]
            if quantized and len(quantized) < len(members):
                yield f"{prefix}: only {', '.join(quantized)} of {', '.join(group)} are quantized; all or none must be"
            for suffix in SCALARS:
                names = [f"{name}.{suffix}" for name in quantized if f"{name}.{suffix}" in checkpoint.entries]
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


def _configs(checkpoint: Checkpoint, modules: list[str], recipe: Recipe) -> Iterator[str]:
    """The two quantization configs agree with each other, with the recipe and with the tensors."""
    number_format = recipe.quantize.format
    flat = checkpoint.config.get("quantization_config")
    if not isinstance(flat, dict):
        yield "config.json has no quantization_config: a server would load packed bytes as weights"
        return
    excluded = flat.get("ignore")
    if number_format is Format.mxfp4:
        yield from _same("config.json quantization_config.quant_method", flat.get("quant_method"), "compressed-tensors")
        yield from _same("config.json quantization_config.format", flat.get("format"), "mxfp4-pack-quantized")
    else:
        yield from _same("config.json quantization_config.quant_method", flat.get("quant_method"), "modelopt")
        yield from _same("config.json quantization_config.quant_algo", flat.get("quant_algo"), ALGORITHM[number_format])
        yield from _nested(checkpoint, number_format, excluded)
    yield from _groups(flat, number_format)
    if not isinstance(excluded, list):
        yield "config.json quantization_config.ignore is not a list"
        return
    yield from _exclusions(checkpoint, modules, excluded)


def _groups(flat: dict[str, Any], number_format: Format) -> Iterator[str]:
    groups = list((flat.get("config_groups") or {}).values())
    if len(groups) != 1:
        yield f"config.json quantization_config has {len(groups)} config_groups, not 1"
        return
    operands = ["weights"] if number_format is Format.w4a16_nvfp4 else ["weights", "input_activations"]
    given = [operand for operand in ("weights", "input_activations") if groups[0].get(operand)]
    yield from _same("config.json config_groups quantize", given, operands)
    for operand in given:
        for key, value in (("num_bits", 4), ("type", "float"), ("group_size", BLOCK[number_format])):
            yield from _same(f"config.json config_groups {operand}.{key}", groups[0][operand].get(key), value)


def _nested(checkpoint: Checkpoint, number_format: Format, ignore: Any) -> Iterator[str]:
    path = checkpoint.folder / "hf_quant_config.json"
    try:
        content = json.loads(path.read_bytes())
        nested, producer = content["quantization"], content["producer"]["name"]
        algorithm, size, excluded = nested["quant_algo"], nested["group_size"], nested["exclude_modules"]
        nested["kv_cache_quant_algo"]  # vLLM refuses a file without the key
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"hf_quant_config.json is missing, damaged or incomplete ({error!r})"
        return
    yield from _same("hf_quant_config.json producer.name", producer, "modelopt")
    yield from _same("hf_quant_config.json quant_algo", algorithm, ALGORITHM[number_format])
    yield from _same("hf_quant_config.json group_size", size, BLOCK[number_format])
    if excluded != ignore:
        yield f"hf_quant_config.json exclude_modules {excluded} and config.json ignore {ignore} differ"


def _exclusions(checkpoint: Checkpoint, modules: list[str], excluded: list[str]) -> Iterator[str]:
    """Quantized linears are not excluded, BF16 ones are, by exact name or fnmatch pattern."""
    for module in modules:
        # vLLM also excludes a module whose name merely contains an entry
        hits = [pattern for pattern in excluded if fnmatchcase(module, pattern) or pattern in module]
        if hits:
            yield f"{module} is quantized, but the configs exclude it by {hits[0]!r}"
    for name in checkpoint.names():
        entry, module = checkpoint.entries[name], name.removesuffix(".weight")
        listed = any(fnmatchcase(module, pattern) for pattern in excluded)
        if entry.dtype == "BF16" and len(entry.shape) == 2 and not listed:
            yield f"{module} is BF16, but the configs do not exclude it"


def _same(what: str, value: Any, expected: Any) -> Iterator[str]:
    if value != expected:
        yield f"{what} is {value!r}, not {expected!r}"


def _first(mask: np.ndarray) -> list[int]:
    return [int(i) for i in np.unravel_index(int(mask.argmax()), mask.shape)]
