"""Metrics of a run: each step once, complete files, and a full disk that stops nothing."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from halfbyte.training import sinks, telemetry
from halfbyte.training.choices import CudaGraphs
from halfbyte.training.config import Recipe
from halfbyte.training.errors import RecipeError, UserError
from halfbyte.training.hardware import GPUS
from halfbyte.training.resolve import resolve
from halfbyte.training.shape import ModelShape, model_flops

SHAPE = ModelShape(2, 64, 96, 4, 2, 16, 64, False, 32, 1e4, None, 1e-5)
RECORD = {"step": 7, "time": 1000.5, "loss": 1.25, "mfu": 0.5, "quantization": {"weight_error": {"mean": 0.1}}}
RECORD |= {"slowest": "rank 3", sinks.DETAIL: {"fc1": {"weight": {"error": 0.09}}}}


def test_a_resume_keeps_each_step_once(tmp_path):
    first = sinks.JsonLines(tmp_path, 0)
    for step in (1, 2, 3, 4):
        first.write({"step": step, "loss": 1.0 / step})
    first.close({})
    path = tmp_path / sinks.METRICS
    path.write_bytes(path.read_bytes() + b'\xff\n{"step": 5, "lo')  # killed while it wrote
    again = sinks.JsonLines(tmp_path, 2)  # the newest checkpoint is that of step 2
    again.write({"step": 3, "loss": 0.3})
    again.close({"checkpoint": {"step": 3}})
    assert [(r["step"], r["loss"]) for r in sinks.read_metrics(path)] == [(1, 1.0), (2, 0.5), (3, 0.3)]
    assert [entry.name for entry in tmp_path.iterdir()] == [sinks.METRICS]


def test_what_is_no_record_is_skipped():
    for line in ("", "{", "[1]", "7", '{"loss": 1}', '{"step": "7"}', "\x00\x00"):
        assert sinks.parsed(line) is None
    assert sinks.parsed('{"step": 7}') == {"step": 7}


def test_the_prometheus_file_letter_by_letter(tmp_path):
    writer = sinks.Prometheus(tmp_path, 'a "b"\\\n', 0)
    writer.close({"checkpoint": {"step": 0}})  # before the first step
    assert not (tmp_path / sinks.PROMETHEUS).exists()
    writer.write(RECORD)
    label = r"a \"b\"\\\n"
    assert (tmp_path / sinks.PROMETHEUS).read_text() == (
        "# HELP halfbyte_step Optimizer steps done.\n# TYPE halfbyte_step gauge\n"
        f'halfbyte_step{{run="{label}"}} 7.0\n'
        "# HELP halfbyte_time Seconds since 1970 of the last step.\n# TYPE halfbyte_time gauge\n"
        f'halfbyte_time{{run="{label}"}} 1000.5\n'
        "# HELP halfbyte_loss Mean loss per token of the last step, nats.\n# TYPE halfbyte_loss gauge\n"
        f'halfbyte_loss{{run="{label}"}} 1.25\n'
        "# HELP halfbyte_mfu Model FLOPs of the last step over the BF16 peak of all GPUs, 0 to 1.\n"
        f'# TYPE halfbyte_mfu gauge\nhalfbyte_mfu{{run="{label}"}} 0.5\n'
        "# TYPE halfbyte_quantization_weight_error_mean gauge\n"
        f'halfbyte_quantization_weight_error_mean{{run="{label}"}} 0.1\n'
    )
    writer.write(RECORD | {"step": 8})  # too soon for another version
    assert 'halfbyte_step{run="' + label + '"} 7.0' in (tmp_path / sinks.PROMETHEUS).read_text()
    writer.close({})
    assert 'halfbyte_step{run="' + label + '"} 8.0' in (tmp_path / sinks.PROMETHEUS).read_text()


def test_tensorboard_has_every_number(tmp_path):
    writer = sinks.TensorBoard(tmp_path, 6)
    writer.write(RECORD)
    writer.close({})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {
        *("loss", "mfu", "quantization/weight_error/mean", "layers/fc1/weight/error")
    }
    (point,) = events.Scalars("loss")
    assert (point.step, point.value, point.wall_time) == (7, 1.25, 1000.5)


def test_a_missing_tensorboard_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"telemetry\.tensorboard = true: not installed .*pip install tensorboard"):
        sinks.TensorBoard(tmp_path, 0)


@pytest.fixture
def run(tmp_path):
    """A callback on a stand-in for Lightning: what it said, what the loggers got, and a function that takes a step."""
    recipe = Recipe()
    recipe.run.dir, recipe.train.global_batch, recipe.train.sequence_length = str(tmp_path), 4, 32
    runtime = SimpleNamespace(first=True, world=1, device=torch.device("cpu"))
    said: list[str] = []
    logged: list[tuple] = []
    logger = SimpleNamespace(log_metrics=lambda metrics, step: logged.append((step, metrics)))
    trainer = SimpleNamespace(loggers=[logger])
    optimizer = SimpleNamespace(param_groups=[{"lr": 1e-5}], gradient_norm=0.5)
    module = SimpleNamespace(progress=SimpleNamespace(losses=[]), optimizer=optimizer, saves=[])
    watched = telemetry.Telemetry(recipe, runtime, SHAPE, said.append)

    def step(loss):
        watched.on_train_batch_start(trainer, module)
        module.progress.losses.append(loss)
        watched.on_train_batch_end(trainer, module, None, [None], 0)

    return SimpleNamespace(**locals())


def test_every_step_has_its_record(run, tmp_path):
    run.watched.on_train_start(run.trainer, run.module)
    run.step(2.0)
    run.watched.peak = GPUS["H200"].bf16
    run.step(1.5)
    run.module.saves.append({"step": 2, "seconds": 8.0, "stall_seconds": 0.5, "wait_seconds": 0.0})
    run.step(1.25)
    run.step(1.0)
    run.watched.close(run.module)
    first, second, third, fourth = sinks.read_metrics(tmp_path / sinks.METRICS)
    assert {key: first[key] for key in ("step", "loss", "learning_rate", "gradient_norm")} == {
        "step": 1,
        "loss": 2.0,
        "learning_rate": 1e-5,
        "gradient_norm": 0.5,
    }
    assert "mfu" not in first
    assert first["memory_bytes"] > 1e6
    assert first["tokens_per_second"] == pytest.approx(4 * 32 / first["seconds"])
    assert second["mfu"] == pytest.approx(model_flops(SHAPE, 128, 32) / second["seconds"] / 989.4e12)
    assert third["checkpoint"] == {
        "step": 2,
        "seconds": 8.0,
        "stall_seconds": 0.5,
        "wait_seconds": 0.0,
    }  # completed after the second step
    assert "checkpoint" not in first | second | fourth
    assert [step for step, _ in run.logged] == [1, 2, 3, 4]
    assert set(run.logged[1][1]) == {"seconds", "tokens_per_second", "mfu", "memory_bytes"}
    assert run.logged[2][1]["checkpoint/stall_seconds"] == 0.5
    assert run.said == []


def gauge(folder, name):
    """Value of a gauge in metrics.prom."""
    return float(re.search(rf"^halfbyte_{name}{{.*}} (.+)$", (folder / sinks.PROMETHEUS).read_text(), re.MULTILINE)[1])


def test_prometheus_sees_the_last_checkpoint_of_all(run, tmp_path, monkeypatch):
    """It completes after the last step's record; and a collector must not have to come in one certain step."""
    monkeypatch.setattr(sinks, "PROMETHEUS_S", 0.0)
    run.module.progress.losses += [3.0] * 4  # a resume after the fourth step
    run.watched.on_train_start(run.trainer, run.module)
    run.step(2.0)
    assert gauge(tmp_path, "checkpoint_step") == 4.0
    run.module.saves.append({"step": 5, "seconds": 8.0, "stall_seconds": 0.5})
    run.step(1.5)
    run.step(1.5)
    assert (gauge(tmp_path, "step"), gauge(tmp_path, "checkpoint_step")) == (7.0, 5.0)
    run.module.saves += [{"step": step, "seconds": 1.0, "stall_seconds": 1.0} for step in (6, 7)]
    run.watched.close(run.module)
    assert (gauge(tmp_path, "step"), gauge(tmp_path, "checkpoint_step")) == (7.0, 7.0)
    assert gauge(tmp_path, "checkpoint_stall_seconds") == 1.0
    assert [record["step"] for record in sinks.read_metrics(tmp_path / sinks.METRICS)] == [5, 6, 7]


