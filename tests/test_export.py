"""The exported directory: names, dtypes, configs, atomic replacement, and what the second reader decodes from it."""

import errno
import hashlib
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from export_tools import team_of
from safetensors import safe_open

from halfbyte.export import hf, reader
from halfbyte.export.container import share_out
from halfbyte.export.pack import fake, module_name, pack
from halfbyte.export.record import record_verdict
from halfbyte.export.team import Team
from halfbyte.training.config import Format, Method, Quantize, Recipe, SecondScale
from halfbyte.training.errors import UserError
from halfbyte.training.hf_map import HFWeight

HIDDEN, FFN, VOCAB, LAYERS = 32, 64, 48, 2
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
        "quantization_config": {"quant_method": "gguf"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "model.safetensors").write_bytes(b"not to be copied")
    return folder


def recipe(number_format: Format = Format.nvfp4, **changes) -> Recipe:
    result = Recipe()
    result.quantize.format = number_format
    for name, value in changes.items():
        setattr(result, name, value)
    return result


def weights(*, excluded: tuple[str, ...] = (), quantized: bool = True, tied: bool = True) -> Iterator[HFWeight]:
    """A whole tiny model in training-time FP32; q/k/v and gate/up are views of one fused weight, as in training."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.05

    yield HFWeight("model.embed_tokens.weight", random(VOCAB, HIDDEN))
    for layer in range(LAYERS):
        fused = random(2 * FFN, HIDDEN)
        for name, (n, k) in LINEARS.items():
            tensor = fused[:FFN] if name == "mlp.gate_proj" else fused[FFN:] if name == "mlp.up_proj" else random(n, k)
            module = f"model.layers.{layer}.{name}"
            fp4 = quantized and module not in excluded
            amax = (torch.tensor(0.21), torch.tensor(3.5)) if fp4 else (None, None)
            yield HFWeight(f"{module}.weight", tensor, fp4, *amax)
        yield HFWeight(f"model.layers.{layer}.input_layernorm.weight", 1 + random(HIDDEN))
        yield HFWeight(f"model.layers.{layer}.post_attention_layernorm.weight", 1 + random(HIDDEN))
    yield HFWeight("model.norm.weight", 1 + random(HIDDEN))
    if not tied:
        yield HFWeight("lm_head.weight", random(VOCAB, HIDDEN))


def export(model_dir: Path, out: Path, source: Iterator[HFWeight] | None = None, run: Recipe | None = None) -> dict:
    return hf.write(
        source or weights(),
        run or recipe(),
        model_dir=model_dir,
        out=out,
        checkpoint="step_00000003",
        versions={"a": "1"},
    )


def stored(out: Path) -> dict[str, tuple[str, list[int]]]:
    """Tensor name -> (dtype, shape), as safetensors' own reader sees them."""
    result = {}
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert tensors.metadata() == {"format": "pt"}
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                view = tensors.get_slice(name)
                result[name] = (view.get_dtype(), view.get_shape())
    return result


