"""What each layout of choices.Container can hold. Pure and torch-free; a line per problem."""

from collections.abc import Iterator, Mapping
from math import gcd

from halfbyte.training.choices import Container
from halfbyte.training.config import Format, Method, Recipe
from halfbyte.training.kv_format import KVCache
from halfbyte.training.shape import ModelShape, linear_sizes, planned_linears

NVFP4_BLOCK = 16
IN_COMPRESSED_TENSORS = (Format.nvfp4, Format.w4a16_nvfp4)


def export_problems(recipe: Recipe, shape: ModelShape) -> Iterator[str]:
    """What of export.also this recipe's model could not be converted to."""
    chosen = recipe.export.also
    if chosen and recipe.method == Method.bf16:
        yield f"export.also = [{', '.join(chosen)}]: method = bf16 quantizes nothing to convert; leave the key out"
        return
    formats, cache = planned_linears(shape, recipe), recipe.quantize.kv_cache
    for container in dict.fromkeys(chosen):
        for problem in container_problems(container, shape, formats, cache, recipe.export.tensor_parallel):
            yield f"export.also = [{', '.join(chosen)}]: {problem}"


def container_problems(
    container: Container, shape: ModelShape, formats: Mapping[str, Format], cache: KVCache, ranks: int
) -> Iterator[str]:
    """Why a checkpoint does not fit into a layout.

    Args:
        container: The layout.
        shape: The model's sizes.
        formats: Module name -> format of every quantized linear.
        cache: Format of the key/value cache.
        ranks: Tensor-parallel size of the engine.

    Yields:
        A line per reason, with the remedy; nothing where it fits.
    """
    if container in (Container.dequantized, Container.nemo):
        return
    distinct = sorted(set(formats.values()))
    named = " and ".join(distinct) or "bf16"
    if cache is KVCache.nvfp4:
        yield f"{container} has no NVFP4 key/value cache; use quantize.kv_cache=fp8, or serve the directory as it is"
    if container is Container.compressed_tensors:
        if len(distinct) != 1 or distinct[0] not in IN_COMPRESSED_TENSORS:
            fitting = " or all ".join(IN_COMPRESSED_TENSORS)
            yield f"{container} holds linears that are all {fitting}, these are {named}; serve the directory as it is"
        return
    bf16 = [name for name in linear_sizes(shape) if name not in formats]
    if distinct != [Format.nvfp4] or bf16:
        which = f", {bf16[0]} bf16" if distinct == [Format.nvfp4] else ""
        yield f"trtllm holds linears that are all nvfp4, these are {named}{which}; serve the directory as it is"
    if shape.qkv_bias or shape.qk_norm:
        yield "trtllm-build takes NVFP4 of Llama's layers only, and these have biases or norms of q and k"
    sizes = {
        "key/value heads": shape.kv_heads,
        "vocabulary": shape.vocab,
        "intermediate size in blocks of 16": shape.ffn // NVFP4_BLOCK,
        "attention output in blocks of 16": shape.heads * shape.head_dim // NVFP4_BLOCK,
    }
    odd = [f"{what} ({size})" for what, size in sizes.items() if ranks > 0 and size % ranks]
    if odd:
        common = gcd(*sizes.values())
        fitting = ", ".join(str(i) for i in range(1, common + 1) if common % i == 0)
        yield f"export.tensor_parallel (--tp) = {ranks} does not divide the {', '.join(odd)}; use {fitting}"
