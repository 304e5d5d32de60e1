"""Packed bytes: the codes, the laws of encoding, and the tensors of one exported linear."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.export.pack import fake, pack
from halfbyte.training import codec, numerics, rounding
from halfbyte.training.config import BlockScale, Format, Quantize, SecondScale
from halfbyte.training.errors import UserError
from halfbyte.training.hf_map import HFWeight

exponents = st.integers(-20, 20)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, NaN equal to NaN and +0 different from -0."""
    return a.dtype == b.dtype and torch.equal(a.float().view(torch.int32), b.float().view(torch.int32))


def scale(exponent: int) -> torch.Tensor:
    return torch.tensor(2.0**exponent)


def weights(seed: int, rows: int = 6, columns: int = 64, decades: float = 2.0) -> torch.Tensor:
    """Heavy-tailed rows of very different magnitude, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) ** 3
    w *= 10 ** (decades * (torch.rand(rows, 1, generator=generator) - 0.5))
    w[-1] = 0
    return w


def test_all_sixteen_codes():
    packed = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8)
    one = torch.ones(1, 1).to(torch.float8_e4m3fn)
    expected = torch.tensor([[0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]])
    assert torch.equal(codec.nvfp4_decode(packed, one, scale(0)), expected)
    again, scales = codec.nvfp4_encode(expected, scale(0))
    assert scales.float().item() == 1.0
    packed[0, 4] = 0x90  # -0 is never written
    assert torch.equal(again, packed)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), exponents, st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.float16]))
def test_decoding_gives_what_was_trained_with(seed: int, exponent: int, dtype: torch.dtype):
    w = weights(seed).clamp(-6e4, 6e4).to(dtype)
    trained = numerics.nvfp4_fake(w, scale(exponent))
    decoded = codec.nvfp4_decode(*codec.nvfp4_encode(w, scale(exponent)), scale(exponent))
    assert trained.dtype == dtype
    if dtype != torch.float16:  # a power-of-two scale makes the values exact in the others
        assert torch.equal(decoded.to(torch.float64), trained.to(torch.float64))
    assert same(numerics.nvfp4_fake(w.float(), scale(exponent)), decoded)
    assert same(numerics.mxfp4_fake(w.float()), codec.mxfp4_decode(*codec.mxfp4_encode(w)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(list(SecondScale)))
def test_packing_the_decoded_values_gives_the_same_bytes(seed: int, mode: SecondScale):
    w = weights(seed)
    s2 = numerics.second_scale(w.abs().max(), mode)
    codes, scales = codec.nvfp4_encode(w, s2)
    codes_again, scales_again = codec.nvfp4_encode(codec.nvfp4_decode(codes, scales, s2), s2)
    assert torch.equal(codes, codes_again)
    assert torch.equal(scales.view(torch.uint8), scales_again.view(torch.uint8))


def difficult(seed: int, dtype: torch.dtype) -> torch.Tensor:
    """[56, 64] of everything: heavy tails, midpoints and their neighbours, tiny, huge, -0, Inf, NaN, any bits."""
    generator = torch.Generator().manual_seed(seed)
    midpoints = torch.randint(-24, 25, (16, 64), generator=generator) / 4
    midpoints[:, ::32] = 6.0  # the block scale is a power of two
    near = midpoints[:8].view(torch.int32) + torch.randint(-1, 2, (8, 64), generator=generator).int()
    bits = torch.randint(-(2**31), 2**31, (8, 64), generator=generator).int()
    ordinary = weights(seed, rows=32, decades=16.0)
    ordinary[0], ordinary[1, 5], ordinary[2, 40], ordinary[3] = -0.0, math.inf, -math.inf, 1e-30
    ordinary[4, ::7], ordinary[5, 33] = math.nan, -math.nan
    near = near.view(torch.float32)
    return torch.cat([ordinary, midpoints[8:], near, bits.view(torch.float32)]).to(dtype)


def bytes_by_table(q: torch.Tensor) -> torch.Tensor:
    """E2M1 values [C, block] -> uint8 [C, block/2] by searching the table; NaN is code 0."""
    magnitude = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    code = (q.abs().unsqueeze(-1) == magnitude).int().argmax(-1) + 8 * (q < 0)
    return (code[:, 0::2] + 16 * code[:, 1::2]).to(torch.uint8)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(-20, 2), st.sampled_from([torch.float32, torch.bfloat16]))
def test_bytes_are_those_of_the_oracle_and_the_table(seed: int, exponent: int, dtype: torch.dtype):
    w = difficult(seed, dtype)
    for rule, block in itertools.product(BlockScale, (16, 32)):
        if rule is BlockScale.mse and block == 32:
            continue
        chunk = w.float().view(-1, block)
        scales = numerics.nvfp4_block_scale(chunk, scale(exponent), rule).float()
        q = rounding.round_e2m1(chunk / (scales * scale(exponent)))
        codes, found = codec.nvfp4_encode(w, scale(exponent), rule, block)
        assert torch.equal(codes.view(-1, block // 2), bytes_by_table(q))
        assert same(found.float().view(-1, 1), torch.where((q == 0).all(-1, keepdim=True), 1.0, scales))
    chunk = w.float().view(-1, 32)
    for rule in (BlockScale.amax, BlockScale.mse):
        exponents = numerics.mxfp4_exponent_code(chunk, rule)
        codes, found = codec.mxfp4_encode(w, rule)
        q = rounding.round_e2m1(chunk * numerics.mxfp4_scales(exponents)[1])
        assert torch.equal(codes.view(-1, 16), bytes_by_table(q))
        assert torch.equal(found.view(-1, 1).int(), exponents)
    amax = chunk.abs().amax(-1, keepdim=True)
    assert same(rounding.block_amax(chunk).nan_to_num(-1.0), amax.nan_to_num(-1.0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_packs_the_same_bytes(dtype: torch.dtype):
    w = torch.cat([difficult(seed, dtype) for seed in range(50)])
    for rule in BlockScale:
        codes, scales = codec.nvfp4_encode(w, scale(-9), rule)
        gpu_codes, gpu_scales = codec.nvfp4_encode(w.cuda(), scale(-9), rule)
        assert torch.equal(codes, gpu_codes.cpu())
        assert torch.equal(scales.float().nan_to_num(-1), gpu_scales.cpu().float().nan_to_num(-1))
    for rule in (BlockScale.amax, BlockScale.mse):
        for on_cpu, on_gpu in zip(codec.mxfp4_encode(w, rule), codec.mxfp4_encode(w.cuda(), rule), strict=True):
            assert torch.equal(on_cpu, on_gpu.cpu())
    on_cpu, on_gpu = codec.fp8_encode(w, scale(-9)), codec.fp8_encode(w.cuda(), scale(-9)).cpu()
    assert same(on_cpu.float().nan_to_num(-1), on_gpu.float().nan_to_num(-1))


def test_nan_blocks_decode_to_nan():
    x = torch.ones(2, 64)
    x[0, 3], x[1, 60] = math.nan, -math.nan
    codes, scales = codec.nvfp4_encode(x, scale(0))
    assert codec.nvfp4_decode(codes, scales, scale(0)).isnan().sum() == 32
    codes, scales = codec.mxfp4_encode(x)
    assert scales.tolist() == [[255, 125], [125, 255]]
    assert codec.mxfp4_decode(codes, scales).isnan().sum() == 64


def test_zero_and_vanishing_blocks_have_one_encoding():
    x = torch.zeros(3, 16)
    x[1], x[2] = 1e-9, -0.0
    codes, scales = codec.nvfp4_encode(x, scale(0))
    assert not codes.any()
    assert scales.float().flatten().tolist() == [1, 1, 1]
    assert not numerics.nvfp4_fake(x, scale(0)).any()
    codes, scales = codec.mxfp4_encode(torch.zeros(1, 32))
    assert not codes.any()
    assert scales.tolist() == [[0]]


def test_modelopt_packs_the_same_bytes():
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    w = weights(3, rows=64, columns=256, decades=1.0)
    amax = w.abs().max()
    s2 = numerics.second_scale(amax, SecondScale.amax)
    packed, scales, scale_2 = NVFP4QTensor.quantize(w, 16)
    codes, ours = codec.nvfp4_encode(w, s2)
    assert torch.equal(scale_2.reshape(()), s2)
    assert torch.equal(scales.view(torch.uint8), ours.view(torch.uint8))
    theirs = packed._quantized_data
    # ModelOpt writes code 8 (-0) where a negative value rounds to zero; it decodes it as +0
    low, high = theirs & 15, theirs >> 4
    theirs = torch.where(low == 8, 0, low) | (torch.where(high == 8, 0, high) << 4)
    assert torch.equal(theirs, codes)


# ---- one exported linear


def linear(rows: int = 32, columns: int = 64, **changes) -> HFWeight:
    fields = {
        "name": "model.layers.0.mlp.down_proj.weight",
        "tensor": torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)),
        "quantized": True,
        "weight_amax": torch.tensor(5.0),
        "input_amax": torch.tensor(21.0),
    }
    return HFWeight(**(fields | changes))


def test_nvfp4_tensors():
    tensors = pack(linear(), Quantize(format=Format.nvfp4))
    described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert described == {
        "weight": (torch.uint8, (32, 32)),
        "weight_scale": (torch.float8_e4m3fn, (32, 4)),
        "weight_scale_2": (torch.float32, ()),
        "input_scale": (torch.float32, ()),
    }
    assert tensors["weight_scale_2"] == 2.0**-9  # 5/2688 = 0.00186, rounded up
    assert tensors["input_scale"] == 2.0**-7  # 21/2688 is exactly this
    decoded = codec.nvfp4_decode(tensors["weight"], tensors["weight_scale"], tensors["weight_scale_2"])
    assert torch.equal(decoded, fake(linear(), Quantize()))


def test_weight_only_has_no_input_scale_and_mxfp4_no_second_scale():
    assert set(pack(linear(input_amax=None), Quantize(format=Format.w4a16_nvfp4))) == {
        "weight",
        "weight_scale",
        "weight_scale_2",
    }
    tensors = pack(linear(weight_amax=None, input_amax=None), Quantize(format=Format.mxfp4))
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "weight_packed": (torch.uint8, (32, 32)),
        "weight_scale": (torch.uint8, (32, 2)),
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight_amax": None}, "weight_amax is missing"),
        ({"input_amax": torch.tensor(math.nan)}, "input_amax is nan"),
        ({"input_amax": torch.tensor(0.0)}, "zero on all calibration data"),
        ({"columns": 24}, "block is 16 input channels; add model.layers.0.mlp.down_proj to quantize.exclude"),
        ({"tensor": torch.full((2, 16), math.inf)}, "NaN or Inf"),
    ],
)
def test_what_cannot_be_packed_is_one_line_with_the_layer(changes: dict, words: str):
    with pytest.raises(UserError) as error:
        pack(linear(**changes), Quantize())
    assert words in str(error.value)
    assert str(error.value).startswith("model.layers.0.mlp.down_proj.weight: ")
    assert "\n" not in str(error.value)
