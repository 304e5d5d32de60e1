"""Whole runs of the tiny recipe through the command line: files, gate, export, verify, formats, methods."""

import hashlib
import json
from pathlib import Path

import pytest

from halfbyte.export.reader import open_checkpoint

pytestmark = pytest.mark.slow
FUSED = ["self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"]
SECRET = "0123456789c0ffee" * 2 + "deadbeef"
"""As long as a key of W&B."""
SECRETS = dict.fromkeys(("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"), SECRET)
"""Planted in the environment of the first run."""
FURTHER = ("export.also=[trtllm]", "export.tensor_parallel=2", "export.files=3")
SHORT = ("train.steps=3", "evaluate.tasks.lambada.limit=4", "evaluate.tasks.english.limit=4", "verify.items=2")


def read(path: Path):
    return json.loads(path.read_text())


def digest(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of every weight and quantization file of an export."""
    files = [*(folder / "export" / "hf").glob("*.safetensors"), *(folder / "export" / "hf").glob("*config.json")]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def same_scores(run: Path, one: str, other: str) -> bool:
    """Whether two stages' per-item scores are equal to the last digit; in FP32 the files and the model must be."""
    names = [path.name.removeprefix(f"{one}.") for path in (run / "evaluate").glob(f"{one}.*.jsonl")]
    assert names
    files = [[(run / "evaluate" / f"{stage}.{name}").read_bytes() for name in names] for stage in (one, other)]
    return files[0] == files[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


def vouch_for(run: Path, changed: Path) -> None:
    """Give the records of a run the hashes of a file that was altered, so that only its scores can tell."""
    record, notes = changed.with_name("halfbyte.json"), run / "export" / "export.json"
    content = read(record)
    content["files"][changed.name] |= {"sha256": hashlib.sha256(changed.read_bytes()).hexdigest()}
    record.write_text(json.dumps(content))
    known = {"record_sha256": hashlib.sha256(record.read_bytes()).hexdigest()}
    notes.write_text(json.dumps(read(notes) | known))


def check_export(export: Path) -> None:
    """The release and its conversions, written by two processes."""
    folders = {path.name for path in export.iterdir() if path.is_dir()}
    assert folders == {"hf", "compressed_tensors", "trtllm"}
    assert len(list((export / "hf").glob("model-*-of-00003.safetensors"))) == 3
    assert {"tokenizer.json", "generation_config.json"} < {path.name for path in (export / "hf").iterdir()}
    card = (export / "hf" / "README.md").read_text()
    assert "Verdict: **pass**, by the rule `bf16`" in card
    assert "\nvllm serve FOLDER --tensor-parallel-size 2\n" in card
    assert "the input of `trtllm-build`" in (export / "trtllm" / "README.md").read_text()
    assert (export / "trtllm" / "rank1.safetensors").exists()
    assert read(export / "trtllm" / "halfbyte.json")["gate"]["verdict"] == "pass"
    assert str((export / "hf").resolve()) in (export / "HANDOFF.md").read_text()


def test_a_run_leaves_everything_that_scripts_rely_on(halfbyte, place):
    further = ("export.also=[compressed_tensors,trtllm]", "export.tensor_parallel=2", "telemetry.tensorboard=true")
    further += ("telemetry.stragglers_every_steps=2", "telemetry.quantization_every_steps=3", "export.files=3")
    options = (*SHORT, *further, "run.dir=runs/a", "parallel.pipeline=2")
    done = halfbyte("run", "tiny", *options, cwd=place, env=SECRETS, fresh=True)
    assert done.returncode == 0, done.stdout + done.stderr
    run = place / "runs" / "a"
    train = read(run / "train.json")
    assert train["steps"] == 3
    assert len(train["losses"]) == 3
    assert all(isinstance(loss, float) for loss in train["losses"])
    scores = read(run / "evaluate.json")
    assert list(scores) == ["bf16", "ptq", "qat", "exported"]
    for stage, tasks in scores.items():
        assert tasks["lambada"]["n"] == 4
        rows = [json.loads(line) for line in (run / "evaluate" / f"{stage}.lambada.jsonl").read_text().splitlines()]
        assert [row["item"] for row in rows] == [0, 1, 2, 3]
    assert same_scores(run, "qat", "exported")
    layers = read(run / "quantize.json")["layers"]
    assert set(train["weight_relative_rms_error"]) == set(layers)
    assert all(0.05 < error < 0.2 for error in train["weight_relative_rms_error"].values())
    assert sum(len(layer["hf"]) for layer in layers.values()) == 28
    assert {layer["format"] for layer in layers.values()} == {"nvfp4"}
    assert read(run / "gate.json")["verdict"] == "pass"
    verified = read(run / "verify.json")
    assert verified["ok"] is True
    assert verified["mismatches"] == 0
    assert verified["tensors"] == 39
    assert all(abs(task["nats_per_token_difference"]) < 1e-3 for task in verified["rescored"].values())
    check_export(run / "export")
    assert "trtllm-serve" in done.stdout
    assert list((run / "wandb").glob("offline-run-*"))
    assert list((run / "tensorboard").glob("events.*"))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["loss"]) for entry in metrics] == list(enumerate(train["losses"], 1))
    assert all(entry["tokens_per_second"] > 0 and entry["gradient_norm"] > 0 for entry in metrics)
    assert [("ranks" in entry) for entry in metrics] == [False, True, False]
    assert 0 < metrics[1]["ranks"]["largest_seconds"] < metrics[1]["seconds"]
    assert [("quantization" in entry) for entry in metrics] == [False, False, True]
    now = {key: layer["weight"]["error"] for key, layer in metrics[2]["layers"].items()}
    assert now == pytest.approx(train["weight_relative_rms_error"], rel=1e-5)
    prometheus = (run / "metrics.prom").read_text()
    assert 'halfbyte_step{run="tiny"} 3.0' in prometheus
    assert 'halfbyte_checkpoint_step{run="tiny"} 3.0' in prometheus  # completed after the last step's record
    logs = [(run / "logs" / f"rank{rank}.log").read_text() for rank in (0, 1)]
    assert all(f"INFO halfbyte: rank {rank} starts" in text for rank, text in enumerate(logs))
    assert all("INFO halfbyte: calibrate" in text and "Warning" in text for text in logs)
    for noise in ("Traceback", "Warning", "WARNING", "NeMo", SECRET):
        assert noise not in done.stdout + done.stderr


