"""The Triton kernels equal numerics.py bit for bit: their logic in Triton's interpreter, themselves on a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from halfbyte.training import numerics
from halfbyte.training.config import SecondScale

SHAPES = [(1, 32), (3, 64), (5, 7, 96), (257, 4096), (1, 32 * 12345)]


@pytest.mark.slow
def test_the_logic_in_the_interpreter(environment):
    worker = Path(__file__).with_name("workers") / "kernels_interpreted.py"
    done = subprocess.run([sys.executable, worker], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.splitlines() == ["done 264"], done.stdout + done.stderr[-2000:]


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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gpu_equals_the_definition(kind, dtype):
    from halfbyte.training import kernels

    for shape in SHAPES:
        x = values(kind, shape).to(dtype)
        amax = x.float().abs()[x.isfinite()].max()
        assert same(kernels.mxfp4_fake(x.cuda()), numerics.mxfp4_fake(x)), shape
        for mode in SecondScale:
            for overshoot in (1.0, 0.1):
                scale_2 = numerics.second_scale(amax * overshoot, mode)
                found = kernels.nvfp4_fake(x.cuda(), scale_2.cuda())
                assert same(found, numerics.nvfp4_fake(x, scale_2)), (shape, mode, overshoot)


@pytest.mark.gpu
def test_a_view_is_quantized_as_what_it_shows():
    from halfbyte.training import kernels

    x = torch.randn(96, 64, device="cuda").bfloat16().t()[:, 32:]
    scale_2 = numerics.second_scale(x.abs().amax(), SecondScale.pow2)
    assert same(kernels.nvfp4_fake(x, scale_2), numerics.nvfp4_fake(x.contiguous(), scale_2))
    assert kernels.mxfp4_fake(x[:0]).shape == (0, 64)


@pytest.mark.gpu
def test_more_elements_than_a_32_bit_offset_can_count():
    from halfbyte.training import kernels

    x = torch.randn(1 << 16, device="cuda").bfloat16().repeat(33000).view(-1, 1 << 16)
    scale_2 = numerics.second_scale(x[0].abs().amax(), SecondScale.pow2)
    assert torch.equal(kernels.nvfp4_fake(x, scale_2)[-1], numerics.nvfp4_fake(x[-1], scale_2))
