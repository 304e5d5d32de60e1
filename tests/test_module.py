"""One training step: its learning rate, its gradient, and that a broken step changes nothing."""

import copy
import dataclasses
import itertools
import json
import math
import runpy
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from halfbyte.training.choices import CudaGraphs
from halfbyte.training.config import Method, Recipe, Train
from halfbyte.training.config_distill import Distill
from halfbyte.training.data import MicroBatch
from halfbyte.training.errors import UserError

pytestmark = pytest.mark.slow  # imports Megatron-Core


@pytest.fixture(scope="module")
def world():
    helpers = runpy.run_path(str(Path(__file__).with_name("workers") / "world.py"))
    with helpers["world_of_one"]() as runtime:
        yield lambda recipe, seed=0: helpers["random_model"](runtime, recipe, seed=seed), runtime


class Bench:
    """A Training module with the two things that Lightning's trainer would give it."""

    def __init__(self, world, recipe: Recipe, *, teacher_seed: int | None = None):
        from halfbyte.training.module import Training

        build, runtime = world
        teacher = None if teacher_seed is None else build(recipe, teacher_seed).requires_grad_(False)
        self.gpt, self.logged = build(recipe), []
        self.module = Training(self.gpt, teacher=teacher, recipe=recipe, runtime=runtime, data=None)
        self.module.optimizers = lambda: self.module.optimizer
        self.module.log_dict = lambda values, **_: self.logged.append(values)

    def step(self, batches: list[MicroBatch]) -> None:
        self.module.training_step(batches, 0)

    def parts(self) -> list:
        megatron = self.module.optimizer.megatron
        return getattr(megatron, "chained_optimizers", [megatron])

    def state(self) -> list[torch.Tensor]:
        """Every tensor that an update changes: parameters, master parameters, Adam's moments and step counts."""
        masters = [p for part in self.parts() for group in part.optimizer.param_groups for p in group["params"]]
        slots = [slot for part in self.parts() for slot in part.optimizer.state.values()]
        moments = [torch.as_tensor(value) for slot in slots for value in slot.values()]
        return [tensor.detach().clone() for tensor in [*self.gpt.parameters(), *masters, *moments]]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def batches(seed: int, count: int = 2) -> list[MicroBatch]:
    """Micro-batches with different numbers of tokens that carry loss."""
    generator = torch.Generator().manual_seed(seed)
    windows = torch.randint(0, 64, (count, 2, 13), generator=generator)
    masks = (torch.rand(count, 2, 12, generator=generator) < torch.linspace(0.2, 1, count)[:, None, None]).float()
    return [MicroBatch(w[:, :-1], w[:, 1:], mask, None) for w, mask in zip(windows, masks, strict=True)]


def make_recipe(*, sharded: bool = True, **train) -> Recipe:
    values = {"steps": 10, "learning_rate": 1e-2, "distributed_optimizer": sharded} | train
    return Recipe(method=Method.bf16, train=Train(**values))


@given(
    steps=st.integers(1, 400),
    warmup=st.integers(0, 399),
    top=st.floats(1e-6, 1e-1),
    share=st.floats(0, 1),
)
@settings(max_examples=100, deadline=None)
def test_learning_rate_rises_to_the_maximum_and_falls_to_the_minimum(steps, warmup, top, share):
    from halfbyte.training.optimizer import learning_rate

    warmup, bottom = min(warmup, steps - 1), share * top
    train = Train(steps=steps, warmup_steps=warmup, learning_rate=top, min_learning_rate=bottom)
    rates = [learning_rate(step, train) for step in range(steps)]
    assert rates[0] > 0
    rise, fall = rates[:warmup], rates[warmup:]
    assert rise == pytest.approx([top * (i + 1) / warmup for i in range(warmup)])
    assert max(rates) == pytest.approx(top)
    assert fall[0] == pytest.approx(top)
    assert all(after <= before for before, after in itertools.pairwise(fall))
    assert rates[-1] >= bottom * (1 - 1e-12)
    assert learning_rate(steps, train) == pytest.approx(bottom)
    assert learning_rate(10 * steps, train) == pytest.approx(bottom)


