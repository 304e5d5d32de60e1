"""A checkpoint that is written while training goes on: what it holds, who waits for it, and what a full disk costs."""

import dataclasses
import errno
import gc
import math
import pickle
import random
import runpy
import threading
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async

from halfbyte.training import (
    checkpoint,
    checkpoint_content,
    checkpoint_write,
    integrity,
    optimizer_state,
    retention,
    runtime,
    saving,
)
from halfbyte.training.checkpoint_memory import HostMemory
from halfbyte.training.config import Method, Recipe
from halfbyte.training.errors import StoppedTogether, UserError
from halfbyte.training.interrupt import Interrupted, Stop
from halfbyte.training.module import Training

WORLD = runpy.run_path(str(Path(__file__).with_name("workers") / "world.py"))


def one_step(opened, *, distributed: bool = True) -> Any:
    """A Training module that has taken one step."""
    recipe = Recipe(method=Method.qat)
    recipe.train.learning_rate, recipe.train.distributed_optimizer = 1e-2, distributed
    trained = WORLD["training"](opened, recipe)
    trained.training_step(WORLD["batches"](), 0)
    return trained


@pytest.fixture(scope="module")
def opened():
    with WORLD["world_of_one"]() as opened:
        checkpoint.tolerate_plain_adam()
        gc.freeze()  # as training does: Megatron runs the collector in every save that it plans
        yield opened
        gc.unfreeze()


@pytest.fixture(scope="module")
def module(opened):
    return one_step(opened)


@pytest.fixture
def plans(monkeypatch) -> list[Path]:
    """The folders for which Megatron was asked what a checkpoint holds."""
    found, planned = [], checkpoint_write.planned

    def noted(content, folder, host):
        found.append(folder)
        return planned(content, folder, host)

    monkeypatch.setattr(checkpoint_write, "planned", noted)
    return found


@pytest.fixture
def slow_disk(monkeypatch):
    """A checkpoint's thread waits before it writes until the event is set."""
    free, write = threading.Event(), checkpoint_write.Write._write_shards

    def late(self):
        assert free.wait(30)
        return write(self)

    monkeypatch.setattr(checkpoint_write.Write, "_write_shards", late)
    return free


@pytest.fixture
def copied_last(module, monkeypatch):
    """A save is copied at the last moment, when forward and backward have run; `copied_last(write)` before a step."""
    free, copy, update = threading.Event(), HostMemory.copy, module.optimizer.step

    def late(self):
        assert free.wait(30)
        copy(self)

    def step(write, closure=None):
        assert not write._copied.is_set()
        free.set()
        write.wait_until_copied()  # as Lightning's hook does
        free.clear()
        update(closure)

    monkeypatch.setattr(HostMemory, "copy", late)
    return lambda write: monkeypatch.setattr(module.optimizer, "step", partial(step, write), raising=False)


def trainable(module) -> checkpoint.Trainable:
    return checkpoint.Trainable(module.gpt, module.optimizer.megatron)


def content(folder: Path) -> dict[str, Any]:
    """File name -> bytes; of the index what it holds, without the number of its save."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != integrity.NAME}
    index = pickle.loads(found.pop(".metadata"))
    return found | {"tensors": index.state_dict_metadata, "places": index.storage_data}


def test_a_step_during_the_write_changes_no_byte_of_it(module, slow_disk, copied_last, plans, tmp_path):
    """Saved in the background, and in the foreground before, where Megatron plans every save."""
    host = HostMemory()
    for step in (1, 2, 3, 4):
        before, behind = (tmp_path / name / f"step_{step:08d}" for name in ("before", "behind"))
        states = torch.get_rng_state(), numpy.random.get_state(), random.getstate()
        slow_disk.set()
        plain = {"progress": [1.0, 2.0]}
        checkpoint.save(trainable(module), plain, before)
        assert (torch.get_rng_state() == states[0]).all()
        slow_disk.clear()
        write = checkpoint.begin(trainable(module), plain, behind, host)
        copied_last(write)
        module.training_step(WORLD["batches"](step), 0)
        plain["progress"].append(3.0)
        random.random()
        assert not write.done
        assert not behind.exists()
        assert retention.latest(behind.parent) == (None if step == 1 else behind.parent / f"step_{step - 1:08d}")
        slow_disk.set()
        write.finish()
        random.setstate(states[2])
        assert content(behind) == content(before)
        assert integrity.damage(behind) is None
        assert retention.latest(behind.parent) == behind
        assert write.seconds > 0
    assert [path.parent.name for path in plans] == ["before", "behind", "before", "before", "before"]
    assert content(behind) != content(behind.with_name("step_00000001"))


def saved_twice(module, host, folder: Path) -> bool:
    """Whether a save with what the host kept of those before equals one without, in every byte; losses grow by each."""
    plain = {"losses": [0.5] * len(list(folder.glob("*/step*"))), "callbacks": {}, "empty": []}
    before, behind = folder / "before" / "step_00000001", folder / "behind" / "step_00000001"
    checkpoint.save(trainable(module), plain, before)
    checkpoint.begin(trainable(module), plain, behind, host).finish()
    same = content(before) == content(behind)
    before.rename(before.with_name(f"step_{len(list(before.parent.iterdir())):08d}"))
    return same


def freeze(module) -> None:
    module.gpt.decoder.layers[0].mlp.linear_fc1.weight.requires_grad_(False)


def switch_off(module) -> None:
    """As sensitivity.py does; it is in ModelOpt's object, whose bytes change."""
    module.gpt.decoder.layers[0].mlp.linear_fc1.input_quantizer.disable()


