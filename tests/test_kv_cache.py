"""Quantization of the key/value cache in training: what attention reads, its gradient, decoding, restarts, refusals."""

import dataclasses
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from halfbyte.export.reader import E2M1, E4M3
from halfbyte.training.config import Quantize, Recipe
from halfbyte.training.errors import RecipeError, UserError
from halfbyte.training.files import read_json, write_json
from halfbyte.training.kv_format import KVCache
from halfbyte.training.resolve import resolve
from halfbyte.training.schedule import collect, token_batch

pytestmark = pytest.mark.slow  # imports Megatron-Core and ModelOpt

WORLD = runpy.run_path(str(Path(__file__).with_name("workers") / "world.py"))
GENERATOR = torch.Generator().manual_seed(4)
WINDOWS = [torch.randint(0, 60, (4, 16), generator=GENERATOR) for _ in range(3)]
CACHES = [KVCache.fp8, KVCache.nvfp4]


@pytest.fixture(scope="module")
def world():
    with WORLD["world_of_one"]() as opened:
        yield opened


def calibrate(stage: torch.nn.Module) -> None:
    with torch.no_grad():
        collect(stage, [token_batch(window) for window in WINDOWS], None)


def make(world, cache: KVCache, **settings):
    """(model in float64 with a quantized cache, the content of quantize.json, recipe)."""
    from halfbyte.training import quantize

    recipe = Recipe(quantize=Quantize(kv_cache=cache, **settings))
    shape = dataclasses.replace(WORLD["SHAPE"], max_positions=64)
    gpt = WORLD["random_model"](world, recipe, shape=shape).double().eval()
    return gpt, quantize.quantize(gpt, recipe, calibrate), recipe


