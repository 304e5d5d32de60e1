"""Clipped gradients and a late start of fake quantization, against closed forms and against plain autograd."""

import runpy
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from halfbyte.training import numerics
from halfbyte.training.config import Distill, Format, LayerFormat, Method, Quantize, Recipe, SecondScale, Train
from halfbyte.training.data import MicroBatch
from halfbyte.training.formats import Rounding
from halfbyte.training.kv_format import KVCache
from halfbyte.training.resolve import resolve
from halfbyte.training.rules import problems
from halfbyte.training.saturation import clip_gradient, clip_weight_gradients, largest

pytestmark = pytest.mark.slow  # imports Megatron-Core and ModelOpt
MIXED = {"*.self_attn.*": LayerFormat.fp8, "model.layers.0.mlp.down_proj": LayerFormat.w4a16_nvfp4}


@pytest.fixture(scope="module")
def world():
    helpers = runpy.run_path(str(Path(__file__).with_name("workers") / "world.py"))
    with helpers["world_of_one"]() as runtime:
        yield lambda recipe, seed=0: helpers["random_model"](runtime, recipe, seed=seed), runtime


def batches(seed: int, count: int = 2) -> list[MicroBatch]:
    windows = torch.randint(0, 64, (count, 2, 13), generator=torch.Generator().manual_seed(seed))
    return [MicroBatch(w[:, :-1], w[:, 1:], torch.ones(2, 12), None) for w in windows]


def calibrate(stage: torch.nn.Module) -> None:
    for batch in batches(9):
        forward(stage, batch)


def forward(gpt: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    return gpt(batch.tokens, torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens), None)


def narrowed(world, *, clip: bool) -> tuple[torch.nn.Module, Recipe]:
    """A quantized model whose calibrated maxima are so small that a part of all weights and inputs lies beyond."""
    from halfbyte.training import quantize

    build, _ = world
    recipe = Recipe(method=Method.qat, quantize=Quantize(layers=MIXED, clip_gradient=clip))
    gpt = build(recipe)
    quantize.quantize(gpt, recipe, calibrate)
    for _, quantizer in quantize.enabled_quantizers(gpt):
        quantizer.amax = quantizer.amax / 8
    quantize.refresh_scales(gpt, recipe.quantize)
    return gpt, recipe


# ---- one tensor


@pytest.mark.parametrize(
    ("number_format", "amax", "inside", "beyond"),
    [
        (Rounding.fp8, 7.0, [7.0, -7.0, 0.0], [7.001, -8.0]),
        # 5.25 = 2688 * 2^-9: the power of two above 5/2688 leaves room for a little more than the calibrated 5.
        (Rounding.nvfp4, 5.0, [5.0, 5.25, -5.25], [5.26, -6.0]),
        (Rounding.nvfp4, 2688.0, [2688.0], [2700.0]),
    ],
)
def test_the_gradient_is_zero_exactly_where_the_format_ends(number_format, amax, inside, beyond):
    scale = numerics.tensor_scale(torch.tensor(amax), number_format, SecondScale.pow2)
    limit = largest(number_format, scale)
    values = torch.zeros(32)
    values[: len(inside) + len(beyond)] = torch.tensor([*inside, *beyond])
    x = values.requires_grad_()
    out = numerics.fake_quantize(clip_gradient(x, limit), number_format, scale)
    assert torch.equal(out, numerics.fake_quantize(x, number_format, scale))  # the value is the same
    assert out.abs().max() == limit
    out.backward(torch.arange(1.0, 33.0))
    expected = torch.arange(1.0, 33.0)
    expected[len(inside) : len(inside) + len(beyond)] = 0
    assert torch.equal(x.grad, expected)


def test_a_nan_keeps_its_gradient():
    x = torch.tensor([torch.nan, 9.0], requires_grad=True)
    clip_gradient(x, torch.tensor(1.0)).sum().backward()
    assert x.grad.tolist() == [1.0, 0.0]


def test_without_a_graph_nothing_is_done():
    x = torch.ones(4)
    assert clip_gradient(x, torch.tensor(0.5)) is x
    assert clip_gradient(x.requires_grad_(), None) is x


# ---- a training step


def reference_gradients(world, parts: list[MicroBatch], *, clip: bool) -> dict[str, torch.Tensor]:
    """Autograd through ModelOpt's own path, where weights are rounded inside the graph."""
    gpt, _ = narrowed(world, clip=clip)
    for part in parts:
        functional.cross_entropy(forward(gpt, part).flatten(0, 1), part.labels.flatten(), reduction="sum").backward()
    return {name: parameter.grad for name, parameter in gpt.named_parameters()}


@pytest.mark.parametrize("clip", [True, False])
def test_a_global_batch_has_the_gradient_of_plain_autograd(world, clip):
    from halfbyte.training import losses, module
    from halfbyte.training.fast_path import weights_once
    from halfbyte.training.schedule import train_batch

    gpt, recipe = narrowed(world, clip=clip)
    parts = batches(1, 3)
    ddp = module.wrap(gpt, recipe)
    ddp.zero_grad_buffer()
    with weights_once(gpt):
        train_batch(ddp, parts, losses.cross_entropy, needs_logits=False)
    clip_weight_gradients(gpt)
    expected = reference_gradients(world, parts, clip=clip)
    zeros = {}
    for name, parameter in gpt.named_parameters():
        found = parameter.main_grad * sum(part.tokens.numel() for part in parts)
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-5)
        if name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")):
            zeros[name] = float((found == 0).double().mean())
    assert len(zeros) == 8
    assert all((share > 0.01) == clip for share in zeros.values()), zeros  # the clip is at work, in every linear


