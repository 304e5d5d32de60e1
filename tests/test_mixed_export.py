"""Checkpoints with FP8, and with several formats: names, dtypes, configs; what was written before them is unchanged."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.export import hf, reader
from halfbyte.export.pack import fake, module_name
from halfbyte.export.quantization_config import quantization_configs
from halfbyte.export.record import recipe_hash
from halfbyte.export.served import decoded_model
from halfbyte.export.verify import verify
from halfbyte.launch.check import export_bytes
from halfbyte.training import numerics
from halfbyte.training.config import Format, LayerFormat, Quantize, Recipe
from halfbyte.training.hf_map import HFWeight, expected_shapes
from halfbyte.training.kv_format import KVCache
from halfbyte.training.shape import read_shape

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 48,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
UNCHANGED = {
    ("nvfp4", "pow2"): "e6451e05ee32b2cb96cd339140f95080bef5d8c252be8380b33f4675d44ac27c",
    ("nvfp4", "amax"): "3d7bf00428086687033173680da7106cdc62f554eeba534942a299e0518a5a52",
    ("w4a16_nvfp4", "pow2"): "3e54f188953193f391c7c3a32b9dd3de3930014b4b24022f94c64b2d932d22de",
    ("w4a16_nvfp4", "amax"): "94545476ae84d550acf6df013b0da9ca50d91780ecfb944c6695c234b0a48d71",
    ("mxfp4", "pow2"): "46c5d455ab0fa996fdd137aec2033c2c0d933b8052ff18110c4ad66b92916760",
}
"""SHA-256 of the tensors and configs that the release before mixed plans wrote for `weights()`."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def weights(model_dir: Path) -> Iterator[HFWeight]:
    """A tiny model whose values come from integers alone, so that they are the same under any torch."""
    for number, (name, shape) in enumerate(expected_shapes(read_shape(model_dir / "config.json")).items()):
        size = int(np.prod(shape))
        mixed = (np.arange(size, dtype=np.uint64) + np.uint64(977 * number)) * np.uint64(2654435761) % np.uint64(2**24)
        tensor = torch.from_numpy((mixed.astype(np.float32) / 2**24 - 0.5) ** 3).reshape(shape) + (len(shape) == 1)
        linear = "_proj" in name
        yield HFWeight(name, tensor, linear, *([torch.tensor(0.125), torch.tensor(3.5)] if linear else []))


def export(model_dir: Path, out: Path, recipe: Recipe) -> reader.Checkpoint:
    hf.write(weights(model_dir), recipe, model_dir=model_dir, out=out, checkpoint="step_00000001", versions={})
    return reader.open_checkpoint(out)


def digest(checkpoint: reader.Checkpoint) -> str:
    """Over names, dtypes, shapes and bytes of all tensors, and both configs but for the producer's version."""
    hashed = hashlib.sha256()
    for name in checkpoint.names():
        entry = checkpoint.entries[name]
        hashed.update(f"{name} {entry.dtype} {entry.shape}".encode())
        hashed.update(checkpoint.raw(name).tobytes())
    for name in ("config.json", "hf_quant_config.json"):
        if (checkpoint.folder / name).exists():
            content = json.loads((checkpoint.folder / name).read_text())
            content.get("quantization_config", content).get("producer", {}).pop("version", None)
            hashed.update(json.dumps(content).encode())
    return hashed.hexdigest()


@pytest.mark.parametrize(("number_format", "scale_2"), UNCHANGED)
def test_single_format_exports_are_what_they_were(model_dir: Path, tmp_path: Path, number_format: str, scale_2: str):
    recipe = Recipe()
    recipe.quantize.format, recipe.quantize.scale_2 = Format(number_format), type(recipe.quantize.scale_2)(scale_2)
    assert digest(export(model_dir, tmp_path / "hf", recipe)) == UNCHANGED[number_format, scale_2]


# ---- several formats

