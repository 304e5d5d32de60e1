"""Calibrations of post-training quantization on a tiny model in this process; layouts are in test_ptq_layouts.py."""

import contextlib
import dataclasses
import runpy
from pathlib import Path

import pytest
import torch

from halfbyte.training import numerics
from halfbyte.training.config import (
    Activations,
    Format,
    Method,
    Parallel,
    Quantize,
    Recipe,
    SecondScale,
    Smoothing,
    Train,
    Weights,
)
from halfbyte.training.errors import UserError
from halfbyte.training.files import write_json
from halfbyte.training.model_rules import model_problems

pytestmark = pytest.mark.slow  # imports Megatron-Core and ModelOpt

WORLD = runpy.run_path(str(Path(__file__).with_name("workers") / "world.py"))
TOKENS = torch.arange(96).reshape(4, 24) * 7 % 64
LINEARS = [
    f"decoder.layers.{layer}.{name}"
    for layer in range(2)
    for name in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
]


@pytest.fixture(scope="module")
def world():
    with WORLD["world_of_one"]() as runtime:

        def build(section: Quantize, **family: bool) -> torch.nn.Module:
            shape = dataclasses.replace(WORLD["SHAPE"], **family)
            gpt = WORLD["random_model"](runtime, Recipe(quantize=section), shape=shape)
            with torch.no_grad():  # outliers in a few channels, as trained models have them
                for layer in gpt.decoder.layers:
                    for norm in (layer.input_layernorm, layer.pre_mlp_layernorm):
                        norm.weight[[3, 17, 40]] *= torch.tensor([20.0, 6.0, 11.0])
            return gpt

        yield build, runtime


