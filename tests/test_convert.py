"""Conversions of a quantized checkpoint: what other programs read in them, refusals, and damage that is found."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from export_tools import LLAMA, QWEN3, UNTIED, export, random_weights, recipe
from safetensors.torch import load_file, save_file

from halfbyte.export.container import TensorFile
from halfbyte.export.convert import convert
from halfbyte.export.converted import check
from halfbyte.export.reader import open_checkpoint
from halfbyte.export.record import file_hash
from halfbyte.export.served import decoded_model
from halfbyte.export.source import cache_of, formats_of
from halfbyte.export.verify import verify
from halfbyte.launch.export import export_as
from halfbyte.training.choices import Container
from halfbyte.training.config import Format, LayerFormat, SecondScale
from halfbyte.training.errors import RecipeError, UserError
from halfbyte.training.kv_format import KVCache
from halfbyte.training.resolve import resolve


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("nvfp4"), UNTIED, recipe(cache=KVCache.fp8))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(1, 25).view(2, 12)).logits


# ---- what other programs read


@pytest.mark.parametrize("config", [LLAMA, QWEN3], ids=["llama", "qwen3"])
@pytest.mark.parametrize("scale_2", list(SecondScale))
def test_compressed_tensors_decompresses_it(tmp_path: Path, config: dict, scale_2: SecondScale):
    run = recipe(Format.w4a16_nvfp4)
    run.quantize.scale_2, run.export.shard_gb = scale_2, 3e-5
    source = export(tmp_path, config, run)
    made = convert(source, Container.compressed_tensors, tmp_path / "ct", ranks=1)
    assert made["files"] == len(list(source.glob("*.safetensors"))) > 1
    # transformers runs it through compressed-tensors: a second program computes with our bytes
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    at_once = CompressedTensorsConfig(run_compressed=False)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", quantization_config=at_once)
    torch.nn.Module.float(theirs)  # the package decompresses to BF16
    ours = logits(decoded_model(source))
    tolerance = 1e-5 if scale_2 is SecondScale.pow2 else 2e-2
    torch.testing.assert_close(logits(theirs), ours, rtol=0, atol=tolerance * float(ours.abs().max()))


def test_compressed_tensors_keeps_codes_and_inverts_scales(exported: Path, tmp_path: Path):
    convert(exported, Container.compressed_tensors, tmp_path / "ct", ranks=1)
    ours, theirs = load_file(exported / "model.safetensors"), load_file(tmp_path / "ct" / "model.safetensors")
    down, attention = "model.layers.1.mlp.down_proj", "model.layers.1.self_attn"
    assert torch.equal(theirs[f"{down}.weight_packed"], ours[f"{down}.weight"])
    assert theirs[f"{down}.weight_scale"].dtype == torch.float8_e4m3fn
    assert theirs[f"{down}.weight_global_scale"].tolist() == [1 / ours[f"{down}.weight_scale_2"].item()]
    assert theirs[f"{down}.input_global_scale"].tolist() == [1 / ours[f"{down}.input_scale"].item()]
    assert theirs[f"{attention}.k_scale"].tolist() == [ours[f"{attention}.k_proj.k_scale"].item()]
    section = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert (section["quant_method"], section["format"]) == ("compressed-tensors", "nvfp4-pack-quantized")
    assert section["ignore"] == ["lm_head", "model.embed_tokens"]
    assert section["kv_cache_scheme"]["num_bits"] == 8
    assert section["config_groups"]["group_0"]["input_activations"]["dynamic"] == "local"


@pytest.mark.parametrize("number_format", [Format.w4a16_nvfp4, Format.w4a16_mxfp4])
def test_transformers_computes_the_same_from_dequantized(tmp_path: Path, number_format: Format):
    from transformers import AutoModelForCausalLM

    source = export(tmp_path, UNTIED, recipe(number_format))
    convert(source, Container.dequantized, tmp_path / "bf16", ranks=1)
    assert {t.dtype for t in load_file(tmp_path / "bf16" / "model.safetensors").values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.float32)
    assert torch.equal(logits(model), logits(decoded_model(source)))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_engine_checkpoint_of_each_rank(exported: Path, tmp_path: Path, ranks: int, tied: bool):
    source = export(tmp_path, LLAMA, recipe()) if tied else exported
    ours = load_file(source / "model.safetensors")
    convert(source, Container.trtllm, tmp_path / "b", ranks=ranks)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["mapping"] == {"world_size": ranks, "tp_size": ranks, "pp_size": 1}
    assert config["quantization"]["kv_cache_quant_algo"] == (None if tied else "FP8")
    assert (config["head_size"], config["vocab_size"], config["norm_epsilon"]) == (16, 48, 1e-5)
    layer, theirs = "model.layers.1.", "transformer.layers.1."
    for rank in range(ranks):
        part = load_file(tmp_path / "b" / f"rank{rank}.safetensors")

        def of(name: str, axis: int = 0, rank=rank) -> torch.Tensor:
            return ours[name].view(torch.uint8).chunk(ranks, axis)[rank]

        qkv = torch.cat([of(f"{layer}self_attn.{name}_proj.weight") for name in "qkv"])
        assert torch.equal(part[f"{theirs}attention.qkv.weight"], qkv)
        scales = part[f"{theirs}mlp.proj.weights_scaling_factor"]
        assert scales.dtype == torch.float8_e4m3fn
        assert torch.equal(scales.view(torch.uint8), of(f"{layer}mlp.down_proj.weight_scale", 1))
        assert torch.equal(part[f"{theirs}mlp.fc.weight"], of(f"{layer}mlp.gate_proj.weight"))
        assert torch.equal(part[f"{theirs}mlp.gate.weight"], of(f"{layer}mlp.up_proj.weight"))
        assert part[f"{theirs}mlp.gate.activation_scaling_factor"] == ours[f"{layer}mlp.up_proj.input_scale"]
        head = "model.embed_tokens.weight" if tied else "lm_head.weight"
        assert torch.equal(part["lm_head.weight"], ours[head].chunk(ranks)[rank])
        if not tied:
            pair = [ours[f"{layer}self_attn.{name}_proj.{name}_scale"].item() for name in "kv"]
            assert part[f"{theirs}attention.kv_cache_scaling_factor"].tolist() == [max(pair)]
            assert part[f"{theirs}attention.v_cache_scaling_factor"].tolist() == [pair[1]]
    assert len(part) == 3 + 2 * (2 + 4 * 5 + (0 if tied else 3))


def test_the_record_carries_the_verdict_and_every_hash(exported: Path, tmp_path: Path):
    out = tmp_path / "ct"
    convert(exported, Container.compressed_tensors, out, ranks=1)
    record = json.loads((out / "halfbyte.json").read_text())
    assert (record["format"], record["gate"], record["checkpoint"]) == (
        "compressed_tensors",
        {"verdict": "pass"},
        "step_00000001",
    )
    assert record["files"].keys() == {path.name for path in out.iterdir()} - {"halfbyte.json"}
    assert {name: entry["sha256"] for name, entry in record["files"].items()} == {
        name: file_hash(out / name) for name in record["files"]
    }
    assert (out / "LICENSE").read_text() == "yours"


ODD = LLAMA | {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 3, "num_key_value_heads": 1}
ODD |= {"head_dim": 32, "vocab_size": 51, "num_hidden_layers": 1}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}  # its heads are hidden / heads wide


@pytest.mark.parametrize("number_format", list(Format))
@pytest.mark.parametrize("config", [LLAMA, UNTIED, QWEN2, QWEN3, ODD], ids=["tied", "untied", "qwen2", "qwen3", "odd"])
def test_every_format_of_every_model_comes_back(tmp_path: Path, config: dict, number_format: Format):
    """Written, verified against the trained weights, decoded into plain files, and these read by transformers."""
    from transformers import AutoModelForCausalLM

    run = recipe(number_format)
    out = export(tmp_path, config, run)
    report = verify(out, random_weights(tmp_path / "source", run), run)
    assert report["problems"] == []
    assert set(formats_of(open_checkpoint(out)).values()) == {number_format}
    convert(out, Container.dequantized, tmp_path / "plain", ranks=1)
    plain, decoded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32), decoded_model(out)
    theirs, ours = plain.state_dict(), decoded.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


# ---- refusals


@pytest.mark.parametrize(
    ("config", "number_format", "cache", "container", "words"),
    [
        (LLAMA, Format.fp8, KVCache.none, Container.compressed_tensors, "all nvfp4 or all w4a16_nvfp4, these are fp8"),
        (LLAMA, Format.nvfp4, KVCache.nvfp4, Container.compressed_tensors, "no NVFP4 key/value cache"),
        (LLAMA, Format.w4a16_nvfp4, KVCache.none, Container.trtllm, "all nvfp4, these are w4a16_nvfp4"),
        (QWEN3, Format.nvfp4, KVCache.none, Container.trtllm, "Llama's layers only"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(tmp_path: Path, config, number_format, cache, container, words: str):
    source = export(tmp_path, config, recipe(number_format, cache))
    with pytest.raises(UserError, match=words) as error:
        convert(source, container, tmp_path / "out", ranks=1)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "source"]


def test_a_recipe_is_told_before_anything_is_trained(tiny_model: Path):
    options = [f"model.path={tiny_model}", "export.also=[compressed_tensors,trtllm]"]
    assert resolve("tiny", options).export.also == [Container.compressed_tensors, Container.trtllm]
    bad = {
        "export.tensor_parallel=3": "= 3 does not divide the key/value heads",
        "quantize.format=mxfp4": "holds linears that are all nvfp4 or all w4a16_nvfp4, these are mxfp4",
        'quantize.exclude=["*.down_proj"]': "these are nvfp4, model.layers.0.mlp.down_proj bf16",
        "method=bf16": "method = bf16 quantizes nothing to convert",
        "export.also=[onnx]": "must be a list, .* of compressed_tensors, trtllm, dequantized",
    }
    for option, words in bad.items():
        with pytest.raises(RecipeError, match=words):
            resolve("tiny", [*options, option])


def test_ranks_that_do_not_divide_the_model_are_refused(exported: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"= 4 does not divide the key/value heads \(2\), .*use 1, 2$"):
        convert(exported, Container.trtllm, tmp_path / "b", ranks=4)


def test_bad_commands_are_one_line(exported: Path, tmp_path: Path):
    calls = {
        "no such format": (exported, "onnx", tmp_path / "x", None),
        "neither a run folder nor a checkpoint": (tmp_path, "trtllm", tmp_path / "x", None),
        "name a destination": (exported, "trtllm", None, None),
        "not a number of GPUs": (exported, "trtllm", tmp_path / "x", 0),
        "name another folder": (exported, "dequantized", exported, None),
    }
    for words, (source, container, to, ranks) in calls.items():
        with pytest.raises(UserError, match=words):
            export_as(source, container, to, ranks, allow_failed_gate=False)
    assert list(tmp_path.iterdir()) == []
    assert export_as(exported, "dequantized", tmp_path / "x", None, allow_failed_gate=False) == tmp_path / "x"


# ---- damage


@pytest.mark.parametrize("container", [kind for kind in Container if kind is not Container.nemo])
def test_the_second_reading_finds_one_flipped_bit(exported: Path, tmp_path: Path, container: Container):
    out = tmp_path / "out"
    convert(exported, container, out, ranks=2 if container is Container.trtllm else 1)
    source = open_checkpoint(exported)
    assert check(source, container, out) > 0
    file = next(iter(sorted(out.glob("*.safetensors"), reverse=True)))
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for place in (start, (start + len(content)) // 2, len(content) - 1):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(UserError):
            check(source, container, out)


def test_a_conversion_that_does_not_check_leaves_what_stood_there(exported: Path, tmp_path: Path, monkeypatch):
    from halfbyte.export import converted

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "older").touch()

    def differs(*_) -> int:
        raise UserError("differs")

    monkeypatch.setattr(converted, "check", differs)
    with pytest.raises(UserError, match="differs"):
        convert(exported, Container.dequantized, tmp_path / "out", ranks=1)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "older"]


# ---- what a directory says about itself


def test_formats_come_from_the_configs(exported: Path, tmp_path: Path):
    assert set(formats_of(open_checkpoint(exported)).values()) == {Format.nvfp4}
    assert cache_of(open_checkpoint(exported)) is KVCache.fp8
    mixed = recipe()
    mixed.quantize.layers = {"model.layers.0.*": LayerFormat.fp8}
    out = export(tmp_path / "mixed", LLAMA, mixed)
    expected = {
        name: Format.fp8 if ".0." in name else Format.nvfp4 for name in open_checkpoint(out).quantized_modules()
    }
    assert formats_of(open_checkpoint(out)) == expected
    (out / "hf_quant_config.json").unlink()  # the flat config says the same
    assert formats_of(open_checkpoint(out)) == expected
    for number_format in (Format.mxfp4, Format.w4a16_mxfp4, Format.w4a8_nvfp4_fp8):
        out = export(tmp_path / number_format, LLAMA, recipe(number_format))
        assert set(formats_of(open_checkpoint(out)).values()) == {number_format}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q: q.update(quant_algo="INT4_AWQ"), "quant_algo = INT4_AWQ"),
        (lambda q: q.update(exclude_modules=["model.layers.1.*"]), "excludes model.layers.1"),
        (lambda q: q.update(kv_cache_quant_algo="INT8"), "kv_cache_quant_algo = INT8"),
        (lambda q: q.update(quantized_layers=[1]), "not a JSON object"),
        (lambda q: q.clear(), "quant_algo = None"),
    ],
)
def test_configs_that_cannot_be_trusted_are_one_line(exported: Path, tmp_path: Path, change, words: str):
    out = Path(shutil.copytree(exported, tmp_path / "hf"))
    path = out / "hf_quant_config.json"
    content = json.loads(path.read_text())
    change(content["quantization"])
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words) as error:
        (formats_of(open_checkpoint(out)), cache_of(open_checkpoint(out)))
    assert "\n" not in str(error.value)


# ---- the container


def test_files_written_tensor_by_tensor_read_as_safetensors(tmp_path: Path):
    layout = {"codes": ("U8", (3, 5)), "one": ("F32", ()), "half": ("BF16", (7,)), "scales": ("F8_E4M3", (2,))}
    with TensorFile(tmp_path / "a", layout) as file:
        file.write("half", np.arange(7, dtype=np.uint16))
        file.write("scales", np.array([1, 0x7E], np.uint8))
        with pytest.raises(ValueError, match="codes"):
            file.write("codes", np.zeros((5, 3), np.uint8))
        file.write("codes", np.arange(15, dtype=np.uint8).reshape(3, 5))
        file.write("one", np.float32(0.25).reshape(()))
        with pytest.raises(ValueError, match="one"):
            file.write("one", np.float32(0.5).reshape(()))
    read = load_file(tmp_path / "a")
    assert read["codes"].tolist() == torch.arange(15).view(3, 5).tolist()
    assert read["one"] == 0.25
    assert read["half"].view(torch.int16).tolist() == list(range(7))
    assert read["scales"].float().tolist() == [2**-9, 448]
    save_file(read, tmp_path / "b", metadata={"format": "pt"})
    assert (tmp_path / "a").stat().st_size == (tmp_path / "b").stat().st_size
    with pytest.raises(ValueError, match="never written"), TensorFile(tmp_path / "c", layout):
        pass