MIX = {
    "model.layers.0.self_attn.*": LayerFormat.fp8,
    "*.1.self_attn.o_proj": LayerFormat.bf16,
    "model.layers.0.mlp.down_proj": LayerFormat.w4a16_nvfp4,
}
LINEARS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
OF_MIX: dict[str, str] = {f"model.layers.{layer}.{name}": "NVFP4" for layer in range(2) for name in LINEARS}
OF_MIX |= {f"model.layers.0.{name}": "FP8" for name in LINEARS[:4]}
OF_MIX |= {"model.layers.0.mlp.down_proj": "W4A16_NVFP4"}
del OF_MIX["model.layers.1.self_attn.o_proj"]
SERVED_MIX = {f"model.layers.{layer}.mlp.gate_up_proj": "NVFP4" for layer in range(2)}
SERVED_MIX |= {"model.layers.0.self_attn.qkv_proj": "FP8", "model.layers.1.self_attn.qkv_proj": "NVFP4"}
"""Linears that servers make of several, and what the configs say of them as well."""
DOWN, OUT, UP = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj", "model.layers.1.mlp.up_proj"


def mixed() -> Recipe:
    return Recipe(quantize=Quantize(layers=dict(MIX)))


def mixed_weights(model_dir: Path) -> list[HFWeight]:
    """As training hands them over: what the recipe leaves in BF16 is not quantized."""
    plan = {f"{name}.weight" for name in OF_MIX}
    return [w if w.name in plan or not w.quantized else HFWeight(w.name, w.tensor) for w in weights(model_dir)]


