"""The engine stage: what it decides on which machine, and the command line that a fake trtllm-build gets to see."""

import hashlib
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from export_tools import LLAMA, QWEN3, export, recipe

from halfbyte.export.serving import Load, Served, commands, readers
from halfbyte.launch import engine as stage
from halfbyte.launch.cli import main
from halfbyte.launch.engine import engine
from halfbyte.training.config import Format
from halfbyte.training.errors import FAILED, USAGE, UserError
from halfbyte.training.kv_format import KVCache
from halfbyte.training.resolve import resolve, save

BUILDER = """#!/bin/bash
printf '%s\\n' "$@" > "{seen}"
echo "building"
echo "{last}"
while [ $# -gt 0 ]; do [ "$1" = --output_dir ] && out="$2"; shift; done
[ {engines} = 0 ] || (echo one > "$out/rank0.engine"; echo two > "$out/rank1.engine"; echo "{{}}" > "$out/config.json")
exit {code}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(tmp_path_factory.mktemp("run"), LLAMA, Format.nvfp4)


def finish(place: Path, config: dict, number_format: Format) -> Path:
    """A run folder as a finished run leaves it, as far as the engine stage looks."""
    cache = KVCache.fp8 if number_format is Format.nvfp4 else KVCache.none
    out = export(place / "made", config, recipe(number_format, cache))
    run = place / "my run"
    shutil.copytree(out, run / "export" / "hf")
    options = [f"model.path={place / 'made' / 'source'}", f"quantize.kv_cache={cache}", f"run.dir={run}"]
    options += [f"quantize.format={number_format}", "export.tensor_parallel=2", "launch.partition=b200"]
    save(resolve("tiny", options), run / "resolved.yaml")
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def machine(
    monkeypatch, tmp_path: Path, version: str, gpu: tuple[int, int] | None, code: int = 0, engines: int = 1
) -> Path:
    """Put a fake TensorRT-LLM on PATH; the file to which its builder writes its arguments."""
    folder, seen = tmp_path / "bin", tmp_path / "seen"
    folder.mkdir()
    script = BUILDER.format(seen=seen, code=code, engines=engines, last="out of memory" if code else "done")
    for name, text in {"trtllm-build": script, "python": f"#!/bin/bash\necho {version}\n"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: gpu)
    return seen


def test_an_engine_is_built_where_it_can_be(run: Path, tmp_path: Path, monkeypatch):
    seen = machine(monkeypatch, tmp_path, "1.2.1", (10, 0))
    done = engine(run, 8, 48, None, allow_failed_gate=False)
    assert "engine of 2 rank(s)" in done
    words = seen.read_text().splitlines()
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert Path(given.pop("--output_dir")).name == ".engine.partial"
    assert given == {
        "--checkpoint_dir": str(run / "export" / "trtllm"),
        "--gemm_plugin": "nvfp4",
        "--gpt_attention_plugin": "bfloat16",
        "--remove_input_padding": "enable",
        "--kv_cache_type": "paged",
        "--tokens_per_block": "32",
        "--use_paged_context_fmha": "enable",
        "--use_fp8_context_fmha": "enable",
        "--max_batch_size": "8",
        "--max_seq_len": "48",
        "--workers": "2",
    }
    assert sorted(path.name for path in (run / "export" / "trtllm").glob("rank*")) == [
        "rank0.safetensors",
        "rank1.safetensors",
    ]
    record = json.loads((run / "export" / "engine.json").read_text())
    assert (record["decision"], record["tensorrt_llm"]["version"]) == ("built", "1.2.1")
    assert record["files"]["rank1.engine"] == hashlib.sha256(b"two\n").hexdigest()
    assert Path(record["log"]).read_text() == "building\ndone\n"
    assert (run / "export" / "engine" / "rank0.engine").exists()
    rank_files = (run / "export" / "trtllm" / "config.json").stat().st_ino
    engine(run, 4, 48, None, allow_failed_gate=False)  # another size, the same rank files
    assert (run / "export" / "trtllm" / "config.json").stat().st_ino == rank_files


@pytest.mark.parametrize(("code", "engines"), [(1, 1), (0, 0)])
def test_a_build_that_fails_leaves_the_older_engine(run: Path, tmp_path: Path, monkeypatch, code: int, engines: int):
    (run / "export" / "engine").mkdir()
    (run / "export" / "engine" / "old.engine").touch()
    machine(monkeypatch, tmp_path, "1.1.0", (12, 0), code, engines)
    with pytest.raises(UserError, match=rf"failed \(exit code {code}, .*engine\.log") as error:
        engine(run, 8, 48, None, allow_failed_gate=False)
    assert ("out of memory" in str(error.value)) is bool(code)
    assert [path.name for path in (run / "export" / "engine").iterdir()] == ["old.engine"]
    assert not (run / "export" / ".engine.partial").exists()


def test_what_is_missing_is_named_and_the_build_is_written(run: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    command = ["engine", str(run), "--max-batch-size", "8", "--max-seq-len", "48", "--tp", "1"]
    assert main(command) == FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert "tensorrt_llm <= 1.2.1 is not installed; trtllm-build is not on PATH; no Blackwell GPU" in line
    script = (run / "export" / "engine.sh").read_text().splitlines()
    words = shlex.split(script[-1])  # the run folder's name needs no quotes here, a space would get them
    assert words[:3] == ["trtllm-build", "--checkpoint_dir", str(run / "export" / "trtllm")]
    assert words[words.index("--output_dir") + 1] == str(run / "export" / "engine")
    job = (run / "export" / "engine.sbatch").read_text()
    assert "#SBATCH --partition=b200" in job
    assert "#SBATCH --gpus-per-node=1" in job
    assert shlex.join(words) in job
    assert json.loads((run / "export" / "engine.json").read_text())["decision"] == "elsewhere"
    machine(monkeypatch, tmp_path, "1.2.1", (9, 0))
    with pytest.raises(UserError, match=r"not built: no Blackwell GPU \(SM100 or newer; found: SM90\); run"):
        engine(run, 8, 48, 1, allow_failed_gate=False)


def test_a_newer_release_loads_the_directory(run: Path, tmp_path: Path, monkeypatch):
    seen = machine(monkeypatch, tmp_path, "1.3.0rc22", None)
    assert "loads" in engine(run, 8, 48, 2, allow_failed_gate=False)
    assert not seen.exists()
    assert not (run / "export" / "trtllm").exists()
    page = (run / "export" / "SERVE.md").read_text()
    out, settings = shlex.quote(str(run / "export" / "hf")), run / "export" / "trtllm-serve.yaml"
    sizes = "--tp_size 2 --max_batch_size 8 --max_seq_len 48"
    assert f"trtllm-serve {out} {sizes} --config {settings}" in page
    assert f"vllm serve {out} --tensor-parallel-size 2 --max-num-seqs 8 --max-model-len 48 --kv-cache-dtype fp8" in page
    assert "--tp 2 --max-running-requests 8 --context-length 48 --quantization modelopt_fp4 --kv-cache-dtype" in page
    assert yaml.safe_load(settings.read_text())["kv_cache_config"]["dtype"] == "fp8"
    weights = run / "export" / "hf" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot be served: .*changed after the export"):
        engine(run, 8, 48, 2, allow_failed_gate=False)


def test_what_no_engine_can_hold_is_refused(tmp_path: Path, monkeypatch):
    run = finish(tmp_path, QWEN3, Format.nvfp4)
    machine(monkeypatch, tmp_path, "1.2.1", (10, 0))
    with pytest.raises(UserError, match="Llama's layers only"):
        engine(run, 8, 48, 1, allow_failed_gate=False)
    assert "trtllm-serve" in (run / "export" / "SERVE.md").read_text()  # its PyTorch backend needs no engine


def test_bad_sizes_and_folders_are_usage(run: Path, tmp_path: Path):
    for sizes, words in {
        (0, 48, 1): "--max-batch-size 0",
        (8, 65, 1): "--max-seq-len 65: the model ends at 64",
    }.items():
        with pytest.raises(UserError, match=words) as error:
            engine(run, *sizes, allow_failed_gate=False)
        assert error.value.code == USAGE
    with pytest.raises(UserError, match=r"holds no resolved\.yaml"):
        engine(tmp_path, 8, 48, 1, allow_failed_gate=False)
    shutil.rmtree(run / "export" / "hf")
    (run / "checkpoints" / "step_00000001").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no exported checkpoint"):
        engine(run, 8, 48, 1, allow_failed_gate=False)


def test_servers_by_format():
    assert readers([Format.nvfp4, Format.fp8]) == ["TensorRT-LLM", "vLLM", "SGLang"]
    assert readers([Format.mxfp4]) == ["vLLM"]
    assert readers([Format.w4a8_nvfp4_fp8]) == ["TensorRT-LLM"]


@pytest.mark.parametrize(
    ("formats", "cache", "vllm", "sglang"),
    [
        ({Format.fp8}, KVCache.none, "", "--quantization modelopt_fp8"),
        (
            {Format.nvfp4},
            KVCache.fp8,
            "--kv-cache-dtype fp8_e4m3",
            "--quantization modelopt_fp4 --kv-cache-dtype fp8_e4m3",
        ),
        # the scales of an NVFP4 cache are those of an FP8 one, and SGLang has no NVFP4
        (
            {Format.nvfp4},
            KVCache.nvfp4,
            "--kv-cache-dtype nvfp4",
            "--quantization modelopt_fp4 --kv-cache-dtype fp8_e4m3",
        ),
        ({Format.nvfp4, Format.fp8}, KVCache.none, "", ""),
    ],
)
def test_the_options_of_each_server(formats: set[Format], cache: KVCache, vllm: str, sglang: str):
    made = commands(Served("/a b", frozenset(formats), cache, "LlamaForCausalLM"), Load())
    assert made["vLLM"] == f"vllm serve '/a b' {vllm}".rstrip()
    assert made["SGLang"] == f"python -m sglang.launch_server --model-path '/a b' {sglang}".rstrip()
    assert made["TensorRT-LLM"] == "trtllm-serve '/a b'"


def test_the_version_is_the_builders_own(tmp_path: Path, monkeypatch):
    machine(monkeypatch, tmp_path, "not-a-version", (10, 0))
    assert stage.Machine.probe().version is None
    assert stage.Machine.probe().capabilities == ((10, 0),)
