"""The kernels of fused.py and fused_losses.py in Triton's interpreter, FP32; prints what differs, then `done N`."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional
from triton.runtime import interpreter

from halfbyte.training import fused, fused_losses, kernels, numerics
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
    rotary()
    losses()
    print(f"done {count}")


def rotary() -> None:
    """Against complex multiplication: (a + ib) e^(i angle)."""
    for heads, width in ((3, 16), (8, 64)):
        x = torch.randn(5, 2, heads, width, requires_grad=True)
        angles = torch.randn(5, width // 2).repeat(1, 2)
        double = x.detach().double().requires_grad_()
        a, b = double.chunk(2, -1)
        turned = torch.complex(a, b) * torch.polar(torch.ones(1).double(), angles[:, None, None, : width // 2].double())
        expected = torch.cat([turned.real, turned.imag], -1)
        found, grad = fused.rotary(x, angles.cos(), angles.sin()), torch.randn(x.shape)
        (found * grad).sum().backward()
        (expected * grad).sum().backward()
        check("rotary", found, expected, 1e-6)
        check("gradient of rotary", x.grad, double.grad, 1e-6)


def losses() -> None:
    """Against torch in FP64, with logits up to the hundreds and vocabularies around a step of the loop."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    for vocab, size in ((64, 3.0), (4096, 100.0), (4500, 3.0), (1, 1.0)):
        logits, teacher = (torch.randn(3, 2, vocab) * size for _ in range(2))
        logits.requires_grad_()
        labels, grad = torch.randint(vocab, (3, 2)), torch.rand(3, 2)
        double, target = logits.detach().double().requires_grad_(), teacher.double()
        cases = {
            "entropy": (
                fused_losses.cross_entropy(logits, labels, group),
                functional.cross_entropy(double.flatten(0, 1), labels.flatten(), reduction="none").view(3, 2),
            )
        }
        for temperature in (1.0, 2.5):
            p, q = (target / temperature).log_softmax(-1), (double / temperature).log_softmax(-1)
            found = fused_losses.divergence(logits, teacher, group, temperature)
            cases[f"divergence at {temperature}"] = (found, (p.exp() * (p - q)).sum(-1))
        for what, (found, expected) in cases.items():
            slope, wanted = (
                torch.autograd.grad((y * grad).sum(), x)[0] for y, x in ((found, logits), (expected, double))
            )
            check(f"{what}, {vocab} columns", found + 1, expected + 1, 2e-6)
            check(f"gradient of {what}, {vocab} columns", slope + 1, wanted + 1, 1e-5)
    dist.destroy_process_group()


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
