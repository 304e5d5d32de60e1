"""The model of a training checkpoint, tensor by tensor in Hugging Face naming; what export and verify read."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from halfbyte.training import checkpoint, low_rank, untrusted
from halfbyte.training.companions import ADAPTERS, SCALES, saved_as
from halfbyte.training.errors import UserError
from halfbyte.training.hf_map import BIASED, FUSED, HFWeight, split_fused
from halfbyte.training.kv_format import SCALES as CACHE_SCALES
from halfbyte.training.shape import ModelShape, layer_norms


def read_weights(
    path: Path, shape: ModelShape, quantized: Collection[str], only: Collection[str] | None = None
) -> Iterator[HFWeight]:
    """The model in Hugging Face naming, tensor by tensor, from a checkpoint of any layout; needs no process group.

    Args:
        path: A checkpoint folder.
        shape: The model's shape.
        quantized: Hugging Face module names of the linears that training fake-quantizes.
        only: Names of the weights to read; none means all.

    Yields:
        Complete tensors in the checkpoint's dtype, layer by layer; memory holds one Megatron tensor at a time.

    Raises:
        UserError: the folder is damaged or lacks a tensor.
    """
    reader = _Reader(path)

    def wanted(*names: str) -> bool:
        return only is None or any(f"{name}.weight" in only or f"{name}.bias" in only for name in names)

    if wanted("model.embed_tokens"):
        yield HFWeight("model.embed_tokens.weight", reader.tensor("embedding.word_embeddings.weight")[: shape.vocab])
    for layer in range(shape.layers):
        prefix, hf = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for name, (target, _) in layer_norms(shape).items():
            if wanted(f"{hf}{target}"):
                yield HFWeight(f"{hf}{target}.weight", reader.tensor(f"{prefix}{name}.weight"))
        for name, parts in FUSED.items():
            if wanted(*(f"{hf}{part}" for part in parts)):
                own = reader.linears(layer, name, shape, quantized)
                yield from (weight for weight in own if only is None or weight.name in only)
    if wanted("model.norm"):
        yield HFWeight("model.norm.weight", reader.tensor("decoder.final_layernorm.weight"))
    if not shape.tied and wanted("lm_head"):
        yield HFWeight("lm_head.weight", reader.tensor("output_layer.weight")[: shape.vocab])


class _IndexOnce(dcp.FileSystemReader):
    """Reads a checkpoint's index once: dcp.load asks for it at every call, which is the square of the tensors."""

    def __init__(self, path: Path):
        super().__init__(str(path))
        self._index = super().read_metadata()

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self._index


class _Reader:
    """Single tensors of a torch_dist checkpoint, loaded one at a time without a process group."""

    def __init__(self, path: Path):
        self.path = path
        try:
            untrusted.check_index(path)
            self.reader = _IndexOnce(path)
            self.sizes = {
                key: entry
                for key, entry in self.reader.read_metadata().state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata)
            }
        except checkpoint.DAMAGED as error:
            raise self._damaged(error) from error

    def tensor(self, key: str) -> torch.Tensor:
        if key not in self.sizes:
            raise UserError(f"checkpoint {self.path}: {key} is not in it; it belongs to another model")
        entry = self.sizes[key]
        state = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
        try:
            dcp.load(state, storage_reader=self.reader, no_dist=True)
        except checkpoint.DAMAGED as error:
            raise self._damaged(error) from error
        return state[key]

    def _damaged(self, error: BaseException) -> UserError:
        why = checkpoint.why(error)
        return UserError(f"checkpoint {self.path}: cannot be read ({why}); remove it to use an older one")

    def linears(self, layer: int, name: str, shape: ModelShape, quantized: Collection[str]) -> Iterator[HFWeight]:
        """The Hugging Face linears in a Megatron linear of a layer, a key of FUSED, and their biases."""
        prefix, hf = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        cached = {
            part: self.maximum(f"{prefix}self_attention.core_attention.{side}_rounding.amax")
            for side, (part, _) in CACHE_SCALES.items()
            if part in FUSED[name]
        }
        amax = {side: self.maximum(f"{prefix}{name}.{side}_quantizer._amax") for side in ("weight", "input")}
        fused = self.merged(f"{prefix}{name}")
        scales = self.optional(saved_as(SCALES, f"{prefix}{name}", "log2"))
        learned = {} if scales is None else split_fused(name, scales.flatten(0, 1), shape)
        for part, tensor in split_fused(name, fused, shape).items():
            numbers = (amax["weight"], amax["input"], cached.get(part), learned.get(part))
            yield HFWeight(f"{hf}{part}.weight", tensor, f"{hf}{part}" in quantized, *numbers)
        if shape.qkv_bias and name == BIASED:
            for part, tensor in split_fused(name, self.tensor(f"{prefix}{name}.bias"), shape).items():
                yield HFWeight(f"{hf}{part}.bias", tensor)

    def linear(self, key: str) -> torch.Tensor:
        """A linear's weight; Megatron stores the halves of a gated one, gate and up, under two keys of their own."""
        if f"{key}_w" in self.sizes:
            return torch.cat([self.tensor(f"{key}_w"), self.tensor(f"{key}_v")])
        return self.tensor(key)

    def merged(self, key: str) -> torch.Tensor:
        """A linear's weight with its adapter (lora.py), if it has one, added."""
        weight = self.linear(f"{key}.weight")
        names = {name: saved_as(ADAPTERS, key, name) for name in ("a", "b", "factor")}
        if names["a"] not in self.sizes:
            return weight
        a_rK, b_PRr, factor = (self.tensor(name) for name in names.values())
        return low_rank.merge(weight, b_PRr.flatten(0, 1), a_rK, float(factor))

    def optional(self, key: str) -> torch.Tensor | None:
        return self.tensor(key) if key in self.sizes else None

    def maximum(self, key: str) -> torch.Tensor | None:
        found = self.optional(key)
        return None if found is None else found.float().amax()
