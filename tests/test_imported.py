"""A quantized directory as model.path: its formats, scales and bytes stay, whatever kind of scales it has."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from export_tools import LLAMA, QWEN3, UNTIED, export, recipe
from safetensors.torch import load_file, save_file

from halfbyte.export import hf, imported
from halfbyte.export.reader import open_checkpoint
from halfbyte.export.verify import verify
from halfbyte.launch.imported import adopt, plain_weights, start_from
from halfbyte.training import checkpoint, model, quantize
from halfbyte.training.config import Format, LayerFormat, Method, Recipe, SecondScale
from halfbyte.training.errors import RecipeError, UserError
from halfbyte.training.files import read_json
from halfbyte.training.formats import Rounding
from halfbyte.training.kv_format import KVCache
from halfbyte.training.resolve import resolve
from halfbyte.training.saved_weights import read_weights
from halfbyte.training.shape import planned_linears, read_shape

WORLD = runpy.run_path(str(Path(__file__).parent / "workers" / "world.py"))
DOWN = "model.layers.1.mlp.down_proj"


def start(folder: Path, source: Path, *options: str) -> Recipe:
    """The tiny recipe on a quantized directory, its formats adopted."""
    base = [f"model.path={source}", f"run.dir={folder / 'run'}", "method=ptq", "train.sequence_length=32"]
    return adopt(resolve("tiny", [*base, "quantize.calibration_samples=2", *options]))


def negative_zero(source: Path) -> None:
    """Write a zero as -0, as other packers do: the value is the same, the byte is not."""
    tensors = load_file(source / "model.safetensors")
    codes = tensors[f"{DOWN}.weight"]
    place = (codes & 15 == 0).nonzero()[0]
    codes[tuple(place)] |= 8
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def mixed() -> Recipe:
    run = recipe()
    run.quantize.layers = {"model.layers.0.*": LayerFormat.fp8, "*.o_proj": LayerFormat.bf16}
    return run


def by_amax() -> Recipe:
    run = recipe(cache=KVCache.fp8)
    run.quantize.scale_2 = SecondScale.amax
    return run


RUNS = {
    "pow2": (UNTIED, recipe()),
    "amax and cache": (LLAMA, by_amax()),
    "mixed": (QWEN3, mixed()),
    "mxfp4": (LLAMA, recipe(Format.mxfp4)),
    "w4a8": (LLAMA, recipe(Format.w4a8_nvfp4_fp8)),
}


@pytest.mark.parametrize("kind", list(RUNS))
def test_a_round_trip_changes_no_byte(tmp_path: Path, kind: str):
    """Into the Megatron model, through its checkpoint, and out: quantizers, scales and codes are those of the files."""
    config, made = RUNS[kind]
    source = export(tmp_path, config, made)
    if kind == "pow2":
        (source / "halfbyte.json").unlink()
        negative_zero(source)
    run = start(tmp_path, source)
    assert (run.quantize.scale_2, run.quantize.kv_cache) == (made.quantize.scale_2, made.quantize.kv_cache)
    shape, report = read_shape(source / "config.json"), tmp_path / "run" / "quantize.json"
    with WORLD["world_of_one"]() as runtime:
        gpt = model.build(shape, run, runtime)
        with plain_weights(source, run, runtime) as folder:
            model.import_hf(gpt, folder, shape, runtime)
        assert not folder.exists()
        start_from(run, gpt, shape, runtime, report)
        quantize.restore(gpt, run, report)
        for layer in quantize.plan(gpt, run.quantize):
            linear = gpt.get_submodule(layer.module)
            assert torch.equal(linear.weight_quantizer(linear.weight), linear.weight)
        saved = tmp_path / "run" / "checkpoints" / "step_00000000"
        checkpoint.save(checkpoint.Trainable(gpt), {}, saved)
    files = open_checkpoint(source)

    def weights():
        return imported.with_source_bytes(read_weights(saved, shape, planned_linears(shape, run)), files)

    out = tmp_path / "again"
    hf.write(weights(), run, model_dir=source, out=out, checkpoint="step_00000000", versions={})
    one, other = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        same = torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (tensor, other[name])))
        assert same, name
    assert verify(out, weights(), run)["problems"] == []


def test_a_weight_that_was_trained_is_packed_anew(tmp_path: Path):
    source = export(tmp_path, LLAMA, recipe())
    files, run = open_checkpoint(source), start(tmp_path, source)
    shape = read_shape(source / "config.json")
    entry = imported.calibration(files, shape, run.quantize)["layers"]["decoder.layers.1.mlp.linear_fc2"]
    values = torch.from_numpy(files.decode(DOWN).copy())
    amax = torch.tensor(entry["amax"]["weight"])
    weight = hf.HFWeight(f"{DOWN}.weight", values, True, amax, torch.tensor(entry["amax"]["input"]))
    (kept,) = imported.with_source_bytes([weight], files)
    assert kept.packed is not None
    assert kept.packed.keys() == {"weight", "weight_scale", "weight_scale_2", "input_scale"}
    values[0, 0] += 0.5
    (trained,) = imported.with_source_bytes([weight], files)
    assert trained.packed is None
    assert hf.pack(trained, run.quantize)["weight_scale_2"] == files.raw(f"{DOWN}.weight_scale_2")  # it stays


@pytest.mark.parametrize("scale_2", list(SecondScale))
@pytest.mark.parametrize("rounding", [Rounding.nvfp4, Rounding.nvfp4_block32, Rounding.fp8])
def test_a_maximum_is_found_for_every_scale_that_one_leads_to(scale_2: SecondScale, rounding: Rounding):
    from halfbyte.training import numerics

    run = recipe()
    run.quantize.scale_2 = scale_2
    for amax in torch.rand(300, generator=torch.Generator().manual_seed(1)).mul_(12).exp_():
        scale = numerics.tensor_scale(amax, rounding, scale_2)
        found = imported.amax_of("x", scale.numpy(), rounding, "weight", run.quantize)
        assert numerics.tensor_scale(torch.tensor(found), rounding, scale_2) == scale


# ---- refusals: one line each


def altered(source: Path, change) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t[f"{DOWN}.weight_scale_2"].mul_(0), "no maximum leads to this scale"),
        (lambda t: t["model.layers.0.mlp.up_proj.input_scale"].mul_(2), "one fused layer"),
        (lambda t: t.pop("model.layers.0.self_attn.k_proj.input_scale"), "no tensor model.layers.0.self_attn.k_proj"),
        (lambda t: t[f"{DOWN}.weight_scale"].view(torch.uint8)[0].fill_(0x7F), "decodes to NaN or Inf"),
        (lambda t: t[f"{DOWN}.weight"].copy_(t[f"{DOWN}.weight"] & 0x11), "try quantize.block_scale=mse"),
    ],
)
def test_scales_that_cannot_be_kept_are_refused(tmp_path: Path, change, words: str):
    source = export(tmp_path, LLAMA, recipe())
    run = start(tmp_path, source)
    altered(source, change)
    (source / "halfbyte.json").unlink()  # a published directory has none: the scales themselves must give it away
    with pytest.raises(UserError, match=words) as error:
        imported.calibration(open_checkpoint(source), read_shape(source / "config.json"), run.quantize)
    assert "\n" not in str(error.value)


def test_a_recipe_that_says_otherwise_is_refused(tmp_path: Path, tiny_model: Path):
    source = export(tmp_path, LLAMA, mixed())
    bad = {
        "quantize.format=mxfp4": "quantize.format = mxfp4: .* is quantized with (nvfp4|fp8)",
        "quantize.scale_2=amax": "quantize.scale_2 = amax",
        "quantize.weights=gptq": "take the place of a calibration",
        "method=bf16": "--format dequantized",
        "method=qad": "model.reference: .* needs the BF16 model",
        f"model.reference={source}": "is quantized itself",
        f"model.reference={tiny_model}": "has other sizes",
    }
    for option, words in bad.items():
        with pytest.raises(RecipeError, match=words):
            start(tmp_path, source, option)
    with pytest.raises(RecipeError, match=r"read only where model.path is quantized"):
        resolve("tiny", [f"model.path={tiny_model}", f"model.reference={tiny_model}"])


def test_commands_that_need_plain_weights_say_so(tmp_path: Path):
    source = export(tmp_path, LLAMA, recipe())
    with pytest.raises(UserError, match="is quantized, and this command needs plain weights"):
        model.check_weights(source, read_shape(source / "config.json"))


def test_qad_from_a_quantized_directory_takes_its_teacher_from_the_reference(tmp_path: Path):
    source = export(tmp_path, LLAMA, recipe())
    plain = Path(shutil.copytree(tmp_path / "source", tmp_path / "plain"))
    (plain / "model.safetensors").touch()
    run = start(tmp_path, source, f"model.reference={plain}", "method=qad")
    assert (run.method, run.model.reference) == (Method.qad, str(plain))
    assert read_json(source / "hf_quant_config.json")["quantization"]["quant_algo"] == "NVFP4"
    assert json.loads((plain / "config.json").read_text())["tie_word_embeddings"]
