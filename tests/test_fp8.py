"""FP8 arithmetic and bytes against a table of E4M3 written out here, torch's own casts and ModelOpt's quantizer."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.export.pack import fake, pack
from halfbyte.training import codec, numerics
from halfbyte.training.config import Format, Quantize, SecondScale
from halfbyte.training.errors import UserError
from halfbyte.training.hf_map import HFWeight

# Magnitudes in order of their codes: 8 subnormals of 2^-9, then 15 binades of 8 but for the last code, which is NaN.
E4M3 = [Fraction(m, 512) for m in range(8)]
E4M3 += [Fraction(8 + m, 8) * Fraction(2) ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]

moderate = st.floats(-1e4, 1e4, width=32).map(lambda v: v if abs(v) > 1e-30 else 0.0)
scales = st.floats(2.0**-20, 2.0**10, width=32)


def code_of(value: Fraction) -> int:
    """Code of the nearest magnitude, ties to the even code; everything above 448 is 448."""
    distance = [abs(min(value, Fraction(448)) - point) for point in E4M3]
    best = min(distance)
    near = [i for i, d in enumerate(distance) if d == best]
    return next(i for i in near if len(near) == 1 or i % 2 == 0)


def weights(seed: int) -> torch.Tensor:
    """Heavy-tailed rows of very different magnitude, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(6, 64, generator=generator) ** 3
    w *= 10 ** (4 * (torch.rand(6, 1, generator=generator) - 0.5))
    w[-1] = 0
    return w


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, NaN equal to NaN and +0 different from -0."""
    one_nan = (t.float().masked_fill(t.isnan(), math.nan).view(torch.int32) for t in (a, b))
    return a.dtype == b.dtype and torch.equal(*one_nan)


def test_the_table_is_complete():
    assert len(E4M3) == 127
    assert (E4M3[1], E4M3[8], E4M3[-1]) == (Fraction(1, 512), Fraction(1, 64), Fraction(448))
    bits = torch.arange(127, dtype=torch.uint8)
    assert [Fraction(v) for v in bits.view(torch.float8_e4m3fn).float().tolist()] == E4M3


def test_every_value_and_every_midpoint():
    """Each magnitude stands for itself, a midpoint goes to the even code, its FP32 neighbours to the near side."""
    one = torch.tensor(1.0)
    values = torch.tensor([float(v) for v in E4M3])
    assert codec.fp8_encode(values[None], one).view(torch.uint8)[0].tolist() == list(range(127))
    middle = (values[1:] + values[:-1]) / 2  # exact in FP32
    up, down = (torch.nextafter(middle, torch.full_like(middle, to)) for to in (math.inf, 0))
    lower = list(range(126))
    encoded = [codec.fp8_encode(t[None], one).view(torch.uint8)[0].tolist() for t in (middle, up, down)]
    assert encoded == [[i + i % 2 for i in lower], [i + 1 for i in lower], lower]
    negative = codec.fp8_encode(-middle[None], one).view(torch.uint8)[0].tolist()
    assert negative == [0] + [128 | (i + i % 2) for i in lower[1:]]  # -2^-10 is a tie with zero, which has no sign


@settings(max_examples=150, deadline=None)
@given(st.lists(moderate, min_size=1, max_size=24), scales)
def test_fp8_equals_its_definition(values: list[float], scale: float):
    x, s = torch.tensor([values]), torch.tensor(scale)
    ratios = [Fraction(float(np.float32(v) / np.float32(scale))) for v in values]  # FP32 division, correctly rounded
    codes = [code_of(abs(r)) for r in ratios]
    signed = [code | 128 if code and r < 0 else code for code, r in zip(codes, ratios, strict=True)]
    assert codec.fp8_encode(x, s).view(torch.uint8)[0].tolist() == signed
    magnitudes = [np.float32(float(E4M3[code])) * np.float32(scale) for code in codes]
    expected = [float(m) if r >= 0 else -float(m) for m, r in zip(magnitudes, ratios, strict=True)]
    assert numerics.fp8_fake(x, s)[0].tolist() == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.float16]))
def test_laws(seed: int, dtype: torch.dtype):
    w = weights(seed).clamp(-6e4, 6e4).to(dtype)
    s = numerics.fp8_scale(w.abs().max())
    once = numerics.fp8_fake(w.float(), s)
    assert same(once, (w.float() / s).to(torch.float8_e4m3fn).float() * s + 0.0)  # nothing saturates at amax/448
    assert once.abs().max() == s * 448
    assert same(numerics.fp8_fake(once, s), once)
    assert same(codec.fp8_decode(codec.fp8_encode(w, s), s), once)
    assert same(numerics.fp8_fake(w, s), once.to(dtype))
    assert same(codec.fp8_encode(once, s).float(), codec.fp8_encode(w, s).float())
    assert torch.equal(numerics.fp8_fake(-w.float(), s), -once)
    assert not once[once == 0].signbit().any()
    assert not (codec.fp8_encode(-w, s).view(torch.uint8) == 128).any()
    assert same(numerics.fp8_fake(w[:, 7:30].float(), s), once[:, 7:30])
    error = (once - w.float()).abs()
    assert (error <= torch.maximum(w.float().abs() / 16, s * 2.0**-10) * 1.0001).all()  # half a step


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch):
    w, s = weights(5), torch.tensor(0.01)
    whole = numerics.fp8_fake(w, s), codec.fp8_encode(w, s)
    monkeypatch.setattr(numerics, "_CPU_CHUNK", 50)
    for a, b in zip(whole, (numerics.fp8_fake(w, s), codec.fp8_encode(w, s)), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_nan_infinity_saturation_and_zero():
    x = torch.tensor([[math.nan, math.inf, -math.inf, 449.0, 1e9, -1e-9, -0.0, 1.0]])
    y = numerics.fp8_fake(x, torch.tensor(1.0))[0]
    assert y[0].isnan()
    assert y[1:].tolist() == [448, -448, 448, 448, 0, 0, 1]
    assert not y[5:7].signbit().any()
    assert (
        codec.fp8_decode(codec.fp8_encode(x, torch.tensor(1.0)), torch.tensor(1.0))[0].isnan().tolist()
        == [True] + [False] * 7
    )


@settings(max_examples=100)
@given(st.floats(2.0**-100, 2.0**120, width=32))
def test_the_scale_is_the_correctly_rounded_quotient(amax: float):
    expected = float(np.float32(amax) / np.float32(448))
    for mode in SecondScale:  # there is no second level: the mode does not matter
        assert numerics.tensor_scale(torch.tensor(amax), Format.fp8, mode).item() == expected


def test_scales_of_nothing_and_of_nonsense():
    s = numerics.fp8_scale(torch.tensor([0.0, 1e-45, 3.4e38, math.inf, math.nan]))
    assert s[:2].tolist() == [2.0**-116] * 2
    assert s[2] == 2.0**116
    assert s[3] == math.inf
    assert s[4].isnan()
    assert not numerics.fp8_fake(torch.zeros(2, 3), s[0]).any()
    assert numerics.fp8_fake(torch.full((1, 1), 3.4e38), s[2]).isfinite().all()
    with pytest.raises(ValueError, match="scale per tensor"):
        numerics.fake_quantize(torch.zeros(2, 16), Format.fp8)


def test_modelopt_rounds_to_the_same_values():
    from modelopt.torch.quantization.tensor_quant import fp8_eager

    w = weights(3)
    amax = w.abs().max()
    assert torch.equal(numerics.fp8_fake(w, numerics.fp8_scale(amax)), fp8_eager(w, amax))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_equals_cpu(dtype: torch.dtype):
    w = weights(9).to(dtype)
    w[2, 7] = math.nan
    s = numerics.fp8_scale(torch.tensor(3.7))
    assert torch.equal(numerics.fp8_scale(torch.tensor(3.7).cuda()).cpu(), s)
    assert same(numerics.fp8_fake(w.cuda(), s.cuda()).cpu(), numerics.fp8_fake(w, s))
    assert same(codec.fp8_encode(w.cuda(), s).cpu().float(), codec.fp8_encode(w, s).float())


def linear(**changes) -> HFWeight:
    fields = {
        "name": "model.layers.0.mlp.down_proj.weight",
        "tensor": torch.randn(32, 65, generator=torch.Generator().manual_seed(0)),  # FP8 takes any K
        "quantized": True,
        "weight_amax": torch.tensor(5.0),
        "input_amax": torch.tensor(21.0),
    }
    return HFWeight(**(fields | changes))


def test_exported_tensors():
    quantize = Quantize(format=Format.fp8)
    tensors = pack(linear(), quantize)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "weight": (torch.float8_e4m3fn, (32, 65)),
        "weight_scale": (torch.float32, ()),
        "input_scale": (torch.float32, ()),
    }
    assert tensors["weight_scale"].item() == float(np.float32(5) / np.float32(448))
    assert tensors["input_scale"].item() == 21 / 448
    assert torch.equal(codec.fp8_decode(tensors["weight"], tensors["weight_scale"]), fake(linear(), quantize))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight_amax": None}, "weight_amax is missing"),
        ({"input_amax": torch.tensor(math.nan)}, "input_amax is nan"),
        ({"input_amax": torch.tensor(0.0)}, "zero on all calibration data"),
        ({"tensor": torch.full((2, 16), math.inf)}, "NaN or Inf"),
        ({"name": "lm_head.weight"}, "BF16 in the recipe"),
    ],
)
def test_what_cannot_be_packed_is_one_line_with_the_layer(changes: dict, words: str):
    with pytest.raises(UserError) as error:
        pack(linear(**changes), Quantize(format=Format.fp8))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
