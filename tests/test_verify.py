"""Verify finds every alteration of the files, and the decoded model computes what a server computes."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from export_tools import team_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from halfbyte.export import hf
from halfbyte.export.copied import broken_copies
from halfbyte.export.pack import fake
from halfbyte.export.reader import open_checkpoint
from halfbyte.export.record import file_hash
from halfbyte.export.served import decoded_model
from halfbyte.export.team import Team
from halfbyte.export.verify import verify
from halfbyte.launch import handover
from halfbyte.launch.console import Console
from halfbyte.training import numerics
from halfbyte.training.config import Format, Method, Recipe
from halfbyte.training.errors import UserError
from halfbyte.training.hf_map import HFWeight, expected_shapes
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
DOWN = "model.layers.1.mlp.down_proj"


def recipe(number_format: Format = Format.nvfp4, method: Method = Method.qat) -> Recipe:
    result = Recipe(method=method)
    result.quantize.format = number_format
    return result


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def trained(model_dir: Path) -> list[HFWeight]:
    generator = torch.Generator().manual_seed(3)
    weights = []
    for name, shape in expected_shapes(read_shape(model_dir / "config.json")).items():
        tensor = torch.randn(*shape, generator=generator) * 0.1 + (len(shape) == 1)
        fp4 = "_proj" in name
        weights.append(HFWeight(name, tensor, fp4, *([torch.tensor(0.4), torch.tensor(4.0)] if fp4 else [])))
    return weights


def export(model_dir: Path, trained: list[HFWeight], out: Path, run: Recipe) -> None:
    hf.write(trained, run, model_dir=model_dir, out=out, checkpoint="step_00000003", versions={})


@pytest.fixture(scope="module")
def exported(model_dir: Path, trained: list[HFWeight], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "hf"
    export(model_dir, trained, out, recipe())
    return out


@pytest.fixture
def out(exported: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy to damage."""
    return Path(shutil.copytree(exported, tmp_path / "hf"))


def rehash(out: Path) -> None:
    """Make halfbyte.json vouch for the altered files, so that the tensors themselves must give them away."""
    path = out / "halfbyte.json"
    record = json.loads(path.read_text())
    files = [file for file in sorted(out.iterdir()) if file != path]
    record["files"] = {
        file.name: {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "bytes": file.stat().st_size}
        for file in files
    }
    path.write_text(json.dumps(record))


def problems(out: Path, trained: list[HFWeight], run: Recipe | None = None) -> str:
    report = verify(out, iter(trained), run or recipe())
    assert not report["ok"]
    assert report["problem_count"] == len(report["problems"]) > 0 or report["problem_count"] > 50
    assert all("\n" not in line for line in report["problems"])
    return "\n".join(report["problems"])


def flip(out: Path, tensor: str, byte: int = 0, mask: int = 1) -> None:
    entry = open_checkpoint(out).entries[tensor]
    content = bytearray(entry.file.read_bytes())
    content[entry.offset + byte] ^= mask
    entry.file.write_bytes(content)


def edit(out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    rehash(out)


# ---- what is right passes


@pytest.mark.parametrize("number_format", list(Format))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_export_verifies(
    model_dir: Path, trained: list[HFWeight], tmp_path: Path, number_format: Format, dtype: torch.dtype
):
    weights = [replace(weight, tensor=weight.tensor.to(dtype)) for weight in trained]
    run = recipe(number_format)
    run.export.shard_gb = 1e-5
    export(model_dir, weights, tmp_path / "hf", run)
    report = verify(tmp_path / "hf", iter(weights), run)
    assert report == {
        "ok": True,
        "tensors": len(trained),
        "mismatches": 0,
        "quantized": 14,
        "elements": sum(weight.tensor.numel() for weight in trained),
        "problems": [],
        "problem_count": 0,
    }


def test_a_dense_export_verifies(model_dir: Path, trained: list[HFWeight], tmp_path: Path):
    weights, run = [replace(weight, quantized=False) for weight in trained], recipe(method=Method.bf16)
    export(model_dir, weights, tmp_path / "hf", run)
    assert verify(tmp_path / "hf", iter(weights), run)["ok"]
    assert "the method is bf16" in problems_of_config(tmp_path / "hf", weights, run)


def problems_of_config(out: Path, weights: list[HFWeight], run: Recipe) -> str:
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": {}}))
    rehash(out)
    return problems(out, weights, run)


def test_several_processes_verify_their_own_files_and_say_the_same(
    model_dir: Path, trained: list[HFWeight], tmp_path: Path
):
    out, run = tmp_path / "hf", recipe()
    run.export.files = 4
    export(model_dir, trained, out, run)

    def together(size: int) -> list[dict]:
        def part(team: Team) -> dict:
            own = hf.own_weights(run, model_dir, team)
            return verify(out, [weight for weight in trained if weight.name in own], run, team)

        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(part, team_of(size)))

    alone = verify(out, trained, run)
    assert alone["ok"]
    assert together(3) == [alone] * 3
    flip(out, f"{DOWN}.weight", byte=5)
    (out / "more.txt").write_text("")
    alone = verify(out, trained, run)
    assert (alone["mismatches"], alone["problem_count"]) == (1, 4)
    for report in together(3):
        assert sorted(report["problems"]) == sorted(alone["problems"])
        assert {name: report[name] for name in report if name != "problems"} == {
            name: alone[name] for name in alone if name != "problems"
        }
    (out / "config.json").write_text("{")
    assert together(2) == [verify(out, trained, run)] * 2