@pytest.mark.parametrize("number_format", list(Format))
def test_tensors_of_each_format(model_dir: Path, tmp_path: Path, number_format: Format):
    out = tmp_path / "run" / "hf"
    sizes = export(model_dir, out, run=recipe(number_format))
    expected = {
        "model.embed_tokens.weight": ("BF16", [VOCAB, HIDDEN]),
        "model.norm.weight": ("BF16", [HIDDEN]),
    }
    block = 16 if number_format in (Format.nvfp4, Format.w4a16_nvfp4) else 32
    for layer in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            expected[f"model.layers.{layer}.{norm}.weight"] = ("BF16", [HIDDEN])
        for name, (n, k) in LINEARS.items():
            module = f"model.layers.{layer}.{name}"
            if number_format in (Format.mxfp4, Format.w4a16_mxfp4):
                expected[f"{module}.weight_packed"] = ("U8", [n, k // 2])
                expected[f"{module}.weight_scale"] = ("U8", [n, k // block])
                continue
            if number_format is Format.fp8:
                expected[f"{module}.weight"] = ("F8_E4M3", [n, k])
                expected[f"{module}.weight_scale"] = expected[f"{module}.input_scale"] = ("F32", [])
                continue
            expected[f"{module}.weight"] = ("U8", [n, k // 2])
            expected[f"{module}.weight_scale"] = ("F8_E4M3", [n, k // block])
            expected[f"{module}.weight_scale_2"] = ("F32", [])
            if number_format in (Format.nvfp4, Format.w4a8_nvfp4_fp8):
                expected[f"{module}.input_scale"] = ("F32", [])
    assert stored(out) == expected
    linear = sum(n * k for n, k in LINEARS.values()) * LAYERS
    dense = VOCAB * HIDDEN + (2 * LAYERS + 1) * HIDDEN
    scalars = {"w4a16_nvfp4": 4, "mxfp4": 0, "w4a16_mxfp4": 0}.get(number_format, 8) * len(LINEARS) * LAYERS
    codes = linear if number_format is Format.fp8 else linear // 2 + linear // block
    assert sizes == {
        "bytes_before": 2 * (linear + dense),
        "bytes_after": codes + scalars + 2 * dense,
        "files": 1,
        "tensors": len(expected),
        "quantized": len(LINEARS) * LAYERS,
    }
    assert [path.name for path in out.parent.iterdir()] == ["hf"]


def test_configs_and_side_files(model_dir: Path, tmp_path: Path):
    out = tmp_path / "hf"
    left_out = "model.layers.1.mlp.down_proj"
    run = recipe()
    run.quantize.exclude = [*run.quantize.exclude, left_out]
    export(model_dir, out, weights(excluded=(left_out,)), run)
    config = json.loads((out / "config.json").read_text())
    nested = json.loads((out / "hf_quant_config.json").read_text())
    excluded = sorted(["lm_head", "model.embed_tokens", left_out])
    assert nested["producer"]["name"] == "modelopt"
    assert nested["quantization"] == {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "exclude_modules": excluded,
    }
    flat = config["quantization_config"]
    elements = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    assert (flat["quant_method"], flat["quant_algo"], flat["ignore"]) == ("modelopt", "NVFP4", excluded)
    assert flat["config_groups"] == {
        "group_0": {"input_activations": elements, "weights": elements, "targets": ["Linear"]}
    }
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["hidden_size"] == HIDDEN
    assert (out / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert (out / "chat_template.jinja").exists()
    assert json.loads((out / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in out.iterdir())  # a server may be another user


def test_record_names_every_file_with_its_hash(model_dir: Path, tmp_path: Path):
    out = tmp_path / "hf"
    export(model_dir, out)
    record = json.loads((out / "halfbyte.json").read_text())
    assert (record["gate"], record["checkpoint"]) == (None, "step_00000003")
    record_verdict(out, {"verdict": "pass"})
    assert json.loads((out / "halfbyte.json").read_text()) == record | {"gate": {"verdict": "pass"}}
    assert record["versions"] == {"a": "1"}
    assert record["recipe"]["quantize"]["format"] == "nvfp4"
    assert (record["method"], record["format"], record["scale_2"]) == ("qat", "nvfp4", "pow2")
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}
    del hashes["halfbyte.json"]
    assert {name: entry["sha256"] for name, entry in record["files"].items()} == hashes


def test_dense_control_has_no_quantization_config(model_dir: Path, tmp_path: Path):
    out = tmp_path / "hf"
    export(model_dir, out, weights(quantized=False, tied=False), recipe(method=Method.bf16))
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert not (out / "hf_quant_config.json").exists()
    assert {dtype for dtype, _ in stored(out).values()} == {"BF16"}
    assert "lm_head.weight" not in stored(out)  # tied: the reader takes the embedding
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    export(model_dir, out, weights(quantized=False, tied=False), recipe(method=Method.bf16))
    assert "lm_head.weight" in stored(out)


def test_shards_and_index(model_dir: Path, tmp_path: Path):
    out, run = tmp_path / "hf", recipe()
    run.export.shard_gb = 8e-6
    sizes = export(model_dir, out, run=run)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert sizes["files"] == len(files) > 1
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sizes["bytes_after"]
    for name, file in index["weight_map"].items():
        with safe_open(out / file, "pt") as tensors:
            tensors.get_tensor(name)
    assert len(index["weight_map"]) == sizes["tensors"]
    one = tmp_path / "one"
    export(model_dir, one)
    assert stored(out) == stored(one)


def write_together(model_dir: Path, out: Path, run: Recipe, source, size: int) -> list[dict]:
    def part(team: Team) -> dict:
        own = hf.own_weights(run, model_dir, team)
        mine = (weight for weight in source() if weight.name in own)
        return hf.write(mine, run, model_dir=model_dir, out=out, checkpoint="step_00000003", versions={}, team=team)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(part, team_of(size)))


def test_the_bytes_do_not_depend_on_how_many_write(model_dir: Path, tmp_path: Path):
    run = recipe()
    run.export.files = 5
    sizes = {size: write_together(model_dir, tmp_path / str(size), run, weights, size) for size in (1, 3)}
    assert sizes[1][0]["files"] == 5
    assert sizes[3] == sizes[1] * 3
    one, three = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("1", "3"))
    assert one == three
    tensors = [path.stat().st_size for path in (tmp_path / "3").glob("*.safetensors")]
    assert max(tensors) < 2 * min(tensors)


def test_a_gpu_without_room_leaves_packing_to_the_cpu(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    export(model_dir, tmp_path / "cpu")
    asked: list[str] = []

    def full(weight: HFWeight) -> HFWeight:
        asked.append(weight.name)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(hf, "_on_gpu", full)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    export(model_dir, tmp_path / "full")
    assert len(asked) == 14
    assert same_files(tmp_path / "cpu", tmp_path / "full")


@pytest.mark.gpu
def test_a_gpu_packs_the_same_files(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    devices: list[str] = []

    def packing(weight: HFWeight, quantize: Quantize) -> dict[str, torch.Tensor]:
        devices.append(weight.tensor.device.type)
        return pack(weight, quantize)

    monkeypatch.setattr(hf, "pack", packing)
    export(model_dir, tmp_path / "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    export(model_dir, tmp_path / "cpu")
    assert devices == ["cuda"] * 14 + ["cpu"] * 14
    assert same_files(tmp_path / "cpu", tmp_path / "gpu")


def same_files(one: Path, other: Path) -> bool:
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (one, other))
    return first == second


def test_one_writer_that_fails_stops_all(model_dir: Path, tmp_path: Path):
    run = recipe()
    run.export.files = 5

    def broken() -> Iterator[HFWeight]:
        for weight in weights():
            nan = weight.name == "model.layers.1.mlp.down_proj.weight"
            yield replace(weight, tensor=weight.tensor * torch.nan) if nan else weight

    with pytest.raises(UserError, match="hold NaN or Inf"):
        write_together(model_dir, tmp_path / "hf", run, broken, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20, 99])
def test_files_are_of_one_size_and_none_is_empty(count: int):
    sizes = {str(i): (7 * i) % 5 * 100 + (10_000 if i == 3 else 1) for i in range(20)}
    groups = share_out(sizes, count=count, limit=0)
    assert [name for group in groups for name in group] == list(sizes)
    assert len(groups) == min(count, 20)
    assert all(groups)


# ---- whole or not at all


class Stop(Exception):
    pass


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("error", [Stop(), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_failure_changes_nothing(model_dir: Path, tmp_path: Path, error: BaseException, older: bool):
    out = tmp_path / "run" / "hf"
    if older:
        export(model_dir, out)
    before = {path.name: path.read_bytes() for path in out.glob("*")}

    def broken() -> Iterator[HFWeight]:
        yield from list(weights())[:9]
        raise error

    with pytest.raises(UserError if isinstance(error, OSError) else type(error)) as caught:
        export(model_dir, out, broken())
    assert {path.name: path.read_bytes() for path in out.glob("*")} == before
    assert out.exists() is older
    assert [path.name for path in out.parent.iterdir()] == (["hf"] if older else [])
    if isinstance(error, OSError):
        assert str(out) in str(caught.value)
        assert "No space left" in str(caught.value)


def test_a_real_write_failure_is_one_line(model_dir: Path, tmp_path: Path):
    """The kernel refuses to write past RLIMIT_FSIZE, as it does on a full disk."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    script = f"""
import torch
from pathlib import Path
from halfbyte.export import hf
from halfbyte.training.config import Method, Recipe
from halfbyte.training.errors import UserError
from halfbyte.training.hf_map import HFWeight
recipe = Recipe(method=Method.bf16)
try:
    hf.write([HFWeight("model.norm.weight", torch.zeros(65536))], recipe, model_dir=Path({str(model_dir)!r}),
             out=Path({str(tmp_path / "hf")!r}), checkpoint="step_00000003", versions={{}})
except UserError as error:
    print("one line:", error)
"""
    done = subprocess.run([sys.executable, "-c", script], preexec_fn=limit, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("one line:"), done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_flush_that_fails_in_the_second_thread_is_one_line(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fsync(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("halfbyte.export.container.os.fsync", fsync)
    with pytest.raises(UserError, match=r"hf: export failed: .*Input/output error"):
        export(model_dir, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_leftovers_of_a_killed_export_are_cleared_and_the_old_one_is_put_back(model_dir: Path, tmp_path: Path):
    out = tmp_path / "hf"
    export(model_dir, out)
    out.rename(tmp_path / ".hf.previous")  # as if killed between the two renames
    (tmp_path / ".hf.partial").mkdir()
    with pytest.raises(UserError, match=r"export lacks 20 weights, model.embed_tokens.weight"):
        export(model_dir, out, iter(()))
    assert (out / "halfbyte.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "source"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: cannot be read"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer files"),
    ],
)
def test_bad_sources_are_one_line(model_dir: Path, tmp_path: Path, damage, words: str):
    damage(model_dir)
    with pytest.raises(UserError, match=words):
        export(model_dir, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_model_that_is_not_what_the_recipe_says_is_refused(model_dir: Path, tmp_path: Path):
    with pytest.raises(UserError, match="not quantized in the model, but in the recipe"):
        export(model_dir, tmp_path / "hf", weights(quantized=False))
    with pytest.raises(UserError, match="quantized in the model, not in the recipe"):
        export(model_dir, tmp_path / "hf", weights(), recipe(method=Method.bf16))
    longer = (replace(w, tensor=w.tensor.repeat(2)) if w.name == "model.norm.weight" else w for w in weights())
    with pytest.raises(UserError, match=r"model\.norm\.weight: .*not as planned; the checkpoint fits another recipe"):
        export(model_dir, tmp_path / "hf", longer)
    with pytest.raises(UserError, match=r"model\.norm\.weight: exported twice"):
        export(model_dir, tmp_path / "hf", iter([*weights(), HFWeight("model.norm.weight", torch.ones(HIDDEN))]))


# ---- the second reader


@pytest.mark.parametrize("number_format", list(Format))
@pytest.mark.parametrize("scale_2", list(SecondScale))
def test_reader_decodes_what_was_trained_with(
    model_dir: Path, tmp_path: Path, number_format: Format, scale_2: SecondScale
):
    run = recipe(number_format)
    run.quantize.scale_2 = scale_2
    export(model_dir, tmp_path / "hf", run=run)
    checkpoint = reader.open_checkpoint(tmp_path / "hf")
    for weight in weights():
        decoded = checkpoint.decode(module_name(weight.name))
        trained = fake(weight, run.quantize) if weight.quantized else weight.tensor.bfloat16().float()
        assert np.array_equal(decoded, trained.numpy())


def test_index_must_fit_the_files(model_dir: Path, tmp_path: Path):
    out, run = tmp_path / "hf", recipe()
    run.export.shard_gb = 8e-6
    export(model_dir, out, run=run)
    path = out / "model.safetensors.index.json"
    index = json.loads(path.read_text())

    def message(weight_map: dict) -> str:
        path.write_text(json.dumps(index | {"weight_map": weight_map}))
        with pytest.raises(UserError) as error:
            reader.open_checkpoint(out)
        return str(error.value)

    complete = index["weight_map"]
    missing = {name: file for name, file in complete.items() if name != "model.norm.weight"}
    assert "model.norm.weight of" in message(missing)
    assert "gone.safetensors, which is missing" in message(complete | {"model.norm.weight": "gone.safetensors"})
    first = sorted(set(complete.values()))[0]
    assert f"model.norm.weight is not in {first}" in message(complete | {"model.norm.weight": first})
    path.unlink()
    with pytest.raises(UserError, match=r"index\.json: missing"):
        reader.open_checkpoint(out)
