"""Which format every layer gets under a budget of bits: the smallest sum of the layers' costs. Torch-free."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from halfbyte.training.config import Format, Recipe
from halfbyte.training.formats import BITS, SPECS
from halfbyte.training.shape import FUSED_GROUPS, ROW_PARALLEL, ModelShape, excluded, linear_sizes

Choice = Format | None
"""A layer's format; None is BF16."""


@dataclass(frozen=True)
class Group:
    """Linears that are one layer at training time: q/k/v, gate/up, or a single one.

    Attributes:
        layer: Number of the transformer layer, from 0.
        hf: Hugging Face module names.
        weights: Elements of all of them.
        formats: Formats that it may have beside BF16, cheapest in bits first.
    """

    layer: int
    hf: tuple[str, ...]
    weights: int
    formats: tuple[Format, ...]

    @property
    def pattern(self) -> str:
        """One fnmatch pattern for exactly these modules."""
        if len(self.hf) == 1:
            return self.hf[0]
        prefix, members = self.hf[0].rpartition(".")[0], [name.rpartition(".")[2] for name in self.hf]
        return f"{prefix}.[{''.join(member[0] for member in members)}]*_proj"


def groups(shape: ModelShape, recipe: Recipe) -> list[Group]:
    """The layers that `halfbyte sensitivity` chooses formats for, in model order: all that quantize.exclude leaves.

    Candidates are quantize.format and FP8; a format that no runtime reads in a mix stays alone. A format whose
    blocks do not divide a layer's K is none of its candidates.
    """
    default = recipe.quantize.format
    candidates = (default,) if default is Format.fp8 or not SPECS[default].mixes else (default, Format.fp8)
    sizes, grouped = linear_sizes(shape), {name: group for group in FUSED_GROUPS for name in group}
    found: dict[tuple[str, ...], Group] = {}
    for name, (_, k) in sizes.items():
        prefix, kind = ".".join(name.split(".")[:3]), name.split(".", 3)[3]
        hf = tuple(f"{prefix}.{member}" for member in grouped.get(kind, (kind,)))
        if hf in found or excluded(name, recipe.quantize.exclude):
            continue
        per_rank = k // recipe.parallel.tensor if kind in ROW_PARALLEL else k
        fitting = tuple(candidate for candidate in candidates if per_rank % SPECS[candidate].grid.block == 0)
        weights = sum(math.prod(sizes[member]) for member in hf)
        found[hf] = Group(int(name.split(".")[2]), hf, weights, fitting)
    return list(found.values())


def mean_bits(chosen: Mapping[Group, Choice]) -> float:
    """Bits per weight of a choice, block scales included."""
    bits = math.fsum(BITS[choice] * group.weights for group, choice in chosen.items())
    return bits / sum(group.weights for group in chosen)


def fewest_bits(members: Sequence[Group]) -> float:
    """Bits per weight with the cheapest format everywhere."""
    return mean_bits({group: group.formats[0] if group.formats else None for group in members})


def allocate(costs: Mapping[Group, Mapping[Format, float]], budget: float) -> dict[Group, Choice]:
    """The choice with the smallest sum of costs among those within the budget: exact, by dynamic programming.

    A multiple-choice knapsack (Kellerer, Pferschy, Pisinger, Knapsack Problems, 2004, chapter 11). Its capacity is
    counted in the greatest common divisor of all differences in bits, which for transformer layers leaves some ten
    thousand states.

    Args:
        costs: Layer -> format -> cost (any unit, at least 0); BF16 costs nothing.
        budget: Bits per weight, block scales included; at least `fewest_bits`.

    Returns:
        Layer -> format. Of equal sums, one with fewer bits.

    Raises:
        ValueError: The budget is below the fewest bits possible.
    """
    options = [_options(group, prices) for group, prices in costs.items()]
    lowest = [choices[0][1] for choices in options]
    capacity = math.floor(4 * budget * sum(group.weights for group in costs) * (1 + 1e-12)) - sum(lowest)
    if capacity < 0:
        raise ValueError(f"{budget} bits per weight are fewer than the layers need")
    unit = math.gcd(*(bits - low for choices, low in zip(options, lowest, strict=True) for _, bits, _ in choices)) or 1
    states = capacity // unit + 1
    states = min(states, sum(choices[-1][1] - choices[0][1] for choices in options) // unit + 1)
    best = np.zeros(states)  # smallest sum so far within each number of units
    picks = []
    for choices, low in zip(options, lowest, strict=True):
        sums = np.full((len(choices), states), np.inf)
        for i, (_, bits, cost) in enumerate(choices):
            extra = (bits - low) // unit
            if extra < states:
                sums[i, extra:] = best[: states - extra] + cost
        picks.append(sums.argmin(axis=0))  # the first of equals: the one with fewer bits
        best = sums.min(axis=0)
    chosen: dict[Group, Choice] = {}
    left = states - 1
    for group, choices, low, pick in reversed(list(zip(costs, options, lowest, picks, strict=True))):
        choice, bits, _ = choices[pick[left]]
        chosen[group] = choice
        left -= (bits - low) // unit
    return {group: chosen[group] for group in costs}


def _options(group: Group, prices: Mapping[Format, float]) -> list[tuple[Choice, int, float]]:
    """(choice, quarter bits, cost), by bits; BF16 last."""
    priced: list[tuple[Choice, float]] = [*prices.items(), (None, 0.0)]
    options = [(choice, round(4 * BITS[choice]) * group.weights, cost) for choice, cost in priced]
    return sorted(options, key=lambda option: option[1])


def patterns(chosen: Mapping[Group, Choice], default: Format) -> dict[str, str]:
    """The choice as quantize.layers: one pattern per layer that differs from the default format, or per whole block.

    Args:
        chosen: Layer -> format.
        default: quantize.format, which needs no pattern.

    Returns:
        fnmatch pattern -> format or bf16, in model order.
    """
    lines: dict[str, str] = {}
    for number in dict.fromkeys(group.layer for group in chosen):
        of_block = {group: choice for group, choice in chosen.items() if group.layer == number}
        words = {group: "bf16" if choice is None else choice.value for group, choice in of_block.items()}
        if len(set(words.values())) == 1 and len(words) > 1:
            words = {f"model.layers.{number}.*": next(iter(words.values()))}
        else:
            words = {group.pattern: word for group, word in words.items()}
        lines |= {pattern: word for pattern, word in words.items() if word != default.value}
    return lines
