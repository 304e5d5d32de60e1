"""What the quantized linears see on calibration data: their inputs, taken where they enter, and percentiles of them.

Shapes: S sequence, B batch, T = S x B tokens, K input channels of a linear. Under sequence parallelism the input of a
column-parallel linear is this rank's part of the tokens, the input of a row-parallel one this rank's part of K.
"""

import contextlib
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)

from halfbyte.training.quantize import Planned

Take = Callable[[Planned, torch.Tensor], None]
"""(linear, its input [S, B, K] on this rank) -> None; called for every micro-batch."""
BINS = 1 << 15
"""Magnitudes by their BF16 bits without the sign: 128 bins to an octave."""


def observe(
    model: torch.nn.Module, planned: Sequence[Planned], run: Callable[[torch.nn.Module], None], takers: Sequence[Take]
) -> None:
    """Run the calibration windows through `model` and show every taker the inputs of the planned linears.

    Args:
        model: This rank's GPTModel, without quantizers; not changed.
        planned: Its linears to watch.
        run: Runs the calibration windows through the model it is given; collective.
        takers: Must not keep the tensors they are shown, unless they copy them.
    """
    with contextlib.ExitStack() as hooks:
        for layer in planned:

            def hook(_: torch.nn.Module, args: tuple[torch.Tensor, ...], layer: Planned = layer) -> None:
                for take in takers:
                    take(layer, args[0].detach())

            handle = model.get_submodule(layer.module).register_forward_pre_hook(hook)
            hooks.callback(handle.remove)
        run(model)


def is_row_parallel(linear: object) -> bool:
    """Whether tensor parallelism splits the linear's input channels (and not its output channels)."""
    return isinstance(linear, RowParallelLinear)


def whole_input(linear: torch.nn.Module, x_SBK: torch.Tensor) -> torch.Tensor:
    """All tokens and all input channels of a linear, from the ranks that share them: [T, K]; collective over TP."""
    if is_row_parallel(linear):
        x_SBK = gather_from_tensor_model_parallel_region(x_SBK)
    elif linear.config.sequence_parallel:  # type: ignore[union-attr]
        x_SBK = gather_from_sequence_parallel_region(x_SBK)
    return x_SBK.flatten(0, 1)


class Percentiles:
    """Percentiles of the magnitude of every watched input, equal on all ranks and under every layout.

    Histograms with fixed bins add up exactly, so shards of an input give the counts of the whole. ModelOpt's histogram
    calibrator stretches its bins to the data that a rank happens to see, and its ranks cannot be merged.
    """

    def __init__(self) -> None:
        self.counts: dict[str, torch.Tensor] = {}

    def take(self, layer: Planned, x: torch.Tensor) -> None:
        """Count the magnitudes, rounded up to BF16."""
        bits = x.float().abs().view(torch.int32).flatten()
        bins = (bits + 0xFFFF) >> 16
        counts = torch.bincount(bins.clamp_(max=BINS - 1), minlength=BINS)
        self.counts[layer.key] = self.counts.get(layer.key, 0) + counts

    def amax(self, percentile: float) -> dict[str, torch.Tensor]:
        """The smallest BF16 numbers that `percentile` % of the magnitudes do not exceed; collective.

        Inputs that all tensor-parallel ranks hold are counted by each of them, which changes no share.

        Args:
            percentile: Above 0, at most 100.

        Returns:
            Layer key -> FP32 [].
        """
        group = parallel_state.get_tensor_model_parallel_group()
        found = {}
        for key, counts in self.counts.items():
            dist.all_reduce(counts, group=group)
            below = counts.cumsum(0).double()
            place = torch.searchsorted(below, below[-1:] * (percentile / 100.0))
            found[key] = (place.int() << 16).view(torch.float32).reshape(())
        return found