def read_by_attention(gpt, tokens: torch.Tensor, monkeypatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(keys, values), each [B, G, S, D], that every layer's attention gets."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    attend = functional.scaled_dot_product_attention

    def spy(q, k, v, **kwargs):
        found.append((k.detach(), v.detach()))
        return attend(q, k, v, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", spy)
        collect(gpt, [token_batch(tokens)], None)
    return found


def on_the_grid(x: np.ndarray, cache: KVCache, scale: float) -> np.ndarray:
    """x [..., D] rounded to the nearest value of the format, from the tables of the second reader, in float64."""
    blocks = x.reshape(-1, 16 if cache is KVCache.nvfp4 else 1)
    scales = np.full((len(blocks), 1), scale)
    values = E4M3[np.isfinite(E4M3)].astype(np.float64)
    if cache is KVCache.nvfp4:
        wanted = np.abs(blocks).max(1, keepdims=True) / (6 * scale)
        scales = scale * values[values > 0][np.abs(wanted - values[values > 0]).argmin(1)][:, None]
        values = E2M1.astype(np.float64)
    nearest = np.abs(blocks[..., None] / scales[..., None] - values).argmin(-1)
    return (values[nearest] * scales).reshape(x.shape)


@pytest.fixture
def only_the_cache(world):
    """Models whose linears compute in full precision, so that what a layer rounds is known from the plain model."""

    def switched_off(cache: KVCache):
        gpt, report, _ = make(world, cache)
        for module in gpt.modules():
            if type(module).__name__ == "TensorQuantizer":
                module.disable()
        return gpt, report["caches"]

    return switched_off


@pytest.mark.parametrize("cache", CACHES)
def test_attention_reads_rotated_keys_and_values_on_the_grid(only_the_cache, cache, monkeypatch):
    (plain, nothing), (gpt, report) = only_the_cache(KVCache.none), only_the_cache(cache)
    assert nothing == {}
    calibration = [read_by_attention(plain, window, monkeypatch) for window in WINDOWS]
    expected, found = (read_by_attention(model, WINDOWS[0], monkeypatch) for model in (plain, gpt))
    for layer in range(2):
        entry = report[f"decoder.layers.{layer}.self_attention"]
        for side, name in enumerate(("key", "value")):
            amax = max(float(window[layer][side].abs().max()) for window in calibration)
            assert entry[name]["amax"] == np.float32(amax)
            assert entry[name]["scale"] == np.float32(np.float32(amax) / np.float32(448))
            if layer == 0:  # the second layer's input has passed through the first one's rounding
                rounded = on_the_grid(expected[0][side].numpy(), cache, entry[name]["scale"])
                close = np.isclose(found[0][side].numpy(), rounded, rtol=1e-6, atol=0)
                assert close.mean() > 0.999  # a value halfway in float64 may go the other way in FP32
                assert not np.allclose(found[0][side].numpy(), expected[0][side].numpy(), rtol=1e-3)


@pytest.mark.parametrize("cache", CACHES)
def test_the_gradient_passes_straight_through(only_the_cache, cache):
    gpt, _ = only_the_cache(cache)
    attention = gpt.decoder.layers[0].self_attention.core_attention
    q, k, v = (torch.randn(12, 2, heads, 16, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    weight = torch.randn(12, 2, 64, dtype=torch.float64)
    found = torch.autograd.grad((attention(q, k, v) * weight).sum(), (q, k, v))
    rounded = [
        rounding(x).detach().requires_grad_()
        for x, rounding in ((k, attention.key_rounding), (v, attention.value_rounding))
    ]
    assert not torch.equal(rounded[0], k)
    attention.key_rounding = attention.value_rounding = None
    expected = torch.autograd.grad((attention(q, *rounded) * weight).sum(), (q, *rounded))
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("cache", CACHES)
def test_decoding_with_a_cache_says_what_scoring_does(world, cache):
    from halfbyte.training.fast_path import weights_once
    from halfbyte.training.generate import Decoder, Prompt

    gpt, _, _ = make(world, cache)
    rows = [torch.randint(0, 60, (length,), generator=GENERATOR).tolist() for length in (7, 1, 19)]
    with weights_once(gpt):
        outputs = Decoder(gpt, torch.device("cpu"), (), str)([Prompt(i, tuple(row), 12) for i, row in enumerate(rows)])
        for row, output in zip(rows, outputs, strict=True):
            tokens = list(row)
            for _ in range(12):
                (logits,) = collect(gpt, [token_batch(torch.tensor([tokens]))], lambda out, index: out)
                tokens.append(int(logits[0, -1].argmax()))
            assert list(output.tokens) == tokens[len(row) :]


def test_a_restored_model_computes_the_same(world, tmp_path):
    from halfbyte.training import quantize

    gpt, report, recipe = make(world, KVCache.nvfp4)
    write_json(tmp_path / "quantize.json", report)
    shape = dataclasses.replace(WORLD["SHAPE"], max_positions=64)
    again = WORLD["random_model"](world, recipe, shape=shape).double().eval()
    assert quantize.restore(again, recipe, tmp_path / "quantize.json") == report
    outputs = [collect(model, [token_batch(WINDOWS[0])], lambda out, index: out)[0] for model in (gpt, again)]
    assert torch.equal(*outputs)
    for other in (KVCache.fp8, KVCache.none):
        changed = Recipe(quantize=Quantize(kv_cache=other))
        with pytest.raises(UserError, match="kv_cache nvfp4 is not as the recipe plans"):
            quantize.restore(WORLD["random_model"](world, changed).double(), changed, tmp_path / "quantize.json")


def test_a_layer_without_maxima_stops_the_run(world):
    from halfbyte.training import quantize

    recipe = Recipe(quantize=Quantize(kv_cache=KVCache.fp8))
    gpt = WORLD["random_model"](world, recipe)
    with torch.no_grad():
        gpt.decoder.layers[1].self_attention.linear_qkv.weight.zero_()
    message = r"quantize.kv_cache: the keys of layer 1 were calibrated to 0.0; check the weights and the calibration"
    with pytest.raises(UserError, match=message):
        quantize.quantize(gpt, recipe, lambda stage: calibrate(stage))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["quantize.kv_cache=int8"], "quantize.kv_cache = int8"),
        (["quantize.kv_cache=fp8", "quantize.format=mxfp4"], "no serving runtime is known to read it beside mxfp4"),
        (["quantize.kv_cache=nvfp4"], "blocks of 16 do not divide the model's heads of 24; use fp8 or none"),
    ],
)
def test_bad_caches_are_refused_in_one_line(options, problem, tiny_model, tmp_path):
    config = read_json(tiny_model / "config.json") | {"head_dim": 24}
    write_json(tmp_path / "config.json", config)
    with pytest.raises(RecipeError) as caught:
        resolve("tiny", [*options, f"model.path={tmp_path / 'none'}", f"model.config={tmp_path / 'config.json'}"])
    (line,) = caught.value.problems
    assert line.startswith("quantize.kv_cache = ")
    assert problem in line
