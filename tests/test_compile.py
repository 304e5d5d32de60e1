"""The Triton kernels compile to machine code for Hopper and Blackwell, which needs no GPU."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime import JITFunction

from halfbyte.training import fused, kernels, learned_kernels

HOPPER, BLACKWELL = 90, 100
POINTERS = {"x": "*bf16", "w": "*bf16", "h": "*bf16", "weight": "*bf16", "out": "*bf16"}
"""Type of `..._ptr`; *fp32 otherwise."""
DIVIDE = [rule.value for rule in (kernels.NVFP4, kernels.FOUR_OVER_SIX, kernels.FP8)]
TILE = {"T": 64, "G": 16}
E4M3 = {"COUNT": 125, "LEAST": 0.0, "MOST": 448.0}
POWERS = {"COUNT": 0, "LEAST": -126, "MOST": 125}
CASES: list[tuple[Any, dict[str, Any]]] = [
    *((kernels._fake, TILE | {"RULE": rule}) for rule in DIVIDE),
    (kernels._fake, {"T": 32, "G": 32, "RULE": kernels.MXFP4.value}),
    *(
        (kernel, TILE | rule)
        for kernel in (learned_kernels._fake, learned_kernels._gradient)
        for rule in (E4M3, POWERS)
    ),
    (fused._norm_forward, {"RULE": kernels.NVFP4.value, "G": 16, "ROWS": 1, "COLUMNS": 4096}),
    (fused._swiglu_forward, {"RULE": kernels.NVFP4.value, "G": 16, "ROWS": 2, "COLUMNS": 1024}),
]


def source(kernel: JITFunction, constants: dict[str, Any]) -> ASTSource:
    """A kernel for BF16 tensors, with sizes of 32 bits and FP32 numbers."""
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name.removesuffix("_ptr"), "*fp32")
        else:
            signature[name] = "fp32" if name in ("eps", "root") else "i32"
    return ASTSource(kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()})


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU compiles them anyway")
@pytest.mark.parametrize("architecture", [HOPPER, BLACKWELL])
def test_every_rounding_kernel_becomes_machine_code(architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel, constants in CASES:
        options = {"num_warps": 4, "enable_fp_fusion": False}
        made = compile(source(kernel, constants), target=GPUTarget("cuda", architecture, 32), options=options)
        assert made.asm["cubin"].startswith(b"\x7fELF")
        # Products and sums are contracted only where fma is written, in kernels._divide: the bits depend on it.
        assert ("fma.rn.f32" in made.asm["ptx"]) == (constants.get("RULE") in DIVIDE)