def test_learning_rate_in_numbers():
    from halfbyte.training.optimizer import learning_rate

    train = Train(steps=10, warmup_steps=2, learning_rate=1.0, min_learning_rate=0.2)
    expected = {0: 0.5, 1: 1.0, 2: 1.0, 4: 0.2 + 0.4 * (1 + math.sqrt(0.5)), 6: 0.6, 10: 0.2}
    assert {step: learning_rate(step, train) for step in expected} == pytest.approx(expected)


def expected_gradient(world, recipe: Recipe, parts: list[MicroBatch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss over all tokens that carry loss, and its gradient, by plain autograd on logits."""
    gpt = world[0](recipe)
    total = torch.tensor(0.0)
    for part in parts:
        positions = torch.arange(part.tokens.shape[1]).expand_as(part.tokens)
        logits = gpt(part.tokens, positions, None)
        losses = functional.cross_entropy(logits.flatten(0, 1), part.labels.flatten(), reduction="none")
        total = total + (losses * part.loss_mask.flatten()).sum()
    loss = total / sum(part.loss_mask.sum() for part in parts)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in gpt.named_parameters()}


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e6])
def test_the_step_uses_the_clipped_gradient_of_the_mean_over_tokens(world, clip):
    recipe, parts = make_recipe(sharded=False, clip_grad=clip, warmup_steps=4), batches(1, 3)
    bench = Bench(world, recipe)
    bench.step(parts)
    loss, gradient = expected_gradient(world, recipe, parts)
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in gradient.values()))
    assert bench.module.progress.losses == pytest.approx([loss], rel=1e-6)
    assert bench.module.progress.tokens == [int(sum(part.loss_mask.sum() for part in parts))]
    (logged,) = bench.logged
    assert logged["gradient_norm"] == pytest.approx(norm, rel=1e-5)
    assert logged["learning_rate"] == pytest.approx(1e-2 / 4)
    factor = min(1.0, clip / norm) if clip else 1.0
    assert (factor < 1) == (clip == 0.05)
    (part,) = bench.parts()
    names = {parameter: name for name, parameter in bench.gpt.named_parameters()}
    moments = {names[parameter]: slot["exp_avg"] for parameter, slot in part.optimizer.state.items()}
    assert set(moments) == set(gradient)
    for name, moment in moments.items():
        torch.testing.assert_close(moment, 0.1 * factor * gradient[name], rtol=1e-4, atol=1e-8)


def test_the_first_update_moves_by_the_learning_rate(world):
    recipe = make_recipe(sharded=False, warmup_steps=5, learning_rate=1e-3)
    bench = Bench(world, recipe)
    before = bench.gpt.output_layer.weight.detach().clone()
    bench.step(batches(2))
    moved = (bench.gpt.output_layer.weight - before).abs()
    assert moved.max().item() == pytest.approx(1e-3 / 5, rel=1e-2)  # Adam's first step is the sign of the gradient


@pytest.fixture
def broken(monkeypatch):
    """Break the loss of the next steps: broken(function of the loss), broken(None) mends it."""
    from halfbyte.training import losses

    whole = losses.cross_entropy

    def change(function):
        changed = whole if function is None else lambda loss, batch, index: function(whole(loss, batch, index))
        monkeypatch.setattr(losses, "cross_entropy", changed)

    return change


FAULTS = {
    "loss_nan": (lambda loss: loss * math.nan, "step 1: loss is nan: stopped before the update"),
    "loss_inf": (lambda loss: loss * math.inf, "step 1: loss is inf: stopped before the update"),
    "gradient_nan": (lambda loss: loss + (0 * loss).sqrt(), "gradient norm is nan: stopped before the update"),
    "gradient_inf": (lambda loss: loss + (loss - loss.detach()) * 1e30 * 1e30, "gradient norm is (inf|nan)"),
}


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_step_changes_nothing(world, broken, fault, sharded, tmp_path):
    recipe = make_recipe(sharded=sharded)
    recipe.run.dir = str(tmp_path)
    bench, control = Bench(world, recipe), Bench(world, recipe)
    for one in (bench, control):
        one.step(batches(3))
    before, progress = bench.state(), copy.deepcopy(bench.module.progress)
    assert len(before) > 3 * len(list(bench.gpt.parameters()))  # Adam's moments are among them
    function, message = FAULTS[fault]
    broken(function)
    whole = [dataclasses.replace(part, loss_mask=torch.ones_like(part.loss_mask)) for part in batches(4)]
    whole = [dataclasses.replace(part, windows=rows) for part, rows in zip(whole, ((4, 7), (1, 0)), strict=True)]
    bench.module.data = SimpleNamespace(path="train.jsonl", lines=lambda window: [10 * window, 10 * window + 1])
    with pytest.raises(UserError, match=message) as caught:  # 0 * inf of a masked token would be NaN
        bench.step(whole)
    assert "\n" not in str(caught.value)
    left = json.loads((tmp_path / "errors" / "step_00000001.json").read_text())
    assert f"{left['message']} (the batch's windows: {tmp_path}/errors/step_00000001.json)" == str(caught.value)
    (rank,) = left["ranks"]
    assert rank.pop("lines") == {"4": [40, 41], "7": [70, 71], "1": [10, 11], "0": [0, 1]}
    assert rank == {"data_parallel_rank": 0, "finite_loss": not fault.startswith("loss"), "windows": [[4, 7], [1, 0]]}
    assert same(bench.state(), before)
    assert bench.module.progress == progress
    assert len(bench.logged) == 1
    broken(None)
    for one in (bench, control):  # as if it had not been
        one.step(batches(5))
    assert same(bench.state(), control.state())
    assert not same(bench.state(), before)
    assert bench.module.progress == control.module.progress


def test_a_checkpoint_is_refused_when_the_text_has_changed(world):
    bench, saved = Bench(world, make_recipe()), {}
    bench.module.data = SimpleNamespace(path="train.jsonl", digest="one")
    bench.step(batches(3))
    bench.module.on_save_checkpoint(saved)
    bench.module.on_load_checkpoint(saved)
    bench.module.data.digest = "other"
    with pytest.raises(
        UserError, match=r"data.train = train.jsonl: has changed since the checkpoint after step 1; put"
    ):
        bench.module.on_load_checkpoint(saved)
    bench.module.on_load_checkpoint({"progress": saved["progress"]})  # a checkpoint of an earlier version


@pytest.mark.parametrize("sharded", [True, False])
def test_a_batch_without_loss_changes_nothing(world, sharded):
    bench = Bench(world, make_recipe(sharded=sharded))
    before = bench.state()
    silent = [MicroBatch(b.tokens, b.labels, torch.zeros_like(b.loss_mask), None) for b in batches(6)]
    with pytest.raises(UserError, match=r"step 0: no token carries loss; check data\.answer_only"):
        bench.step(silent)
    assert same(bench.state(), before)
    assert bench.module.progress.losses == bench.module.progress.tokens == bench.logged == []


def test_both_optimizers_give_the_same_weights(world):
    runs = [Bench(world, make_recipe(sharded=sharded, weight_decay=0.1)) for sharded in (True, False)]
    for run in runs:
        for seed in range(3):
            run.step(batches(seed))
    assert runs[0].module.progress.losses == pytest.approx(runs[1].module.progress.losses, rel=1e-6)
    for ours, theirs in zip(*(run.gpt.parameters() for run in runs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_distillation_compares_with_the_teacher(world):
    recipe = make_recipe()
    recipe.method, recipe.distill = Method.qad, Distill(temperature=2.0)
    parts, bench = batches(7, 3), Bench(world, recipe, teacher_seed=1)
    student, teacher = (world[0](recipe, seed) for seed in (0, 1))
    total = 0.0
    for part in parts:
        positions = torch.arange(part.tokens.shape[1]).expand_as(part.tokens)
        s, t = ((gpt(part.tokens, positions, None).double() / 2).log_softmax(-1).detach() for gpt in (student, teacher))
        kl = 4 * functional.kl_div(s, t, log_target=True, reduction="none").sum(-1)
        total += float((kl * part.loss_mask).sum())
    bench.step(parts)
    assert bench.module.progress.losses == pytest.approx([total / bench.module.progress.tokens[0]], rel=1e-5)
    kept = bench.module._distillation.teacher
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), teacher.parameters(), strict=True))


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(world):
    recipe = make_recipe()
    recipe.method = Method.qad
    bench = Bench(world, recipe, teacher_seed=0)
    bench.step(batches(8))
    assert bench.module.progress.losses == pytest.approx([0.0], abs=1e-7)
    assert bench.logged[0]["gradient_norm"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    "distill",
    [Distill(), Distill(top_k=5, temperature=2.0), Distill(top_k=3, hidden=1.5, cross_entropy=0.5)],
    ids=["full", "top_k", "mixed"],
)
def test_the_teacher_may_compute_batch_by_batch_or_beforehand(world, monkeypatch, distill):
    from halfbyte.training.distillation import Distillation

    recipe = make_recipe()
    recipe.method, recipe.distill = Method.qad, distill
    runs = [Bench(world, recipe, teacher_seed=1) for _ in range(2)]
    runs[0].step(batches(9, 3))
    monkeypatch.setattr(Distillation, "loss", Distillation.beforehand)
    runs[1].step(batches(9, 3))
    assert runs[0].module.progress == runs[1].module.progress
    assert same(runs[0].state(), runs[1].state())


def test_batch_by_batch_one_micro_batch_of_the_teacher_is_alive(world, monkeypatch):
    from halfbyte.training import distillation

    alive: list[weakref.ref] = []
    most = []
    forward = distillation.forward_only

    def watched(model, batch):
        logits = forward(model, batch)
        alive.append(weakref.ref(logits))
        most.append(sum(one() is not None for one in alive))
        return logits

    monkeypatch.setattr(distillation, "forward_only", watched)
    recipe = make_recipe()
    recipe.method = Method.qad
    Bench(world, recipe, teacher_seed=1).step(batches(10, 4))
    assert most == [1, 1, 1, 1]


@pytest.mark.parametrize("layers", [[], [1], [0, 1]])
def test_the_mixed_loss_is_its_parts(world, layers):
    recipe, parts = make_recipe(), batches(11, 3)
    recipe.method = Method.qad
    recipe.distill = Distill(cross_entropy=0.25, hidden=3.0, hidden_layers=layers)
    bench = Bench(world, recipe, teacher_seed=1)
    bench.step(parts)
    total = 0.0
    models = [world[0](recipe, seed) for seed in (0, 1)]
    for part in parts:
        positions = torch.arange(part.tokens.shape[1]).expand_as(part.tokens)
        hidden, logits = ([], []), []
        for gpt, into in zip(models, hidden, strict=True):
            watched = [gpt.decoder.layers[number] for number in layers] or [gpt.decoder]
            for place in watched:
                place.register_forward_hook(lambda module, args, out, into=into: into.append(out))
            logits.append(gpt(part.tokens, positions, None).detach().double().log_softmax(-1))
            for place in watched:
                place._forward_hooks.clear()
        kl = functional.kl_div(*logits, log_target=True, reduction="none").sum(-1)
        ce = -logits[0].gather(-1, part.labels.unsqueeze(-1)).squeeze(-1)
        both = zip(*hidden, strict=True)
        pairs = [[(x[0] if layers else x).detach().double() for x in pair] for pair in both]
        mse = sum((student - teacher).square().mean(-1).T for student, teacher in pairs) / len(pairs)
        total += float(((kl + 0.25 * ce + 3 * mse) * part.loss_mask).sum())
    assert bench.module.progress.losses == pytest.approx([total / bench.module.progress.tokens[0]], rel=1e-5)


@pytest.mark.parametrize("layers", [[], [0, 1]])
def test_hidden_states_teach(world, layers):
    """With a weight that drowns the divergence, the error of the hidden states falls."""
    recipe, part = make_recipe(learning_rate=3e-3, steps=1000), batches(12, 1)
    recipe.method, recipe.distill = Method.qad, Distill(hidden=1e4, hidden_layers=layers)
    bench = Bench(world, recipe, teacher_seed=1)
    for _ in range(30):
        bench.step(part)
    assert bench.module.progress.losses[-1] < 0.3 * bench.module.progress.losses[0]


def test_gradients_are_summed_early_where_hooks_can_tell_that_they_are_ready():
    from halfbyte.training import companions, module

    model, recipe = torch.nn.Module(), Recipe()

    def early(device="cuda"):
        return module.reduces_early(model, recipe, torch.device(device))

    assert not early()  # one data-parallel rank
    recipe.parallel.data = 2
    assert not early()  # one host: replayed, and a replay runs no hook
    assert early("cpu")
    recipe.parallel.data = 16
    assert early()
    recipe.train.cuda_graphs = CudaGraphs.always
    assert not early()
    recipe.train.recompute = True  # and nothing is replayed
    assert early()
    recipe.train.cuda_graphs = CudaGraphs.auto
    model.add_module(companions.NAME, companions.Companions())  # they read this rank's own sums after the pass
    assert not early()