def test_where_graphs_hide_waiting_the_report_says_so_once(run, monkeypatch):
    asked = []

    def compared(seconds, device, ratio, *, apart):
        asked.append(apart)
        return {"median_seconds": 1.0}, []

    monkeypatch.setattr(telemetry, "compare", compared)
    monkeypatch.setattr(telemetry, "WaitClock", lambda device: SimpleNamespace(start=int, stop=int))
    monkeypatch.setattr(telemetry, "peak_gpu_bytes", lambda *_: 0)
    monkeypatch.setattr(telemetry, "gpu_of", lambda name: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "")
    run.recipe.telemetry.stragglers_every_steps = 1
    run.runtime.world, run.runtime.device = 2, torch.device("cuda")
    for tensor, graphs, said in ((2, "auto", 1), (2, "never", 0), (1, "auto", 0)):
        run.recipe.parallel.tensor, run.recipe.parallel.data = tensor, 2 // tensor
        run.recipe.train.cuda_graphs = CudaGraphs(graphs)
        run.watched = telemetry.Telemetry(run.recipe, run.runtime, SHAPE, run.said.append)
        run.module.progress.losses.clear()
        for _ in range(2):
            run.watched.on_train_batch_start(run.trainer, run.module)
            run.module.progress.losses.append(1.0)
            run.watched.on_train_batch_end(run.trainer, run.module, None, [None], 0)
        assert asked == [said == 0] * 2
        assert run.said == [f"  step 1: {telemetry.GRAPHS_HIDE}"] * said
        asked.clear()
        run.said.clear()


