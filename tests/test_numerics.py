"""FP4 arithmetic against exact rational definitions: nothing here shares a formula with training/numerics.py."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.training import codec, numerics
from halfbyte.training.config import SecondScale
from halfbyte.training.formats import Rounding

GRID = [Fraction(v) for v in ("0", "1/2", "1", "3/2", "2", "3", "4", "6")]
E4M3 = sorted(
    {Fraction(m, 8) * Fraction(1, 64) for m in range(8)}
    | {(1 + Fraction(m, 8)) * Fraction(2) ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)}
)

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
moderate = st.floats(-1e4, 1e4, width=32).map(lambda v: v if abs(v) > 1e-30 else 0.0)
exponents = st.integers(-20, 20)


def nearest_even(value: Fraction, grid: list[Fraction]) -> int:
    """Index of the nearest grid point; of two equally near the one with the even index (even mantissa)."""
    distance = [abs(value - point) for point in grid]
    best = min(distance)
    candidates = [i for i, d in enumerate(distance) if d == best]
    return next(i for i in candidates if len(candidates) == 1 or i % 2 == 0)


def f32(value: Fraction) -> Fraction:
    """Round a rational number to FP32 exactly, to nearest even (float() alone would round twice)."""
    near = np.float32(float(value))
    candidates = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    best = min(candidates, key=lambda c: (abs(Fraction(float(c)) - value), int(c.view(np.int32)) & 1))
    return Fraction(float(best))


def nvfp4_reference(block: list[float], scale_2: float) -> list[float]:
    """NVFP4 by its definition, on rationals with an FP32 rounding where the format computes in FP32."""
    s2, values = Fraction(scale_2), [Fraction(v) for v in block]
    raw = f32(max(map(abs, values)) / f32(6 * s2))
    scale = E4M3[nearest_even(min(max(raw, Fraction(1, 512)), Fraction(448)), E4M3)]
    step = f32(scale * s2)
    return [float(f32(GRID[nearest_even(f32(abs(v) / step), GRID)] * step)) * (-1 if v < 0 else 1) for v in values]


def mxfp4_reference(block: list[float]) -> list[float]:
    values = [Fraction(v) for v in block]
    k = next((k for k in range(-127, 126) if max(map(abs, values)) <= 6 * Fraction(2) ** k), 125)
    step = Fraction(2) ** k
    return [float(GRID[nearest_even(abs(v) / step, GRID)] * step) * (-1 if v < 0 else 1) for v in values]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, NaN equal to NaN and +0 different from -0."""
    one_nan = (t.float().masked_fill(t.isnan(), math.nan).view(torch.int32) for t in (a, b))
    return a.dtype == b.dtype and torch.equal(*one_nan)


def scale(exponent: int) -> torch.Tensor:
    return torch.tensor(2.0**exponent)


