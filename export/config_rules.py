"""The quantization configs of a checkpoint, checked on the files: with each other, with the recipe, with the tensors.

Shares no code with what wrote them (export/quantization_config.py): what is expected is stated here a second time.
"""

import json
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from halfbyte.export.reader import Checkpoint
from halfbyte.training.config import Format
from halfbyte.training.kv_format import KVCache

ALGORITHM = {
    Format.nvfp4: {"quant_algo": "NVFP4", "group_size": 16},
    Format.w4a16_nvfp4: {"quant_algo": "W4A16_NVFP4", "group_size": 16},
    Format.w4a8_nvfp4_fp8: {"quant_algo": "W4A8_NVFP4_FP8", "group_size": 32},
    Format.fp8: {"quant_algo": "FP8"},
}
"""A format as ModelOpt's readers know it."""
FP4_16, FP4_32, FP8 = (
    {"num_bits": bits, "type": "float", "group_size": size} for bits, size in [(4, 16), (4, 32), (8, None)]
)
OPERANDS = {
    Format.nvfp4: {"weights": FP4_16, "input_activations": FP4_16},
    Format.w4a16_nvfp4: {"weights": FP4_16},
    Format.w4a8_nvfp4_fp8: {"weights": FP4_32, "input_activations": FP8},
    Format.mxfp4: {"weights": FP4_32, "input_activations": FP4_32},
    Format.w4a16_mxfp4: {"weights": FP4_32},
    Format.fp8: {"weights": FP8, "input_activations": FP8},
}
"""What a config group says about the elements of each operand that is quantized."""
MIXED = {Format.nvfp4, Format.w4a16_nvfp4, Format.fp8}
"""Formats that runtimes read beside each other."""
SERVED_AS = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
"""First member of what servers hold as one linear -> its name there: a server may look for that name alone."""

CACHES = {
    KVCache.none: (None, None),
    KVCache.fp8: ("FP8", {"dynamic": False, "num_bits": 8, "type": "float"}),
    KVCache.nvfp4: ("NVFP4", "NVFP4"),
}
"""The cache's format in hf_quant_config.json (kv_cache_quant_algo) and in config.json (kv_cache_scheme)."""


def broken_configs(checkpoint: Checkpoint, formats: dict[str, Format], cache: KVCache) -> Iterator[str]:
    """Every contradiction, one line each.

    Args:
        checkpoint: The opened files.
        formats: Module name -> format of every quantized linear.
        cache: Format of the key/value cache.
    """
    flat = checkpoint.config.get("quantization_config")
    if not isinstance(flat, dict):
        yield "config.json has no quantization_config: a server would load packed bytes as weights"
        return
    excluded, distinct = flat.get("ignore"), set(formats.values())
    if len(distinct) > 1 and not distinct <= MIXED:
        alone = ", ".join(sorted(distinct - MIXED))
        yield f"formats are {', '.join(sorted(distinct))}: no runtime reads {alone} in a mix"
        return
    if distinct and not distinct <= ALGORITHM.keys():
        yield from _same("config.json quantization_config.quant_method", flat.get("quant_method"), "compressed-tensors")
        yield from _same("config.json quantization_config.format", flat.get("format"), "mxfp4-pack-quantized")
    else:
        layers = {module: ALGORITHM[number_format] for module, number_format in _and_as_served(formats).items()}
        mixed = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
        expected = mixed if len(distinct) > 1 else dict(next(iter(layers.values()), {}))
        yield from _same("config.json quantization_config.quant_method", flat.get("quant_method"), "modelopt")
        for key in ("quant_algo", "quantized_layers"):
            yield from _same(f"config.json quantization_config.{key}", flat.get(key), expected.get(key))
        yield from _nested(checkpoint, expected | {"kv_cache_quant_algo": CACHES[cache][0]}, excluded)
    yield from _same("config.json quantization_config.kv_cache_scheme", flat.get("kv_cache_scheme"), CACHES[cache][1])
    yield from _groups(flat, formats)
    if not isinstance(excluded, list) or not all(isinstance(pattern, str) for pattern in excluded):
        yield "config.json quantization_config.ignore is not a list of names"
        return
    yield from _exclusions(checkpoint, list(formats), excluded)


