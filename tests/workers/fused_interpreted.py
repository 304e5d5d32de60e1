"""The kernels of fused.py in Triton's interpreter, FP32 on the CPU; prints what differs, then `done N`."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from torch.nn import functional
from triton.runtime import interpreter

from halfbyte.training import fused, kernels, numerics
from halfbyte.training.config import BlockScale, Format

count = 0


def check(what: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """One line if they differ by more than a part of the largest value."""
    global count
    count += 1
    error = (found.double() - expected.double()).abs().max() / expected.abs().max()
    if not error <= tolerance:
        print(f"{what}: differs by {error:.1e} of the largest value")


def rules():
    """(name, rule, scale, format or None) of every way to round."""
    yield "none", kernels.NONE, None, None
    for number_format in (Format.nvfp4, Format.mxfp4, Format.fp8):
        rule = kernels.rule_of(number_format, BlockScale.amax)
        yield number_format.value, rule, torch.tensor(2.0**-9), number_format


def main() -> None:
    """Forward against torch, rounding against numerics, gradients against autograd in FP64."""
    np.seterr(all="ignore")
    torch.manual_seed(0)
    for shape in ((3, 2, 64), (5, 96), (2, 576)):
        x, weight = torch.randn(shape), torch.rand(shape[-1]) + 0.5
        grad = torch.randn(shape)
        h = torch.randn(*shape[:-1], 2 * shape[-1]) * 3
        plain = {}
        for name, rule, scale, number_format in rules():
            leaves = [t.clone().requires_grad_() for t in (x, weight, h)]
            norm, glu = fused.rms_norm(leaves[0], leaves[1], 1e-5, rule, scale), fused.swiglu(leaves[2], rule, scale)
            (norm * grad).sum().backward()
            (glu * grad).sum().backward()
            double = [t.double().requires_grad_() for t in (x, weight, h)]
            reference = functional.rms_norm(double[0], (shape[-1],), double[1], 1e-5)
            gate, up = double[2].chunk(2, -1)
            reference_glu = functional.silu(gate) * up
            ((reference + reference_glu) * grad).sum().backward()
            for what, found, wanted in zip(("x", "weight", "h"), leaves, double, strict=True):
                check(f"{shape} {name} gradient of {what}", found.grad, wanted.grad, 2e-6)
            if number_format is None:
                plain = {"norm": norm.detach(), "glu": glu.detach()}
                check(f"{shape} norm", norm, reference, 1e-6)
                check(f"{shape} glu", glu, reference_glu, 1e-6)
            else:
                check(f"{shape} {name} norm", norm, numerics.fake_quantize(plain["norm"], number_format, scale), 0.0)
                check(f"{shape} {name} glu", glu, numerics.fake_quantize(plain["glu"], number_format, scale), 0.0)
    print(f"done {count}")


patch_tensor = interpreter._patch_lang_tensor


def patch_index(tensor, scope):
    """A loop's bounds are arrays of one element, which NumPy 2 no longer takes for a number."""
    patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


if __name__ == "__main__":
    interpreter._patch_lang_tensor = patch_index
    from kernels_interpreted import fused as fused_multiply_add

    interpreter.InterpreterBuilder.create_fma = fused_multiply_add
    main()