def move(module) -> None:
    """A parameter's values at another place."""
    norm = module.gpt.decoder.final_layernorm.weight
    norm.data = norm.data.clone()


def calibrate(module) -> None:
    """Another maximum in the place of the old one."""
    quantizer = module.gpt.decoder.layers[0].mlp.linear_fc1.input_quantizer
    quantizer._amax = quantizer._amax * 2


@pytest.mark.parametrize("distributed", [True, False])
def test_a_save_is_planned_again_when_what_it_stores_has_changed(opened, plans, tmp_path, distributed):
    module, host = one_step(opened, distributed=distributed), HostMemory()

    def planned() -> int:
        plans.clear()
        assert saved_twice(module, host, tmp_path)
        return len(plans) - 1  # the save without a record is always planned

    assert planned() == 1
    for change in (freeze, switch_off, move, calibrate):
        module.training_step(WORLD["batches"](7), 0)
        assert planned() == 0
        change(module)
        assert planned() == 1
    module.gpt.decoder.layers[1].mlp.linear_fc1.input_quantizer._amax.mul_(2)  # a value, which every save takes anew
    assert planned() == 0


@pytest.mark.parametrize("distributed", [True, False])
def test_bf16_weights_and_their_fp32_originals_are_saved_from_the_record_too(
    opened, plans, monkeypatch, tmp_path, distributed
):
    """As a GPU trains; only forward and backward are left out, which not every CPU has in BF16."""
    host_device = type(runtime._HostDevice())  # world_of_one keeps the one that it has entered
    usual = host_device.__torch_function__

    def names_bf16(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.type and len(args) == 1 and not kwargs and args[0].dtype is torch.bfloat16:
            return "torch.cuda.BFloat16Tensor"  # by which Megatron's optimizer tells them
        return usual(self, func, types, args, kwargs)

    monkeypatch.setattr(host_device, "__torch_function__", names_bf16)
    recipe, bf16 = Recipe(method=Method.bf16), dataclasses.replace(opened, dtype=torch.bfloat16)
    recipe.train.distributed_optimizer = distributed
    gpt = WORLD["random_model"](bf16, recipe)
    module, host = Training(gpt, teacher=None, recipe=recipe, runtime=bf16, data=None), HostMemory()
    for _ in range(3):
        for parameter in gpt.parameters():
            parameter.main_grad.normal_()
        module.optimizer.megatron.step()
        assert saved_twice(module, host, tmp_path)
    assert {source.dtype for _, source in host.staged} == {torch.bfloat16, torch.float32}
    assert len(plans) == 3 + 1


def test_without_all_ranks_nothing_is_repeated(monkeypatch, tmp_path):
    for other in (True, False):
        monkeypatch.setattr(
            checkpoint_write.dist,
            "all_gather_object",
            lambda votes, mine, other=other: votes.__setitem__(slice(None), [mine, (None, other)]),
        )
        monkeypatch.setattr(checkpoint_write.dist, "get_world_size", lambda: 2)
        assert checkpoint_write._agreed(None, tmp_path, vote=True) is other


@pytest.mark.parametrize("what", ["values", "tensors"])
def test_what_cannot_be_repeated_is_planned_every_time(module, plans, monkeypatch, tmp_path, what):
    """An optimizer with more to store than we know; a tensor that a plan computed for itself."""
    if what == "values":
        monkeypatch.setattr(optimizer_state, "common", lambda optimizer: {})
    else:
        monkeypatch.setattr(checkpoint_content.Content, "storages", lambda self: set())
    host = HostMemory()
    assert saved_twice(module, host, tmp_path)
    assert saved_twice(module, host, tmp_path)
    assert host.record is None
    assert len(plans) == 4


def test_what_one_rank_need_not_gather_is_what_megatron_gathers(module, monkeypatch, tmp_path):
    ours, theirs = tmp_path / "ours" / "step_00000001", tmp_path / "theirs" / "step_00000001"
    checkpoint.save(trainable(module), {}, ours)
    monkeypatch.setattr(optimizer_state, "ungathered", nullcontext)
    checkpoint.save(trainable(module), {}, theirs)
    assert content(ours) == content(theirs)
    assert "optimizer.state.exp_avg.decoder.layers.0.mlp.linear_fc1.weight_w" in content(ours)["tensors"]


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_a_stretch_of_a_tensor_is_a_few_boxes_in_order(shape, data):
    count = math.prod(shape)
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    numbered = torch.arange(count).view(shape)
    found = list(optimizer_state.boxes(tuple(shape), start, stop))
    parts = [numbered[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].flatten() for box in found]
    assert torch.cat([torch.arange(0), *parts]).tolist() == list(range(start, stop))
    assert len(found) <= 2 * len(shape) - 1
    assert all(0 not in sizes for _, sizes in found)


@pytest.mark.gpu
def test_a_gpu_s_tensors_are_copied_to_pinned_memory():
    here = torch.arange(1 << 24, device="cuda", dtype=torch.float32)
    host, copies = HostMemory(), []

    def state():
        return {"a": ShardedTensor.from_rank_offsets("a", here), "b": [ShardedTensor.from_rank_offsets("b", here[7:])]}

    host.reserve(state())
    for added in (0, 1):
        staged = state()
        host.stage(staged)
        host.copy()
        here += 1
        copies.append(staged["a"].data)
        assert (staged["a"].data == torch.arange(1 << 24) + added).all()
        assert (staged["b"][0].data == torch.arange(7, 1 << 24) + added).all()
    assert copies[0].is_pinned()
    assert copies[0].data_ptr() == copies[1].data_ptr()  # kept


def test_reserved_memory_is_what_a_save_fills_and_buffers_are_copied_at_once():
    weight, maximum = torch.ones(4, 2), torch.ones(3)

    def state():
        return {"w": ShardedTensor.from_rank_offsets("w", weight), "m": ShardedTensor.from_rank_offsets("m", maximum)}

    host, staged = HostMemory(), state()
    assert host.empty
    host.reserve(state())
    assert not host.empty
    host._reservation.join()
    reserved = dict(host._kept)
    host.stage(staged, at_once={maximum.data_ptr()})
    assert all(any(part.data is kept for kept in reserved.values()) for part in staged.values())
    weight += 1
    maximum += 1
    host.copy()
    assert staged["m"].data.tolist() == [1.0] * 3
    assert (staged["w"].data == 2).all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_tensors_are_noted_again_with_the_values_that_they_have_by_then(device):
    weight, maximum = torch.ones(4, 2, device=device), torch.ones(3, device=device)
    staged = {"w": ShardedTensor.from_rank_offsets("w", weight), "m": ShardedTensor.from_rank_offsets("m", maximum)}
    host = HostMemory()
    host.stage(staged, at_once={maximum.data_ptr()})
    host.copy()
    weight += 1
    maximum += 1
    host.stage_again()
    weight += 1
    maximum += 1
    host.copy()
    assert (staged["w"].data == 3).all()
    assert staged["m"].data.tolist() == [2.0] * 3


def test_what_was_written_in_the_background_is_loaded(module, tmp_path):
    path = tmp_path / "step_00000001"
    write = checkpoint.begin(trainable(module), {"at": 7}, path, HostMemory())
    write.wait_until_copied()
    saved = {name: value.clone() for name, value in module.gpt.named_parameters()}
    module.training_step(WORLD["batches"](5), 0)
    write.finish()
    assert any((value != saved[name]).any() for name, value in module.gpt.named_parameters())
    assert checkpoint.load(trainable(module), path) == {"at": 7}
    assert all((value == saved[name]).all() for name, value in module.gpt.named_parameters())


@pytest.mark.parametrize("repeated", [True, False])
@pytest.mark.parametrize("place", ["folder", "shards", "sums", "index", "name"])
def test_a_full_disk_is_one_line_and_costs_no_earlier_checkpoint(module, monkeypatch, tmp_path, place, repeated):
    host = HostMemory()
    checkpoint.begin(trainable(module), {}, tmp_path / "step_00000001", host).finish()
    host = host if repeated else HostMemory()

    def full(*_, **__):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            if place == "shards":  # torch's writer says this where the disk said that
                raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    owner, name = {
        "folder": (Path, "mkdir"),
        "shards": (filesystem_async, "_write_item"),
        "sums": (integrity, "digests"),
        "index": (checkpoint_write, "save_config"),
        "name": (integrity, "write"),
    }[place]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(UserError) as caught:
            checkpoint.begin(trainable(module), {}, tmp_path / "step_00000002", host).finish()
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"checkpoint {tmp_path}/step_00000002 not saved (")
    assert "No space left on device" in str(caught.value)
    assert str(caught.value).endswith("GB free there); the previous one stays; free space and start again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step_00000001"]
    assert integrity.damage(tmp_path / "step_00000001") is None