def _groups(flat: dict[str, Any], formats: dict[str, Format]) -> Iterator[str]:
    """One group per format, aimed at all linears or, in a mix, at exactly the linears of its format."""
    groups = [_mapping(group) for group in _mapping(flat.get("config_groups")).values()]
    distinct = sorted(set(formats.values()))
    if len(groups) != len(distinct):
        yield f"config.json quantization_config has {len(groups)} config_groups, not {len(distinct)}"
        return
    named = _and_as_served(formats)
    for number_format in distinct:
        members = sorted(name for name in named if named[name] is number_format)
        targets = members if len(distinct) > 1 else ["Linear"]
        group = next((group for group in groups if group.get("targets") == targets), None)
        if group is None:
            yield f"config.json config_groups: no group's targets are the {len(targets)} of {number_format}"
            continue
        operands = OPERANDS[number_format]
        given = [operand for operand in ("weights", "input_activations") if group.get(operand)]
        yield from _same("config.json config_groups quantize", given, list(operands))
        for operand in operands.keys() & set(given):
            for key, value in operands[operand].items():
                found = _mapping(group[operand]).get(key)
                yield from _same(f"config.json config_groups {operand}.{key}", found, value)


def _mapping(value: Any) -> dict[str, Any]:
    """The value if it is a JSON object, else an empty one: a file may hold anything."""
    return value if isinstance(value, dict) else {}


def _nested(checkpoint: Checkpoint, expected: dict[str, Any], ignore: Any) -> Iterator[str]:
    path = checkpoint.folder / "hf_quant_config.json"
    try:
        content = json.loads(path.read_bytes())
        nested, producer = content["quantization"], content["producer"]["name"]
        found = {key: nested[key] for key in expected}  # also a null: vLLM refuses a file without kv_cache_quant_algo
        excluded = nested["exclude_modules"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        yield f"hf_quant_config.json is missing, damaged or incomplete ({error!r})"
        return
    yield from _same("hf_quant_config.json producer.name", producer, "modelopt")
    for key, value in expected.items():
        yield from _same(f"hf_quant_config.json {key}", found[key], value)
    if excluded != ignore:
        yield f"hf_quant_config.json exclude_modules {excluded} and config.json ignore {ignore} differ"


def _exclusions(checkpoint: Checkpoint, modules: list[str], excluded: list[str]) -> Iterator[str]:
    """Quantized linears are not excluded, BF16 ones are, by exact name or fnmatch pattern."""
    for module in _and_as_served(dict.fromkeys(modules)):
        # vLLM also excludes a module whose name merely contains an entry
        hits = [pattern for pattern in excluded if fnmatchcase(module, pattern) or pattern in module]
        if hits:
            yield f"{module} is quantized, but the configs exclude it by {hits[0]!r}"
    for name in checkpoint.names():
        entry, module = checkpoint.entries[name], name.removesuffix(".weight")
        if entry.dtype == "BF16" and len(entry.shape) == 2:
            for served in _and_as_served({module: None}):
                if not any(fnmatchcase(served, pattern) for pattern in excluded):
                    yield f"{served} is BF16, but the configs do not exclude it"


def _and_as_served(modules: dict[str, Any]) -> dict[str, Any]:
    """Modules with what is said of them, and the same of the linears that servers make of q, k, v and of gate, up."""
    parts = [(*module.rpartition("."), said) for module, said in modules.items()]
    return modules | {f"{parent}.{SERVED_AS[name]}": said for parent, _, name, said in parts if name in SERVED_AS}


def _same(what: str, value: Any, expected: Any) -> Iterator[str]:
    """One line if a value is not as expected; of two mappings, their first differing entry."""
    if isinstance(value, dict) and isinstance(expected, dict):
        differing = sorted(name for name in value.keys() | expected.keys() if value.get(name) != expected.get(name))
        for name in differing[:1]:
            more = f" ({len(differing)} entries differ)" if len(differing) > 1 else ""
            yield f"{what} has {value.get(name)!r} for {name}, not {expected.get(name)!r}{more}"
    elif value != expected:
        yield f"{what} is {value!r}, not {expected!r}"
