"""BlockScale.mse against an exhaustive search in exact fractions, its laws, and its way into the exported bytes."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.export import pack
from halfbyte.training import codec, numerics, rounding
from halfbyte.training.config import BlockScale, Format, Quantize, SecondScale
from halfbyte.training.hf_map import HFWeight

MSE = BlockScale.mse
GRID = [Fraction(v) for v in rounding.E2M1]
E4M3 = [Fraction(v) for v in torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()]
E8M0 = [Fraction(2) ** k for k in range(-127, 126)]
SCALES = {Format.nvfp4: E4M3, Format.mxfp4: E8M0}


def by_definition(block: list[Fraction], scales: list[Fraction]) -> tuple[Fraction, Fraction]:
    """(scale, squared error): the smallest error among 2.5 s < amax <= 10 s; of equals the largest scale."""
    amax = max(map(abs, block))
    allowed = [s for s in scales if 5 * s < 2 * amax <= 20 * s] or [scales[0] if amax < scales[-1] else scales[-1]]
    errors = {s: sum(min((abs(x) - g * s) ** 2 for g in GRID) for x in block) for s in allowed}
    least = min(errors.values())
    return max(s for s, error in errors.items() if error == least), least


eighths = st.integers(-2047, 2047).map(lambda n: n / 8)
"""11 bits: differences are exact, and sums of squares differ in more than FP32's last place or not at all."""


@settings(deadline=None)
@given(st.lists(eighths, min_size=16, max_size=16), st.integers(-9, 2))
def test_an_nvfp4_scale_is_the_best_there_is(block, exponent):
    x = torch.tensor([block]) * 2.0**exponent
    scale_2 = 2.0**-3
    units = [Fraction(v) / Fraction(scale_2) for v in x[0].tolist()]
    scale, least = by_definition(units, E4M3)
    found = Fraction(numerics.nvfp4_block_scale(x, torch.tensor(scale_2), MSE).float().item())
    assert found == scale or (sum(min((abs(u) - g * found) ** 2 for g in GRID) for u in units) < least * (1 + 2**-20))


@settings(deadline=None)
@given(st.lists(eighths, min_size=32, max_size=32), st.integers(-100, 100))
def test_an_mxfp4_exponent_is_the_best_there_is(block, exponent):
    x = torch.tensor([block]) * 2.0**exponent
    units = [Fraction(v) for v in x[0].tolist()]
    scale, least = by_definition(units, E8M0)
    found = Fraction(2) ** (numerics.mxfp4_exponent_code(x, MSE).item() - 127)
    assert found == scale or (sum(min((abs(u) - g * found) ** 2 for g in GRID) for u in units) < least * (1 + 2**-20))


