"""Errors, drift and clipped shares of every quantized linear, against what is computed from its tensors by hand."""

import runpy
from pathlib import Path

import pytest
import torch

from halfbyte.training.config import Format, LayerFormat, Method, Quantize, Recipe, Train
from halfbyte.training.config_train import Lora
from halfbyte.training.data import MicroBatch

WORLD = runpy.run_path(str(Path(__file__).with_name("workers") / "world.py"))
FORMATS = {"*.mlp.down_proj": LayerFormat.bf16, "model.layers.0.*": LayerFormat.fp8}


def batch(seed: int) -> MicroBatch:
    window = torch.randint(0, 64, (2, 13), generator=torch.Generator().manual_seed(seed))
    return MicroBatch(window[:, :-1], window[:, 1:], torch.ones(2, 12), None)


@pytest.fixture(scope="module")
def make():
    """(recipe's section) -> a calibrated model."""
    with WORLD["world_of_one"]() as opened:
        from halfbyte.training import quantize
        from halfbyte.training.schedule import collect

        def build(section: Quantize) -> torch.nn.Module:
            recipe = Recipe(method=Method.qat, quantize=section)
            gpt = WORLD["random_model"](opened, recipe)
            quantize.quantize(gpt, recipe, lambda stage: collect(stage, [batch(9)], None))
            return gpt

        yield build


def linear_inputs(gpt: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What reaches every quantized linear in the stats' own pass."""
    from halfbyte.training.schedule import collect

    found, handles = {}, []
    for name, module in gpt.named_modules():
        if hasattr(module, "input_quantizer"):
            handles.append(module.register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0]})))
    collect(gpt, [batch(1)], None)
    for handle in handles:
        handle.remove()
    return found


def test_every_number_by_hand(make):
    from halfbyte.training import quantization_stats, quantize

    section = Quantize(layers=FORMATS)
    gpt = make(section)
    for _, quantizer in quantize.enabled_quantizers(gpt):  # maxima of some earlier, calmer model
        quantizer.amax = quantizer.amax / 4
    quantize.refresh_scales(gpt, section)
    found = quantization_stats.measure(gpt, batch(1), section)
    inputs = linear_inputs(gpt)
    planned = quantize.plan(gpt, section)
    assert set(found) == {layer.key for layer in planned}
    assert len(found) == 6  # fc2 is excluded in both layers
    assert {layer.format for layer in planned} == {Format.fp8, Format.nvfp4}
    for layer in planned:
        linear = gpt.get_submodule(layer.module)
        for side, x in (("weight", linear.weight), ("input", inputs[layer.module])):
            quantizer = linear.get_submodule(f"{side}_quantizer")
            rule, x = quantizer._quantizer_cache, x.detach().double()
            error = (rule.fake(x.float()).double() - x).norm() / x.norm()
            top = rule.scale * (448 if layer.format is Format.fp8 else 448 * 6)
            entry = found[layer.key][side]
            assert entry["error"] == pytest.approx(float(error), rel=1e-5)
            assert entry["drift"] == pytest.approx(float(x.abs().max() / quantizer.amax), rel=1e-6)
            assert entry["clipped"] == float((x.abs() > top).double().mean())
    (line,) = quantization_stats.lines(found)
    assert "x its calibrated maximum" in line
    totals = quantization_stats.summary(found)
    assert totals["weight"]["largest_drift"] == pytest.approx(4.0, rel=1e-6)
    assert totals["input"]["largest_clipped"] > 1e-3