def test_nothing_to_verify_is_an_error(out: Path, trained: list[HFWeight], tmp_path: Path):
    with pytest.raises(UserError, match="export first"):
        verify(tmp_path / "nowhere", iter(trained), recipe())
    with pytest.raises(UserError, match="no trained weights"):
        verify(out, iter(()), recipe())


# ---- every alteration is found


@pytest.mark.parametrize(
    "tensor",
    [
        f"{DOWN}.weight",
        f"{DOWN}.weight_scale",
        f"{DOWN}.weight_scale_2",
        f"{DOWN}.input_scale",
        "model.norm.weight",
        "model.embed_tokens.weight",
    ],
)
def test_one_flipped_bit(out: Path, trained: list[HFWeight], tensor: str):
    flip(out, tensor)
    assert "model.safetensors changed after the export" in problems(out, trained)
    rehash(out)
    found = problems(out, trained)
    assert tensor in found
    assert "SHA-256" not in found


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_byte_is_found_in_the_tensors(
    exported: Path, trained: list[HFWeight], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    folder = Path(shutil.copytree(exported, tmp_path_factory.mktemp("flip") / "hf"))
    entries = open_checkpoint(folder).entries
    tensor = data.draw(st.sampled_from(sorted(entries)))
    size = open_checkpoint(folder).raw(tensor).nbytes
    flip(folder, tensor, data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, 255)))
    rehash(folder)
    assert tensor in problems(folder, trained)


def test_scales_that_cancel_are_found(out: Path, trained: list[HFWeight]):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        scale = tensors[f"{DOWN}.weight_scale"].float()
        tensors[f"{DOWN}.weight_scale"] = (scale / 2).to(torch.float8_e4m3fn)
        tensors[f"{DOWN}.weight_scale_2"] *= 2

    edit(out, change)
    found = problems(out, trained)
    assert f"{DOWN}.weight_scale (stored)" in found
    assert f"{DOWN}.weight_scale_2 (stored)" in found
    assert f"{DOWN}.weight: " not in found  # the values are the same


def test_broken_rules_are_named(out: Path, trained: list[HFWeight]):
    query, up = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{query}.input_scale"] *= 2
        tensors[f"{up}.weight_scale_2"] *= 1.5
        tensors[f"{DOWN}.weight_scale"].view(torch.uint8)[3, 1] = 0x7F
        tensors["model.layers.0.input_layernorm.weight"] = tensors["model.layers.0.input_layernorm.weight"].float()
        tensors["model.layers.1.mlp.bias"] = torch.zeros(3, dtype=torch.bfloat16)
        del tensors["model.layers.1.self_attn.o_proj.input_scale"]
        del tensors["model.norm.weight"]

    edit(out, change)
    found = problems(out, trained)
    assert "input_scale differs inside one fused layer: model.layers.0.self_attn.q_proj.input_scale = " in found
    assert "weight_scale_2 differs inside one fused layer: model.layers.0.mlp.gate_proj.weight_scale_2 = " in found
    assert f"{up}.weight_scale_2 is 0.000366" in found
    assert "not a power of two" in found
    assert f"{DOWN}.weight_scale: 1 of 128 scales are outside [2^-9, 448], first at [3, 1]" in found
    assert "model.layers.0.input_layernorm.weight is F32 but belongs to no quantized linear" in found
    assert "model.layers.1.mlp.bias is in the files but not in the trained model" in found
    assert "model.layers.1.self_attn.o_proj.input_scale is missing" in found
    assert "no tensor model.norm.weight" in found


