"""Recorded passes in one process, a stage's pairs and a micro-batch's whole: bit for bit what the plain calls give.

The stage is a whole model here, and functions stand in the place of CUDA graphs; test_methods.py has real pipelines,
test_graphs.py real graphs.
"""

import itertools
import math
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from halfbyte.training.config import BlockScale, Method, Quantize, Recipe, Train
from halfbyte.training.config_train import Lora
from halfbyte.training.data import MicroBatch
from halfbyte.training.errors import StoppedTogether
from halfbyte.training.kv_format import KVCache

pytestmark = pytest.mark.slow  # imports Megatron-Core
WORKERS = Path(__file__).with_name("workers")
WORLD = runpy.run_path(str(WORKERS / "world.py"))
Again = runpy.run_path(str(WORKERS / "again.py"))["Again"]
STEPS, IN_FLIGHT = 4, 2
VOCABULARY = 80
"""No other matrix of the model has as many rows."""
CASES = {
    "bf16": (Method.bf16, {}, {}),
    "qat": (Method.qat, {}, {}),
    "later": (Method.qat, {"fake_quant_after_steps": 2}, {}),
    "clipped": (Method.qat, {}, {"clip_gradient": True}),
    "cache": (Method.qat, {}, {"kv_cache": KVCache.fp8}),
    "four_over_six": (Method.qat, {}, {"block_scale": BlockScale.four_over_six}),
    "learned": (Method.qat, {"block_scale_lr_mult": 20.0}, {}),
    "lora": (Method.qat, {"lora": Lora(rank=4)}, {}),
    "frozen": (Method.qat, {"freeze": ["*norm*", "model.embed_tokens"]}, {}),
    "tied": (Method.qat, {}, {}),
}
"""Name -> method, changes of `train` and of `quantize`."""


@pytest.fixture(scope="module")
def world():
    with WORLD["world_of_one"]() as runtime:
        yield runtime


@pytest.fixture(autouse=True)
def in_flight(monkeypatch):
    """As many pairs as the first of two stages has."""
    from halfbyte.training import stage_graphs

    monkeypatch.setattr(stage_graphs, "_in_flight", lambda: IN_FLIGHT)
    monkeypatch.setattr(Again, "opened", [])


def trained(world, case: str, way: str):
    """A Training module whose passes are called as ever ("plain"), in pairs ("pairs") or whole ("whole")."""
    from halfbyte.training.graphs import Replay
    from halfbyte.training.stage_graphs import StageReplay

    method, train, quantize = CASES[case]
    optimization = Train(**({"steps": STEPS, "learning_rate": 1e-2, "sequence_length": 12} | train))
    recipe = Recipe(method=method, train=optimization, quantize=Quantize(**quantize))
    module = WORLD["training"](world, recipe, shape=replace(WORLD["SHAPE"], vocab=VOCABULARY, tied=case == "tied"))
    if way == "pairs":
        module._stage = StageReplay(Again)
    elif way == "whole":
        module._replay = Replay(recorder=Again)
    module._rounded = None if way == "plain" else {}
    return module


def batches(seed: int, *, documents: bool = False, count: int = 3) -> list[MicroBatch]:
    """Micro-batches, of one document a row or of several."""
    generator = torch.Generator().manual_seed(seed)
    windows = torch.randint(0, 64, (count, 2, 13), generator=generator)
    masks = (torch.rand(count, 2, 12, generator=generator) < 0.7).float()
    numbers = torch.randint(0, 2, (count, 2, 12), generator=generator).cumsum(-1)
    pieces = zip(windows, masks, numbers, strict=True)
    return [MicroBatch(w[:, :-1], w[:, 1:], m, n if documents else None) for w, m, n in pieces]


def state(module) -> list[torch.Tensor]:
    """What training changes."""
    return [parameter.detach().clone() for parameter in module.gpt.parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("way", "documents"), [("pairs", False), ("pairs", True), ("whole", True)])
