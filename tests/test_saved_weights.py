"""Weights of a checkpoint, tensor by tensor."""

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from halfbyte.training import untrusted
from halfbyte.training.saved_weights import read_weights
from halfbyte.training.shape import read_shape


def test_the_index_is_read_once_however_many_tensors_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with_layers = read_shape(Path(str(files("halfbyte.recipes") / "shapes" / "tiny.json")))
    shape = replace(with_layers, layers=0, tied=False, vocab=5)
    padded = torch.arange(8.0).expand(3, 8).T
    saved = {
        "embedding.word_embeddings.weight": padded,
        "decoder.final_layernorm.weight": torch.ones(3),
        "output_layer.weight": -padded,
    }
    dcp.save(saved, checkpoint_id=str(tmp_path), no_dist=True)
    monkeypatch.setattr(untrusted, "check_index", lambda _: None)  # torch's writer notes a Path, Megatron's does not
    read, calls = dcp.FileSystemReader.read_metadata, []
    monkeypatch.setattr(dcp.FileSystemReader, "read_metadata", lambda self: calls.append(1) or read(self))
    found = {weight.name: weight.tensor.tolist() for weight in read_weights(tmp_path, shape, ())}
    assert found == {
        "model.embed_tokens.weight": padded[:5].tolist(),
        "model.norm.weight": [1.0] * 3,
        "lm_head.weight": (-padded[:5]).tolist(),
    }
    assert len(calls) == 1
