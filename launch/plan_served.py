"""What the served model needs: weights by format, key/value cache, and what of it fits where. Torch-free."""

from copy import deepcopy
from dataclasses import dataclass

from halfbyte.launch.plan_model import Architecture
from halfbyte.training.config import Format, Method, Recipe
from halfbyte.training.formats import BITS
from halfbyte.training.hardware import GIB, GPUS, MIG_SLICES, Gpu, mig_name
from halfbyte.training.shape import linear_sizes, planned_linears

SERVED = (None, Format.fp8, Format.nvfp4, Format.mxfp4)
"""Formats that a plan compares; None is BF16. The recipe's own comes first where it is another."""
CONTEXT = 8192
"""Tokens of cache that make a model fit: one sequence of this length."""


@dataclass(frozen=True)
class Served:
    """A model in memory.

    Attributes:
        name: Of the format.
        weights: Bytes.
        cache: Bytes of key/value cache per token.
    """

    name: str
    weights: float
    cache: float

    def tokens(self, memory: float) -> int:
        """Tokens of cache that fit beside the weights; negative if not even those do."""
        return int((memory - self.weights) // self.cache)


def served(recipe: Recipe, model: Architecture, number_format: Format | None) -> Served:
    """The model in one format: what quantize.exclude leaves in BF16 stays so; the cache in FP8 unless all is BF16.

    The few scales per tensor are not counted. A model known by its counts has all its linears in the format.
    """
    share = 1.0 if model.shape is None else _share(recipe, model)
    quantized = model.linears * share
    weights = 2 * (model.parameters - quantized) + quantized * BITS[number_format] / 8
    return Served(
        "bf16" if number_format is None else number_format.value,
        weights,
        model.cached * (2 if number_format is None else 1),
    )


def _share(recipe: Recipe, model: Architecture) -> float:
    """Share of the linears that the recipe's patterns leave to quantize.format."""
    plain = deepcopy(recipe)
    plain.method = Method.ptq
    sizes = linear_sizes(model.sizes)
    planned = sum(sizes[name][0] * sizes[name][1] for name in planned_linears(model.sizes, plain))
    return planned / sum(n * k for n, k in sizes.values())


def smallest_slice(model: Served, gpu: Gpu) -> str | None:
    """The smallest MIG instance that holds the weights and one sequence of CONTEXT tokens; None if none does."""
    for slices, share in MIG_SLICES.items():
        if model.tokens(gpu.usable_share(share)) >= CONTEXT:
            return mig_name(gpu, slices)
    return None


def served_lines(recipe: Recipe, model: Architecture) -> list[str]:
    """A table: what each format needs, the smallest MIG slice, tokens of cache on one B200 and on one NVL72 rack."""
    one, rack = GPUS["B200"], GPUS["GB200-NVL72"]
    own = [] if recipe.quantize.format in SERVED else [recipe.quantize.format]
    head = ("weights GiB", "cache KiB/token", "MIG slice", "tokens, 1 x B200", "tokens, NVL72")
    lines = [f"{'':<16}" + "".join(f"{word:>18}" for word in head)]
    for number_format in (*SERVED, *own):
        it = served(recipe, model, number_format)
        fits = it.tokens(one.usable)
        on_one = f"{fits:,}" if fits >= CONTEXT else "does not fit"
        lines.append(
            f"{it.name:<16}{it.weights / GIB:>18.1f}{it.cache / 1024:>18.1f}{smallest_slice(it, one) or '-':>18}"
            f"{on_one:>18}{it.tokens(rack.usable * rack.domain):>18,}"
        )
    lines.append(
        f"tokens: of key/value cache beside the weights (BF16 with BF16, else FP8); B200: {one.memory_gib:g} GiB"
        f" (192 GB); slice: of a B200, with {CONTEXT} tokens at least; what a runtime needs besides is not counted"
    )
    return lines