def test_no_secret_is_written(place):
    written = [path for path in (place / "runs" / "a").rglob("*") if path.is_file()]
    assert len(written) > 30
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]


def test_a_finished_run_is_not_done_again(halfbyte, place):
    before = digest(place / "runs" / "a")
    again = halfbyte("run", "tiny", *SHORT, *FURTHER, "run.dir=runs/a", "parallel.pipeline=2", cwd=place)
    assert again.returncode == 0, again.stderr
    started = ("import", "evaluate", "train", "export")
    assert not any(line.startswith(started) for line in again.stdout.splitlines())
    assert digest(place / "runs" / "a") == before


def flip(path: Path) -> bytes:
    """Flip a bit of a file's last byte; what it held before."""
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    return good


def test_a_flipped_byte_fails_verify(halfbyte, place):
    export = place / "runs" / "a" / "export"
    weights, engine = export / "hf" / "model-00002-of-00003.safetensors", export / "trtllm" / "rank1.safetensors"
    record = export / "hf" / "halfbyte.json"
    good = {weights: flip(weights), record: record.read_bytes(), engine: flip(engine)}
    record.write_bytes(good[record].replace(b'"verdict": "pass"', b'"verdict": "Pass"'))
    done = halfbyte("verify", "runs/a", cwd=place)
    assert done.returncode == 1
    assert done.stderr.startswith("error: verify failed: ")
    report = read(place / "runs" / "a" / "verify.json")
    assert report["ok"] is False
    for path, line in zip(good, report["problems"][-3:], strict=True):
        assert f"{path.name} changed after the export (SHA-256 differs)" in line
    for path, content in good.items():
        path.write_bytes(content)
    assert halfbyte("verify", "runs/a", cwd=place).returncode == 0


def test_a_run_does_not_ship_again_what_changed_since_it_was_verified(halfbyte, place):
    export = place / "runs" / "a" / "export"
    weights, engine = export / "hf" / "model-00002-of-00003.safetensors", export / "trtllm" / "rank1.safetensors"
    good = {path: flip(path) for path in (weights, engine)}
    options = (*SHORT, *FURTHER, "run.dir=runs/a", "parallel.pipeline=2")
    done = halfbyte("run", "tiny", *options, cwd=place)
    assert done.returncode == 0, done.stderr
    assert "model-00002-of-00003.safetensors changed after the export (SHA-256 differs); exporting it" in done.stdout
    assert {path: path.read_bytes() for path in good} == good


