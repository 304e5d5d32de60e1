"""Bandwidth of the fake-quantization kernels beside a copy's, and the GEMM that utilisation is measured against."""

from collections.abc import Callable
from typing import Any

import torch

from halfbyte.training import numerics
from halfbyte.training.config import BlockScale, SecondScale
from halfbyte.training.formats import Rounding

ROWS, COLUMNS = 8192, 14336
GEMM = 8192
REPEATS = 50


def measure() -> dict[str, Any]:
    """Time every kernel on a [8192, 14336] BF16 tensor, with a cold cache (the tensor is five times the L2 cache).

    Returns:
        gemm_flops (per second, BF16 8192^3); kernels: name -> microseconds, bytes_per_second (read and write).
    """
    x = torch.randn(ROWS, COLUMNS, device="cuda").bfloat16()
    scale_2 = numerics.second_scale(x.abs().amax(), SecondScale.pow2)
    out = torch.empty_like(x)
    runs: dict[str, Callable[[], Any]] = {
        "copy": lambda: out.copy_(x),
        "nvfp4": lambda: numerics.fake_quantize(x, Rounding.nvfp4, scale_2),
        "four_over_six": lambda: numerics.fake_quantize(x, Rounding.nvfp4, scale_2, BlockScale.four_over_six),
        "mxfp4": lambda: numerics.fake_quantize(x, Rounding.mxfp4),
        "fp8": lambda: numerics.fake_quantize(x, Rounding.fp8, scale_2),
        "modelopt_nvfp4": _modelopt_nvfp4(x),
    }
    moved = 2 * x.numel() * x.element_size()
    kernels = {}
    for name, run in runs.items():
        microseconds = _time(run)
        kernels[name] = {"microseconds": microseconds, "bytes_per_second": moved / microseconds * 1e6}
    a, b = (torch.randn(GEMM, GEMM, device="cuda").bfloat16() for _ in range(2))
    return {"kernels": kernels, "gemm_flops": 2 * GEMM**3 / _time(lambda: a @ b) * 1e6}


def _modelopt_nvfp4(x: torch.Tensor) -> Callable[[], Any]:
    from modelopt.torch.kernels.quantization.gemm import fp4_fake_quant_block

    amax = x.abs().amax().float()
    return lambda: fp4_fake_quant_block(x, amax)


def _time(run: Callable[[], Any]) -> float:
    """Median microseconds of one call."""
    for _ in range(5):
        run()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPEATS)]
    for start, end in marks:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) * 1000 for start, end in marks)[REPEATS // 2]
