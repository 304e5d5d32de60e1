"""LoRA with fake quantization: the merged weight's bits, the gradients of its factors, what trains, what is saved."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from halfbyte.training import low_rank
from halfbyte.training.config import Format, Method, Parallel, Quantize, Recipe, Train
from halfbyte.training.config_train import Lora
from halfbyte.training.method_rules import method_problems
from halfbyte.training.model_rules import model_problems

WORLD = runpy.run_path(str(Path(__file__).with_name("workers") / "world.py"))
batches, training = WORLD["batches"], WORLD["training"]
SHAPE = WORLD["SHAPE"]


def factors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Weight [24, 40], B [24, 5], A [5, 40]."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*size, generator=generator).to(dtype) for size in ((24, 40), (24, 5), (5, 40))]


# ---- arithmetic


def test_a_merged_weight_is_rounded_once_from_exact_products():
    w, b, a = factors()
    expected = w.double() + 0.3 * sum(b.double()[:, i : i + 1] * a.double()[i] for i in range(5))
    assert torch.equal(low_rank.merge(w, b, a, 0.3), expected.float())


def test_a_shard_merges_to_the_shard_of_the_whole(monkeypatch):
    w, b, a = factors()
    whole = low_rank.merge(w, b, a, 0.7)
    assert torch.equal(low_rank.merge(w[6:12], b[6:12], a, 0.7), whole[6:12])
    assert torch.equal(low_rank.merge(w[:, 8:20], b, a[:, 8:20], 0.7), whole[:, 8:20])
    monkeypatch.setattr(low_rank, "_ELEMENTS", 100)
    assert torch.equal(low_rank.merge(w, b, a, 0.7), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_change_the_weight_keeps_every_bit(dtype):
    w, b, a = factors()
    merged = low_rank.merge(w.to(dtype), torch.zeros_like(b), a, 16.0)
    assert merged.dtype == torch.float32
    assert torch.equal(merged, w.to(dtype).float())


def test_the_gradients_are_those_of_the_product():
    w, b, a = factors(torch.float64)
    grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    b.requires_grad_(), a.requires_grad_()
    ((w + 0.3 * b @ a) * grad).sum().backward()
    for ours, theirs in zip(low_rank.gradients(grad, b.detach(), a.detach(), 0.3), (b.grad, a.grad), strict=True):
        torch.testing.assert_close(ours, theirs)


# ---- training


def recipe_of(targets: tuple[str, ...] = ("*",), *, clip: bool = False, **train) -> Recipe:
    lora = Lora(rank=3, alpha=6.0, targets=list(targets))
    values = {"steps": 100, "learning_rate": 1e-2, "clip_grad": 0.0, "lora": lora} | train
    quantize = Quantize(format=Format.w4a16_nvfp4, clip_gradient=clip)
    return Recipe(method=Method.qat, quantize=quantize, train=Train(**values))


@pytest.fixture(scope="module")
def opened():
    with WORLD["world_of_one"]() as opened:
        yield opened


def snapshot(module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.gpt.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_only_adapters_train_and_the_loss_falls(opened, recompute):
    module = training(opened, recipe_of(("*.mlp.*", "*.1.self_attn.o_proj"), recompute=recompute, weight_decay=0.1))
    before = snapshot(module)
    factors = {name for name in before if name.startswith("companions.adapters:")}
    assert len(factors) == 2 * 5
    module.training_step(batches(), 0)
    changed = {name for name, p in snapshot(module).items() if not torch.equal(p, before[name])}
    assert {name for name in factors if name.endswith(".b")} <= changed <= factors  # A by its weight decay
    for _ in range(9):
        module.training_step(batches(), 0)
    changed = {name for name, p in snapshot(module).items() if not torch.equal(p, before[name])}
    assert changed == factors
    assert module.progress.losses[-1] < 0.9 * module.progress.losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("clip", [False, True])
def test_a_step_gives_the_factors_the_gradient_of_the_loss(opened, clip):
    """Against autograd of the mean loss through the merged weights, rounded straight through."""
    from torch.nn import functional

    from halfbyte.training import companions, losses
    from halfbyte.training.fast_path import weights_once
    from halfbyte.training.schedule import train_batch

    module = training(opened, recipe_of(clip=clip))
    for _ in range(2):  # B is not 0, and the gradients of a step before are gone
        module.training_step(batches(4), 0)
    if clip:  # some weights beyond the range
        rules = [linear.weight_quantizer for linear in module.gpt.modules() if hasattr(linear, "weight_quantizer")]
        for rule in (one for one in rules if one.is_enabled):
            rule._quantizer_cache = replace(rule._quantizer_cache, limit=torch.tensor(0.2))
    module.optimizer.zero_grad()
    with weights_once(module.gpt):
        train_batch(module.ddp, batches(), losses.cross_entropy, needs_logits=False)
    pairs = []
    for name, adapter in companions.of(module.gpt).each():
        linear = module.gpt.get_submodule(name)
        rule = linear.weight_quantizer._quantizer_cache
        a, b = (p.detach().clone().requires_grad_() for p in (adapter.a, adapter.b))
        pairs += [(adapter.a, a), (adapter.b, b)]
        merged = linear.weight.detach() + 2.0 * b.flatten(0, 1) @ a
        reached = merged if not clip else torch.where(merged.abs() <= 0.2, merged, merged.detach())
        q = rule.fake(companions.weight_of(module.gpt, name)).detach() + (reached - reached.detach())
        linear.gradient_accumulation_fusion = False
        linear.weight_quantizer._quantizer_cache.fake = lambda x, q=q: q
    total = sum(
        functional.cross_entropy(
            module.gpt(x.tokens, torch.arange(12).expand_as(x.tokens), None).flatten(0, 1), x.labels.flatten()
        )
        for x in batches()
    )
    (total / 2).backward()
    assert len(pairs) == 16
    for ours, theirs in pairs:
        assert theirs.grad.any()
        torch.testing.assert_close(ours.main_grad, theirs.grad, rtol=2e-3, atol=1e-6)


@pytest.mark.slow
def test_a_checkpoint_is_read_as_what_was_trained(opened, tmp_path):
    """Merged weights, and scales learned beside an adapter, to the bit; the quantized ones in memory are theirs."""
    from halfbyte.export.pack import fake
    from halfbyte.training import checkpoint, companions
    from halfbyte.training.fast_path import weights_once
    from halfbyte.training.hf_map import FUSED, split_fused
    from halfbyte.training.saved_weights import read_weights
    from halfbyte.training.shape import planned_linears

    recipe = recipe_of(block_scale_lr_mult=10.0)
    module = training(opened, recipe)
    for _ in range(2):
        module.training_step(batches(), 0)
    path = tmp_path / "checkpoints" / "step_00000002"
    checkpoint.save(checkpoint.Trainable(module.gpt, module.optimizer.megatron), {}, path)
    read = {one.name: one for one in read_weights(path, SHAPE, planned_linears(SHAPE, recipe))}
    weights = {name: companions.weight_of(module.gpt, name) for name, _ in companions.of(module.gpt).each()}
    with weights_once(module.gpt):
        quantized = {name: module.gpt.get_submodule(name).weight.detach().clone() for name in weights}
    for name, weight in weights.items():
        layer, inside = name.removeprefix("decoder.layers.").split(".", 1)
        halves = [split_fused(inside, whole, SHAPE) for whole in (weight, quantized[name])]
        for part in FUSED[inside]:
            one = read[f"model.layers.{layer}.{part}.weight"]
            assert torch.equal(one.tensor, halves[0][part])
            assert torch.equal(fake(one, recipe.quantize), halves[1][part])
    assert len(weights) == 8
    base = module.gpt.get_submodule("decoder.layers.0.mlp.linear_fc2").weight
    assert not torch.equal(read["model.layers.0.mlp.down_proj.weight"].tensor, base)


@pytest.mark.slow
def test_adapters_start_from_the_seed_and_their_layers_name(opened):
    from halfbyte.training import companions

    models = [training(opened, recipe_of(("*.mlp.*",), seed=seed)).gpt for seed in (1, 1, 2)]
    starts = [{name: one.a.detach() for name, one in companions.of(gpt).each()} for gpt in models]
    for name, a in starts[0].items():
        assert torch.equal(a, starts[1][name])
        assert not torch.equal(a, starts[2][name])
        assert a.abs().max() <= a.shape[1] ** -0.5
    assert len({float(a.flatten()[0]) for a in starts[0].values()}) == len(starts[0])


# ---- rules


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": Method.bf16}, "train.lora.rank = 4: method bf16 trains no quantized weight"),
        ({"targets": ["*.q_proj"]}, "train.lora.targets = [*.q_proj]: splits q_proj, k_proj, v_proj of layer 0, 1"),
        ({"targets": ["lm_head", "*"]}, "train.lora.targets = lm_head: matches no quantized linear"),
        ({"freeze": ["*norm*"]}, "train.freeze = [*norm*]: train.lora.rank = 4 freezes all weights; leave it out"),
        ({"pipeline": 2, "targets": ["*.0.*"]}, "no adapter in pipeline stage 1 (counted from 0), which has nothing"),
        ({"late": 3}, "train.lora.rank = 4: learns from quantized weights only"),
        ({"rank": 65}, "train.lora.rank = 65: above the full rank of every adapted linear, 64; give less, or 0"),
    ],
)
def test_where_no_adapter_can_stand_is_one_line(changes, says):
    lora = Lora(rank=changes.get("rank", 4), targets=changes.get("targets", ["*"]))
    train = Train(lora=lora, freeze=changes.get("freeze", []), fake_quant_after_steps=changes.get("late", 0))
    parallel = Parallel(pipeline=changes.get("pipeline", 1))
    (line,) = method_problems(Recipe(method=changes.get("method", Method.qat), train=train, parallel=parallel), SHAPE)
    assert says in line


@pytest.mark.parametrize("method", [Method.qat, Method.qad])
def test_adapters_under_any_layout_are_no_problem(method):
    for parallel in (Parallel(), Parallel(tensor=2, sequence=True), Parallel(pipeline=2)):
        train = Train(lora=Lora(rank=4, targets=["*.mlp.*"]), sequence_length=16, block_scale_lr_mult=1.0)
        recipe = Recipe(method=method, train=train, parallel=parallel)
        assert list(model_problems(recipe, SHAPE)) == []
