"""Sizes and rotary settings that no model can have, or that could be read in two ways: a line each, before a run."""

from typing import Any

import pytest

from halfbyte.training.errors import RecipeError
from halfbyte.training.shape import shape_of

from .export_tools import LLAMA, LLAMA3_SCALED


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"head_dim": 33}, "head_dim = 33: the rotation turns pairs"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3: no divisor of num_attention_heads = 4"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false': neither true nor false"),
        ({"sliding_window": -5}, "sliding_window = -5: not a number of tokens"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, "rope_theta = -1: not a positive number"),
        # as transformers 5 writes it for models whose kinds of layers rotate differently; 10,000 was taken for all
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
            "full_attention: a rota",
        ),
    ],
)
def test_what_cannot_be_a_model_is_one_line(changes: dict[str, Any], says: str):
    with pytest.raises(RecipeError) as caught:
        shape_of(LLAMA | changes, "config.json")
    (line,) = caught.value.problems
    assert says in line


def test_two_spellings_that_contradict_each_other_are_one_line():
    both = LLAMA | {
        "rope_parameters": LLAMA3_SCALED | {"rope_theta": 1e5},
        "rope_scaling": LLAMA3_SCALED | {"factor": 16.0},
    }
    with pytest.raises(RecipeError, match="rope_parameters and rope_scaling differ in factor") as caught:
        shape_of(both, "config.json")
    assert len(caught.value.problems) == 1
    assert shape_of(both | {"rope_scaling": LLAMA3_SCALED}, "config.json").rope_scaling_factor == 8.0
