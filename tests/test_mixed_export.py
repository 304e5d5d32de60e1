"""Checkpoints with FP8, and with several formats: names, dtypes, configs; what was written before them is unchanged."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from halfbyte.export import hf, reader
from halfbyte.training.config import Format, Recipe
from halfbyte.training.hf_map import HFWeight, expected_shapes
from halfbyte.training.shape import read_shape

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 48,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
UNCHANGED = {
    ("nvfp4", "pow2"): "e6451e05ee32b2cb96cd339140f95080bef5d8c252be8380b33f4675d44ac27c",
    ("nvfp4", "amax"): "3d7bf00428086687033173680da7106cdc62f554eeba534942a299e0518a5a52",
    ("w4a16_nvfp4", "pow2"): "3e54f188953193f391c7c3a32b9dd3de3930014b4b24022f94c64b2d932d22de",
    ("w4a16_nvfp4", "amax"): "94545476ae84d550acf6df013b0da9ca50d91780ecfb944c6695c234b0a48d71",
    ("mxfp4", "pow2"): "46c5d455ab0fa996fdd137aec2033c2c0d933b8052ff18110c4ad66b92916760",
}
"""SHA-256 of the tensors and configs that the release before mixed plans wrote for `weights()`."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def weights(model_dir: Path) -> Iterator[HFWeight]:
    """A tiny model whose values come from integers alone, so that they are the same under any torch."""
    for number, (name, shape) in enumerate(expected_shapes(read_shape(model_dir / "config.json")).items()):
        size = int(np.prod(shape))
        mixed = (np.arange(size, dtype=np.uint64) + np.uint64(977 * number)) * np.uint64(2654435761) % np.uint64(2**24)
        tensor = torch.from_numpy((mixed.astype(np.float32) / 2**24 - 0.5) ** 3).reshape(shape) + (len(shape) == 1)
        linear = "_proj" in name
        yield HFWeight(name, tensor, linear, *([torch.tensor(0.125), torch.tensor(3.5)] if linear else []))


def export(model_dir: Path, out: Path, recipe: Recipe) -> reader.Checkpoint:
    hf.write(weights(model_dir), recipe, model_dir=model_dir, out=out, verdict=None, versions={})
    return reader.open_checkpoint(out)


def digest(checkpoint: reader.Checkpoint) -> str:
    """Over names, dtypes, shapes and bytes of all tensors, and both configs but for the producer's version."""
    hashed = hashlib.sha256()
    for name in checkpoint.names():
        entry = checkpoint.entries[name]
        hashed.update(f"{name} {entry.dtype} {entry.shape}".encode())
        hashed.update(checkpoint.raw(name).tobytes())
    for name in ("config.json", "hf_quant_config.json"):
        if (checkpoint.folder / name).exists():
            content = json.loads((checkpoint.folder / name).read_text())
            content.get("quantization_config", content).get("producer", {}).pop("version", None)
            hashed.update(json.dumps(content).encode())
    return hashed.hexdigest()


@pytest.mark.parametrize(("number_format", "scale_2"), UNCHANGED)
def test_single_format_exports_are_what_they_were(model_dir: Path, tmp_path: Path, number_format: str, scale_2: str):
    recipe = Recipe()
    recipe.quantize.format, recipe.quantize.scale_2 = Format(number_format), type(recipe.quantize.scale_2)(scale_2)
    assert digest(export(model_dir, tmp_path / "hf", recipe)) == UNCHANGED[number_format, scale_2]
