"""What quantizing single layers costs: the KL divergence of the BF16 model to itself with only them quantized.

One model, in place, under any layout. All layers get quantizers and are calibrated once: the maxima are those of the
BF16 model, so they hold for every format. Then `Variants` switches layers on and off, and every variant is compared
with the same BF16 logits on the same tokens, at every position.

Shapes: N texts, S padded tokens, T compared positions of a text, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

from halfbyte.training import quantize, tasks, typed
from halfbyte.training.allocation import Choice, Group
from halfbyte.training.arithmetic import Arithmetic
from halfbyte.training.config import Format, Recipe
from halfbyte.training.data import MicroBatch, plain_batches
from halfbyte.training.errors import UserError
from halfbyte.training.fast_path import weights_once
from halfbyte.training.runtime import Runtime
from halfbyte.training.schedule import collect
from halfbyte.training.scoring import Item
from halfbyte.training.smoothing import smooth
from halfbyte.training.statistics import Interval, paired_ratio

CONFIDENCE = 0.95
ROWS = 64
"""Positions whose distributions are held in FP64 at a time."""
TEXTS, SHORTEST = 16, 32
"""Texts that a measurement should have at least, and the positions below which none is cut for that."""


class Variants:
    """A model whose layers can be given any format, or BF16, without a new calibration."""

    def __init__(self, model: torch.nn.Module, recipe: Recipe, calibrate: Callable[[torch.nn.Module], None]):
        # quantize.layers is what is looked for: it decides about nothing here, about smoothing neither.
        self.model, self.section = model, replace(recipe.quantize, layers={})
        smooth(model, quantize.plan(model, self.section), self.section, calibrate)  # BF16's function stays
        # FP8's quantizers collect one maximum per tensor on both sides, which is what every format is scaled by.
        everything = replace(self.section, format=Format.fp8)
        planned = quantize.plan(model, everything)
        for layer in planned:
            if not torch.isfinite(typed.linear(model, layer.module).weight).all():
                raise UserError(f"sensitivity: {layer.key}.weight holds NaN or Inf; check the weights")
        quantize.insert(model, planned, everything, calibrate)
        quantize.refresh_scales(model, everything)
        self.here = {layer.hf: layer for layer in planned}

    def choose(self, chosen: Mapping[Group, Choice]) -> None:
        """Give the layers named in `chosen` their formats and leave all others in BF16."""
        of_layer = {group.hf: choice for group, choice in chosen.items()}
        for hf, layer in self.here.items():
            choice = of_layer.get(hf)
            wanted = replace(layer, format=choice).quantizers if choice else {}
            for name in layer.quantizers:
                quantizer = self.model.get_submodule(name)
                if name not in wanted:
                    quantizer.disable()  # type: ignore[operator]
                    continue
                quantizer.enable()  # type: ignore[operator]
                side = name.rpartition(".")[2].removesuffix("_quantizer")
                quantizer._quantizer_cache = Arithmetic.of(side, wanted[name], quantizer.amax, self.section)  # type: ignore[arg-type]


@dataclass
class Comparison:
    """Texts, and the BF16 model's logits on them, which every variant is compared with.

    Attributes:
        recipe: The recipe; evaluate.tokens_per_batch bounds a batch.
        runtime: This process.
        items: The texts, N >= 2.
        pad_id: Token that fills the right end of short rows.
        reference: Text -> [T, V] logits of the BF16 model in its own dtype, on the ranks that score; None before the
            first pass.
    """

    recipe: Recipe
    runtime: Runtime
    items: Sequence[Item]
    pad_id: int
    reference: dict[int, torch.Tensor] | None = None

    def batches(self) -> tuple[list[MicroBatch], list[int]]:
        """This data-parallel rank's batches, all of one size as a pipeline wants them, and each one's first text."""
        multiple = self.recipe.parallel.tensor if self.recipe.parallel.sequence else 1
        tokens_NS = tasks.pad(self.items, self.pad_id, multiple)
        rows = max(1, self.recipe.evaluate.tokens_per_batch // tokens_NS.shape[1])
        every = plain_batches(tokens_NS, min(rows, len(self.items)), self.runtime.device)
        starts = range(0, len(self.items), min(rows, len(self.items)))
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        return every[rank::size], list(starts)[rank::size]

    def run(self, model: torch.nn.Module) -> list[float]:
        """One pass: the first keeps the BF16 logits, every later one compares with them. Collective.

        Returns:
            Per text the sum over its positions of KL(BF16 || this), nats, on every rank; empty after the first pass.
        """
        known, kept = self.reference, {}
        sums: dict[int, float] = {}
        batches, starts = self.batches()

        def take(logits: torch.Tensor, index: int) -> None:
            whole_BSV = gather_from_tensor_model_parallel_region(logits)
            if parallel_state.get_tensor_model_parallel_rank() != 0:
                return
            for row, text in enumerate(range(starts[index], min(starts[index] + len(whole_BSV), len(self.items)))):
                rows_TV = whole_BSV[row, : len(self.items[text].tokens) - 1]
                if known is None:
                    kept[text] = rows_TV.clone()
                else:
                    sums[text] = divergence(known[text], rows_TV)

        if batches:
            with weights_once(model):
                collect(model, batches, take)
        if known is None:
            self.reference = kept
        parts: list[dict[int, float]] = [{}] * dist.get_world_size()
        dist.all_gather_object(parts, sums)
        merged = {text: value for part in parts for text, value in part.items()}
        return [merged[text] for text in sorted(merged)]

    def interval(self, sums: Sequence[float]) -> Interval:
        """Mean nats per position, with the interval over the texts.

        Raises:
            UserError: the variant's logits are not finite.
        """
        if not all(map(math.isfinite, sums)):
            raise UserError("sensitivity: a quantized layer gives non-finite logits; check the weights")
        found = paired_ratio(sums, [len(item.tokens) - 1 for item in self.items], CONFIDENCE)
        return replace(found, low=max(0.0, found.low))  # a divergence is not negative


def divergence(expected_TV: torch.Tensor, found_TV: torch.Tensor) -> float:
    """Sum over positions of KL(softmax(expected) || softmax(found)), nats, in FP64.

    Args:
        expected_TV: Float logits [T, V].
        found_TV: Float logits [T, V] on the same device.
    """
    total = 0.0
    for expected, found in zip(expected_TV.split(ROWS), found_TV.split(ROWS), strict=True):
        p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
    return total


def enough(items: Sequence[Item], tokens: int) -> list[Item]:
    """The first texts that have `tokens` compared positions together, at least two of them.

    Long texts are cut, so that there are about TEXTS of them: an interval over a few texts would say nothing.

    Raises:
        UserError: there are fewer than two texts, so that nothing could be said about the uncertainty.
    """
    longest = 1 + max(SHORTEST, tokens // TEXTS)
    taken: list[Item] = []
    for item in items:
        if len(taken) >= 2 and sum(len(t.tokens) - 1 for t in taken) >= tokens:
            break
        taken.append(replace(item, tokens=item.tokens[:longest]))
    if len(taken) < 2:
        raise UserError("sensitivity: the data holds fewer than two texts; give more lines (sensitivity.data)")
    return taken
