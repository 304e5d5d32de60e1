"""The arithmetic of one operand of a quantized linear: what ModelOpt's backend "halfbyte" does at a quantizer."""

from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.training import learned_scales, numerics
from halfbyte.training.config import BlockScale, Quantize
from halfbyte.training.formats import GRIDS, Rounding
from halfbyte.training.saturation import clip_gradient, largest


@dataclass
class Arithmetic:
    """What our backend needs at a quantizer; kept in the slot that ModelOpt reserves for backends and never saves.

    Attributes:
        rounding: How values round.
        scale: FP32 [] scale per tensor: NVFP4's second-level scale or FP8's only one; None for MXFP4.
        block_scale: How block scales are chosen.
        limit: FP32 [], the largest magnitude that the format represents with the scale per tensor, where the gradient
            is zero beyond what is represented (`end`); None passes it everywhere.
        log2: [.., K / block] logarithms of the block scales where they are learned (lsq.py), in the place of the rule.
    """

    rounding: Rounding
    scale: torch.Tensor | None
    block_scale: BlockScale = BlockScale.amax
    limit: torch.Tensor | None = None
    log2: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        side: str,
        rounding: Rounding,
        amax: torch.Tensor | None,
        quantize: Quantize,
        log2: torch.Tensor | None = None,
    ) -> "Arithmetic":
        """The arithmetic of one side (weight or input) of a linear whose calibrated maximum is FP32 [] `amax`."""
        block_scale = quantize.block_scale if side == "weight" else BlockScale.amax
        if amax is None or not GRIDS[rounding].per_tensor:
            clips = quantize.clip_gradient and log2 is not None  # blocks whose scale does not follow have an end
            return cls(rounding, None, block_scale, torch.tensor(torch.inf) if clips else None, log2)
        scale = numerics.tensor_scale(amax.float(), rounding, quantize.scale_2, block_scale)
        return cls(rounding, scale, block_scale, largest(rounding, scale) if quantize.clip_gradient else None, log2)

    def end(self) -> torch.Tensor | None:
        """The magnitude beyond which the gradient is zero: FP32 [], under learned scales [.., K]; None for nowhere."""
        return self.limit if self.limit is None or self.log2 is None else self.represented()

    def represented(self) -> torch.Tensor | None:
        """The largest magnitude that comes out: FP32 [], under learned scales [N, K]; None where scales follow x."""
        if self.log2 is not None:
            return learned_scales.ends(self.log2.detach().flatten(0, -2), self.rounding, self.scale)
        return None if self.scale is None else largest(self.rounding, self.scale)

    def fake(self, x: torch.Tensor) -> torch.Tensor:
        """Fake-quantized x [..., K] in its own dtype; the gradient passes straight through, within `end`."""
        x = clip_gradient(x, self.end())
        if self.log2 is not None:
            return learned_scales.fake_quantize(x, self.log2, self.rounding, self.scale)
        return numerics.fake_quantize(x, self.rounding, self.scale, self.block_scale)

    def fake_into(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Fake-quantized x, without a gradient, written to `out`: contiguous, of x's shape, rounded to its dtype."""
        if self.log2 is not None or out.dtype != x.dtype:
            return out.copy_(self.fake(x.detach()))
        return numerics.fake_quantize_into(x, out, self.rounding, self.scale, self.block_scale)

    def rule(self) -> tuple[Any, torch.Tensor | None]:
        """The same for a kernel that rounds what it is about to store: how (kernels.rule_of), and the scale."""
        from halfbyte.training import kernels

        return kernels.rule_of(self.rounding, self.block_scale), self.scale
