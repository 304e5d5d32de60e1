"""The knapsack against exhaustive search, and the patterns against the rule that reads them."""

import itertools
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.training.allocation import Group, allocate, fewest_bits, groups, mean_bits, patterns
from halfbyte.training.config import Format, LayerFormat, Method, Parallel, Quantize, Recipe
from halfbyte.training.shape import bits_per_weight, layer_format, linear_sizes, planned_linears, read_shape

SHAPES = Path(__file__).parent.parent / "recipes/shapes"
TINY = read_shape(SHAPES / "tiny.json")
BITS = {Format.nvfp4: 4.5, Format.fp8: 8.0, None: 16.0}
BOTH = (Format.nvfp4, Format.fp8)


def members(weights: list[int]) -> list[Group]:
    return [Group(i, (f"model.layers.{i}.mlp.down_proj",), size, BOTH) for i, size in enumerate(weights)]


prices = st.tuples(st.floats(0, 10), st.floats(0, 10))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12).map(lambda n: 64 * n), prices), min_size=1, max_size=6), st.floats(0, 1))
def test_no_choice_within_the_budget_is_cheaper(layers, place: float):
    costs = {
        group: dict(zip(BOTH, price, strict=True))
        for group, (_, price) in zip(members([size for size, _ in layers]), layers, strict=True)
    }
    budget = 4.5 + place * 11.5
    total = sum(group.weights for group in costs)

    def bits(choice) -> float:
        return sum(BITS[c] * group.weights for c, group in zip(choice, costs, strict=True))

    def cost(choice) -> float:
        return math.fsum(0.0 if c is None else costs[g][c] for c, g in zip(choice, costs, strict=True))

    possible = [
        c for c in itertools.product([*BOTH, None], repeat=len(costs)) if bits(c) <= budget * total * (1 + 1e-12)
    ]
    found = tuple(allocate(costs, budget).values())
    assert found in possible
    assert cost(found) == pytest.approx(min(map(cost, possible)), abs=1e-9)


def test_a_greedy_choice_would_be_wrong_here():
    """Room for one large layer or for two small ones: by cost per bit the large one comes first, the small ones win."""
    large, *small = members([300, 200, 200])
    costs = {large: {Format.fp8: 3.1}, **{group: {Format.fp8: 2.0} for group in small}}
    assert allocate(costs, 8 + 8 * 400 / 700) == {large: Format.fp8, small[0]: None, small[1]: None}
    assert allocate(costs, 8 + 8 * 399 / 700)[large] is None


def test_ends_of_the_budget():
    some = members([64, 128])
    costs = {group: {Format.nvfp4: 1.0, Format.fp8: 0.1} for group in some}
    assert set(allocate(costs, 4.5).values()) == {Format.nvfp4}
    assert set(allocate(costs, 16).values()) == {None}
    with pytest.raises(ValueError, match="fewer than the layers need"):
        allocate(costs, 4.49)
    free = {group: {Format.nvfp4: 0.0, Format.fp8: 0.0} for group in some}
    assert set(allocate(free, 16).values()) == {Format.nvfp4}  # equal sums: fewer bits


def test_groups_are_the_layers_that_exclude_leaves():
    found = groups(TINY, Recipe(quantize=Quantize(exclude=["*.0.self_attn.*", "lm_head"])))
    assert [group.hf[0].split(".", 2)[2] for group in found[:4]] == [
        "0.mlp.gate_proj",
        "0.mlp.down_proj",
        "1.self_attn.q_proj",
        "1.self_attn.o_proj",
    ]
    assert found[2].hf == tuple(f"model.layers.1.self_attn.{x}_proj" for x in "qkv")
    assert found[2].weights == (128 + 64 + 64) * 128
    assert {group.formats for group in found} == {BOTH}
    for alone in (Format.fp8, Format.mxfp4):
        assert {group.formats for group in groups(TINY, Recipe(quantize=Quantize(format=alone)))} == {(alone,)}
    split = groups(TINY, Recipe(parallel=Parallel(tensor=16)))  # K per rank is 8 for o_proj and 16 for down_proj
    assert [group.formats for group in split[:4]] == [BOTH, (Format.fp8,), BOTH, BOTH]
    assert fewest_bits(split) > fewest_bits(found) == 4.5


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([Format.nvfp4, Format.w4a16_nvfp4, Format.mxfp4]))
def test_patterns_say_exactly_what_was_chosen(data, default: Format):
    recipe = Recipe(method=Method.ptq, quantize=Quantize(format=default, exclude=["*.1.*.o_proj", "lm_head"]))
    chosen = {group: data.draw(st.sampled_from([*group.formats, None])) for group in groups(TINY, recipe)}
    recipe.quantize.layers = {k: LayerFormat(v) for k, v in patterns(chosen, default).items()}
    expected = {name: choice for group, choice in chosen.items() for name in group.hf}
    for name in linear_sizes(TINY):
        assert layer_format(name, recipe.quantize) == expected.get(name)
    if any(chosen.values()):
        assert bits_per_weight(TINY, recipe) == pytest.approx(mean_bits(chosen))
    assert planned_linears(TINY, recipe) == {name: choice for name, choice in expected.items() if choice}


@pytest.mark.parametrize("name", ["llama31_8b", "smollm2_135m"])
def test_models_of_real_size_take_no_time(name: str):
    found = groups(read_shape(SHAPES / f"{name}.json"), Recipe())
    costs = {group: {Format.nvfp4: 1.0 + i % 7, Format.fp8: 0.1 * (i % 5)} for i, group in enumerate(found)}
    chosen = allocate(costs, 6.0)
    assert 5.9 < mean_bits(chosen) <= 6.0
