"""The quantization hook on a tiny model: what is converted, which values the linears see, what the gradient is."""

import contextlib
import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from halfbyte.training import numerics
from halfbyte.training.config import Format, LayerFormat, Quantize, Recipe, SecondScale
from halfbyte.training.errors import UserError
from halfbyte.training.files import write_json
from halfbyte.training.formats import SPECS, Rounding

pytestmark = pytest.mark.slow  # imports Megatron-Core and ModelOpt

HF = {
    "self_attention.linear_qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention.linear_proj": ["self_attn.o_proj"],
    "mlp.linear_fc1": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.linear_fc2": ["mlp.down_proj"],
}
LINEARS = [f"decoder.layers.{layer}.{name}" for layer in range(2) for name in HF]
LINEAR_INPUTS = [64, 64, 64, 96] * 2
TOKENS = torch.arange(48).reshape(2, 24) * 7 % 64


@pytest.fixture(scope="module")
def world():
    helpers = runpy.run_path(str(Path(__file__).with_name("workers") / "world.py"))
    with helpers["world_of_one"]() as runtime:
        yield lambda recipe, seed=0: helpers["random_model"](runtime, recipe, seed=seed), runtime


@pytest.fixture
def hook(world):
    from halfbyte.training import quantize

    return quantize


def forward(gpt: torch.nn.Module, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return gpt(tokens, positions, None)


def sharing(gpt: torch.nn.Module):
    from halfbyte.training.fast_path import weights_once

    return weights_once(gpt)


def make(world, number_format: Format = Format.nvfp4, *, seed: int = 0, **settings):
    """(quantized model, report, untouched copy of the model, recipe)."""
    from halfbyte.training import quantize

    build, _ = world
    recipe = Recipe(quantize=Quantize(format=number_format, **settings))
    gpt = build(recipe, seed)
    plain = build(recipe, seed)
    report = quantize.quantize(gpt, recipe, lambda stage: forward(stage))
    return gpt, report, plain, recipe


def loss_gradients(gpt: torch.nn.Module) -> dict[str, torch.Tensor]:
    gpt.zero_grad()
    (forward(gpt).float().log_softmax(-1)[..., 5].sum() / 10).backward()
    return {name: parameter.grad.clone() for name, parameter in gpt.named_parameters()}


def quantized_weights(gpt: torch.nn.Module, hook) -> set[str]:
    return {
        name.removesuffix(".weight_quantizer")
        for name, _ in hook.enabled_quantizers(gpt)
        if name.endswith("weight_quantizer")
    }


def test_every_linear_is_converted(world, hook):
    gpt, report, _, _ = make(world)
    names = {name for name, _ in hook.enabled_quantizers(gpt)}
    assert names == {f"{linear}.{side}_quantizer" for linear in LINEARS for side in ("weight", "input")}
    assert list(report["layers"]) == sorted(LINEARS, key=lambda key: (int(key.split(".")[2]), key))
    for key, entry in report["layers"].items():
        _, _, layer, linear = key.split(".", 3)
        assert entry["hf"] == [f"model.layers.{layer}.{part}" for part in HF[linear]]
        assert entry["format"] == "nvfp4"
        assert 0.05 < entry["weight_relative_rms_error"] < 0.15


@pytest.mark.parametrize(
    ("patterns", "left_out"),
    [
        (["*.self_attn.[qkv]_proj"], [name for name in LINEARS if name.endswith("qkv")]),
        (["model.layers.0.self_attn.?_proj"], LINEARS[:2]),
        (["*.o_proj"], [name for name in LINEARS if name.endswith("linear_proj")]),
        (["model.layers.1.mlp.down_proj"], [LINEARS[7]]),
        (["model.layers.1.*", "lm_head"], LINEARS[4:]),
        (["*.gate_proj", "*.up_proj"], [LINEARS[2], LINEARS[6]]),
        (["MODEL.layers.*", "layers.0.*", "q_proj"], []),
    ],
)
def test_excluded_layers_stay_as_they_were(world, hook, patterns, left_out):
    gpt, report, plain, _ = make(world, exclude=patterns)
    assert quantized_weights(gpt, hook) == set(LINEARS) - set(left_out) == set(report["layers"])
    for name in LINEARS:
        linear, before = gpt.get_submodule(name), plain.get_submodule(name)
        x = torch.randn(3, before.weight.shape[1])
        assert torch.equal(linear(x)[0], before(x)[0]) == (name in left_out)


def test_embedding_and_head_are_never_quantized(world):
    gpt, _, plain, _ = make(world, exclude=[])
    x = torch.randn(3, 64)
    assert torch.equal(gpt.output_layer(x)[0], plain.output_layer(x)[0])
    assert torch.equal(gpt.embedding.word_embeddings(TOKENS), plain.embedding.word_embeddings(TOKENS))


@pytest.mark.parametrize("pattern", ["*.q_proj", "model.layers.1.self_attn.k_proj", "*.up_proj", "*.[qv]_proj"])
def test_a_fused_layer_is_not_split(world, pattern):
    with pytest.raises(UserError, match=r"quantize\.exclude splits .*exclude all or none"):
        make(world, exclude=[pattern])


@pytest.mark.parametrize("side", ["weight", "input"])
def test_a_quantizer_lost_behind_the_hook_stops_the_run(world, hook, monkeypatch, side):
    lost, quantize = f"{LINEARS[5]}.{side}_quantizer", hook.mtq.quantize

    def lossy(model, config, calibrate):
        quantize(model, config, calibrate)
        model.get_submodule(lost).disable()

    monkeypatch.setattr(hook.mtq, "quantize", lossy)
    with pytest.raises(UserError, match=rf"planned != converted; not quantized: \['{lost}'\], unplanned: none"):
        make(world)


def test_an_unplanned_quantizer_stops_the_run(world, hook, monkeypatch):
    quantize = hook.mtq.quantize

    def greedy(model, config, calibrate):
        quantize(model, config, calibrate)
        model.get_submodule(f"{LINEARS[1]}.weight_quantizer").enable()

    monkeypatch.setattr(hook.mtq, "quantize", greedy)
    with pytest.raises(UserError, match=rf"not quantized: none, unplanned: \['{LINEARS[1]}.weight_quantizer'\]"):
        make(world, exclude=["*.o_proj"])


@pytest.mark.parametrize("mode", SecondScale)
@pytest.mark.parametrize("number_format", Format)
def test_linears_see_weights_on_the_grid_bit_for_bit(world, number_format, mode):
    gpt, report, plain, _ = make(world, number_format, scale_2=mode)
    for name in LINEARS:
        weight = plain.get_submodule(name).weight
        amax = weight.abs().amax()
        if number_format in (Format.mxfp4, Format.w4a16_mxfp4):
            expected = numerics.mxfp4_fake(weight)
            assert report["layers"][name]["scale_2"] == report["layers"][name]["amax"] == {}
        elif number_format is Format.fp8:
            scale = amax / torch.tensor(448.0)  # whatever scale_2 says: there is no second level
            expected = (weight / scale).to(torch.float8_e4m3fn).float() * scale
            assert report["layers"][name]["amax"]["weight"] == amax.item()
            assert report["layers"][name]["scale"]["weight"] == scale.item()
            assert report["layers"][name]["scale_2"] == {}
        else:
            w4a8 = number_format is Format.w4a8_nvfp4_fp8  # block 32, and a scale per tensor of FP8's range
            scale_2 = numerics.second_scale(amax, mode)
            if w4a8:
                exact = amax / torch.tensor(448.0)
                scale_2 = exact if mode is SecondScale.amax else 2 ** exact.log2().ceil()
            expected = numerics.nvfp4_fake(weight, scale_2, block=32 if w4a8 else 16)
            if w4a8:
                of_input = torch.tensor(report["layers"][name]["amax"]["input"])
                assert report["layers"][name]["scale"] == {"input": (of_input / torch.tensor(448.0)).item()}
            assert report["layers"][name]["amax"]["weight"] == amax.item()
            assert report["layers"][name]["scale_2"]["weight"] == scale_2.item()
        linear = gpt.get_submodule(name)
        assert torch.equal(linear.weight, weight)
        assert torch.equal(linear.weight_quantizer(linear.weight), expected)
        if number_format in (
            Format.w4a16_nvfp4,
            Format.w4a16_mxfp4,
        ):  # the identity reads the weight out
            assert torch.equal(linear(torch.eye(weight.shape[1]))[0], expected.T)
        error = (expected - weight).double().norm() / weight.double().norm()
        assert report["layers"][name]["weight_relative_rms_error"] == pytest.approx(error.item(), rel=1e-5)


def test_inputs_are_rounded_with_the_calibrated_maximum(world):
    build, _ = world
    from halfbyte.training import quantize

    recipe = Recipe()
    gpt, seen = build(recipe), {name: torch.tensor(0.0) for name in LINEARS}

    def calibrate(stage):
        def note(name):
            return lambda module, args: seen.update({name: torch.maximum(seen[name], args[0].detach().abs().amax())})

        hooks = [stage.get_submodule(name).register_forward_pre_hook(note(name)) for name in LINEARS]
        for tokens in (TOKENS, TOKENS.flip(0, 1)):
            forward(stage, tokens)
        for handle in hooks:
            handle.remove()

    report = quantize.quantize(gpt, recipe, calibrate)
    for name in LINEARS:
        assert report["layers"][name]["amax"]["input"] == seen[name].item() > 0
        linear = gpt.get_submodule(name)
        x = torch.randn(5, linear.weight.shape[1])
        scale_2 = numerics.second_scale(seen[name], SecondScale.pow2)
        rounded = functional.linear(numerics.nvfp4_fake(x, scale_2), linear.weight_quantizer(linear.weight))
        assert torch.equal(linear(x)[0], rounded)


def test_mxfp4_needs_no_calibration_and_rounds_inputs(world):
    from halfbyte.training import quantize

    build, _ = world
    recipe = Recipe(quantize=Quantize(format=Format.mxfp4))
    gpt = build(recipe)
    quantize.quantize(gpt, recipe, lambda stage: pytest.fail("calibrated"))
    linear = gpt.get_submodule(LINEARS[3])
    x = torch.randn(5, linear.weight.shape[1])
    expected = functional.linear(numerics.mxfp4_fake(x), numerics.mxfp4_fake(linear.weight))
    assert torch.equal(linear(x)[0], expected)


@pytest.mark.parametrize("once", [False, True])
def test_the_gradient_goes_straight_through(world, hook, once):
    gpt, _, plain, _ = make(world, Format.w4a16_nvfp4)
    with torch.no_grad():
        for name in LINEARS:
            weight = plain.get_submodule(name).weight
            weight.copy_(numerics.nvfp4_fake(weight, numerics.second_scale(weight.abs().amax(), SecondScale.pow2)))
    expected = loss_gradients(plain)  # of the same model with its weights moved onto the grid
    if once:
        with sharing(gpt):
            found = loss_gradients(gpt)
    else:
        found = loss_gradients(gpt)
    assert set(found) == set(expected)
    for name in expected:
        assert found[name].abs().max() > 0
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("number_format", [Format.nvfp4, Format.mxfp4, Format.fp8])
def test_the_gradient_goes_straight_through_rounded_inputs(world, number_format):
    gpt, report, _, _ = make(world, number_format)
    name = LINEARS[2]
    linear = gpt.get_submodule(name)
    x, out_grad = 3 * torch.randn(6, 64), torch.randn(6, linear.weight.shape[0])
    x[0, 0] = 1e6  # saturates: the gradient passes all the same
    leaf = x.clone().requires_grad_()
    (linear(leaf)[0] * out_grad).sum().backward()
    scale = (report["layers"][name]["scale_2"] | report["layers"][name].get("scale", {})).get("input")
    x_q = numerics.fake_quantize(x, number_format, None if scale is None else torch.tensor(scale))
    torch.testing.assert_close(leaf.grad, out_grad @ linear.weight_quantizer(linear.weight))
    torch.testing.assert_close(linear.weight.grad, out_grad.T @ x_q)


@pytest.fixture
def counted(hook, monkeypatch):
    """How often each tensor went through the arithmetic, by the identity of its storage."""
    calls: dict[int, int] = {}
    arithmetic = numerics.fake_quantize

    def count(x, *rest):
        calls[x.data_ptr()] = calls.get(x.data_ptr(), 0) + 1
        return arithmetic(x, *rest)

    monkeypatch.setattr(numerics, "fake_quantize", count)
    return calls


def test_weights_once_quantizes_each_weight_once(world, hook, counted):
    gpt, _, _, _ = make(world, Format.w4a16_nvfp4)
    weights = [gpt.get_submodule(name).weight.data_ptr() for name in LINEARS]
    counted.clear()
    with sharing(gpt):
        for _ in range(3):
            loss_gradients(gpt)
    assert counted == dict.fromkeys(weights, 1)
    counted.clear()
    for _ in range(3):
        loss_gradients(gpt)
    assert counted == dict.fromkeys(weights, 3)


@pytest.mark.parametrize("number_format", Format)
def test_weights_once_changes_no_bit(world, hook, number_format):
    gpt, _, _, _ = make(world, number_format)
    logits, gradients = forward(gpt), loss_gradients(gpt)
    with sharing(gpt):
        for _ in range(2):
            assert torch.equal(forward(gpt), logits)
            found = loss_gradients(gpt)
            assert all(torch.equal(found[name], gradients[name]) for name in gradients)


def test_nothing_stale_after_weights_once(world, hook):
    gpt, _, plain, _ = make(world)
    name = LINEARS[1]  # the one whose input nobody else rounds
    linear, x = gpt.get_submodule(name), torch.randn(4, 64)
    with sharing(gpt):
        before = linear(x)[0]
    with torch.no_grad():
        linear.weight.mul_(-1)
    outside = linear(x)[0]
    assert torch.equal(outside, -before)
    with sharing(gpt):
        assert torch.equal(linear(x)[0], outside)
    scale_2 = linear.weight_quantizer._quantizer_cache.scale
    expected = numerics.nvfp4_fake(-plain.get_submodule(name).weight, scale_2)
    assert torch.equal(linear.weight_quantizer(linear.weight), expected)


def _optimizer_step(weight: torch.nn.Parameter) -> None:
    weight.grad = torch.randn_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()


def _ema_swap(weight: torch.nn.Parameter) -> None:
    weight.data.lerp_(torch.randn_like(weight), 0.5)


def _new_storage(weight: torch.nn.Parameter) -> None:
    weight.data = torch.randn_like(weight)


@pytest.mark.parametrize("change", [_optimizer_step, _ema_swap, _new_storage, "load"])
def test_every_change_of_a_weight_reaches_the_next_pass(world, change):
    gpt, _, _, _ = make(world)
    name = LINEARS[1]  # the one whose input nobody else rounds
    linear, x = gpt.get_submodule(name), torch.randn(4, LINEAR_INPUTS[1])
    with sharing(gpt):
        first = linear(x)[0]
    if change == "load":
        gpt.load_state_dict({f"{name}.weight": torch.randn_like(linear.weight)}, strict=False)
    else:
        change(linear.weight)
    with sharing(gpt):
        second = linear(x)[0]
    rules = [linear.get_submodule(f"{side}_quantizer")._quantizer_cache.scale for side in ("input", "weight")]
    inputs, weight = (numerics.nvfp4_fake(t, s) for t, s in zip((x, linear.weight), rules, strict=True))
    assert torch.equal(second, functional.linear(inputs, weight))
    assert not torch.equal(first, second)


def test_a_weight_changed_inside_a_pass_is_an_error(world):
    gpt, _, _, _ = make(world)
    weight = gpt.get_submodule(LINEARS[1]).weight
    before = weight.detach().clone()
    reason = r"layers\.0\.self_attention\.linear_proj\.weight was changed"
    with pytest.raises(UserError, match=reason), sharing(gpt), torch.no_grad():
        weight.mul_(2)
    assert torch.equal(weight, before)


def test_a_pass_leaves_modelopt_s_forward_as_it_was(world):
    gpt, _, _, _ = make(world)
    before = {name: dict(module.__dict__) for name, module in gpt.named_modules()}
    storage = {name: parameter.data_ptr() for name, parameter in gpt.named_parameters()}
    with sharing(gpt):
        assert "forward" in gpt.get_submodule(LINEARS[0]).__dict__
    assert all(module.__dict__.keys() == before[name].keys() for name, module in gpt.named_modules())
    assert {name: parameter.data_ptr() for name, parameter in gpt.named_parameters()} == storage


def test_weights_once_ends_with_an_error_too(world, hook):
    gpt, _, _, _ = make(world)
    linear, x = gpt.get_submodule(LINEARS[0]), torch.randn(4, 64)
    with contextlib.suppress(ZeroDivisionError), sharing(gpt):
        linear(x)
        raise ZeroDivisionError
    before = linear(x)[0]
    with torch.no_grad():
        linear.weight.mul_(2)
    assert not torch.equal(linear(x)[0], before)


@pytest.mark.parametrize("number_format", Format)
@pytest.mark.parametrize("mode", SecondScale)
def test_restore_gives_the_same_model(world, hook, tmp_path, number_format, mode):
    gpt, report, plain, recipe = make(world, number_format, scale_2=mode, exclude=["model.layers.0.mlp.*"])
    path = tmp_path / "quantize.json"
    write_json(path, report)
    again = hook.restore(plain, recipe, path)
    assert again == report == json.loads(path.read_text())
    before, after = (dict(hook.enabled_quantizers(model)) for model in (gpt, plain))
    assert set(before) == set(after)
    for name, quantizer in before.items():
        scales = quantizer._quantizer_cache.scale, after[name]._quantizer_cache.scale
        assert scales == (None, None) or torch.equal(*scales)
    assert torch.equal(forward(gpt), forward(plain))


def test_restore_refuses_another_plan(world, hook, tmp_path):
    _, report, plain, _ = make(world, exclude=["*.o_proj"])
    path = tmp_path / "quantize.json"
    write_json(path, report)
    with pytest.raises(UserError, match="linear_proj is not as the recipe plans; the run folder belongs to another"):
        hook.restore(plain, Recipe(), path)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("number_format", Format)
def test_a_broken_weight_stops_the_run(world, hook, number_format, bad):
    build, _ = world
    recipe = Recipe(quantize=Quantize(format=number_format))
    gpt = build(recipe)
    with torch.no_grad():
        gpt.get_submodule(LINEARS[6]).weight[3, 5] = bad
    with pytest.raises(UserError, match=rf"^quantize: {LINEARS[6]}\.weight holds NaN or Inf"):
        hook.quantize(gpt, recipe, lambda stage: forward(stage))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_activation_stops_the_run(world, hook, bad):
    build, _ = world
    broken = torch.full(
        (2, 64), bad
    )  # as a layer's input: calibrating a whole model on it leaves ModelOpt half patched
    with pytest.raises(
        UserError, match=r"^quantize: calibration failed \(detected (nan|inf) values .*check the weights"
    ):
        hook.quantize(build(Recipe()), Recipe(), lambda stage: stage.get_submodule(LINEARS[4]).input_quantizer(broken))


def test_calibrating_on_nothing_stops_the_run(world, hook):
    build, _ = world
    with pytest.raises(UserError, match="input_quantizer was calibrated to nothing"):
        hook.quantize(build(Recipe()), Recipe(), lambda stage: None)


def test_as_exported_rounds_what_is_not_quantized_and_gives_it_back(world, hook):
    gpt, _, plain, _ = make(world, exclude=["*.down_proj"])
    before = dict(plain.named_parameters())
    converted = {f"{name}.weight" for name in LINEARS if not name.endswith("fc2")}
    with hook.as_exported(gpt):
        for name, parameter in gpt.named_parameters():
            expected = before[name] if name in converted else before[name].bfloat16().float()
            assert torch.equal(parameter, expected), name
            assert name in converted or not torch.equal(parameter, before[name])
    assert all(torch.equal(parameter, before[name]) for name, parameter in gpt.named_parameters())


MIX = {
    "model.layers.0.self_attn.*": LayerFormat.fp8,
    "*.down_proj": LayerFormat.bf16,
    "model.layers.1.mlp.*": LayerFormat.w4a16_nvfp4,  # down_proj matched above
}
OF_MIX = dict(zip(LINEARS, ["fp8", "fp8", "nvfp4", None, "nvfp4", "nvfp4", "w4a16_nvfp4", None], strict=True))


def test_a_mixed_plan_gives_every_linear_its_own_arithmetic(world, hook):
    gpt, report, plain, _ = make(world, layers=MIX)
    assert {name: entry["format"] for name, entry in report["layers"].items()} == {k: v for k, v in OF_MIX.items() if v}
    rounded_inputs = {name for name, _ in hook.enabled_quantizers(gpt) if name.endswith("input_quantizer")}
    assert rounded_inputs == {f"{name}.input_quantizer" for name, f in OF_MIX.items() if f in ("fp8", "nvfp4")}
    for name, number_format in OF_MIX.items():
        linear, weight = gpt.get_submodule(name), plain.get_submodule(name).weight
        x = torch.randn(3, weight.shape[1])
        if number_format is None:
            assert torch.equal(linear(x)[0], plain.get_submodule(name)(x)[0])
            continue
        amax = weight.abs().amax()
        scale = amax / 448 if number_format == "fp8" else numerics.second_scale(amax, SecondScale.pow2)
        expected = numerics.fake_quantize(weight, SPECS[Format(number_format)].weights, scale)
        assert torch.equal(linear.weight_quantizer(linear.weight), expected)
        seen = report["layers"][name]
        of_input = torch.tensor(seen.get("scale", seen["scale_2"]).get("input", 1.0))
        if number_format != "w4a16_nvfp4":
            x = numerics.fake_quantize(x, Rounding(number_format), of_input)
        assert torch.equal(linear(x)[0], functional.linear(x, expected))


def test_a_mixed_plan_is_restored_and_another_is_refused(world, hook, tmp_path):
    gpt, report, plain, recipe = make(world, layers=MIX)
    path = tmp_path / "quantize.json"
    write_json(path, report)
    other = Recipe(quantize=Quantize(layers=MIX | {"*.down_proj": LayerFormat.fp8}))
    build, _ = world
    with pytest.raises(UserError, match="linear_fc2 is not as the recipe plans"):
        hook.restore(build(other), other, path)
    other = Recipe(quantize=Quantize(layers=MIX | {"model.layers.0.self_attn.*": LayerFormat.nvfp4}))
    with pytest.raises(UserError, match="linear_proj is not as the recipe plans"):
        hook.restore(build(other), other, path)
    hook.restore(plain, recipe, path)
    assert torch.equal(forward(gpt), forward(plain))


def test_a_format_for_a_part_of_a_fused_layer_is_refused(world):
    with pytest.raises(UserError, match=r"quantize\.layers splits .*give them one format"):
        make(world, layers={"*.q_proj": LayerFormat.fp8})


@pytest.mark.parametrize(
    ("settings", "algorithm"),
    [
        ({}, "max"),
        ({"format": Format.fp8}, "max"),
        ({"format": Format.mxfp4}, None),
        ({"format": Format.mxfp4, "layers": {"*.o_proj": LayerFormat.bf16}}, None),
        ({"format": Format.nvfp4, "layers": {"*": LayerFormat.mxfp4}}, "max"),
    ],
)
def test_a_pipeline_stage_with_nothing_to_quantize_calibrates_as_the_others_do(world, hook, settings, algorithm):
    """Otherwise the others would wait for it for ever."""
    settings = Quantize(**settings)
    build, _ = world
    planned = hook.plan(build(Recipe(quantize=settings)), settings)
    assert hook.modelopt_config(planned, settings)["algorithm"] == algorithm
    assert hook.modelopt_config([], settings)["algorithm"] == algorithm