def test_a_linear_in_the_wrong_precision_is_found(out: Path, trained: list[HFWeight]):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for suffix in ("weight_scale", "weight_scale_2", "input_scale"):
            del tensors[f"{DOWN}.{suffix}"]
        tensors[f"{DOWN}.weight"] = torch.zeros(32, 64, dtype=torch.bfloat16)

    edit(out, change)
    assert f"{DOWN} is BF16, but the configs do not exclude it" in problems(out, trained)


@pytest.mark.parametrize(
    ("file", "keys", "value", "words"),
    [
        ("config.json", ["quantization_config", "quant_algo"], "FP8", "quant_algo is 'FP8', not 'NVFP4'"),
        ("config.json", ["quantization_config", "ignore"], [], "model.embed_tokens is BF16, but the configs do not"),
        (
            "config.json",
            ["quantization_config", "ignore"],
            ["model.layers.1*"],
            f"{DOWN} is quantized, but the configs",
        ),
        ("config.json", ["quantization_config", "config_groups"], {}, "0 config_groups, not 1"),
        ("config.json", ["quantization_config"], None, "no quantization_config"),
        ("hf_quant_config.json", ["quantization", "group_size"], 32, "group_size is 32, not 16"),
        ("hf_quant_config.json", ["quantization", "exclude_modules"], ["lm_head"], "and config.json ignore"),
        ("hf_quant_config.json", ["quantization"], {}, "incomplete"),
    ],
)
def test_configs_that_disagree(
    out: Path, trained: list[HFWeight], file: str, keys: list[str], value: object, words: str
):
    content = json.loads((out / file).read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (out / file).write_text(json.dumps(content))
    rehash(out)
    assert words in problems(out, trained)


def test_files_lost_added_truncated_or_swapped(out: Path, model_dir: Path, trained: list[HFWeight], tmp_path: Path):
    (out / "tokenizer.json").rename(out / "other.json")
    found = problems(out, trained)
    assert "tokenizer.json is listed in halfbyte.json but missing" in found
    assert "other.json is not listed" in found
    content = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(content[:-5])
    assert "truncated" in problems(out, trained)
    (out / "halfbyte.json").unlink()
    assert "cannot be told from altered ones" in problems(out, trained)

    run, sharded = recipe(), tmp_path / "sharded"
    run.export.shard_gb = 1e-5
    export(model_dir, trained, sharded, run)
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])
    rehash(sharded)
    assert "is not in model-0000" in problems(sharded, trained)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("change", [lambda path: path.symlink_to("nowhere"), Path.mkdir])
def test_a_file_that_cannot_be_read_is_a_finding(out: Path, trained: list[HFWeight], name: str, change: Callable):
    (out / name).unlink()
    change(out / name)
    assert f"{name} changed after the export" in problems(out, trained)


def setting(**changes: object) -> Callable[[Path], object]:
    """Change config.json: as a converter might, or somebody who wants a longer context."""

    def change(out: Path) -> None:
        path = out / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (setting(rms_norm_eps=1e-2), "config.json: rms_norm_eps = 0.01, and should be 1e-05"),
        (setting(rope_theta=5e5), "config.json: rope_theta = 500000.0, and should be None"),
        (setting(auto_map={"AutoModel": "evil.Model"}), "config.json: auto_map = "),
        (setting(torch_dtype="float16"), "config.json: torch_dtype = 'float16', and should be 'bfloat16'"),
        (lambda out: (out / "tokenizer.json").write_text("[]"), "tokenizer.json: is not what "),
        (lambda out: (out / "evil.py").write_text(""), "evil.py: belongs to no export"),
    ],
)
def test_what_the_weights_do_not_tell_is_compared_with_the_source(
    out: Path, model_dir: Path, change: Callable[[Path], object], said: str
):
    assert broken_copies(out, model_dir) == []
    change(out)
    (line,) = broken_copies(out, model_dir)
    assert said in line


