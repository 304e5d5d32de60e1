"""train.freeze: what is named does not move, everything else gets the very gradient that it would have had."""

import dataclasses
import json
import runpy
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from halfbyte.launch.start import RESOLVED
from halfbyte.training.config import Method, Parallel, Recipe, Train
from halfbyte.training.errors import UserError
from halfbyte.training.pattern_rules import freeze_problems
from halfbyte.training.resolve import resolve, save
from halfbyte.training.saved_weights import read_weights
from halfbyte.training.shape import ModelShape, read_shape

pytestmark = pytest.mark.slow  # imports Megatron-Core
WORLD = runpy.run_path(str(Path(__file__).with_name("workers") / "world.py"))
batches = WORLD["batches"]
SHAPE: ModelShape = WORLD["SHAPE"]


@pytest.fixture(scope="module")
def opened():
    with WORLD["world_of_one"]() as opened:
        yield opened


def training(opened, patterns: list[str], *, shape: ModelShape = SHAPE, **settings):
    train = Train(steps=10, learning_rate=1e-2, weight_decay=0.1, freeze=patterns, **settings)
    return WORLD["training"](opened, Recipe(method=Method.qat, train=train), shape=shape)


def gradients(module) -> dict[str, torch.Tensor]:
    from halfbyte.training import losses
    from halfbyte.training.fast_path import weights_once
    from halfbyte.training.schedule import train_batch

    module.ddp.zero_grad_buffer()
    with weights_once(module.gpt):
        train_batch(module.ddp, batches(), losses.cross_entropy, needs_logits=False)
    return {name: p.main_grad.clone() for name, p in module.gpt.named_parameters() if p.requires_grad}


FROZEN = {
    "*norm*": {"decoder.layers.*_layernorm.weight", "decoder.layers.*layernorm.weight", "decoder.final_layernorm.*"},
    "lm_head": {"output_layer.weight"},
    "model.embed_tokens": {"embedding.*"},
    "model.layers.0.self_attn.[qkv]_proj": {"decoder.layers.0.self_attention.linear_qkv.weight"},
    "model.layers.?.mlp.*": {"decoder.layers.*.mlp.*"},
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("pattern", FROZEN)
def test_what_is_frozen_stays_and_the_rest_learns_as_before(opened, pattern, recompute):
    free, module = training(opened, []), training(opened, [pattern], recompute=recompute)
    names = {name for name, _ in module.gpt.named_parameters()}
    expected = {name for name in names if any(fnmatchcase(name, form) for form in FROZEN[pattern])}
    assert expected
    found, whole = gradients(module), gradients(free)
    assert set(found) == names - expected
    for name, gradient in found.items():
        assert torch.equal(gradient, whole[name]), name
        assert bool(gradient.any()), name
    before = {name: p.detach().clone() for name, p in module.gpt.named_parameters()}
    for _ in range(2):
        module.training_step(batches(), 0)
    moved = {name for name, p in module.gpt.named_parameters() if not torch.equal(p, before[name])}
    assert moved == names - expected  # weight decay leaves frozen ones alone as well


def test_tied_embeddings_are_one_parameter(opened):
    tied = dataclasses.replace(SHAPE, tied=True)
    module = training(opened, ["model.embed_tokens", "lm_head"], shape=tied)
    assert not module.gpt.embedding.word_embeddings.weight.requires_grad
    with pytest.raises(UserError, match=r"train.freeze splits model.embed_tokens, lm_head: they are one parameter"):
        training(opened, ["lm_head"], shape=tied)


def test_something_must_be_left_to_train(opened):
    with pytest.raises(UserError, match="nothing to train"):
        training(opened, ["*"])


# ---- rules


@pytest.mark.parametrize(
    ("patterns", "pipeline", "tied", "says"),
    [
        (["model.layers.0.norm"], 1, False, "train.freeze = model.layers.0.norm: matches no module"),
        (["*.q_proj"], 1, False, "splits q_proj, k_proj, v_proj of layer 0, 1, one layer at training time; freeze all"),
        (["lm_head"], 1, True, "model.embed_tokens and lm_head of this model are one parameter; freeze both or none"),
        (["*"], 1, False, "train.freeze = [*]: leaves nothing to train; freeze less"),
        (["model.layers.1.*", "model.norm", "lm_head"], 2, False, "leaves pipeline stage 1 (counted from 0) with noth"),
        (["model.layers.0.*", "model.embed_tokens"], 2, False, "leaves pipeline stage 0 (counted from 0) with nothing"),
    ],
)
def test_what_cannot_be_frozen_is_one_line(patterns, pipeline, tied, says):
    recipe = Recipe(train=Train(freeze=patterns), parallel=Parallel(pipeline=pipeline))
    (line,) = freeze_problems(recipe, dataclasses.replace(SHAPE, tied=tied))
    assert says in line


def test_what_can_be_frozen_is_no_problem():
    for patterns in ([], ["*norm*"], ["model.layers.0.*", "model.norm"], ["*.gate_proj", "*.up_proj"]):
        recipe = Recipe(train=Train(freeze=patterns), parallel=Parallel(pipeline=2))
        assert list(freeze_problems(recipe, SHAPE)) == []


def test_norms_of_heads_can_be_frozen_where_the_model_has_them():
    recipe = Recipe(train=Train(freeze=["*.q_norm"]))
    assert list(freeze_problems(recipe, dataclasses.replace(SHAPE, qk_norm=True))) == []
    assert len(list(freeze_problems(recipe, SHAPE))) == 1


# ---- a run of two processes that goes on in one


def test_frozen_weights_are_saved_as_they_came_also_after_a_resume_under_another_layout(halfbyte, tiny_model, tmp_path):
    run, frozen = tmp_path / "run", "train.freeze=[model.embed_tokens,'*norm*',model.layers.1.*]"
    options = ("train.steps=2", "train.recompute=true", "evaluate.tasks=[]", "run.wandb=disabled", "method=bf16")
    layout = ("parallel.tensor=2", "parallel.sequence=true")
    save(resolve("tiny", [f"model.path={tiny_model}", f"run.dir={run}", frozen, *options, *layout]), run / RESOLVED)
    before, shape = load_file(tiny_model / "model.safetensors"), read_shape(tiny_model / "config.json")
    still = {name for name in before if "norm" in name or "embed_tokens" in name or name.startswith("model.layers.1.")}
    for overrides in ((), ("train.steps=3", "parallel.tensor=1", "parallel.sequence=false")):
        done = halfbyte("train", run, *overrides)
        assert done.returncode == 0, done.stdout + done.stderr
        losses = json.loads((run / "train.json").read_text())["losses"]
        weights = read_weights(run / "checkpoints" / f"step_{len(losses):08d}", shape, ())
        moved = {w.name: not torch.equal(w.tensor.float(), before[w.name].float()) for w in weights}
        assert set(moved) == set(before)
        assert {name for name, has_moved in moved.items() if not has_moved} == still
    assert len(set(losses)) == 3
