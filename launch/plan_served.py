"""What the served model needs: weights by format, key/value cache, and what of it fits where. Torch-free."""

import math
from copy import deepcopy
from dataclasses import dataclass

from halfbyte.launch.plan_model import Architecture
from halfbyte.training.config import Format, Method, Recipe
from halfbyte.training.formats import BITS
from halfbyte.training.hardware import GIB, GPUS, MIG_SLICES, Gpu, mig_name
from halfbyte.training.kv_format import KVCache
from halfbyte.training.shape import ModelShape, linear_sizes, planned_linears

SERVED = (None, Format.fp8, Format.nvfp4, Format.mxfp4)
"""Formats that a plan compares; None is BF16. The recipe's own comes first where it is another."""
CACHE_BITS = {KVCache.none: 16.0, KVCache.fp8: 8.0, KVCache.nvfp4: 4.5}
"""Bits of a cached number with its block scale."""
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


def exported(recipe: Recipe, shape: ModelShape) -> Served:
    """What the recipe's own plan leaves: every layer in its format, the cache as quantize.kv_cache says.

    Args:
        recipe: Of a method that quantizes.
        shape: Of a model with a gated MLP.
    """
    sizes, planned = linear_sizes(shape), planned_linears(shape, recipe)
    saved = sum(
        (BITS[None] - BITS[number_format]) / 8 * math.prod(sizes[name]) for name, number_format in planned.items()
    )
    numbers = 2 * shape.layers * shape.kv_heads * shape.head_dim
    return Served("this recipe", 2 * shape.parameters - saved, numbers * CACHE_BITS[recipe.quantize.kv_cache] / 8)


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
    """Share of the linears that the recipe quantizes, in whatever format."""
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
    """A table: what each format needs, the smallest MIG slice, tokens of cache on one B200 and on one NVL72 rack.

    The recipe's own row is there where it says more than the formats' do: formats of single layers, or another cache.
    """
    one, rack = GPUS["B200"], GPUS["GB200-NVL72"]
    own = [] if recipe.quantize.format in SERVED else [recipe.quantize.format]
    head = ("weights GiB", "cache KiB/token", "MIG slice", "tokens, 1 x B200", "tokens, NVL72")
    lines = [f"{'':<16}" + "".join(f"{word:>18}" for word in head)]
    rows = [served(recipe, model, number_format) for number_format in (*SERVED, *own)]
    if recipe.method is not Method.bf16 and model.shape is not None and model.gated:
        mine = exported(recipe, model.shape)
        rows += [mine] if (mine.weights, mine.cache) not in [(row.weights, row.cache) for row in rows] else []
    for it in rows:
        fits = it.tokens(one.usable)
        on_one = f"{fits:,}" if fits >= CONTEXT else "does not fit"
        lines.append(
            f"{it.name:<16}{it.weights / GIB:>18.1f}{it.cache / 1024:>18.1f}{smallest_slice(it, one) or '-':>18}"
            f"{on_one:>18}{it.tokens(rack.usable * rack.domain):>18,}"
        )
    lines.append(
        f"tokens: of key/value cache beside the weights (BF16 with BF16, this recipe's own, else FP8); B200: "
        f"{one.memory_gib:g} GiB (192 GB); slice: of a B200, with {CONTEXT} tokens at least; what a runtime needs "
        "besides is not counted"
    )
    spread = f"NVL72: one copy of weights and cache over all {rack.domain} GPUs, the most that can fit"
    every = "; FP8 and FP4 of all linears: a checkpoint that leaves attention in BF16 is larger"
    return [*lines, spread + (every if model.shape is None else "")]