def weights(seed: int, rows: int = 6, columns: int = 64, decades: float = 2.0) -> torch.Tensor:
    """Heavy-tailed rows of very different magnitude, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) ** 3
    w *= 10 ** (decades * (torch.rand(rows, 1, generator=generator) - 0.5))
    w[-1] = 0
    return w


# ---- the element grid


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize(("tie", "even"), [(0.25, 0), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (3.5, 4), (5.0, 4)])
def test_midpoints_go_to_even_and_their_neighbours_to_the_near_side(block: int, tie: float, even: float):
    up, down = np.nextafter(np.float32([tie, tie]), np.float32([9, 0]))
    x = torch.zeros(1, block)
    x[0, :7] = torch.tensor([6.0, tie, -tie, up, down, -up, -down])
    y = numerics.nvfp4_fake(x, scale(0)) if block == 16 else numerics.mxfp4_fake(x)
    values = [float(v) for v in GRID]
    above, below = min(v for v in values if v > tie), max(v for v in values if v < tie)
    assert y[0, :7].tolist() == [6.0, even, -even, above, below, -above, -below]


def test_branch_free_rounding_equals_the_table_for_every_bfloat16():
    bits = torch.arange(0x7F80, dtype=torch.int32)  # every finite magnitude
    a = (bits << 16).view(torch.float32)
    boundaries = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    index = torch.searchsorted(boundaries, a)
    index += (a == 0.75) | (a == 1.75) | (a == 3.5)  # ties whose even neighbour is above
    expected = torch.tensor([float(v) for v in GRID])[index]
    assert same(numerics.round_e2m1(a.clone()), expected)
    assert torch.equal(numerics.round_e2m1(-a), -expected)


# ---- the second-level scale


@given(st.floats(min_value=2.0**-149, max_value=2.0**127, width=32))
def test_pow2_scale_is_the_smallest_power_of_two_that_covers_amax(amax: float):
    s = Fraction(numerics.second_scale(torch.tensor(amax), SecondScale.pow2).item())
    assert math.log2(s) == int(math.log2(s))
    if -116 < math.log2(s) < 116:
        assert s / 2 < Fraction(amax) / 2688 <= s


@given(st.floats(min_value=2.0**-100, max_value=2.0**120, width=32))
def test_amax_scale_is_the_correctly_rounded_quotient(amax: float):
    s = numerics.second_scale(torch.tensor(amax), SecondScale.amax)
    assert s.item() == float(np.float32(amax) / np.float32(2688))


@pytest.mark.parametrize("mode", list(SecondScale))
def test_scale_of_nothing_and_of_nonsense(mode: SecondScale):
    s = numerics.second_scale(torch.tensor([0.0, 1e-45, 3.4e38, math.inf, math.nan]), mode)
    assert s[:2].tolist() == [2.0**-116] * 2
    assert s[2] <= 2.0**116
    assert s[3] == math.inf
    assert s[4].isnan()
    assert s.dtype == torch.float32


def test_exact_multiples_of_2688_keep_their_power_of_two():
    for k in range(-100, 100):
        amax = torch.tensor(2688.0) * 2.0**k
        above = torch.nextafter(amax, torch.tensor(math.inf))
        assert numerics.second_scale(amax, SecondScale.pow2) == 2.0**k
        assert numerics.second_scale(above, SecondScale.pow2) == 2.0 ** (k + 1)


# ---- both formats against their definition


@settings(max_examples=200, deadline=None)
@given(st.lists(moderate, min_size=16, max_size=16), exponents)
def test_nvfp4_equals_its_definition(block: list[float], exponent: int):
    y = numerics.nvfp4_fake(torch.tensor([block]), scale(exponent))
    assert y[0].tolist() == nvfp4_reference(block, 2.0**exponent)


@settings(max_examples=100, deadline=None)
@given(st.lists(moderate, min_size=16, max_size=16), st.floats(2.0**-20, 2.0**10, width=32))
def test_nvfp4_equals_its_definition_for_any_second_scale(block: list[float], scale_2: float):
    y = numerics.nvfp4_fake(torch.tensor([block]), torch.tensor(scale_2))
    assert y[0].tolist() == nvfp4_reference(block, scale_2)


@settings(max_examples=100, deadline=None)
@given(st.lists(moderate.filter(bool), min_size=32, max_size=32), st.sampled_from(SecondScale))
def test_w4a8_weights_equal_their_definition_and_fit_into_fp8(block: list[float], mode: SecondScale):
    """NVFP4 by its definition on a block of 32, with the scale per tensor of the FP8 range."""
    x = torch.tensor([block])
    s2 = numerics.second_scale(x.abs().amax(), mode, rounding=Rounding.nvfp4_block32)
    quotient = f32(Fraction(float(x.abs().amax())) / 448)
    expected = quotient if mode is SecondScale.amax else Fraction(2) ** math.ceil(math.log2(quotient))
    assert Fraction(s2.item()) == expected
    y = numerics.fake_quantize(x, Rounding.nvfp4_block32, s2)
    assert y[0].tolist() == nvfp4_reference(block, s2.item())
    codes, scales = codec.nvfp4_encode(x, s2, block=32)
    assert (codes.shape, scales.shape) == ((1, 16), (1, 1))
    assert same(codec.nvfp4_decode(codes, scales, s2), y)
    largest = 6 * max(scales.float().tolist()[0])
    assert largest <= 448 * (1 + 1 / 16)  # E4M3's rounding of 448/6


@settings(max_examples=200, deadline=None)
@given(st.lists(finite, min_size=32, max_size=32))
def test_mxfp4_equals_its_definition_on_all_of_fp32(block: list[float]):
    assert numerics.mxfp4_fake(torch.tensor([block]))[0].tolist() == mxfp4_reference(block)


def test_nvfp4_stays_finite_on_all_of_fp32():
    x = torch.tensor([[3.4e38, 1.0] * 8, [1e-45, 0.0] * 8])
    s2 = numerics.second_scale(x.abs().max(), SecondScale.pow2)
    y = numerics.nvfp4_fake(x, s2)
    assert y.isfinite().all()
    assert y[0, 0] == 6 * 448 * 2.0**116  # saturated
    assert (y[1] == 0).all()


# ---- laws


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(list(SecondScale)))
def test_quantizing_twice_changes_nothing(seed: int, mode: SecondScale):
    w = weights(seed)
    s2 = numerics.second_scale(w.abs().max(), mode)
    once = numerics.nvfp4_fake(w, s2)
    assert same(numerics.nvfp4_fake(once, s2), once)
    once = numerics.mxfp4_fake(w)
    assert same(numerics.mxfp4_fake(once), once)


def test_the_one_block_that_nvfp4_cannot_reproduce():
    unit = 2.0**-9  # amax of 9.5 units: scale 2 units, 9.5 -> 4 * 2; an amax of 8 units alone gets the scale 1 unit
    x = torch.full((1, 16), 9.5 * unit)
    once = numerics.nvfp4_fake(x, scale(0))
    assert (once == 8 * unit).all()
    assert (numerics.nvfp4_fake(once, scale(0)) == 6 * unit).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), exponents, st.integers(-30, 30))
def test_powers_of_two_commute(seed: int, exponent: int, shift: int):
    w = weights(seed)
    factor = 2.0**shift
    scaled = numerics.nvfp4_fake(w * factor, scale(exponent + shift))
    assert same(scaled, numerics.nvfp4_fake(w, scale(exponent)) * factor)
    assert same(numerics.mxfp4_fake(w * factor), numerics.mxfp4_fake(w) * factor)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31))
def test_sign_symmetry_and_positive_zeros(seed: int):
    w = weights(seed)
    w[0, ::3] = -0.0
    s2 = numerics.second_scale(w.abs().max(), SecondScale.pow2)
    for y, mirrored in (
        (numerics.nvfp4_fake(w, s2), numerics.nvfp4_fake(-w, s2)),
        (numerics.mxfp4_fake(w), numerics.mxfp4_fake(-w)),
    ):
        assert torch.equal(y, -mirrored)
        assert not y[y == 0].signbit().any()
        assert not mirrored[mirrored == 0].signbit().any()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3))
def test_a_shard_quantizes_to_the_shard_of_the_whole(seed: int, cut: int):
    w, k = weights(seed, columns=128), 32 * cut
    s2 = numerics.second_scale(w.abs().max(), SecondScale.pow2)
    for fake in (lambda t: numerics.nvfp4_fake(t, s2), numerics.mxfp4_fake):
        assert same(fake(w[:, :k]), fake(w)[:, :k])
        assert same(fake(w[2:5, k:]), fake(w)[2:5, k:])
        assert same(fake(w.t().contiguous().t()), fake(w))  # strides do not matter


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch):
    w, s2 = weights(5, rows=7, columns=96), scale(-8)
    whole = numerics.nvfp4_fake(w, s2), numerics.mxfp4_fake(w), *codec.nvfp4_encode(w, s2), *codec.mxfp4_encode(w)
    monkeypatch.setattr(numerics, "_CPU_CHUNK", 64)
    parts = numerics.nvfp4_fake(w, s2), numerics.mxfp4_fake(w), *codec.nvfp4_encode(w, s2), *codec.mxfp4_encode(w)
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31))
def test_relative_error_is_bounded_by_half_a_step(seed: int):
    w = weights(seed)
    s2 = numerics.second_scale(w.abs().max(), SecondScale.pow2)
    for y, block in ((numerics.nvfp4_fake(w, s2), 16), (numerics.mxfp4_fake(w), 32)):
        error = (y - w).abs().view(-1, block)
        amax = w.abs().view(-1, block).amax(-1, keepdim=True)
        # the widest step, 4..6, is a third of the maximum; MXFP4's scale may be almost twice amax/6
        bound = amax * (1 / 6 if block == 16 else 1 / 3) * 1.07 + 2.0**-9 * s2
        assert (error <= bound).all()


# ---- NaN, Inf, zero


def test_nan_spoils_its_block_and_no_other():
    x = torch.ones(2, 64)
    x[0, 3], x[1, 60] = math.nan, -math.nan
    for y, block in ((numerics.nvfp4_fake(x, scale(0)), 16), (numerics.mxfp4_fake(x), 32)):
        expected = x.view(-1, block).isnan().any(-1, keepdim=True).expand(-1, block)
        assert torch.equal(y.view(-1, block).isnan(), expected)


def test_infinity_saturates():
    x = torch.zeros(1, 32)
    x[0, 5] = -math.inf
    assert numerics.nvfp4_fake(x, scale(0))[0, 5] == -6 * 448
    assert numerics.mxfp4_fake(x)[0, 5] == -6 * 2.0**125


def test_values_above_the_calibrated_amax_saturate_at_it():
    x = torch.full((1, 16), 4 * 2688.0)
    assert (numerics.nvfp4_fake(x, scale(0)) == 2688).all()


def test_subnormal_block_scale_is_kept():
    x = torch.full((1, 16), 6 * 2.0**-9)
    assert same(numerics.nvfp4_fake(x, scale(0)), x)
    assert codec.nvfp4_encode(x, scale(0))[1].view(torch.uint8).item() == 1


# ---- interface


@pytest.mark.parametrize("rounding", list(Rounding))
def test_straight_through_gradient_saves_nothing(rounding: Rounding):
    x = (torch.randn(4, 64) * 100).requires_grad_()
    before = x.detach().clone()
    y = numerics.fake_quantize(x, rounding, scale(-6))
    assert y.grad_fn is not None
    assert y.grad_fn.saved_tensors == ()
    gradient = torch.randn(4, 64)
    y.backward(gradient)
    assert torch.equal(x.grad, gradient)  # where values saturate, too
    assert torch.equal(x, before)
    expected = {
        Rounding.nvfp4: numerics.nvfp4_fake(x, scale(-6)),
        Rounding.nvfp4_block32: numerics.nvfp4_fake(x, scale(-6), block=32),
        Rounding.mxfp4: numerics.mxfp4_fake(x),
        Rounding.fp8: numerics.fp8_fake(x, scale(-6)),
    }
    assert same(y.detach(), expected[rounding])


def test_bad_shapes_and_missing_scales_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 24\).*16"):
        numerics.nvfp4_fake(torch.zeros(2, 24), scale(0))
    with pytest.raises(ValueError, match=r"\(3, 48\).*32"):
        codec.mxfp4_encode(torch.zeros(3, 48))
    with pytest.raises(ValueError, match="scale per tensor"):
        numerics.fake_quantize(torch.zeros(2, 16), Rounding.nvfp4)
    assert numerics.nvfp4_fake(torch.zeros(0, 16), scale(0)).shape == (0, 16)
    assert numerics.nvfp4_fake(torch.ones(2, 3, 16, dtype=torch.bfloat16), scale(0)).dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_equals_cpu(dtype: torch.dtype):
    w = weights(9, rows=512, columns=1024, decades=6.0).to(dtype)
    w[7, 7] = math.nan
    for mode in SecondScale:
        s2 = numerics.second_scale(torch.tensor(3.7), mode)
        assert same(numerics.nvfp4_fake(w.cuda(), s2.cuda()).cpu(), numerics.nvfp4_fake(w, s2))
        assert torch.equal(numerics.second_scale(torch.tensor(3.7).cuda(), mode).cpu(), s2)
        for ours, theirs in zip(codec.nvfp4_encode(w, s2), codec.nvfp4_encode(w.cuda(), s2), strict=True):
            assert same(ours.float(), theirs.cpu().float())  # CUDA's NaN has another payload
    assert same(numerics.mxfp4_fake(w.cuda()).cpu(), numerics.mxfp4_fake(w))
