"""Which tensors an export holds and which file each is in, before any weight is read. Torch-free.

Every process that writes plans the same from the model's sizes and the recipe, so files can be shared out without a
word between them, and the bytes do not depend on how many processes there are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from halfbyte.export.container import STORAGE, share_out
from halfbyte.training.config import Format, Recipe
from halfbyte.training.formats import GRIDS, SPECS
from halfbyte.training.hf_map import expected_shapes
from halfbyte.training.kv_format import SCALES, KVCache
from halfbyte.training.shape import ModelShape, planned_linears

Stored = tuple[str, tuple[int, ...]]
"""Safetensors dtype and shape of a tensor in a file."""


@dataclass(frozen=True)
class Layout:
    """The plan of an export.

    Attributes:
        tensors: Weight of the model -> the tensors that it becomes, by name.
        files: Weights in each file, in model order.
        formats: Quantized module -> format.
        dense: Modules whose weight stays a BF16 matrix, and lm_head: a tied one has no tensor, but readers look it up.
        bytes_before: All weights in BF16.
    """

    tensors: dict[str, dict[str, Stored]]
    files: list[list[str]]
    formats: dict[str, Format]
    dense: list[str]
    bytes_before: int

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors."""
        return sum(nbytes(stored) for tensors in self.tensors.values() for stored in tensors.values())

    def file(self, number: int) -> dict[str, Stored]:
        """The tensors of one file."""
        return {name: stored for weight in self.files[number] for name, stored in self.tensors[weight].items()}


def nbytes(stored: Stored) -> int:
    """Bytes of a tensor's data."""
    return prod(stored[1]) * np.dtype(STORAGE[stored[0]]).itemsize


def plan_layout(shape: ModelShape, recipe: Recipe) -> Layout:
    """Plan an export.

    Args:
        shape: The model's sizes.
        recipe: Method, formats, cache, and the section `export`: number or size of the files.
    """
    formats, weights = planned_linears(shape, recipe), in_order(expected_shapes(shape))
    cached = bool(formats) and recipe.quantize.kv_cache is not KVCache.none
    tensors: dict[str, dict[str, Stored]] = {}
    for name, size in weights.items():
        module = name.removesuffix(".weight")
        parts = packed_tensors(formats[module], *size) if module in formats else {"weight": ("BF16", size)}
        tensors[name] = {name: ("BF16", size)} if name.endswith(".bias") else _named(module, parts)
        if cached and name.endswith(".weight"):
            scales = {suffix: ("F32", ()) for part, suffix in SCALES.values() if module.endswith(part)}
            tensors[name] |= _named(module, scales)
    dense = {name.removesuffix(".weight") for name, size in weights.items() if len(size) == 2} - formats.keys()
    sizes = {name: sum(map(nbytes, parts.values())) for name, parts in tensors.items()}
    files = share_out(sizes, count=recipe.export.files, limit=int(recipe.export.shard_gb * 1e9))
    return Layout(
        tensors, files, formats, sorted(dense | {"lm_head"}), sum(2 * prod(size) for size in weights.values())
    )


def in_order(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Weights in the order in which a model uses them: what is after the layers comes last."""
    last = [name for name in ("model.norm.weight", "lm_head.weight") if name in shapes]
    return {name: size for name, size in shapes.items() if name not in last} | {name: shapes[name] for name in last}


def _named(module: str, parts: Mapping[str, Stored]) -> dict[str, Stored]:
    return {f"{module}.{suffix}": stored for suffix, stored in parts.items()}


def packed_tensors(number_format: Format, n: int, k: int) -> dict[str, Stored]:
    """Suffix -> dtype and shape of what pack.pack makes of a linear [N, K]."""
    spec = SPECS[number_format]
    grid, blocks = spec.grid, (n, k // spec.grid.block)
    if not grid.per_tensor:
        return {"weight_packed": ("U8", (n, k // 2)), "weight_scale": ("U8", blocks)}
    if grid.block_scale is None:
        parts: dict[str, Stored] = {"weight": ("F8_E4M3", (n, k)), "weight_scale": ("F32", ())}
    else:
        parts = {"weight": ("U8", (n, k // 2)), "weight_scale": ("F8_E4M3", blocks), "weight_scale_2": ("F32", ())}
    scaled = spec.inputs is not None and GRIDS[spec.inputs].per_tensor
    return parts | ({"input_scale": ("F32", ())} if scaled else {})