class Disk:
    """A strategy whose checkpoints are done when they are told to be; `events` says what happened."""

    def __init__(self):
        self.events: list[str] = []

    def begin(self, path: Path, storage_options) -> None:
        step = retention.step_of(path)
        self.events.append(f"begin {step}" + ("" if storage_options is None else ", copied"))
        self.write = SimpleNamespace(
            step=step,
            seconds=2.0,
            done=False,
            handed_over=False,
            hand_over=lambda: self.hand_over(step),
            finish=lambda: self.events.append(f"finish {step}"),
            wait_until_copied=lambda: self.events.append(f"wait {step}"),
        )

    def hand_over(self, step: int) -> None:
        self.events.append(f"hand over {step}")
        self.write.handed_over = True

    def reserve(self, host) -> None:
        assert host.empty
        host._reservation = threading.Thread(target=int)
        self.events.append("reserve")


@pytest.fixture
def trained(module, tmp_path):
    """steps(n): n more steps of a callback over a Disk; returns the Disk's events in them."""
    recipe = Recipe(method=Method.qat)
    recipe.run.dir, recipe.train.steps, recipe.checkpoint.every_steps = str(tmp_path), 9, 2
    stop, disk = Stop(), Disk()
    callback = saving.Checkpoints(recipe, module.runtime, stop)
    trainer = SimpleNamespace(strategy=disk, save_checkpoint=disk.begin)
    done = SimpleNamespace(progress=SimpleNamespace(losses=[]), saves=[], phase="", on_train_end=lambda: None)

    def steps(count: int, *, signal: str | None = None, written: bool = False) -> list[str]:
        stop.requested = signal
        if written:
            disk.write.done = True
        before = len(disk.events)
        for _ in range(count):
            done.progress.losses.append(1.0)
            callback.on_train_batch_end(trainer, done)
        return disk.events[before:]

    steps.callback, steps.disk, steps.saves, steps.recipe, steps.module = callback, disk, done.saves, recipe, done
    steps.fail = lambda error: callback.on_exception(trainer, done, error)
    return steps


