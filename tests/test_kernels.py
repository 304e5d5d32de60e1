"""The Triton kernels equal numerics.py bit for bit: their logic in Triton's interpreter, themselves on a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from halfbyte.training import numerics
from halfbyte.training.config import BlockScale, Format, SecondScale

SHAPES = [(1, 32), (3, 64), (5, 7, 96), (257, 4096), (1, 32 * 12345)]


@pytest.mark.slow
@pytest.mark.parametrize(("worker", "checks"), [("kernels_interpreted.py", 880), ("fused_interpreted.py", 88)])
def test_the_logic_in_the_interpreter(environment, worker, checks):
    path = Path(__file__).with_name("workers") / worker
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.splitlines() == [f"done {checks}"], done.stdout + done.stderr[-2000:]


def values(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    factor = {"normal": 1.0, "tiny": 1e-38, "subnormal": 1e-41, "huge": 1e37}
    if kind in factor:
        return normal * factor[kind]
    if kind == "heavy tail":
        return normal**5
    if kind == "midpoints":
        return (normal * 8).round() * 0.25
    if kind == "zeros":
        return normal * (normal > 1)
    flat = normal.view(-1)
    flat[3], flat[-1] = {"nan": (torch.nan, 1.0), "inf": (torch.inf, -torch.inf)}[kind]
    return normal


KINDS = ["normal", "tiny", "subnormal", "huge", "heavy tail", "midpoints", "zeros", "nan", "inf"]


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    found, expected = found.cpu().float(), expected.cpu().float()
    nan = expected.isnan()
    return torch.equal(found.isnan(), nan) and torch.equal(
        found.masked_fill(nan, 0).view(torch.int32), expected.masked_fill(nan, 0).view(torch.int32)
    )


FORMATS = [(Format.nvfp4, BlockScale.amax), (Format.nvfp4, BlockScale.four_over_six)]
FORMATS += [(Format.mxfp4, BlockScale.amax), (Format.fp8, BlockScale.amax)]


def scales(x: torch.Tensor, number_format: Format, choice: BlockScale) -> list[torch.Tensor]:
    """Scales per tensor of both kinds, with and without saturation; a format without one ignores what it is given."""
    if number_format == Format.mxfp4:
        return [torch.ones(())]
    amax = x.float().abs()[x.isfinite()].max()
    return [
        numerics.tensor_scale(amax * part, number_format, mode, choice) for mode in SecondScale for part in (1.0, 0.1)
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("number_format", "choice"), FORMATS)
def test_the_gpu_equals_the_definition(number_format, choice, kind, dtype):
    for shape in SHAPES:
        x = values(kind, shape).to(dtype)
        for scale in scales(x, number_format, choice):
            found = numerics.fake_quantize(x.cuda(), number_format, scale.cuda(), choice)
            assert same(found, numerics.fake_quantize(x, number_format, scale, choice)), (shape, scale)


@pytest.mark.gpu
def test_a_view_is_quantized_as_what_it_shows():
    x = torch.randn(96, 64, device="cuda").bfloat16().t()[:, 32:]
    scale_2 = numerics.second_scale(x.abs().amax(), SecondScale.pow2)
    assert same(numerics.fake_quantize(x, Format.nvfp4, scale_2), numerics.nvfp4_fake(x.contiguous(), scale_2))
    assert same(numerics.fake_quantize(x, Format.nvfp4, scale_2.cpu()), numerics.nvfp4_fake(x, scale_2))
    assert numerics.fake_quantize(x[:0], Format.mxfp4).shape == (0, 64)
    with pytest.raises(ValueError, match="not a multiple of the block of 32"):
        numerics.fake_quantize(x[:, :16], Format.mxfp4)


@pytest.mark.gpu
def test_more_elements_than_a_32_bit_offset_can_count():
    x = torch.randn(1 << 16, device="cuda").bfloat16().repeat(33000).view(-1, 1 << 16)
    scale_2 = numerics.second_scale(x[0].abs().amax(), SecondScale.pow2)
    assert torch.equal(numerics.fake_quantize(x, Format.nvfp4, scale_2)[-1], numerics.nvfp4_fake(x[-1], scale_2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 576, 1536, 4096, 14336])
def test_norm_and_swiglu_round_what_they_would_have_stored(width, dtype):
    from halfbyte.training import fused, kernels

    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(37, 3, width, device="cuda", generator=generator).to(dtype)
    h = (torch.randn(37, 3, 2 * width, device="cuda", generator=generator) * 3).to(dtype)
    weight = (torch.rand(width, device="cuda", generator=generator) + 0.5).to(dtype)
    runs = {
        "norm": lambda *rule: fused.rms_norm(x, weight, 1e-5, *rule),
        "swiglu": lambda *rule: fused.swiglu(h, *rule),
    }
    for run in runs.values():
        plain = run(kernels.NONE, None)
        for number_format, choice in FORMATS:
            scale = scales(plain, number_format, choice)[0].cuda()
            rule = kernels.rule_of(number_format, choice)
            assert torch.equal(run(rule, scale), numerics.fake_quantize(plain, number_format, scale, choice))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_gradients_of_norm_and_swiglu(dtype, tolerance):
    from halfbyte.training import fused, kernels

    tensors = [torch.randn(2000, 1, k, device="cuda").to(dtype).requires_grad_() for k in (576, 1152)]
    weight = torch.rand(576, device="cuda").to(dtype).requires_grad_()
    doubles = [t.detach().double().requires_grad_() for t in (*tensors, weight)]
    norm, glu = (
        fused.rms_norm(tensors[0], weight, 1e-5, kernels.NONE, None),
        fused.swiglu(tensors[1], kernels.NONE, None),
    )
    gate, up = doubles[1].chunk(2, -1)
    expected = functional.rms_norm(doubles[0], (576,), doubles[2], 1e-5), functional.silu(gate) * up
    grad = torch.randn_like(norm)
    ((norm + glu) * grad).sum().backward()
    ((expected[0] + expected[1]) * grad.double()).sum().backward()
    pairs = [(norm, expected[0]), (glu, expected[1])]
    pairs += [(t.grad, d.grad) for t, d in zip((*tensors, weight), doubles, strict=True)]
    for found, wanted in pairs:
        assert (found.double() - wanted).norm() / wanted.norm() < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_losses_on_the_gpu(dtype, tolerance, tmp_path):
    from halfbyte.training import fused_losses

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD
        student, teacher = ((torch.randn(300, 2, 49152, device="cuda") * 4).to(dtype) for _ in range(2))
        student.requires_grad_()
        labels = torch.randint(49152, (300, 2), device="cuda")
        double, grad = student.detach().double().requires_grad_(), torch.rand(300, 2, device="cuda")
        p, q = teacher.double().log_softmax(-1), double.log_softmax(-1)
        pairs = [
            (fused_losses.cross_entropy(student, labels, group), -q.gather(-1, labels[..., None])[..., 0]),
            (fused_losses.divergence(student, teacher, group, 1.0), (p.exp() * (p - q)).sum(-1)),
        ]
        for found, expected in pairs:
            assert ((found.double() - expected).abs() < 1e-5 * (1 + expected.abs())).all()
            slopes = [
                torch.autograd.grad((y * grad).sum(), x, retain_graph=True)[0]
                for y, x in ((found, student), (expected, double))
            ]
            assert (slopes[0].double() - slopes[1]).norm() / slopes[1].norm() < tolerance
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "width"), [(9, 64), (3, 64), (32, 128)])
def test_rotary_is_megatrons(heads, width):
    from megatron.core.models.common.embeddings import rope_utils

    from halfbyte.training import model

    x = torch.randn(64, 2, heads, width, device="cuda", requires_grad=True)
    freqs = torch.randn(64, 1, 1, width // 2, device="cuda").repeat(1, 1, 1, 2)
    expected = rope_utils._apply_rotary_pos_emb_bshd(x, freqs, rotary_interleaved=False)
    found, grad = model.rotary(x, freqs), torch.randn_like(x)
    assert (found - expected).abs().max() < 1e-5
    slopes = [torch.autograd.grad(y, x, grad)[0] for y in (found, expected)]
    assert (slopes[0] - slopes[1]).abs().max() < 1e-5
