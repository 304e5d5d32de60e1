"""Enumerations of the recipe's sections `quantize` and `train`; config.py has their fields."""

from enum import StrEnum


class SecondScale(StrEnum):
    """NVFP4's per-tensor scale: amax/2688 rounded up to a power of two, or amax/2688 itself (as ModelOpt)."""

    pow2 = "pow2"
    amax = "amax"


class BlockScale(StrEnum):
    """How a weight block's scale is chosen; activations always take amax."""

    amax = "amax"
    """The block's maximum becomes 6 (MXFP4: at most 6)."""
    four_over_six = "four_over_six"
    """NVFP4: the maximum becomes 6 or 4, by the smaller squared error (arXiv 2512.02010)."""
    mse = "mse"
    """NVFP4 and MXFP4: the scale with the smallest squared error of all that put the maximum between 2.5 and 10."""


class Activations(StrEnum):
    """What the scale per tensor of a linear's input (NVFP4, FP8) comes from, on calibration data.

    The maximum, or a percentile of the magnitudes, above which values saturate.
    """

    max = "max"
    percentile = "percentile"


class Smoothing(StrEnum):
    """How outliers are moved from inputs into weights before quantization (training/smoothing.py)."""

    none = "none"
    smoothquant = "smoothquant"
    """By the maxima of input and weight channels (arXiv 2211.10438)."""
    awq_lite = "awq_lite"
    """By the means of input channels, with the exponent that has the smallest output error (arXiv 2306.00978)."""
    awq_duo = "awq_duo"
    """awq_lite with an exponent for the weight's channels as well, and factors that are not powers of two."""


class Weights(StrEnum):
    """How FP4 weights get their values: each rounded by itself, or by GPTQ (training/gptq.py)."""

    round = "round"
    gptq = "gptq"


class CudaGraphs(StrEnum):
    """Whether the passes of a micro-batch are replayed from CUDA graphs.

    One graph (training/graphs.py); in a pipeline's stage a pair for each micro-batch in flight (stage_graphs.py).
    """

    auto = "auto"
    """Everywhere but where data-parallel ranks are on several hosts: there gradients are summed beside the last
    backward pass."""
    always = "always"
    """There, too; gradients are summed after the last backward pass."""
    never = "never"


class Container(StrEnum):
    """What an export can be converted to, beside the layout that it has."""

    compressed_tensors = "compressed_tensors"
    """NVFP4 as compressed-tensors `nvfp4-pack-quantized`."""
    trtllm = "trtllm"
    """NVFP4 as a TensorRT-LLM checkpoint directory, the input of trtllm-build (TensorRT-LLM <= 1.2.1)."""
    dequantized = "dequantized"
    """The values of the quantized weights in BF16, as a plain Hugging Face directory; for debugging."""
    nemo = "nemo"
    """A .nemo archive: the weights as they were trained and the state of their quantizers, to go on from."""


class Dtype(StrEnum):
    """Compute type: auto is bfloat16 on a GPU and float32 on a CPU; float64 is for layout tests."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float64 = "float64"


FLOAT64_ON_GPU = "train.dtype = float64: only for layout tests on the CPU; use bfloat16"
"""Why a layout cannot run on GPUs."""
