"""What servers read from an export's configs, by the rules of their loaders.

The rules are stated here from the loaders' source (docs/evidence/export.md names the files and versions); the servers
themselves are not installed.
"""

import json
import re
from fnmatch import fnmatch, fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from halfbyte.export.convert import convert
from halfbyte.training.choices import Container
from halfbyte.training.config import Format, LayerFormat, Recipe
from halfbyte.training.kv_format import KVCache
from halfbyte.training.shape import layer_format

from .export_tools import LLAMA, LLAMA3_SCALED, QWEN3, export, recipe


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def rope_of_transformers_4(config: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """LlamaConfig, MistralConfig, Qwen2Config and Qwen3Config of transformers 4.57: what is not given has a default."""
    return config.get("rope_theta", 10000.0), config.get("rope_scaling")


@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, None),
        ({"rope_parameters": LLAMA3_SCALED | {"rope_theta": 1e5}}, LLAMA3_SCALED),
        ({"rope_theta": 1e5}, None),
        ({"rope_theta": 1e5, "rope_scaling": LLAMA3_SCALED}, LLAMA3_SCALED),
    ],
)
def test_transformers_4_and_5_read_the_same_rotation(tmp_path: Path, rope: dict[str, Any], scaling: dict | None):
    out = export(tmp_path, LLAMA | rope, recipe())
    convert(out, Container.compressed_tensors, tmp_path / "ct", ranks=1)
    convert(out, Container.dequantized, tmp_path / "dense", ranks=1)
    for folder in (out, tmp_path / "ct", tmp_path / "dense"):
        config = config_of(folder)
        assert rope_of_transformers_4(config) == (1e5, scaling)
        config.pop("quantization_config", None)
        assert AutoConfig.for_model(**config).rope_parameters == {"rope_type": "default", "rope_theta": 1e5} | (
            scaling or {}
        )


MEMBERS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
ALGORITHMS = {None: None, Format.nvfp4: "NVFP4", Format.w4a16_nvfp4: "W4A16_NVFP4", Format.fp8: "FP8"}
TWELVE = {"num_hidden_layers": 12}  # so that a name of layer 1 is the beginning of others
SERVED = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


def members_of(name: str) -> list[str]:
    parent, _, last = name.rpartition(".")
    return [f"{parent}.{member}" for member in MEMBERS.get(last, (last,))]


def built_by_vllm(section: dict[str, Any], name: str) -> str | None:
    """ModelOptQuantConfigBase.is_layer_excluded and ModelOptMixedPrecisionConfig._resolve_quant_algo."""
    ignored = section["ignore"]
    (all_ignored,) = {member in ignored for member in members_of(name)}  # some and not all of them is an error
    if all_ignored or any(entry in name or fnmatch(name, entry) for entry in ignored):
        return None
    if section["quant_algo"] != "MIXED_PRECISION":
        return section["quant_algo"]
    layers = section["quantized_layers"]
    given = [name] if name in layers else [member for member in members_of(name) if member in layers]
    (algorithm,) = {layers[key]["quant_algo"] for key in given} or {None}
    return algorithm


def built_by_sglang(section: dict[str, Any], name: str) -> str | None:
    """ModelOptQuantConfig.is_layer_excluded, ModelOptMixedPrecisionConfig._resolve_quant_algo; packed_modules_mapping
    is empty for its dense models."""
    patterns = [entry.replace(".", r"\.").replace("*", ".*") for entry in section["ignore"]]
    if any(re.fullmatch(pattern, part) for pattern in patterns for part in (name, *name.split("."))):
        return None
    if section["quant_algo"] != "MIXED_PRECISION":
        return section["quant_algo"]
    layers = section["quantized_layers"]
    below = next((info for key, info in layers.items() if key.startswith(f"{name}.")), {})
    return layers.get(name, below).get("quant_algo")


def built_by_tensorrt_llm(section: dict[str, Any], name: str) -> str | None:
    """DecoderModelForCausalLM.__post_init__ before it looked for the members of a fused linear in exclude_modules."""
    if any(fnmatchcase(name, entry) for entry in section["exclude_modules"]):
        return None
    if section["quant_algo"] != "MIXED_PRECISION":
        return section["quant_algo"]
    first, *others = members_of(name)
    hits = (info for key, info in section["quantized_layers"].items() if (first in key if others else name == key))
    return next(hits, {}).get("quant_algo")


def partly(number_format: Format) -> Recipe:
    run = recipe(number_format)
    run.quantize.exclude += ["model.layers.1.self_attn.[qkv]_proj", "model.layers.11.mlp.[gu]*"]
    return run


def mixed() -> Recipe:
    run = recipe()
    run.quantize.layers = {
        "model.layers.1.mlp.[gu]*": LayerFormat.bf16,
        "*.self_attn.*": LayerFormat.fp8,
        "*.1*.mlp.down_proj": LayerFormat.w4a16_nvfp4,
    }
    return run


@pytest.mark.parametrize("config", [LLAMA | TWELVE, QWEN3 | TWELVE], ids=["llama", "qwen3"])
@pytest.mark.parametrize(
    "run", [partly(Format.nvfp4), partly(Format.w4a16_nvfp4), partly(Format.fp8), mixed()], ids=lambda run: "plan"
)
def test_every_server_builds_each_linear_as_the_files_hold_it(tmp_path: Path, config: dict[str, Any], run: Recipe):
    out = export(tmp_path, config, run)
    flat = config_of(out)["quantization_config"]
    nested = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    for layer in range(config["num_hidden_layers"]):
        for name in (f"model.layers.{layer}.{part}" for part in SERVED):
            (held,) = {layer_format(member, run.quantize) for member in members_of(name)}
            assert built_by_vllm(flat, name) == ALGORITHMS[held], name
            assert built_by_sglang(flat, name) == ALGORITHMS[held], name
            assert built_by_tensorrt_llm(nested, name) == ALGORITHMS[held], name
    assert {built(flat, "lm_head") for built in (built_by_vllm, built_by_sglang)} == {None}
    assert built_by_tensorrt_llm(nested, "lm_head") is None


@pytest.mark.parametrize(
    ("number_format", "container", "rounds_inputs"),
    [
        (Format.mxfp4, None, True),
        (Format.w4a16_mxfp4, None, False),
        (Format.nvfp4, Container.compressed_tensors, True),
        (Format.w4a16_nvfp4, Container.compressed_tensors, False),
    ],
)
def test_vllm_finds_a_scheme_for_compressed_tensors(
    tmp_path: Path, number_format: Format, container: Container | None, rounds_inputs: bool
):
    """CompressedTensorsConfig._is_nvfp4_format, _is_mxfp4, and its kv_cache_scheme."""
    cache = KVCache.none if container is None else KVCache.fp8
    out = export(tmp_path, LLAMA, recipe(number_format, cache))
    if container is not None:
        convert(out, container, tmp_path / "other", ranks=1)
    section = config_of(out if container is None else tmp_path / "other")["quantization_config"]
    (group,) = section["config_groups"].values()
    elements = {"num_bits": 4, "type": "float", "symmetric": True}
    elements |= (
        {"strategy": "group", "group_size": 32} if container is None else {"strategy": "tensor_group", "group_size": 16}
    )
    for operand in ("weights", "input_activations") if rounds_inputs else ("weights",):
        assert elements.items() <= group[operand].items()
    assert rounds_inputs or group["input_activations"] is None
    if container is not None:
        scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
        assert scheme.items() <= section["kv_cache_scheme"].items()
