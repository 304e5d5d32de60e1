"""THE table of number formats: how weights round, how activations round, and what a checkpoint calls it. Torch-free.

A new format is one entry of SPECS, if its operands round in a way that GRIDS has; else one entry there as well, with
its arithmetic in numerics.py and codec.py. The second statement of a format, against which files are checked, is in
export/rules.py, config_rules.py and reader.py.
"""

from dataclasses import dataclass
from enum import StrEnum

from halfbyte.training.config import Format


class Rounding(StrEnum):
    """A way to round the values of one operand; numerics.py defines each."""

    nvfp4 = "nvfp4"
    nvfp4_block32 = "nvfp4_block32"
    """NVFP4 with blocks of 32 whose scales leave room: q times block scale is at most 448, so that a kernel can hold
    the product in FP8."""
    mxfp4 = "mxfp4"
    fp8 = "fp8"


@dataclass(frozen=True)
class Grid:
    """What a rounding stores.

    Attributes:
        bits: Of an element: 4 is E2M1, 8 is E4M3.
        block: Elements along K that share a block scale; 1 where there are none.
        block_scale: (exponent, mantissa) bits of the block scale; None without.
        per_tensor: Whether there is an FP32 scale per tensor, which comes from a calibrated maximum.
    """

    bits: int
    block: int
    block_scale: tuple[int, int] | None
    per_tensor: bool

    @property
    def bits_per_weight(self) -> float:
        """With block scales, which take a byte each; the scale per tensor is not counted."""
        return self.bits + (8 / self.block if self.block_scale else 0)


GRIDS = {
    Rounding.nvfp4: Grid(4, 16, (4, 3), per_tensor=True),
    Rounding.nvfp4_block32: Grid(4, 32, (4, 3), per_tensor=True),
    Rounding.mxfp4: Grid(4, 32, (8, 0), per_tensor=False),
    Rounding.fp8: Grid(8, 1, None, per_tensor=True),
}


@dataclass(frozen=True)
class Spec:
    """One format.

    Attributes:
        weights: How weights round.
        inputs: How the inputs of a linear round; None leaves them as they are.
        quant_algo: Its name in ModelOpt's files; None goes out as compressed-tensors `mxfp4-pack-quantized`.
        mixes: Whether runtimes read it beside other formats (MIXED_PRECISION).
        words: What it quantizes, for the plan.
    """

    weights: Rounding
    inputs: Rounding | None
    quant_algo: str | None
    mixes: bool
    words: str

    @property
    def grid(self) -> Grid:
        """Of the weights."""
        return GRIDS[self.weights]

    @property
    def two_level(self) -> bool:
        """Whether weights have block scales and a scale per tensor: what quantize.scale_2 is about."""
        return self.grid.block_scale is not None and self.grid.per_tensor

    def rounding(self, side: str) -> Rounding | None:
        """Of one side of a linear, `weight` or `input`."""
        return {"weight": self.weights, "input": self.inputs}[side]


BOTH, ONLY = "weights and activations", "weights only"
SPECS = {
    Format.nvfp4: Spec(Rounding.nvfp4, Rounding.nvfp4, "NVFP4", True, BOTH),
    Format.w4a16_nvfp4: Spec(Rounding.nvfp4, None, "W4A16_NVFP4", True, ONLY),
    Format.w4a8_nvfp4_fp8: Spec(
        Rounding.nvfp4_block32, Rounding.fp8, "W4A8_NVFP4_FP8", False, "weights, and activations in FP8"
    ),
    Format.mxfp4: Spec(Rounding.mxfp4, Rounding.mxfp4, None, False, BOTH),
    Format.w4a16_mxfp4: Spec(Rounding.mxfp4, None, None, False, ONLY),
    Format.fp8: Spec(Rounding.fp8, Rounding.fp8, "FP8", True, BOTH),
}

BITS: dict[Format | None, float] = {name: spec.grid.bits_per_weight for name, spec in SPECS.items()} | {None: 16.0}
"""Bits per weight with its block scales; the few scales per tensor are not counted. None is BF16."""