def test_clipping_changes_what_flows_through_inputs_too(world):
    clipped, plain = (reference_gradients(world, batches(1), clip=clip) for clip in (True, False))
    name = "embedding.word_embeddings.weight"
    assert not torch.allclose(clipped[name], plain[name], rtol=1e-2)


# ---- the late start


def bench(world, recipe: Recipe, *, quantized: bool = True):
    """A Training module with the two things that Lightning's trainer would give it."""
    from halfbyte.training import quantize
    from halfbyte.training.module import Training

    build, runtime = world
    gpt = build(recipe)
    if quantized:
        quantize.quantize(gpt, recipe, calibrate)
    module = Training(gpt, teacher=None, recipe=recipe, runtime=runtime, data=None)
    module.optimizers, module.log_dict = lambda: module.optimizer, lambda values, **_: None
    return module


def losses_of(module, steps: range) -> list[float]:
    for step in steps:
        module.training_step(batches(step), 0)
    return module.progress.losses


@pytest.mark.parametrize("cache", [KVCache.none, KVCache.fp8])
def test_the_first_steps_are_those_of_the_bf16_control(world, cache):
    def recipe(method: Method, late: int) -> Recipe:
        train = Train(steps=10, learning_rate=1e-2, fake_quant_after_steps=late)
        return Recipe(method=method, train=train, quantize=Quantize(kv_cache=cache))

    late = losses_of(bench(world, recipe(Method.qat, 3)), range(5))
    control = losses_of(bench(world, recipe(Method.bf16, 0), quantized=False), range(5))
    at_once = losses_of(bench(world, recipe(Method.qat, 0)), range(5))
    assert late[:3] == control[:3]  # bit for bit
    assert all(a != b for a, b in zip(late[3:], control[3:], strict=True))
    assert all(a != b for a, b in zip(late, at_once, strict=True))


def test_the_switch_is_a_matter_of_the_step_so_a_resume_keeps_it(world):
    recipe = Recipe(method=Method.qat, train=Train(steps=10, learning_rate=1e-2, fake_quant_after_steps=2))
    straight, saved = bench(world, recipe), {}
    losses_of(straight, range(3))
    straight.on_save_checkpoint(saved)
    before = [p.detach().clone() for p in straight.gpt.parameters()]
    for steps_done, quantizes in ((1, False), (3, True)):
        resumed, plain = bench(world, recipe), bench(world, recipe, quantized=False)
        for module in (resumed, plain):
            with torch.no_grad():
                for mine, theirs in zip(module.gpt.parameters(), before, strict=True):
                    mine.copy_(theirs)
            module.on_load_checkpoint({"progress": {k: v[:steps_done] for k, v in saved["progress"].items()}})
        found, bf16 = (losses_of(module, range(3, 4))[-1] for module in (resumed, plain))
        assert (found != bf16) == quantizes


def test_unquantized_is_the_plain_model_its_cache_included(world):
    from halfbyte.training import quantize
    from halfbyte.training.fake_quant import unquantized

    recipe = Recipe(method=Method.qat, quantize=Quantize(kv_cache=KVCache.fp8))
    (gpt, plain), batch = (world[0](recipe) for _ in range(2)), batches(1)[0]
    quantize.quantize(gpt, recipe, calibrate)
    with unquantized(gpt):
        assert torch.equal(forward(gpt, batch), forward(plain, batch))
    assert not torch.equal(forward(gpt, batch), forward(plain, batch))


def test_unquantized_ends_with_an_error_too(world):
    from halfbyte.training.fake_quant import unquantized
    from halfbyte.training.quantize import enabled_quantizers

    gpt, _ = narrowed(world, clip=False)
    batch = batches(1)[0]
    names, quantized = [name for name, _ in enabled_quantizers(gpt)], forward(gpt, batch)
    with unquantized(gpt):
        assert not list(enabled_quantizers(gpt))
        assert not torch.equal(forward(gpt, batch), quantized)
    with pytest.raises(ZeroDivisionError), unquantized(gpt):
        _ = 1 // 0
    assert [name for name, _ in enabled_quantizers(gpt)] == names  # weight-only layers keep their input as it was
    assert torch.equal(forward(gpt, batch), quantized)


# ---- rules


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train.fake_quant_after_steps=-1"], "must not be negative"),
        (["train.fake_quant_after_steps=6"], "train.steps = 6 end before it; give less than 6"),
        (["train.fake_quant_after_steps=2", "method=qad"], "a QAD student is its teacher and has nothing to learn"),
        (["quantize.clip_gradient=true", "quantize.format=mxfp4"], "mxfp4 has no calibrated range to leave"),
        (
            ["quantize.clip_gradient=true", "quantize.format=w4a16_mxfp4"],
            "w4a16_mxfp4 has no calibrated range to leave",
        ),
    ],
)
def test_what_would_do_nothing_is_one_line(overrides, says):
    recipe = resolve("tiny", [])
    for override in overrides:
        key, _, value = override.partition("=")
        group, _, name = key.partition(".")
        formats = {"mxfp4": Format.mxfp4, "w4a16_mxfp4": Format.w4a16_mxfp4}
        parsed = ({"true": True, "qad": Method.qad} | formats).get(value)
        setattr(getattr(recipe, group) if name else recipe, name or group, int(value) if parsed is None else parsed)
    (line,) = problems(recipe)
    assert says in line


def test_blocks_of_mxfp4_end_where_their_scale_is_learned():
    assert resolve("tiny", ["quantize.clip_gradient=true", "quantize.format=mxfp4", "train.block_scale_lr_mult=1"])


def test_a_late_start_of_qad_has_labels_to_learn_from():
    recipe = resolve("tiny", ["method=qad", "train.fake_quant_after_steps=2", "distill.cross_entropy=0.5"])
    assert recipe.distill == Distill(cross_entropy=0.5)