def blocks(seed: int, width: int) -> torch.Tensor:
    """Many kinds of rows: Gaussian, heavy tails, few distinct values, values of a coarse grid, twelve decades."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 4096, width, generator=generator)
    x[1] = x[1] ** 5
    x[2] = (x[2] * 2).round()
    x[3] = torch.tensor(rounding.E2M1)[torch.randint(8, x[3].shape, generator=generator)] * x[3].sign()
    x[4] = x[3] * torch.tensor(E4M3, dtype=torch.float32)[torch.randint(126, (4096, 1), generator=generator)]
    x[5] *= 10 ** (12 * torch.rand(4096, 1, generator=generator) - 9)
    return x.flatten(0, 1)


SCALE_2 = [2.0**-11, 1.0, 2.0**-60]


@pytest.mark.parametrize("scale_2", SCALE_2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_bytes_are_a_fixed_point(scale_2, dtype):
    x, s = blocks(1, 16).to(dtype), torch.tensor(scale_2)
    once = numerics.nvfp4_fake(x.float(), s, MSE)
    assert torch.equal(numerics.nvfp4_fake(once, s, MSE), once)
    codes, scale = codec.nvfp4_encode(x, s, MSE)
    again, scale_again = codec.nvfp4_encode(codec.nvfp4_decode(codes, scale, s), s, MSE)
    assert torch.equal(codes, again)
    assert torch.equal(scale.view(torch.uint8), scale_again.view(torch.uint8))
    assert torch.equal(codec.nvfp4_decode(codes, scale, s), once)


@pytest.mark.parametrize("magnitude", [1.0, 2.0**-130, 2.0**120])
def test_mxfp4_bytes_are_a_fixed_point(magnitude):
    x = blocks(2, 32) * magnitude
    once = numerics.mxfp4_fake(x, MSE)
    assert torch.equal(numerics.mxfp4_fake(once, MSE), once)
    codes, scale = codec.mxfp4_encode(x, MSE)
    again, scale_again = codec.mxfp4_encode(codec.mxfp4_decode(codes, scale), MSE)
    assert torch.equal(codes, again)
    assert torch.equal(scale, scale_again)
    assert torch.equal(codec.mxfp4_decode(codes, scale), once)


def test_no_block_is_worse_than_under_the_other_rules():
    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(3))
    scale_2 = numerics.second_scale(x.abs().amax(), SecondScale.pow2, MSE)

    def errors(fake: torch.Tensor, width: int) -> torch.Tensor:
        return (fake - x).double().square().view(-1, width).sum(-1)

    nv = {rule: errors(numerics.nvfp4_fake(x, scale_2, rule), 16) for rule in BlockScale}
    assert (nv[MSE] <= nv[BlockScale.four_over_six] * (1 + 1e-6)).all()
    assert nv[MSE].sum() < 0.93 * nv[BlockScale.four_over_six].sum() < 0.93 * nv[BlockScale.amax].sum()
    mx = {rule: errors(numerics.mxfp4_fake(x, rule), 32) for rule in (BlockScale.amax, MSE)}
    assert (mx[MSE] <= mx[BlockScale.amax] * (1 + 1e-6)).all()
    assert mx[MSE].sum() < 0.95 * mx[BlockScale.amax].sum()


@pytest.mark.parametrize("width", [16, 32])
def test_nan_infinity_and_zero(width):
    x = torch.full((4, width), 1.3125)  # 6 * 448 * 2^-11
    x[0, 3], x[1, 5], x[3] = torch.nan, torch.inf, -0.0
    fake = numerics.nvfp4_fake(x, torch.tensor(2.0**-11), MSE) if width == 16 else numerics.mxfp4_fake(x, MSE)
    assert fake[0].isnan().all()
    assert fake[1].isfinite().all()
    assert fake[1, 5] == (1.3125 if width == 16 else 6 * 2.0**125)
    assert width == 32 or torch.equal(fake[2], x[2])
    assert not fake[3].any()
    assert not fake[3].signbit().any()


@pytest.mark.parametrize("number_format", [Format.nvfp4, Format.mxfp4])
def test_the_packed_bytes_decode_to_the_trained_weight(number_format):
    w = (torch.randn(64, 256, generator=torch.Generator().manual_seed(6)) ** 3).bfloat16()
    amax = w.float().abs().amax()
    weight = HFWeight("model.layers.0.mlp.up_proj.weight", w, True, weight_amax=amax, input_amax=amax)
    section = Quantize(format=number_format, block_scale=MSE)
    packed = pack.pack(weight, section)
    if number_format is Format.mxfp4:
        decoded = codec.mxfp4_decode(packed["weight_packed"], packed["weight_scale"])
        plain = numerics.mxfp4_fake(w.float())
    else:
        decoded = codec.nvfp4_decode(packed["weight"], packed["weight_scale"], packed["weight_scale_2"])
        plain = numerics.nvfp4_fake(w.float(), packed["weight_scale_2"])
        assert packed["input_scale"] == numerics.second_scale(amax, SecondScale.pow2)  # activations have no choice
    assert torch.equal(decoded, pack.fake(weight, section))
    assert not torch.equal(decoded, plain)