@pytest.mark.parametrize("number_format", [Format.mxfp4, Format.w4a16_nvfp4])
def test_only_what_a_format_has(make, number_format):
    from halfbyte.training import quantization_stats, quantize

    section = Quantize(format=number_format)
    gpt = make(section)
    before = [parameter.clone() for parameter in gpt.parameters()]
    found = quantization_stats.measure(gpt, batch(1), section)
    assert {key: layer["weight"]["error"] for key, layer in found.items()} == pytest.approx(
        quantize.weight_errors(gpt, section), rel=1e-5
    )
    sides = {"weight", "input"} if number_format is Format.mxfp4 else {"weight"}
    assert all(set(layer) == sides for layer in found.values())
    assert all(("drift" in layer["weight"]) is (number_format is not Format.mxfp4) for layer in found.values())
    assert quantization_stats.lines(found) == []
    assert all(torch.equal(now, was) for now, was in zip(gpt.parameters(), before, strict=True))
    assert not any(quantizer._forward_hooks for _, quantizer in quantize.enabled_quantizers(gpt))


def test_a_weight_is_seen_with_its_adapter(make):
    from halfbyte.training import companions, lora, quantization_stats, quantize

    section = Quantize()
    gpt = make(section)
    bare = quantization_stats.measure(gpt, batch(1), section)
    lora.attach(gpt, Recipe(method=Method.qat, quantize=section, train=Train(lora=Lora(rank=2))))
    with torch.no_grad():
        for _, adapter in companions.of(gpt).each():
            adapter.b.fill_(0.3)
    found = quantization_stats.measure(gpt, batch(1), section)
    errors = {key: layer["weight"]["error"] for key, layer in found.items()}
    assert errors == pytest.approx(quantize.weight_errors(gpt, section), rel=1e-5)
    assert all(found[key]["weight"]["drift"] > bare[key]["weight"]["drift"] for key in found)


@pytest.mark.parametrize("number_format", [Format.mxfp4, Format.nvfp4])
def test_a_block_is_clipped_where_its_learned_scale_ends(make, number_format):
    from halfbyte.training import companions, lsq, quantization_stats, quantize

    section = Quantize(format=number_format)
    gpt = make(section)
    lsq.attach(gpt, Recipe(method=Method.qat, quantize=section, train=Train(block_scale_lr_mult=1.0)))
    with torch.no_grad():
        for _, scale in companions.of(gpt).each():
            scale.log2.sub_(1.0)  # half of what every block needs
    found = quantization_stats.measure(gpt, batch(1), section)
    for layer in quantize.plan(gpt, section):
        linear = gpt.get_submodule(layer.module)
        weight = linear.weight.detach()
        most = linear.weight_quantizer._quantizer_cache.fake(1e3 * weight.sign()).abs()  # a full block's largest value
        share = float((weight.abs() > most).double().mean())
        assert found[layer.key]["weight"]["clipped"] == share
        assert share > 0.01


def test_tensors_larger_than_a_piece(monkeypatch):
    from halfbyte.training import quantization_stats

    monkeypatch.setattr(quantization_stats, "CHUNK", 7)
    x = torch.linspace(-3, 3, 50).view(5, 10)
    seen = quantization_stats.see(x, x.round(), torch.tensor(2.5), torch.tensor(2.0))
    expected = [float((x.round() - x).square().sum()), float(x.square().sum()), float((x.abs() > 2.5).sum()), 50.0]
    assert seen.sums.tolist() == pytest.approx(expected, rel=1e-6)
    assert (float(seen.amax), float(seen.calibrated)) == (3.0, 2.0)


def test_a_quiet_run_says_nothing_and_the_worst_layer_is_named():
    from halfbyte.training import quantization_stats

    def layer(clipped):
        return {"weight": {"error": 0.1, "clipped": 0.5}, "input": {"error": 0.1, "clipped": clipped, "drift": 2.0}}

    assert quantization_stats.lines({"a": layer(0.001), "b": {"weight": {"error": 0.1, "clipped": 0.5}}}) == []
    assert quantization_stats.lines({"a": layer(0.002), "b": layer(0.01), "c": layer(0.0)}) == [
        "the input of b reaches 2.00 x its calibrated maximum, 1.00% of it is clipped (and 1 more layers)"
    ]
    assert quantization_stats.summary({}) == {}
