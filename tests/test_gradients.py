"""Weight gradients accumulated in place: the sum over micro-batches of what plain autograd gives, in FP32."""

import dataclasses
import runpy
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from halfbyte.training.config import Method, Quantize, Recipe, Train
from halfbyte.training.data import MicroBatch

pytestmark = pytest.mark.slow  # imports Megatron-Core


@pytest.fixture(scope="module")
def world():
    helpers = runpy.run_path(str(Path(__file__).with_name("workers") / "world.py"))
    with helpers["world_of_one"]() as runtime:

        def build(recipe: Recipe, *, tied: bool):
            shape = dataclasses.replace(helpers["SHAPE"], tied=tied)
            return helpers["random_model"](runtime, recipe, shape=shape)

        yield build, runtime


def batches(count: int) -> list[MicroBatch]:
    windows = torch.randint(0, 64, (count, 2, 13), generator=torch.Generator().manual_seed(5))
    return [MicroBatch(w[:, :-1], w[:, 1:], torch.ones(2, 12), None) for w in windows]


def calibrate(stage: torch.nn.Module) -> None:
    tokens = batches(1)[0].tokens
    stage(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)


def plain_gradients(gpt: torch.nn.Module, parts: list[MicroBatch]) -> dict[str, torch.Tensor]:
    """Autograd's gradient of the summed loss."""
    for part in parts:
        positions = torch.arange(part.tokens.shape[1]).expand_as(part.tokens)
        logits = gpt(part.tokens, positions, None)
        functional.cross_entropy(logits.flatten(0, 1), part.labels.flatten(), reduction="sum").backward()
    return {name: parameter.grad for name, parameter in gpt.named_parameters()}


def main_gradients(gpt: torch.nn.Module, recipe: Recipe, parts: list[MicroBatch]) -> dict[str, torch.Tensor]:
    """What stands in main_grad after one global batch, before the optimizer; normalised per token by Megatron."""
    from halfbyte.training import losses, module
    from halfbyte.training.fast_path import weights_once
    from halfbyte.training.schedule import train_batch

    ddp = module.wrap(gpt, recipe)
    ddp.zero_grad_buffer()
    with weights_once(gpt):
        train_batch(ddp, parts, losses.cross_entropy, needs_logits=False)
    tokens = sum(float(part.loss_mask.sum()) for part in parts)
    return {name: parameter.main_grad * tokens for name, parameter in gpt.named_parameters()}


def fused_calls(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the weights whose gradient went through the fused path."""
    from halfbyte.training import gradients

    calls, whole = [], gradients.accumulate

    def count(total_input, grad_output, main_grad):
        calls.append(tuple(main_grad.shape))
        whole(total_input, grad_output, main_grad)

    monkeypatch.setattr(gradients, "accumulate", count)
    return calls


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_main_grad_is_the_sum_over_micro_batches(world, monkeypatch, tied, quantized):
    from halfbyte.training import quantize

    build, _ = world
    method = Method.qat if quantized else Method.bf16
    recipe = Recipe(method=method, train=Train(global_batch=6, micro_batch=2), quantize=Quantize())
    gpt, plain, parts = build(recipe, tied=tied), build(recipe, tied=tied), batches(3)
    for model in (gpt, plain) if quantized else ():
        quantize.quantize(model, recipe, calibrate)
    calls = fused_calls(monkeypatch)
    found, expected = main_gradients(gpt, recipe, parts), plain_gradients(plain, parts)
    linears = 2 * 4 + 1  # every linear of both layers and the logits, in every micro-batch
    assert len(calls) == 3 * linears
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulation_keeps_the_sum_in_fp32(dtype):
    from halfbyte.training.gradients import accumulate

    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(32, n, generator=generator).to(dtype) for n in (24, 16))
    total = torch.randn(16, 24, generator=generator)
    expected = total.double() + grad.double().t() @ x.double()
    accumulate(x, grad, total)
    assert (total - expected).abs().max() < 1e-5  # a gradient rounded to BF16 on the way would be off by 1e-2


@pytest.mark.gpu
def test_accumulation_on_the_gpu():
    from halfbyte.training.gradients import accumulate

    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(512, 256, generator=generator, device="cuda").bfloat16()
    grad = torch.randn(512, 384, generator=generator, device="cuda").bfloat16()
    total = torch.zeros(384, 256, device="cuda")
    for _ in range(2):
        accumulate(x, grad, total)
    expected = 2 * grad.double().t() @ x.double()
    assert (total - expected).abs().max() < 1e-3


def test_clipping_at_once_is_megatrons_clipping(world, monkeypatch):
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale

    from halfbyte.training import gradients

    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(size, generator=generator) for size in ((5, 7), (300,), (1,), (64, 64))]
    monkeypatch.setattr(clip_grads, "l2_norm_impl", None)
    monkeypatch.setattr(clip_grads, "multi_tensor_scale_impl", None)
    gradients.fuse_clipping()
    flag = torch.zeros(1, dtype=torch.int)
    ours, _ = clip_grads.l2_norm_impl(65536, flag, [tensors], False)
    theirs, _ = local_multi_tensor_l2_norm(65536, flag, [tensors], False)
    assert torch.equal(ours, theirs)
    for places in (tensors, [torch.empty_like(tensor) for tensor in tensors]):
        expected = [torch.empty_like(tensor) for tensor in tensors]
        local_multi_tensor_scale(65536, flag, [tensors, expected], 0.37)
        clip_grads.multi_tensor_scale_impl(65536, flag, [tensors, places], 0.37)
        assert all(torch.equal(a, b) for a, b in zip(places, expected, strict=True))
