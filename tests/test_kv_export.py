"""The scales of a quantized key/value cache in an export: names, values, configs, and what verify finds."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.export import hf
from halfbyte.export.decode import write_decoded
from halfbyte.export.served import decoded_model
from halfbyte.export.verify import verify
from halfbyte.launch.check import export_bytes
from halfbyte.training.config import Method, Quantize, Recipe
from halfbyte.training.errors import UserError
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
    "head_dim": 16,
    "vocab_size": 48,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
AMAX = {"model.layers.0.self_attn.k_proj": 3.0, "model.layers.1.self_attn.k_proj": 0.7} | {
    f"model.layers.{layer}.self_attn.v_proj": 0.25 for layer in range(2)
}
EXCLUDED = "model.layers.1.self_attn.*"
"""Stays BF16, and its cache is quantized all the same."""


def recipe(cache: KVCache) -> Recipe:
    return Recipe(quantize=Quantize(kv_cache=cache, exclude=["lm_head", EXCLUDED]))


def trained(folder: Path, cache: KVCache) -> list[HFWeight]:
    generator, weights = torch.Generator().manual_seed(3), []
    for name, size in expected_shapes(read_shape(folder / "config.json")).items():
        tensor = torch.randn(*size, generator=generator) * 0.3 + (len(size) == 1)
        module = name.removesuffix(".weight")
        quantized = "_proj" in name and not module.startswith(EXCLUDED[:-1])
        maxima = [torch.tensor(1.6), torch.tensor(4.0)] if quantized else [None, None]
        cached = AMAX.get(module) if cache is not KVCache.none else None
        weights.append(HFWeight(name, tensor, quantized, *maxima, None if cached is None else torch.tensor(cached)))
    return weights


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    (source / "config.json").write_text(json.dumps(CONFIG))
    (source / "tokenizer.json").write_text("{}")
    folders = {}
    for cache in KVCache:
        folders[cache] = tmp_path_factory.mktemp("run") / "hf"
        sizes = hf.write(
            trained(source, cache), recipe(cache), model_dir=source, out=folders[cache], checkpoint="c", versions={}
        )
        assert sizes["bytes_after"] == export_bytes(recipe(cache), read_shape(source / "config.json"))
    return folders


def verified(exports, cache: KVCache, out: Path | None = None) -> dict:
    return verify(out or exports[cache], iter(trained(exports[cache], cache)), recipe(cache))


@pytest.mark.parametrize("cache", KVCache)
def test_names_values_and_configs(exports, cache):
    tensors = load_file(exports[cache] / "model.safetensors")
    scales = {name: value for name, value in tensors.items() if name.endswith(("k_scale", "v_scale"))}
    expected = {} if cache is KVCache.none else {f"{m}.{m[-6]}_scale": np.float32(a) / 448 for m, a in AMAX.items()}
    assert {name: value.item() for name, value in scales.items()} == expected
    assert all(value.dtype is torch.float32 and value.shape == () for value in scales.values())
    nested = json.loads((exports[cache] / "hf_quant_config.json").read_text())["quantization"]
    flat = json.loads((exports[cache] / "config.json").read_text())["quantization_config"]
    assert nested["kv_cache_quant_algo"] == {"none": None, "fp8": "FP8", "nvfp4": "NVFP4"}[cache]
    schemes = {"none": None, "fp8": {"dynamic": False, "num_bits": 8, "type": "float"}, "nvfp4": "NVFP4"}
    assert flat.get("kv_cache_scheme") == schemes[cache]
    assert json.loads((exports[cache] / "halfbyte.json").read_text())["kv_cache"] == cache
    assert verified(exports, cache)["problems"] == []


def test_what_the_files_are_decoded_with(exports, tmp_path):
    scales = write_decoded(exports[KVCache.fp8], tmp_path / "decoded")
    assert {name: value for name, value in scales.items() if not name.endswith("input_scale")} == {
        f"{module}.{module[-6]}_scale": np.float32(amax) / 448 for module, amax in AMAX.items()
    }
    assert not any(name.endswith("scale") for name in load_file(tmp_path / "decoded" / "model.safetensors"))


NAME = "model.layers.1.self_attn.k_proj.k_scale"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors[NAME].mul_(1.0000002), f"{NAME}: 1 of 1 values differ from the trained model"),
        (lambda tensors: tensors.pop(NAME), f"{NAME} is missing"),
        (lambda tensors: tensors.update({NAME: tensors[NAME].bfloat16()}), f"{NAME} is BF16, not F32"),
        (lambda tensors: tensors.update({NAME: tensors[NAME].reshape(1)}), rf"{NAME} has shape [1], not []"),
        (lambda tensors: tensors[NAME].zero_(), f"{NAME} is 0.0, not a positive number"),
    ],
)
def test_damaged_scales_are_found(exports, tmp_path, change, message):
    out = Path(shutil.copytree(exports[KVCache.fp8], tmp_path / "hf"))
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert message in "\n".join(verified(exports, KVCache.fp8, out)["problems"])


@pytest.mark.parametrize("file", ["hf_quant_config.json", "config.json"])
def test_configs_that_deny_the_cache_are_found(exports, tmp_path, file):
    out = Path(shutil.copytree(exports[KVCache.nvfp4], tmp_path / "hf"))
    shutil.copyfile(exports[KVCache.none] / file, out / file)
    key = "kv_cache_quant_algo" if file.startswith("hf") else "kv_cache_scheme"
    assert f"{key} is None, not 'NVFP4'" in "\n".join(verified(exports, KVCache.nvfp4, out)["problems"])


def test_scales_without_a_quantized_cache_are_found(exports):
    report = verify(exports[KVCache.fp8], iter(trained(exports[KVCache.none], KVCache.none)), recipe(KVCache.none))
    assert f"{NAME} is F32 but belongs to no quantized linear; only BF16 may stand alone" in report["problems"]
    assert "config.json quantization_config.kv_cache_scheme is" in "\n".join(report["problems"])


def test_a_cache_that_was_zero_cannot_be_exported(exports, tmp_path):
    weights = [
        HFWeight(weight.name, weight.tensor, weight.quantized, weight.weight_amax, weight.input_amax, torch.tensor(0.0))
        for weight in trained(exports[KVCache.none], KVCache.none)
        if weight.name == f"{NAME.removesuffix('.k_scale')}.weight"
    ]
    run = Recipe(method=Method.bf16)
    with pytest.raises(UserError, match="its part of the cache was zero on all calibration data"):
        hf.write(weights, run, model_dir=exports[KVCache.none], out=tmp_path / "hf", checkpoint="c", versions={})


@pytest.mark.slow  # imports transformers' models
@pytest.mark.parametrize("cache", [KVCache.fp8, KVCache.nvfp4])
def test_the_decoded_model_rounds_what_it_caches_in_scoring_and_in_generation(exports, cache):
    tokens = torch.randint(1, 48, (2, 12), generator=torch.Generator().manual_seed(5))
    model, plain = decoded_model(exports[cache]), decoded_model(exports[KVCache.none])
    assert not torch.allclose(model(tokens).logits, plain(tokens).logits, atol=1e-3)
    for layer, stored in enumerate(model(tokens).past_key_values.layers):
        for x, name in ((stored.keys, "k_proj.k_scale"), (stored.values, "v_proj.v_scale")):
            scale = np.float32(AMAX[f"model.layers.{layer}.self_attn.{name[:6]}"]) / np.float32(448)
            blocks = (x.double() / float(scale)).reshape(-1, 16 if cache is KVCache.nvfp4 else 1)
            if cache is KVCache.fp8:
                assert torch.allclose(blocks.float().to(torch.float8_e4m3fn).double(), blocks, rtol=1e-6)
            else:  # at most eight magnitudes in a block
                assert max(len(block.abs().round(decimals=6).unique()) for block in blocks) <= 8
    model.generation_config.eos_token_id = None
    answer = model.generate(tokens[:, :5], max_new_tokens=6, do_sample=False, pad_token_id=0)
    for length in range(5, 11):  # without a cache that was filled before
        assert torch.equal(model(answer[:, :length]).logits[:, -1].argmax(-1), answer[:, length])
