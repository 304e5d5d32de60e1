"""The Triton kernels in Triton's interpreter, on the CPU, against numerics.py; prints what differs, then `done N`.

FP32 only: the interpreter mis-rounds casts to 16 bits. Its fma rounds twice; it is replaced by one that does not (the
product of two FP32 numbers is exact in FP64).
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from triton.runtime import interpreter

from halfbyte.training import kernels, learned_kernels, learned_scales, numerics
from halfbyte.training.config import BlockScale, Format, SecondScale
from halfbyte.training.formats import GRIDS


def fused(self, x, y, z):
    """FP32 fma through FP64."""
    product = x.data.astype(np.float64) * y.data.astype(np.float64)
    return interpreter.TensorHandle((product + z.data.astype(np.float64)).astype(np.float32), z.dtype.scalar)


def tensors(shape: tuple[int, ...]):
    """(name, FP32 tensor) of every kind of value."""
    normal = torch.randn(shape)
    flat = normal.clone()
    flat.view(-1)[5] = torch.nan
    infinite = normal.clone()
    infinite.view(-1)[7], infinite.view(-1)[-1] = torch.inf, -torch.inf
    zeros = normal.clone()
    zeros[0] = 0.0
    return {
        "normal": normal,
        "heavy tail": normal**5,
        "at the smallest normal number": normal * 1e-38,
        "subnormal": normal * 1e-41,
        "huge": (normal * 1e38).clamp(-3e38, 3e38),
        "76 decades": normal * 10 ** (76 * torch.rand(shape) - 38),
        "midpoints": torch.randint(-26, 27, shape) * 0.25,
        "zero rows": zeros,
        "NaN": flat,
        "Inf": infinite,
        "minus zero": -0.0 * normal.abs(),
    }


def differences(found: torch.Tensor, expected: torch.Tensor) -> int:
    """Elements that differ in a bit; any NaN equals any other."""
    nan = expected.isnan()
    return int((found.isnan() != nan).sum() + (found.view(torch.int32) != expected.view(torch.int32))[~nan].sum())


def learned(name: str, x: torch.Tensor) -> int:
    """Learned block scales from the rule's, moved by up to two octaves; some at a midpoint, out of range, NaN."""
    amax = x.abs()[x.isfinite()].max()
    for rounding in learned_scales._KERNEL:
        constants = {"block": GRIDS[rounding].block} | learned_scales._KERNEL[rounding]
        scale_2 = numerics.second_scale(amax, "pow2") if GRIDS[rounding].per_tensor else None
        log2 = learned_scales.initial_log2(x, rounding, scale_2, BlockScale.amax)
        log2 += 4 * torch.rand(log2.shape) - 2
        log2.view(-1)[:4] = torch.tensor([learned_scales._MIDPOINTS[9], -400.0, 400.0, torch.nan])
        found = learned_kernels.fake(x, log2, scale_2, **constants)
        wrong = differences(found, learned_scales.fake(x, log2, rounding, scale_2))
        grad = torch.randn(x.shape)
        slopes = learned_kernels.gradient(x, grad, log2, scale_2, root=3.0, **constants)
        expected = learned_scales.gradient(x, grad, log2, rounding, scale_2) * (constants["block"] * 6) ** 0.5 / 3
        far = ~torch.isclose(slopes, expected, rtol=1e-5, atol=1e-4, equal_nan=True)
        if wrong or far.any():
            print(f"{name} learned scales of {rounding}: {wrong} elements and {int(far.sum())} gradients differ")
    return 2 * len(learned_scales._KERNEL)


def main() -> None:
    """Compare; one line per failing case."""
    interpreter.InterpreterBuilder.create_fma = fused
    np.seterr(all="ignore")
    torch.manual_seed(0)
    count = 0
    for shape in ((3, 64), (5, 7, 32), (1, 4864), (9, 256)):
        for name, x in tensors(shape).items():
            amax = x.abs()[x.isfinite()].max()
            scales = [numerics.second_scale(amax * part, mode) for mode in SecondScale for part in (1.0, 0.1)]
            scales.append(
                torch.tensor(0x3FFFFFFF, dtype=torch.int32).view(torch.float32) * 2.0**-8
            )  # mantissa all ones
            choices = (BlockScale.amax, BlockScale.four_over_six)  # no kernel searches, see kernels.supports
            rules = [(Format.nvfp4, choice, scale) for choice in choices for scale in scales]
            rules += [(Format.fp8, BlockScale.amax, scale) for scale in (*scales, numerics.fp8_scale(amax))]
            rules.append((Format.mxfp4, BlockScale.amax, None))
            pairs = [
                (kernels.fake(x, f, s, c), numerics.fake_quantize(x, f, s, c), f"{f} {c} {s}") for f, c, s in rules
            ]
            count += learned(f"{name} {list(shape)}", x.reshape(-1, 32)) if x.numel() % 128 == 0 else 0
            for found, expected, which in pairs:
                count += 1
                wrong = differences(found, expected)
                if wrong:
                    print(f"{name} {list(shape)} {which}: {wrong} of {x.numel()} elements differ")
    print(f"done {count}")


if __name__ == "__main__":
    main()