def test_memory_of_graphs_counts_while_they_rest(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 7)
    recipe, gpu = Recipe(), torch.device("cuda")
    assert telemetry.peak_gpu_bytes(recipe, gpu) == 7
    recipe.train.cuda_graphs = CudaGraphs.never
    assert telemetry.peak_gpu_bytes(recipe, gpu) == 5
    assert telemetry.peak_gpu_bytes(recipe, torch.device("cpu")) is None


def test_a_full_disk_stops_nothing(run, tmp_path):
    run.watched.on_train_start(run.trainer, run.module)
    full = SimpleNamespace(write=lambda record: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    run.watched.sinks.insert(0, full)
    run.step(2.0)
    run.step(1.5)
    run.watched.close(run.module)
    assert run.said == ["  metrics cannot be written (No space left on device): training goes on without them"]
    assert [step for step, _ in run.logged] == [1, 2]


def test_the_end_of_wandb_does_not_keep_the_checkpoint_from_being_saved(run, tmp_path):
    def lost(metrics, step):
        raise ConnectionResetError("Connection lost")

    run.trainer.loggers[0].log_metrics = lost
    run.watched.on_train_start(run.trainer, run.module)
    run.step(2.0)
    assert [record["step"] for record in sinks.read_metrics(tmp_path / sinks.METRICS)] == [1]


def test_other_ranks_write_nothing(run, tmp_path):
    run.runtime.first = False
    run.watched.on_train_start(run.trainer, run.module)
    run.step(2.0)
    assert list(tmp_path.iterdir()) == []


def test_flops_by_hand():
    linear = 64 * (4 + 2 * 2) * 16 + 64 * 64 + 3 * 64 * 96
    assert model_flops(SHAPE, 1, 32) == 6 * (2 * linear + 64 * 64) + 6 * 2 * 32 * 64


def test_bad_keys_are_refused():
    with pytest.raises(RecipeError) as error:
        resolve("tiny", ["telemetry.straggler_ratio=1.0", "telemetry.quantization_every_steps=-1"])
    assert [line.partition(":")[0] for line in error.value.problems] == [
        "telemetry.quantization_every_steps = -1",
        "telemetry.straggler_ratio = 1.0",
    ]
    assert json.dumps(resolve("tiny", ["telemetry.tensorboard=true"]).telemetry.tensorboard) == "true"