def test_only_a_layout_that_verify_finds_altered_is_made_again(halfbyte, place):
    run = place / "runs" / "a"
    export, engine = run / "export", run / "export" / "trtllm" / "rank1.safetensors"
    good, weights = flip(engine), sorted((export / "hf").glob("*.safetensors"))
    written = [path.stat().st_mtime_ns for path in weights]
    assert halfbyte("verify", "runs/a", cwd=place).returncode == 1
    report = read(run / "verify.json")
    assert not report["ok"]
    assert (
        report["further"]
        == report["problems"]
        == [f"{engine.relative_to(place)} changed after the export (SHA-256 differs)"]
    )
    assert "NOT VERIFIED" in (run / "report.html").read_text()
    done = halfbyte("run", "tiny", *SHORT, *FURTHER, "run.dir=runs/a", "parallel.pipeline=2", cwd=place)
    assert done.returncode == 0, done.stderr
    started = [line.split("  ")[0] for line in done.stdout.splitlines()]
    assert "export trtllm" in started
    assert not {"export", "verify", "import"} & set(started)
    assert engine.read_bytes() == good
    assert [path.stat().st_mtime_ns for path in weights] == written
    report = read(run / "verify.json")
    assert (report["ok"], report["problems"], report["problem_count"], report["further"]) == (True, [], 0, [])
    assert report["rescored"]
    assert "NOT VERIFIED" not in (run / "report.html").read_text()


def test_a_failed_gate_leaves_nothing_to_ship_unless_it_is_asked_to(halfbyte, place):
    run = place / "runs" / "a"
    strict = ("gate.perplexity_ratio=1e-6",)
    assert halfbyte("gate", "runs/a", *strict, cwd=place).returncode == 3
    done = halfbyte("export", "runs/a", *strict, cwd=place)
    assert done.returncode == 3
    assert not (run / "export" / "hf").exists()
    assert not (run / "export" / "HANDOFF.md").exists()
    assert not (run / "export" / "trtllm").exists()
    assert read(run / "export" / "candidate" / "halfbyte.json")["gate"] is None
    allowed = halfbyte("export", "runs/a", *strict, "--allow-failed-gate", cwd=place)
    assert allowed.returncode == 3
    assert read(run / "export" / "hf" / "halfbyte.json")["gate"]["verdict"] == "fail"
    assert "fail" in (run / "export" / "HANDOFF.md").read_text()


def test_a_verdict_about_another_checkpoint_ships_nothing(halfbyte, place):
    longer = ("train.steps=4", "gate.perplexity_ratio=1000")
    assert halfbyte("gate", "runs/a", "gate.perplexity_ratio=1000", cwd=place).returncode == 0
    assert halfbyte("train", "runs/a", *longer, cwd=place).returncode == 0
    assert set(read(place / "runs" / "a" / "state.json")) == {"evaluate.bf16", "evaluate.ptq", "train"}
    assert not (place / "runs" / "a" / "export" / "export.json").exists()
    for stage in ("gate", "export"):
        done = halfbyte(stage, "runs/a", *longer, cwd=place)
        assert done.returncode == 1
        assert "the newest checkpoint is step_00000004" in done.stderr


LAYERS = '{"model.layers.0.*": fp8, "*.down_proj": w4a16_nvfp4, "model.layers.3.self_attn.*": bf16}'
FORMATS = {
    "mxfp4": ("quantize.format=mxfp4",),
    # Float64, because an FP8 scale is the calibrated maximum itself, not rounded to a power of two.
    "mixed": (f"quantize.layers={LAYERS}", "train.dtype=float64", "quantize.kv_cache=nvfp4"),
}


@pytest.mark.parametrize("number_format", FORMATS)
def test_ptq_exports_the_same_bytes_from_one_process_and_from_tensor_parallel(halfbyte, place, number_format):
    options = (*SHORT, "method=ptq", *FORMATS[number_format], "run.wandb=disabled")
    folders = []
    layouts = {"one": (), "tp2": ("parallel.tensor=2", "parallel.sequence=true")}
    for name, layout in layouts.items():
        folders.append(place / "runs" / f"{number_format}_{name}")
        done = halfbyte("run", "tiny", *options, *layout, f"run.dir={folders[-1]}", cwd=place)
        assert done.returncode == 0, done.stdout + done.stderr
        assert read(folders[-1] / "verify.json")["ok"] is True
        assert same_scores(folders[-1], "ptq", "exported")
    if number_format == "mxfp4":
        config = read(folders[0] / "export" / "hf" / "config.json")["quantization_config"]
        assert config["format"] == "mxfp4-pack-quantized"
        same = [(folder / "export" / "hf" / "model.safetensors").read_bytes() for folder in folders]
        assert same[0] == same[1]
    else:
        assert digest(folders[0]) == digest(folders[1])


