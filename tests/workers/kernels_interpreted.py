"""The Triton kernels in Triton's interpreter, on the CPU, against numerics.py; prints what differs, then `done N`.

FP32 only: the interpreter mis-rounds casts to 16 bits. Its fma rounds twice; it is replaced by one that does not (the
product of two FP32 numbers is exact in FP64).
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from triton.runtime import interpreter

from halfbyte.training import kernels, numerics
from halfbyte.training.config import BlockScale, Format, SecondScale


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
            for found, expected, which in pairs:
                count += 1
                wrong = differences(found, expected)
                if wrong:
                    print(f"{name} {list(shape)} {which}: {wrong} of {x.numel()} elements differ")
    print(f"done {count}")


if __name__ == "__main__":
    main()