@pytest.fixture(scope="module")
def exported(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "hf"
    hf.write(mixed_weights(model_dir), mixed(), model_dir=model_dir, out=out, checkpoint="step_00000001", versions={})
    return out


@pytest.fixture
def out(exported: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(exported, tmp_path / "hf"))


def problems(out: Path, model_dir: Path, *, rehash: bool = True) -> str:
    """What verify finds; with `rehash` halfbyte.json vouches for the files, so that the tensors must give them away."""
    path = out / "halfbyte.json"
    record = json.loads(path.read_text())
    if rehash:
        files = [file for file in sorted(out.iterdir()) if file != path]
        record["files"] = {
            file.name: {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "bytes": file.stat().st_size}
            for file in files
        }
        path.write_text(json.dumps(record))
    report = verify(out, iter(mixed_weights(model_dir)), mixed())
    assert report["ok"] is not bool(report["problems"])
    return "\n".join(report["problems"])


def test_a_mix_is_written_as_each_format_is(exported: Path, model_dir: Path):
    checkpoint = reader.open_checkpoint(exported)
    suffixes = {
        "NVFP4": {"weight": "U8", "weight_scale": "F8_E4M3", "weight_scale_2": "F32", "input_scale": "F32"},
        "W4A16_NVFP4": {"weight": "U8", "weight_scale": "F8_E4M3", "weight_scale_2": "F32"},
        "FP8": {"weight": "F8_E4M3", "weight_scale": "F32", "input_scale": "F32"},
        None: {"weight": "BF16"},
    }
    for layer in range(2):
        for name in LINEARS:
            module = f"model.layers.{layer}.{name}"
            found = {n.removeprefix(f"{module}."): e.dtype for n, e in checkpoint.entries.items() if f"{module}." in n}
            assert found == suffixes[OF_MIX.get(module)]
    for weight in mixed_weights(model_dir):
        trained = fake(weight, mixed().quantize) if weight.quantized else weight.tensor.bfloat16().float()
        assert np.array_equal(checkpoint.decode(module_name(weight.name)), trained.numpy())
    shape = read_shape(model_dir / "config.json")
    assert export_bytes(mixed(), shape) == sum(checkpoint.raw(name).nbytes for name in checkpoint.names())
    record = json.loads((exported / "halfbyte.json").read_text())
    assert (record["format"], record["scale_2"]) == ("fp8+nvfp4+w4a16_nvfp4", "pow2")
    assert problems(exported, model_dir, rehash=False) == ""


def test_the_configs_name_every_layers_format(exported: Path):
    flat = json.loads((exported / "config.json").read_text())["quantization_config"]
    nested = json.loads((exported / "hf_quant_config.json").read_text())
    layers = {
        name: {"quant_algo": algorithm} | ({} if algorithm == "FP8" else {"group_size": 16})
        for name, algorithm in (OF_MIX | SERVED_MIX).items()
    }
    excluded = ["lm_head", "model.embed_tokens", "model.layers.1.self_attn.o_proj"]
    assert nested["quantization"] == {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": None,
        "exclude_modules": excluded,
        "quantized_layers": layers,
    }
    assert (flat["quant_method"], flat["quant_algo"], flat["ignore"]) == ("modelopt", "MIXED_PRECISION", excluded)
    assert flat["quantized_layers"] == layers
    targets = [name for group in flat["config_groups"].values() for name in group["targets"]]
    assert sorted(targets) == sorted(layers)


@pytest.mark.parametrize("cache", KVCache)
@pytest.mark.parametrize("formats", [["nvfp4"], ["w4a16_nvfp4"], ["fp8"], ["fp8", "nvfp4"], ["nvfp4", "w4a16_nvfp4"]])
def test_modelopt_turns_the_nested_shape_into_our_flat_one(formats: list[str], cache: KVCache):
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

    layers = {f"model.layers.{i}.mlp.down_proj": Format(formats[i % len(formats)]) for i in range(4)}
    flat, nested = quantization_configs(layers, ["lm_head"], cache)
    theirs = convert_hf_quant_config_format(nested)
    for config in (flat, theirs):  # the numbers of the groups mean nothing
        config["config_groups"] = sorted(config["config_groups"].values(), key=str)
    assert flat == theirs


def test_modelopt_describes_w4a8_as_we_do():
    """Its converter knows the format inside a mix only, so that is where it is asked."""
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

    flat, nested = quantization_configs({"a": Format.w4a8_nvfp4_fp8}, ["lm_head"], KVCache.none)
    mixed = {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": _algorithm(nested)}}
    theirs = convert_hf_quant_config_format({"producer": nested["producer"], "quantization": mixed})
    assert flat["config_groups"]["group_0"] | {"targets": ["a"]} == theirs["config_groups"]["group_0"]


def _algorithm(nested: dict) -> dict:
    return {key: nested["quantization"][key] for key in ("quant_algo", "group_size")}


def test_mxfp4_in_a_mix_has_no_shape():
    with pytest.raises(ValueError, match="no runtime reads this mix: fp8, mxfp4"):
        quantization_configs({"a": Format.mxfp4, "b": Format.fp8}, [], KVCache.none)
    with pytest.raises(ValueError, match="no runtime reads this mix: nvfp4, w4a8_nvfp4_fp8"):
        quantization_configs({"a": Format.w4a8_nvfp4_fp8, "b": Format.nvfp4}, [], KVCache.none)


def test_a_cache_beside_mxfp4_has_no_shape():
    with pytest.raises(ValueError, match="no runtime is known to read a fp8 cache beside MXFP4"):
        quantization_configs({"a": Format.w4a16_mxfp4}, [], KVCache.fp8)


def test_weight_only_mxfp4_names_no_activations():
    flat, nested = quantization_configs({"a": Format.w4a16_mxfp4}, ["lm_head"], KVCache.none)
    both, _ = quantization_configs({"a": Format.mxfp4}, ["lm_head"], KVCache.none)
    assert nested is None
    assert both["config_groups"]["group_0"].pop("input_activations")["dynamic"] is True
    assert flat["config_groups"]["group_0"].pop("input_activations") is None
    assert flat == both  # nothing else differs


@pytest.mark.parametrize("tensor", [f"{OUT}.weight", f"{OUT}.weight_scale", f"{OUT}.input_scale", f"{UP}.weight"])
@pytest.mark.parametrize("bit", [0, 6, 7])
def test_one_flipped_bit_is_found(out: Path, model_dir: Path, tensor: str, bit: int):
    entry = reader.open_checkpoint(out).entries[tensor]
    content = bytearray(entry.file.read_bytes())
    content[entry.offset] ^= 1 << bit
    entry.file.write_bytes(content)
    assert f"{tensor} (stored): 1 of" in problems(out, model_dir) or f"{tensor}: 1 of" in problems(out, model_dir)


def test_broken_rules_are_named(out: Path, model_dir: Path):
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight_scale"] *= 2
    tensors["model.layers.0.self_attn.k_proj.input_scale"] *= -1
    tensors[f"{OUT}.weight"].view(torch.uint8)[3, 1] = 0xFF
    tensors[f"{OUT}.input_scale"] = tensors[f"{OUT}.input_scale"].reshape(1)
    tensors[f"{DOWN}.input_scale"] = torch.tensor(1.0)
    del tensors["model.layers.0.self_attn.v_proj.weight_scale"]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    found = problems(out, model_dir)
    assert "weight_scale differs inside one fused layer: model.layers.0.self_attn.q_proj.weight_scale = " in found
    assert "k_proj.input_scale is -0.0078125, not a positive number" in found
    assert f"{OUT}.weight: 1 of 1024 codes are NaN, first at [3, 1]" in found
    assert f"{OUT}.input_scale has shape [1], not []" in found
    assert f"{DOWN}.input_scale is F32 but belongs to no quantized linear" in found
    assert "model.layers.0.self_attn.v_proj.weight is F8_E4M3 but belongs to no quantized linear" in found
    assert "only model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj of" in found


@pytest.mark.parametrize(
    ("file", "keys", "value", "words"),
    [
        ("config.json", ["quantization_config", "quant_algo"], "NVFP4", "quant_algo is 'NVFP4', not 'MIXED_PRECISION'"),
        (
            "config.json",
            ["quantization_config", "quantized_layers", OUT, "quant_algo"],
            "NVFP4",
            f"quantized_layers has {{'quant_algo': 'NVFP4'}} for {OUT}, not {{'quant_algo': 'FP8'}}",
        ),
        ("config.json", ["quantization_config", "quantized_layers"], None, "quantized_layers is None, not"),
        (
            "config.json",
            ["quantization_config", "config_groups", "group_1"],
            {},
            "no group's targets are the 11 of nvfp4",
        ),
        ("config.json", ["quantization_config", "config_groups", "group_0", "weights", "num_bits"], 4, "is 4, not 8"),
        ("config.json", ["quantization_config", "ignore"], [OUT], f"{OUT} is quantized, but the configs exclude it"),
        ("hf_quant_config.json", ["quantization", "quantized_layers", UP], {}, f"quantized_layers has {{}} for {UP}"),
        ("hf_quant_config.json", ["quantization", "quant_algo"], "FP8", "quant_algo is 'FP8', not 'MIXED_PRECISION'"),
    ],
)
def test_configs_that_disagree(out: Path, model_dir: Path, file: str, keys: list[str], value: object, words: str):
    content = json.loads((out / file).read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (out / file).write_text(json.dumps(content))
    assert words in problems(out, model_dir)


def test_a_checkpoint_of_another_plan_does_not_verify(exported: Path, model_dir: Path):
    other = Recipe(quantize=Quantize(layers=MIX | {"model.layers.0.self_attn.*": LayerFormat.nvfp4}))
    found = "\n".join(verify(exported, iter(mixed_weights(model_dir)), other)["problems"])
    assert "model.layers.0.self_attn.q_proj.weight is F8_E4M3, not U8" in found
    assert "quantized_layers has" in found


def test_the_decoded_model_rounds_each_input_as_its_layer_does(exported: Path, model_dir: Path):
    model, x = decoded_model(exported), 4 * torch.randn(5, 32)
    for module, scale in ((OUT, torch.tensor(3.5) / 448), (UP, torch.tensor(2.0**-9))):
        weight = next(fake(w, mixed().quantize) for w in mixed_weights(model_dir) if w.name == f"{module}.weight")
        rounded = numerics.fake_quantize(x, Format.fp8 if module == OUT else Format.nvfp4, scale)
        assert torch.equal(model.get_submodule(module)(x), torch.nn.functional.linear(rounded, weight))
    y = torch.randn(5, 64)
    weight = next(fake(w, mixed().quantize) for w in mixed_weights(model_dir) if w.name == f"{DOWN}.weight")
    assert torch.equal(model.get_submodule(DOWN)(y), torch.nn.functional.linear(y, weight))  # weights only


def test_the_order_of_the_patterns_is_part_of_the_recipes_hash():
    turned = Recipe(quantize=Quantize(layers=dict(reversed(MIX.items()))))
    assert recipe_hash(turned) != recipe_hash(mixed()) == recipe_hash(mixed())
