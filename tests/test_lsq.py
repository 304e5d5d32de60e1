"""Learned block scales: what they round to, their gradient, their bytes, and a step of training with them."""

import json
import math
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from halfbyte.export import hf
from halfbyte.export.pack import fake, pack
from halfbyte.export.verify import verify
from halfbyte.training import codec, learned_scales, numerics
from halfbyte.training.config import BlockScale, Format, Method, Quantize, Recipe, Train
from halfbyte.training.formats import GRIDS, SPECS, Rounding
from halfbyte.training.hf_map import HFWeight, expected_shapes
from halfbyte.training.method_rules import method_problems
from halfbyte.training.rounding import E2M1
from halfbyte.training.shape import read_shape

WORLD = runpy.run_path(str(Path(__file__).with_name("workers") / "world.py"))
batches, training = WORLD["batches"], WORLD["training"]
RULES = [
    (Rounding.nvfp4, BlockScale.amax),
    (Rounding.nvfp4, BlockScale.four_over_six),
    (Rounding.nvfp4, BlockScale.mse),
    (Rounding.nvfp4_block32, BlockScale.amax),
    (Rounding.mxfp4, BlockScale.amax),
    (Rounding.mxfp4, BlockScale.mse),
]


def weight(seed: int = 0, rows: int = 24, columns: int = 128, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values over many octaves, a block of zeros and one of a single value."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * torch.randn(rows, columns, generator=generator).exp()
    w[0, :32], w[1:2, 1:32] = 0.0, 0.0
    return w.to(dtype)


def scale_of(w: torch.Tensor, rounding: Rounding, block_scale: BlockScale = BlockScale.amax) -> torch.Tensor | None:
    per_tensor = GRIDS[rounding].per_tensor
    return numerics.second_scale(w.abs().amax(), "pow2", block_scale, rounding) if per_tensor else None


def moved(log2: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """Scales after some training: up to an octave away."""
    return log2 + 2 * torch.rand(log2.shape, generator=torch.Generator().manual_seed(seed)) - 1


# ---- rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rounding", "block_scale"), RULES)
def test_scales_start_where_the_rule_has_them(rounding, block_scale, dtype):
    w = weight(dtype=dtype)
    scale_2 = scale_of(w, rounding, block_scale)
    log2 = learned_scales.initial_log2(w, rounding, scale_2, block_scale)
    found = learned_scales.fake(w, log2, rounding, scale_2)
    assert found.dtype == dtype
    assert torch.equal(found, numerics.fake_quantize(w, rounding, scale_2, block_scale))


def test_a_scale_is_the_nearest_number_of_its_format():
    log2 = torch.linspace(-12, 11, 4001)
    numbers = numerics.E4M3_VALUES.double()
    nearest = numbers[(log2.double().exp2()[:, None] - numbers).abs().argmin(1)].float()
    assert torch.equal(learned_scales.block_scales(log2, Rounding.nvfp4), nearest)
    assert torch.equal(learned_scales.block_scales(log2, Rounding.nvfp4_block32), nearest.clamp(max=72))
    assert torch.equal(learned_scales.block_scales(log2, Rounding.mxfp4), log2.round().exp2())
    ends = learned_scales.block_scales(torch.tensor([-math.inf, -200.0, 200.0, math.inf]), Rounding.mxfp4)
    assert ends.tolist() == [2.0**-126, 2.0**-126, 2.0**125, 2.0**125]
    for rounding in (Rounding.nvfp4, Rounding.mxfp4):
        assert learned_scales.block_scales(torch.tensor([math.nan]), rounding).isnan().all()


@pytest.mark.parametrize("rounding", [Rounding.nvfp4, Rounding.nvfp4_block32, Rounding.mxfp4])
def test_rounding_is_to_the_nearest_multiple_of_the_given_scale(rounding):
    w = weight()
    scale_2, block = scale_of(w, rounding), GRIDS[rounding].block
    log2 = moved(learned_scales.initial_log2(w, rounding, scale_2, BlockScale.amax))
    steps = learned_scales.block_scales(log2, rounding).double() * (1 if scale_2 is None else scale_2.double())
    grid = steps.flatten()[:, None] * torch.tensor([*E2M1, *(-v for v in E2M1[1:])]).double()
    nearest = (w.double().view(-1, block, 1) - grid[:, None]).abs().amin(-1)
    found = learned_scales.fake(w, log2, rounding, scale_2).double().view(-1, block)
    assert torch.equal((found[..., None] == grid[:, None]).any(-1), torch.ones(found.shape, dtype=torch.bool))
    assert torch.equal((w.double().view(-1, block) - found).abs(), nearest)


# ---- gradient


@pytest.mark.parametrize("rounding", [Rounding.nvfp4, Rounding.mxfp4])
def test_the_gradient_is_that_of_the_straight_through_estimator(rounding):
    """Autograd through clip(w / s) rounded straight through, times s."""
    w, block = weight(), GRIDS[rounding].block
    scale_2 = scale_of(w, rounding)
    log2 = moved(learned_scales.initial_log2(w, rounding, scale_2, BlockScale.amax))
    grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    s = learned_scales.block_scales(log2, rounding).double() * (1 if scale_2 is None else scale_2.double())
    s.requires_grad_()
    v = w.double().view(*s.shape, block) / s[..., None]
    clipped = v.clamp(-6, 6)
    q = clipped + (learned_scales.round_e2m1(v.detach().float()).double() - clipped).detach()
    (q * s[..., None] * grad.view(v.shape)).sum().backward()
    found = learned_scales.gradient(w, grad, log2, rounding, scale_2)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, s.grad / math.sqrt(6 * block), rtol=1e-5, atol=1e-6)
    assert (v.abs() > 6).any()


def test_where_all_saturates_the_gradient_is_the_slope_of_the_loss():
    """Finite differences: beyond 6 s the rounded weight is 6 s, a smooth function of the scale."""
    w = torch.full((2, 16), 100.0) * torch.tensor([1.0, -1.0]).view(2, 1)
    grad = torch.randn(2, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    lower, upper = (torch.full((2, 1), math.log2(s)) for s in (1.0, 1.125))  # neighbours in E4M3
    one = torch.tensor(1.0)
    losses = [(learned_scales.fake(w, log2, Rounding.nvfp4, one).double() * grad).sum(1) for log2 in (lower, upper)]
    slope = (losses[1] - losses[0]) / 0.125 / math.sqrt(96)
    torch.testing.assert_close(learned_scales.gradient(w, grad, lower, Rounding.nvfp4, one).flatten(), slope)


# ---- bytes


def learned(weights: list[HFWeight], recipe: Recipe) -> list[HFWeight]:
    found = []
    for one in weights:
        if one.quantized:
            rounding = SPECS[recipe.quantize.format].weights
            scale_2 = scale_of(torch.tensor(0.4), rounding) if GRIDS[rounding].per_tensor else None
            log2 = moved(learned_scales.initial_log2(one.tensor, rounding, scale_2, BlockScale.amax))
            one = replace(one, log2_scale=log2)
        found.append(one)
    return found


FP4 = [name for name in Format if SPECS[name].grid.block_scale]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    values = runpy.run_path(str(Path(__file__).with_name("test_verify.py")))
    folder = tmp_path_factory.mktemp("source")
    (folder / "config.json").write_text(json.dumps(values["CONFIG"]))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize("number_format", FP4)
def test_given_scales_are_packed_and_verified(source, tmp_path, number_format):
    recipe, generator = Recipe(quantize=Quantize(format=number_format)), torch.Generator().manual_seed(3)
    plain = []
    for name, shape in expected_shapes(read_shape(source / "config.json")).items():
        amax = [torch.tensor(0.4), torch.tensor(4.0)] if "_proj" in name else []
        plain.append(HFWeight(name, torch.randn(*shape, generator=generator) * 0.1, bool(amax), *amax))
    weights = learned(plain, recipe)
    hf.write(weights, recipe, model_dir=source, out=tmp_path / "hf", checkpoint="step_00000001", versions={})
    report = verify(tmp_path / "hf", iter(weights), recipe)
    assert report["problems"] == []
    assert report["quantized"] == 14
    # The rule's scales, or one scale moved by one binade, are another model.
    assert "values differ from the trained model" in verify(tmp_path / "hf", iter(plain), recipe)["problems"][0]
    place = next(i for i, one in enumerate(weights) if one.log2_scale is not None)
    other = weights[place].log2_scale.clone()
    other[0, 0] += 1
    weights[place] = replace(weights[place], log2_scale=other)
    assert verify(tmp_path / "hf", iter(weights), recipe)["mismatches"] == 1


def test_codes_times_given_scales_are_the_trained_weight():
    w = weight()
    log2 = moved(learned_scales.initial_log2(w, Rounding.nvfp4, torch.tensor(2.0**-7), BlockScale.amax))
    one = HFWeight("model.layers.0.mlp.down_proj.weight", w, True, torch.tensor(20.0), torch.tensor(1.0), None, log2)
    tensors = pack(one, Quantize())
    used = fake(one, Quantize()).view(*log2.shape, 16).ne(0).any(-1)
    given = learned_scales.block_scales(log2, Rounding.nvfp4)
    assert torch.equal(tensors["weight_scale"].float()[used], given[used])
    decoded = codec.nvfp4_decode(tensors["weight"], tensors["weight_scale"], tensors["weight_scale_2"])
    assert torch.equal(decoded, fake(one, Quantize()))


# ---- training


def recipe_of(**train) -> Recipe:
    values = {"steps": 100, "learning_rate": 1e-3, "block_scale_lr_mult": 30.0} | train
    return Recipe(method=Method.qat, quantize=Quantize(format=Format.w4a16_nvfp4), train=Train(**values))


@pytest.fixture(scope="module")
def opened():
    with WORLD["world_of_one"]() as opened:
        yield opened


@pytest.mark.slow
def test_a_step_gives_scales_the_gradient_of_the_loss(opened):
    """Against autograd of the mean loss, through weights rounded by differentiable steps."""
    from torch.nn import functional

    from halfbyte.training import losses
    from halfbyte.training.fast_path import weights_once
    from halfbyte.training.schedule import train_batch

    module = training(opened, recipe_of())
    module.ddp.zero_grad_buffer()
    with weights_once(module.gpt):
        train_batch(module.ddp, batches(), losses.cross_entropy, needs_logits=False)
    found = {name: p.main_grad.clone() for name, p in module.gpt.named_parameters()}
    scales = {}
    for name, linear in module.gpt.named_modules():
        if hasattr(linear, "weight_quantizer"):
            rule = linear.weight_quantizer._quantizer_cache
            if rule is None:  # lm_head
                continue
            s = learned_scales.block_scales(rule.log2.flatten(0, 1), rule.rounding) * rule.scale
            scales[name], linear.gradient_accumulation_fusion = s.requires_grad_(), False
            v = (linear.weight.detach().view(*s.shape, 16) / s[..., None]).clamp(-6, 6)
            q = v + (learned_scales.round_e2m1(v.detach().clone()) - v).detach()
            linear.weight_quantizer._quantizer_cache = replace(rule, log2=None)
            linear.weight_quantizer._quantizer_cache.fake = lambda x, q=q, s=s: (q * s[..., None]).view_as(x)
    assert len(scales) == 8
    total = sum(
        functional.cross_entropy(
            module.gpt(b.tokens, torch.arange(12).expand_as(b.tokens), None).flatten(0, 1), b.labels.flatten()
        )
        for b in batches()
    )
    (total / 2).backward()
    for name, s in scales.items():
        ours = found[f"companions.scales:{name.replace('.', '/')}.log2"]
        torch.testing.assert_close(ours.flatten(0, 1), s.grad / math.sqrt(96), rtol=2e-3, atol=1e-7)


@pytest.mark.slow
def test_scales_learn_at_their_own_rate_and_without_decay(opened):
    """Adam's first update is the learning rate, in the direction of the gradient."""
    module = training(opened, recipe_of(weight_decay=0.5, clip_grad=0.0))
    before = {name: p.detach().clone() for name, p in module.gpt.named_parameters()}
    module.training_step(batches(), 0)
    checked = 0
    for name, p in module.gpt.named_parameters():
        change, gradient = (p.detach() - before[name]), p.main_grad
        sure = gradient.abs() > 1e-5
        if name.endswith("log2"):
            torch.testing.assert_close(change[sure], -0.03 * gradient[sure].sign(), rtol=2e-3, atol=1e-6)
            assert not change[gradient == 0].any()
            checked += int(sure.sum())
        elif p.dim() == 2:
            expected = -1e-3 * (gradient.sign() + 0.5 * before[name])
            torch.testing.assert_close(change[sure], expected[sure], rtol=2e-3, atol=1e-6)
    assert checked > 500


@pytest.mark.slow
@pytest.mark.parametrize("number_format", [Format.w4a16_nvfp4, Format.w4a16_mxfp4])
def test_a_clipped_gradient_ends_where_the_block_ends(opened, number_format):
    """quantize.clip_gradient: LSQ's own gradient of the weight, 0 beyond 6 s; that of the scales stays as it is."""
    modules = []
    for clips in (False, True):
        recipe = recipe_of(clip_grad=0.0)
        recipe.quantize.format, recipe.quantize.clip_gradient = number_format, clips
        modules.append(training(opened, recipe))
        with torch.no_grad():  # every block's end below its maximum
            for name, parameter in modules[-1].gpt.named_parameters():
                parameter.sub_(1.0 if name.endswith("log2") else 0.0)
    outside = {}
    for name, linear in modules[0].gpt.named_modules():
        rule = linear.weight_quantizer._quantizer_cache if hasattr(linear, "weight_quantizer") else None
        if rule is not None:  # lm_head has none
            steps = learned_scales.block_scales(rule.log2.flatten(0, 1), rule.rounding) * (rule.scale or 1.0)
            blocks = linear.weight.detach().view(*steps.shape, -1).abs()
            outside[f"{name}.weight"] = (blocks > 6 * steps[..., None]).view_as(linear.weight)
    assert len(outside) == 8
    for module in modules:
        module.training_step(batches(), 0)
    plain, clipped = (dict(module.gpt.named_parameters()) for module in modules)
    for name, parameter in plain.items():
        expected = parameter.main_grad
        if name in outside:
            assert expected[outside[name]].abs().sum() > 0
            expected = expected.masked_fill(outside[name], 0.0)
        assert torch.equal(clipped[name].main_grad, expected), name


@pytest.mark.slow
def test_scales_that_learn_beat_scales_by_rule(opened):
    """With weights that hardly move, the loss of one batch falls further."""
    ends = []
    for multiple in (0.0, 3000.0):
        module = training(opened, recipe_of(learning_rate=1e-5, block_scale_lr_mult=multiple))
        for _ in range(15):
            module.training_step(batches(), 0)
        ends.append(module.progress.losses[-1])
    start = module.progress.losses[0]
    assert start - ends[1] > 2 * (start - ends[0]) > 0


@pytest.mark.slow
def test_frozen_layers_keep_the_rule(opened):
    module = training(opened, recipe_of(freeze=["model.layers.0.*"]))
    names = [name for name, _ in module.gpt.named_parameters() if name.endswith("log2")]
    assert len(names) == 4
    assert all("decoder/layers/1/" in name for name in names)
    module.training_step(batches(), 0)


# ---- rules


@pytest.mark.parametrize(
    ("method", "number_format", "late", "says"),
    [
        (Method.ptq, Format.nvfp4, 0, "method ptq trains no quantized weight; give 0, or method=qat or qad"),
        (Method.qat, Format.fp8, 0, "fp8 layers have no block scales to learn"),
        (
            Method.qad,
            Format.mxfp4,
            5,
            "learns from quantized weights only; give 0, or set train.fake_quant_after_steps=0",
        ),
    ],
)
def test_where_no_scale_can_be_learned_is_one_line(method, number_format, late, says):
    train = Train(block_scale_lr_mult=10.0, fake_quant_after_steps=late)
    recipe = Recipe(method=method, quantize=Quantize(format=number_format), train=train)
    (line,) = method_problems(recipe, WORLD["SHAPE"])
    assert line.startswith("train.block_scale_lr_mult = 10.0: ")
    assert says in line
    assert list(method_problems(replace(recipe, train=Train()), WORLD["SHAPE"])) == []


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", [Rounding.nvfp4, Rounding.nvfp4_block32, Rounding.mxfp4])
def test_a_gpu_rounds_with_learned_scales_as_a_cpu_does(rounding, dtype):
    for shape in [(1, 32), (24, 128), (257, 4096)]:
        w, scale_2 = weight(2, *shape, dtype=dtype), None
        w.view(-1)[-3:] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        if GRIDS[rounding].per_tensor:
            scale_2 = numerics.second_scale(torch.tensor(30.0), "pow2", rounding=rounding)
        log2 = moved(learned_scales.initial_log2(w, rounding, scale_2, BlockScale.amax), seed=3)
        log2.view(-1)[0] = torch.nan
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(4))
        on_gpu = [None if x is None else x.cuda() for x in (w, grad, log2, scale_2)]
        found = learned_scales.fake(on_gpu[0], on_gpu[2], rounding, on_gpu[3]).cpu()
        expected = learned_scales.fake(w, log2, rounding, scale_2)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
        slopes = learned_scales.gradient(on_gpu[0], on_gpu[1], on_gpu[2], rounding, on_gpu[3]).cpu()
        torch.testing.assert_close(
            slopes, learned_scales.gradient(w, grad, log2, rounding, scale_2), rtol=1e-4, atol=1e-5, equal_nan=True
        )