def forward(gpt: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return gpt(TOKENS, torch.arange(TOKENS.shape[1]).expand_as(TOKENS), None)


def inputs_of(gpt: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every linear's inputs on TOKENS, FP32 [T, K], by hooks of the test's own."""
    seen = {}
    handles = [
        gpt.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0].flatten(0, 1)})
        )
        for name in LINEARS
    ]
    forward(gpt)
    for handle in handles:
        handle.remove()
    return seen


def calibrated(world, **settings):
    """(model, report, recipe) after calibration on TOKENS."""
    from halfbyte.training import ptq

    build, _ = world
    recipe = Recipe(quantize=Quantize(**settings))
    gpt = build(recipe.quantize)
    return gpt, ptq.calibrate(gpt, recipe, forward), recipe


@pytest.mark.parametrize("number_format", [Format.nvfp4, Format.fp8])
def test_a_percentile_is_the_order_statistic_rounded_up_to_bf16(world, number_format):
    gpt, report, _ = calibrated(world, format=number_format, activations=Activations.percentile, percentile=97.5)
    _, plain, _ = calibrated(world, format=number_format)
    for name, x in inputs_of(world[0](Quantize())).items():
        ordered = x.abs().flatten().sort().values
        exact = ordered[-(-len(ordered) * 975 // 1000) - 1]  # the smallest that 97.5 % do not exceed
        found = report["layers"][name]["amax"]["input"]
        assert exact <= found <= exact * (1 + 2**-7)
        assert torch.tensor(found).bfloat16() == found
        assert found < plain["layers"][name]["amax"]["input"] == ordered[-1]
        assert report["layers"][name]["amax"]["weight"] == plain["layers"][name]["amax"]["weight"]
        scale = gpt.get_submodule(name).input_quantizer._quantizer_cache.scale
        assert scale == numerics.tensor_scale(torch.tensor(found), number_format, SecondScale.pow2)


def test_the_whole_percentile_is_the_maximum(world):
    _, report, _ = calibrated(world, activations=Activations.percentile, percentile=100.0)
    assert report["layers"] == calibrated(world)[1]["layers"]


def test_a_restart_takes_the_percentiles_from_quantize_json(world, tmp_path):
    from halfbyte.training import quantize

    gpt, report, recipe = calibrated(world, activations=Activations.percentile, percentile=99.0)
    write_json(tmp_path / "quantize.json", report)
    again = world[0](recipe.quantize)
    quantize.restore(again, recipe, tmp_path / "quantize.json")
    assert torch.equal(forward(again), forward(gpt))


@pytest.mark.parametrize("number_format", [Format.nvfp4, Format.fp8, Format.mxfp4])
def test_a_zeroed_layer_is_refused_where_its_scale_would_hold_it_at_zero(world, number_format):
    from halfbyte.training import ptq

    for method in (Method.ptq, Method.qat):
        recipe = Recipe(method=method, quantize=Quantize(format=number_format))
        gpt = world[0](recipe.quantize)
        with torch.no_grad():
            for layer in gpt.decoder.layers:
                layer.mlp.linear_fc2.weight.zero_()
        learns = number_format is Format.mxfp4  # its scales follow the weight
        says = "add model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj to quantize.exclude"
        with contextlib.nullcontext() if method is Method.ptq or learns else pytest.raises(UserError, match=says):
            ptq.calibrate(gpt, recipe, forward)


def plain_and_smoothed(world, method: Smoothing, **family: bool) -> tuple[torch.nn.Module, torch.nn.Module, dict]:
    """(model, the same smoothed but not quantized, factors by layer)."""
    from halfbyte.training import quantize, smoothing

    section = Quantize(smoothing=method)
    plain, smoothed = world[0](section, **family), world[0](section, **family)
    return plain, smoothed, smoothing.smooth(smoothed, quantize.plan(smoothed, section), section, forward)


@pytest.mark.parametrize("family", [{}, {"qkv_bias": True, "tied": True}, {"qk_norm": True}], ids=str)
@pytest.mark.parametrize("method", [Smoothing.smoothquant, Smoothing.awq_lite, Smoothing.awq_duo])
def test_smoothing_does_not_change_the_logits(world, method, family):
    plain, smoothed, facts = plain_and_smoothed(world, method, **family)
    if method is Smoothing.awq_duo:  # FP32's rounding of products with numbers that are not powers of two
        assert not torch.equal(forward(smoothed), forward(plain))
        torch.testing.assert_close(forward(smoothed), forward(plain), rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(forward(smoothed), forward(plain))
    for name in LINEARS:
        same = torch.equal(smoothed.get_submodule(name).weight, plain.get_submodule(name).weight)
        assert same == (facts[name]["least"] == facts[name]["most"] == 1.0 and not name.endswith(("qkv", "fc1")))
    assert any(entry["most"] >= 2 for entry in facts.values())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("method", [Smoothing.smoothquant, Smoothing.awq_duo])
def test_inputs_that_are_not_finite_are_no_factors(world, method, bad):
    from halfbyte.training import ptq

    recipe = Recipe(quantize=Quantize(format=Format.mxfp4, smoothing=method))  # no maximum that would tell
    gpt = world[0](recipe.quantize)
    with torch.no_grad():
        gpt.decoder.layers[1].pre_mlp_layernorm.weight[9] = bad
    with pytest.raises(UserError, match=r"^quantize.smoothing: the inputs of decoder.layers.1.mlp.linear_fc1 are not"):
        ptq.calibrate(gpt, recipe, forward)


def test_awq_duo_follows_its_formula(world):
    plain, smoothed, facts = plain_and_smoothed(world, Smoothing.awq_duo)
    before, after = inputs_of(plain), inputs_of(smoothed)
    for name in LINEARS:
        x = before[name].abs().double().mean(0)
        w = plain.get_submodule(name).weight.double().square().mean(0).sqrt()
        if name.endswith("proj"):  # two query heads share each value channel
            x, w = (v.view(2, 2, 16).amax(1, keepdim=True).expand(2, 2, 16).flatten() for v in (x, w))
        wanted = (x ** facts[name]["alpha"] / w ** facts[name]["beta"]).log2()
        factor = (before[name].double() / after[name].double()).nanmedian(0).values.log2()
        assert (factor * 8 - (factor * 8).round()).abs().max() < 1e-3  # eighths of a power of two
        offset = (factor - wanted).sub((factor - wanted).mean())  # s is centred, so known up to a common factor
        assert offset.abs().max() < 1 / 8
    assert len({facts[name]["beta"] for name in LINEARS}) > 1


def test_smoothquant_follows_its_formula(world):
    plain, smoothed, _ = plain_and_smoothed(world, Smoothing.smoothquant)
    before, after = inputs_of(plain), inputs_of(smoothed)
    for name in LINEARS:
        x, w = before[name].abs().amax(0).double(), plain.get_submodule(name).weight.abs().amax(0).double()
        if name.endswith("proj"):  # 4 query heads of 16 over 2 key/value heads: two heads share each value channel
            x, w = (v.view(2, 2, 16).amax(1, keepdim=True).expand(2, 2, 16).flatten() for v in (x, w))
        wanted = (x / w).sqrt()
        factor = (before[name] / after[name]).double().nanmean(0)
        assert torch.equal(factor.log2(), factor.log2().round())  # powers of two
        assert ((factor / wanted).log2().abs() <= 0.5 + 1e-9).all()


@pytest.mark.parametrize("method", [Smoothing.awq_lite, Smoothing.awq_duo])
def test_awq_never_loses_on_its_sample(world, method):
    plain, smoothed, facts = plain_and_smoothed(world, method)
    inputs = {"plain": inputs_of(plain), "smoothed": inputs_of(smoothed)}
    for name in LINEARS:
        assert facts[name]["alpha"] in [i / 10 for i in range(11)]
        assert facts[name].get("beta") in ([0, 0.25, 0.5, 0.75] if method is Smoothing.awq_duo else [None])
        if name.endswith(("qkv", "fc1")):
            continue  # their rows are scaled as well, for the next linear's sake
        exact, errors = inputs["plain"][name] @ plain.get_submodule(name).weight.T, {}
        for which, gpt in (("plain", plain), ("smoothed", smoothed)):
            sides = inputs[which][name], gpt.get_submodule(name).weight.detach()
            x, w = (numerics.nvfp4_fake(v, numerics.second_scale(v.abs().amax(), SecondScale.pow2)) for v in sides)
            errors[which] = float((x @ w.T - exact).square().sum())
        assert errors["smoothed"] <= errors["plain"] * (1 + 1e-4), name
    assert sum(facts[name]["alpha"] > 0 for name in LINEARS) >= 4


@pytest.mark.parametrize("percentile", [100.0, 90.0])
def test_awq_chooses_by_what_the_layer_is_quantized_with(world, monkeypatch, percentile):
    """Every exponent tried by itself: none has a smaller error under the scale that calibration then gives."""
    from halfbyte.training import quantize, smoothing

    settings = {"smoothing": Smoothing.awq_lite, "activations": Activations.percentile, "percentile": percentile}
    ours = [name for name in LINEARS if name.endswith(("proj", "fc2"))]  # others' rows are scaled for the next linear
    plain = world[0](Quantize())
    exact = {name: x @ plain.get_submodule(name).weight.T for name, x in inputs_of(plain).items()}
    _, report, _ = calibrated(world, **settings)
    errors = {name: {} for name in ours}
    for alpha, beta in smoothing.EXPONENTS[Smoothing.awq_lite]:
        monkeypatch.setitem(smoothing.EXPONENTS, Smoothing.awq_lite, [(alpha, beta)])
        section, smoothed = Quantize(**settings), world[0](Quantize())
        smoothing.smooth(smoothed, quantize.plan(smoothed, section), section, forward)
        inputs, (_, found, _) = inputs_of(smoothed), calibrated(world, **settings)
        for name in ours:
            amax = found["layers"][name]["amax"]
            sides = {"input": inputs[name], "weight": smoothed.get_submodule(name).weight.detach()}
            scales = {side: numerics.second_scale(torch.tensor(amax[side]), SecondScale.pow2) for side in sides}
            x, w = (numerics.nvfp4_fake(value, scales[side]) for side, value in sides.items())
            errors[name][alpha] = float((x @ w.T - exact[name]).square().sum())
    for name in ours:
        chosen = report["layers"][name]["smoothing"]["alpha"]
        assert errors[name][chosen] <= min(errors[name].values()) * (1 + 1e-4), (name, chosen, errors[name])


@pytest.mark.parametrize("number_format", [Format.nvfp4, Format.mxfp4])  # FP8's steps are relative: little to gain
@pytest.mark.parametrize("method", [Smoothing.smoothquant, Smoothing.awq_lite, Smoothing.awq_duo])
def test_smoothing_brings_the_quantized_model_closer(world, number_format, method):
    exact = forward(world[0](Quantize()))
    error = {}
    for smoothing in (Smoothing.none, method):
        gpt, report, _ = calibrated(world, format=number_format, smoothing=smoothing)
        error[smoothing] = float((forward(gpt) - exact).square().mean())
        assert all(("smoothing" in layer) == (smoothing is not Smoothing.none) for layer in report["layers"].values())
    assert error[method] < error[Smoothing.none]


@pytest.mark.parametrize("number_format", [Format.nvfp4, Format.mxfp4])
def test_gptq_brings_every_output_and_the_model_closer(world, number_format):
    exact, error = forward(world[0](Quantize())), {}
    for weights in Weights:
        gpt, report, _ = calibrated(world, format=number_format, weights=weights)
        error[weights] = float((forward(gpt) - exact).square().mean())
    for name in LINEARS:
        linear, entry = gpt.get_submodule(name), report["layers"][name]
        assert torch.equal(linear.weight_quantizer._quantizer_cache.fake(linear.weight), linear.weight)
        assert 0.05 < entry["weight_relative_rms_error"] < 0.5  # against the weight as it was before
        outputs = entry["output_relative_rms_error"]
        assert 0 < outputs["gptq"] < outputs["round"] < 0.2
    assert error[Weights.gptq] < error[Weights.round]


@pytest.mark.parametrize("section", ["train.sequence_length", "quantize.calibration_length"])
def test_lengths_are_shared_evenly_under_sequence_parallelism(section):
    recipe = Recipe(parallel=Parallel(tensor=2, sequence=True), train=Train(sequence_length=16))
    assert model_problems(recipe, WORLD["SHAPE"]) == []
    recipe.train.sequence_length = 15 if section.startswith("train") else 16
    recipe.quantize.calibration_length = 15 if section.startswith("quantize") else None
    (found,) = model_problems(recipe, WORLD["SHAPE"])
    assert found.startswith(f"{section} = 15: not a multiple of parallel.tensor = 2")
