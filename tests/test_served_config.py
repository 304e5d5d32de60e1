"""What servers read from an export's configs, by the rules of their loaders.

The rules are stated here from the loaders' source (docs/evidence/export.md names the files and versions); the servers
themselves are not installed.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from halfbyte.export.convert import convert
from halfbyte.training.choices import Container
from halfbyte.training.errors import RecipeError
from halfbyte.training.shape import shape_of

from .export_tools import LLAMA, export, recipe

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def rope_of_transformers_4(config: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """LlamaConfig, MistralConfig, Qwen2Config and Qwen3Config of transformers 4.57: what is not given has a default."""
    return config.get("rope_theta", 10000.0), config.get("rope_scaling")


@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, None),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 1e5}}, LLAMA3),
        ({"rope_theta": 1e5}, None),
        ({"rope_theta": 1e5, "rope_scaling": LLAMA3}, LLAMA3),
    ],
)
def test_transformers_4_and_5_read_the_same_rotation(tmp_path: Path, rope: dict[str, Any], scaling: dict | None):
    out = export(tmp_path, LLAMA | rope, recipe())
    convert(out, Container.compressed_tensors, tmp_path / "ct", ranks=1)
    convert(out, Container.dequantized, tmp_path / "dense", ranks=1)
    for folder in (out, tmp_path / "ct", tmp_path / "dense"):
        config = config_of(folder)
        assert rope_of_transformers_4(config) == (1e5, scaling)
        config.pop("quantization_config", None)
        assert AutoConfig.for_model(**config).rope_parameters == {"rope_type": "default", "rope_theta": 1e5} | (
            scaling or {}
        )


def test_two_spellings_that_contradict_each_other_are_one_line():
    both = LLAMA | {"rope_parameters": LLAMA3 | {"rope_theta": 1e5}, "rope_scaling": LLAMA3 | {"factor": 16.0}}
    with pytest.raises(RecipeError, match="rope_parameters and rope_scaling differ in factor") as caught:
        shape_of(both, "config.json")
    assert len(caught.value.problems) == 1
    assert shape_of(both | {"rope_scaling": LLAMA3}, "config.json").rope_scaling_factor == 8.0