def test_a_mixed_run_says_what_each_layer_is_and_guards_its_fp8_bytes(halfbyte, place):
    run = place / "runs" / "mixed_one"
    layers = read(run / "quantize.json")["layers"]
    assert {key: layers[key]["format"] for key in layers if key.startswith("decoder.layers.0.")} == dict.fromkeys(
        [f"decoder.layers.0.{name}" for name in FUSED], "fp8"
    )
    assert [layers[f"decoder.layers.3.{name}"]["format"] for name in FUSED[2:]] == ["nvfp4", "w4a16_nvfp4"]
    assert not any(f"decoder.layers.3.{name}" in layers for name in FUSED[:2])
    quantization = read(run / "export" / "hf" / "hf_quant_config.json")["quantization"]
    assert quantization["kv_cache_quant_algo"] == "NVFP4"
    named = quantization["quantized_layers"]
    assert named["model.layers.0.mlp.up_proj"] == {"quant_algo": "FP8"}
    fused = {name for name in named if name.endswith((".qkv_proj", ".gate_up_proj"))}
    assert len(named.keys() - fused) == sum(len(layer["hf"]) for layer in layers.values()) == 24
    assert len(fused) == sum(len(layer["hf"]) > 1 for layer in layers.values())
    assert "MIXED_PRECISION" in (run / "export" / "HANDOFF.md").read_text()
    entry = open_checkpoint(run / "export" / "hf").entries["model.layers.0.mlp.up_proj.weight"]
    assert entry.dtype == "F8_E4M3"
    content = bytearray(entry.file.read_bytes())
    content[entry.offset + 7] ^= 1
    entry.file.write_bytes(content)
    done = halfbyte("verify", run, cwd=place)
    assert done.returncode == 1
    assert "error: verify failed: model.layers.0.mlp.up_proj.weight: 1 of" in done.stderr


def test_weight_only_with_an_fp8_cache(halfbyte, place):
    run = place / "runs" / "w4a16"
    options = (*SHORT, "quantize.format=w4a16_nvfp4", "quantize.kv_cache=fp8", "run.wandb=disabled", f"run.dir={run}")
    done = halfbyte("run", "tiny", *options, cwd=place)
    assert done.returncode == 0
    assert "key/value cache in fp8" in done.stdout
    layers = read(run / "quantize.json")["layers"].values()
    assert all(set(layer["scale_2"]) == {"weight"} for layer in layers)
    assert same_scores(run, "qat", "exported")
    assert read(run / "verify.json")["ok"] is True


def test_distillation_and_the_control_run_through(halfbyte, place):
    done = halfbyte("run", "tiny", *SHORT, "method=qad", "run.dir=runs/qad", "run.wandb=disabled", cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = read(place / "runs" / "qad" / "train.json")["losses"]
    assert 0 < losses[0] < 1  # KL to the unquantized model, not a cross-entropy of 6.7
    done = halfbyte("run", "tiny", *SHORT, "method=bf16", "run.dir=runs/bf16", "run.wandb=disabled", cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    run = place / "runs" / "bf16"
    assert read(run / "gate.json")["verdict"] == "not_applicable"
    assert not (run / "export" / "hf" / "hf_quant_config.json").exists()
    assert read(run / "verify.json")["ok"] is True


def test_the_gate_fails_a_copy_whose_scales_were_doubled_in_one_layer(halfbyte, place):
    """Perplexity and accuracy of a random model do not see it; KL to BF16 does. Nothing stays released."""
    from safetensors.torch import load_file, save_file

    run = place / "runs" / "doubled"
    options = ("method=ptq", "gate.kl=0.15", "evaluate.tasks.english.limit=24", "verify.items=0", "run.wandb=disabled")
    done = halfbyte("run", "tiny", *options, f"run.dir={run}", cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    path = run / "export" / "hf" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight_scale_2"] *= 2
    save_file(tensors, path, metadata={"format": "pt"})
    vouch_for(run, path)
    marks = read(run / "state.json")
    del marks["evaluate.exported"]  # as if the run had been stopped before it scored the verified files
    (run / "state.json").write_text(json.dumps(marks))
    again = halfbyte("run", "tiny", *options, f"run.dir={run}", cwd=place)
    assert again.returncode == 3, again.stdout + again.stderr
    measures = read(run / "gate.json")["tasks"]["english"]["measures"]
    assert "fail" in measures.values()
    assert "perplexity" in [name for name, verdict in measures.items() if verdict == "pass"]
    assert not (run / "export" / "hf").exists()