@pytest.mark.parametrize("case", CASES)
def test_recorded_passes_train_what_plain_calls_train(world, case, way, documents):
    plain, again = trained(world, case, "plain"), trained(world, case, way)
    begun = state(plain)
    for step in range(STEPS):
        for module in (plain, again):
            module.training_step(batches(step, documents=documents), step)
        assert again.optimizer.gradient_norm == plain.optimizer.gradient_norm
    assert again.progress == plain.progress
    assert same(state(again), state(plain))
    assert not same(begun, state(plain))
    recorded = again._stage.recorded if way == "pairs" else len(again._replay._captured)
    assert recorded == (IN_FLIGHT if way == "pairs" else 1) * (2 if case == "later" else 1)
    again.on_train_end()
    assert Again.opened == []


@pytest.mark.parametrize("way", ["pairs", "whole"])
@pytest.mark.parametrize("case", ["qat", "tied", "lora", "frozen"])
def test_no_weight_has_a_gradient_of_its_size_in_a_recorded_pass(world, case, way):
    """But the embedding, whose gradient a lookup makes; and nothing in it reaches Megatron's hooks."""
    module, reached = trained(world, case, way), []
    weights = {tuple(parameter.shape) for parameter in module.gpt.parameters() if parameter.dim() == 2}
    for name, parameter in module.gpt.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda _, name=name: reached.append(name))
    module.training_step(batches(0, count=1), 0)
    assert reached
    reached.clear()
    module.training_step(batches(1, count=1), 1)
    made = [tuple(tensor.shape) for recorder in Again.opened for tensor in itertools.chain(*recorder.made)]
    table = (VOCABULARY, WORLD["SHAPE"].hidden)
    assert [shape for shape in made if shape in weights] == ([table] if case in ("qat", "tied") else [])
    assert len(made) > 100
    assert reached == []
    module.on_train_end()


@pytest.mark.parametrize("case", CASES)
def test_nothing_in_a_stage_calls_python_beside_the_pass(world, case):
    """Hooks would run when it is captured, and never again."""
    module = trained(world, case, "pairs")
    for step in range(2):
        module.training_step(batches(step), step)
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooked = [name for name, part in module.gpt.named_modules() if any(getattr(part, table) for table in tables)]
    assert hooked == []


def test_statistics_between_two_steps_see_the_model_and_leave_it_alone(world):
    from halfbyte.training import quantization_stats

    plain, pairs = (trained(world, "qat", way) for way in ("plain", "pairs"))
    for step in range(STEPS):
        found = []
        for module in (plain, pairs):
            module.training_step(batches(step), step)
            found.append(quantization_stats.measure(module.gpt, batches(step)[0], module.recipe.quantize))
        assert found[0] == found[1]
    assert pairs.progress == plain.progress


def test_a_loss_that_is_not_finite_stops_before_the_update_and_leaves_no_trace(world, tmp_path):
    plain, pairs = (trained(world, "qat", way) for way in ("plain", "pairs"))
    for module in (plain, pairs):
        module.recipe.run.dir = str(tmp_path)
        for step in range(2):
            module.training_step(batches(step), step)
    weight = pairs.gpt.decoder.layers[0].input_layernorm.weight
    before, kept = state(pairs), weight.detach().clone()
    with torch.no_grad():
        weight[0] = math.nan
    with pytest.raises(StoppedTogether, match="step 2: loss is nan: stopped before the update"):
        pairs.training_step(batches(2), 2)
    with torch.no_grad():
        weight.copy_(kept)
    assert same(before, state(pairs))
    for module in (plain, pairs):
        module.training_step(batches(2), 2)
    assert pairs.progress == plain.progress
    assert same(state(pairs), state(plain))


def test_other_batches_have_pairs_of_their_own(world):
    module = trained(world, "bf16", "pairs")
    for step, count in enumerate((3, 3, 1, 1, 3)):
        module.training_step(batches(step, count=count), step)
    assert module._stage.recorded == IN_FLIGHT + 1  # of one micro-batch no two are in flight
    longer = [replace(part, segments=torch.zeros(2, 12, dtype=torch.int64)) for part in batches(9)]
    module.training_step(longer, 5)
    assert module._stage.recorded == IN_FLIGHT + 1  # a first time runs unrecorded
    module.training_step(longer, 6)
    assert module._stage.recorded == 2 * IN_FLIGHT + 1
    assert len(Again.opened) == module._stage.recorded + 2  # one for the backward passes of several pairs
    for _ in range(2):
        module.on_train_end()
    assert len(Again.opened) == module._stage.recorded == 0