def test_what_was_altered_beside_the_export_stands_in_the_one_report_that_is_written(
    out: Path, model_dir: Path, trained: list[HFWeight], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A second write would leave "ok" behind where the process is killed between the two."""
    run, written = recipe(), []
    run.model.path = str(model_dir)
    monkeypatch.setattr(handover, "exported", lambda folder: out)
    monkeypatch.setattr(handover, "known", lambda folder: {"record_sha256": file_hash(out / "halfbyte.json")})
    monkeypatch.setattr(handover, "remember", lambda folder, **entries: None)
    monkeypatch.setattr(handover, "trained_weights", lambda recipe, folder, only: iter(trained))
    monkeypatch.setattr(handover, "write_json", lambda path, content: written.append((path.name, content["ok"])))
    report = handover.check_again(run, tmp_path, Console(False), ["trtllm changed"])
    assert report["problems"] == ["trtllm changed"]
    assert report["problem_count"] == 1
    assert written == [("verify.json", False)]
    assert handover.check_again(run, tmp_path, Console(False))["ok"]
    assert written[1:] == [("verify.json", True)]


def test_another_models_files_do_not_verify(out: Path, trained: list[HFWeight]):
    further = [replace(weight, tensor=weight.tensor * 1.01) for weight in trained]
    report = verify(out, iter(further), recipe())
    assert report["mismatches"] == len(trained)
    assert not report["ok"]
    calibrated_otherwise = [replace(weight, input_amax=torch.tensor(9.0)) for weight in trained]
    assert verify(out, iter(calibrated_otherwise), recipe())["mismatches"] == 14
    assert "is U8, not" not in problems(out, trained, recipe(Format.w4a16_nvfp4))


# ---- the decoded model


def test_weight_only_model_is_transformers_with_rounded_weights(
    model_dir: Path, trained: list[HFWeight], tmp_path: Path
):
    from transformers import LlamaConfig, LlamaForCausalLM

    run = recipe(Format.w4a16_nvfp4)
    export(model_dir, trained, tmp_path / "hf", run)
    reference = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    state = {w.name: fake(w, run.quantize) if w.quantized else w.tensor.bfloat16().float() for w in trained}
    reference.load_state_dict(state, strict=False)
    tokens = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(decoded_model(tmp_path / "hf")(tokens).logits, reference(tokens).logits)


@pytest.mark.parametrize("number_format", [Format.nvfp4, Format.mxfp4, Format.w4a8_nvfp4_fp8, Format.w4a16_mxfp4])
def test_fp4_activations_are_rounded_with_the_scale_in_the_file(
    model_dir: Path, trained: list[HFWeight], tmp_path: Path, number_format: Format
):
    run = recipe(number_format)
    export(model_dir, trained, tmp_path / "hf", run)
    linear = decoded_model(tmp_path / "hf").get_submodule(DOWN)
    weight = next(fake(w, run.quantize) for w in trained if w.name == f"{DOWN}.weight")
    x = torch.randn(5, 64)
    scale = torch.tensor(2.0 ** math.ceil(math.log2(4.0 / 2688)))  # input_amax 4
    rounded = {
        Format.nvfp4: numerics.nvfp4_fake(x, scale),
        Format.mxfp4: numerics.mxfp4_fake(x),
        Format.w4a8_nvfp4_fp8: (x / (4.0 / 448)).to(torch.float8_e4m3fn).float() * torch.tensor(4.0 / 448),
        Format.w4a16_mxfp4: x,
    }[number_format]
    assert torch.equal(linear(x), torch.nn.functional.linear(rounded, weight))
    assert torch.equal(rounded, x) == (number_format is Format.w4a16_mxfp4)


def test_a_config_without_the_group_of_a_linear_is_one_line(out: Path):
    path = out / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"] = {}
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"no config group aims at model\.layers"):
        decoded_model(out)


def test_decoded_model_refuses_tensors_without_a_place(out: Path):
    edit(
        out, lambda tensors: tensors.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(2, dtype=torch.bfloat16)})
    )
    with pytest.raises(UserError, match=r"model\.layers\.9\.mlp\.up_proj has no place"):
        decoded_model(out)