def test_at_most_one_save_is_under_way(trained):
    trained.recipe.train.steps, trained.recipe.checkpoint.every_steps = 13, 4
    assert trained(4) == ["begin 4, copied"]
    assert trained(1) == []
    assert trained(1, written=True) == ["hand over 4"]  # as soon as all ranks have written
    assert trained(1) == ["finish 4"]  # and as soon as rank 0 has added index and name
    assert trained.saves == [
        {"step": 4, "seconds": 2.0, "stall_seconds": pytest.approx(0.5, abs=0.5), "wait_seconds": 0.0}
    ]
    assert trained(2) == ["begin 8, copied"]
    assert trained(3) == ["finish 8", "begin 12, copied"]  # the next one waits
    assert trained(1) == ["finish 12", "begin 13", "finish 13"]  # and so does the end


def test_a_checkpoint_that_is_handed_over_is_finished_when_rank_0_has_completed_it(trained):
    trained.recipe.checkpoint.every_steps = 4
    trained(4)
    assert trained(1, written=True) == ["hand over 4"]
    trained.disk.write.done = False  # rank 0's thread
    assert trained(1) == []
    assert trained(1, written=True) == ["finish 4"]


def test_a_save_that_finds_the_one_before_unwritten_waits_for_it_and_a_line_says_once_what_to_set(trained, capsys):
    """Two steps in 2.0 s, of which training waited 1.5 s: steps take 0.25 s, so that eight would not have waited."""
    disk, now = trained.disk, [100.0]
    trained.recipe.train.steps = 12

    def slowly(step):
        now[0] += 1.5
        disk.events.append(f"finish {step}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving.time, "perf_counter", lambda: now[0])
        trained(2)
        disk.write.finish = partial(slowly, 2)
        assert trained(2) == ["finish 2", "begin 4, copied"]
        disk.write.finish = partial(slowly, 4)
        assert trained(2) == ["finish 4", "begin 6, copied"]
        assert trained(1, written=True) == ["hand over 6"]
        assert trained(1) == ["finish 6", "begin 8, copied"]  # written: nothing waits
    assert capsys.readouterr().err == (
        "warning: checkpoint.every_steps = 2: the save after step 2 took 2.0 s, longer than the 2 steps to the next "
        "one, which waited 1.5 s for it; set checkpoint.every_steps=9 or more\n"
    )
    assert [(save["stall_seconds"], save["wait_seconds"]) for save in trained.saves] == [(1.5, 1.5), (1.5, 1.5), (0, 0)]


def test_an_update_waits_until_what_it_changes_is_copied(trained):
    hook = partial(trained.callback.on_before_optimizer_step, None, None, None)
    hook()
    trained(2)
    hook()
    trained.callback._finish(trained.module)
    hook()
    assert trained.disk.events == ["begin 2, copied", "wait 2", "finish 2"]


@pytest.mark.parametrize(("every", "steps", "reserves"), [(3, 9, True), (0, 9, False), (8, 8, False), (1, 9, False)])
def test_memory_to_pin_is_taken_after_the_first_step_if_a_save_needs_it(trained, every, steps, reserves):
    trained.recipe.checkpoint.every_steps, trained.recipe.train.steps = every, steps
    for device, reserved in (("cpu", False), ("cuda", reserves)):
        trained.callback.runtime = dataclasses.replace(trained.callback.runtime, device=torch.device(device))
        assert ("reserve" in trained(1)) is reserved
        assert every == 1 or (trained.callback._stall > 0) is reserved
    assert trained(1) == (["begin 3, copied"] if every == 3 else ["finish 2", "begin 3, copied"] if every == 1 else [])


def test_what_need_not_stay_is_deleted_beside_training(trained, monkeypatch):
    free, deleted = threading.Event(), []

    def delete(folders):
        assert free.wait(30)
        deleted.append(folders)

    monkeypatch.setattr(retention, "prune", lambda *_: ["old"])
    monkeypatch.setattr(retention, "delete", delete)
    trained.recipe.checkpoint.every_steps = 4
    trained(4)
    assert trained(2, written=True) == ["hand over 4", "finish 4"]
    assert deleted == []
    threading.Timer(0.1, free.set).start()
    trained(2)  # the next save waits for it
    assert deleted == [["old"]]
    trained(2, written=True)
    assert [0.0 < save["wait_seconds"] <= save["stall_seconds"] for save in trained.saves[:2]] == [False, True]


def test_a_signal_waits_for_both_saves(trained):
    trained(2)
    with pytest.raises(Interrupted, match="stopped by SIGTERM after step 3 of 9: checkpoint saved"):
        trained(1, signal="SIGTERM")
    assert trained.disk.events == ["begin 2, copied", "finish 2", "begin 3", "finish 3"]


def test_a_stop_of_all_ranks_completes_what_is_written_and_another_does_not(trained):
    trained(2)
    trained.fail(RuntimeError("on this rank only"))
    assert trained.disk.events == ["begin 2, copied"]
    trained.fail(StoppedTogether("loss is nan"))
    assert trained.disk.events == ["begin 2, copied", "finish 2"]


def test_without_background_every_save_is_waited_for(trained):
    trained.callback._host = None
    assert trained(4) == ["begin 2", "finish 2", "begin 4", "finish 4"]
