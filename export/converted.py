"""Conversions read back and compared with their source, by code that shares none of the writers' tables.

compressed_tensors   every linear decompressed by the compressed-tensors package, as its config says
trtllm               every Hugging Face tensor put together again from the rank files, by TensorRT-LLM's names
dequantized          every tensor against the source's, decoded by export/reader.py
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from halfbyte.export.reader import Checkpoint, Entry, open_checkpoint, read_header, stored
from halfbyte.training.choices import Container
from halfbyte.training.errors import UserError

ENGINE_NAMES = {
    "self_attn.o_proj": ("attention.dense", 1),
    "mlp.gate_proj": ("mlp.fc", 0),
    "mlp.up_proj": ("mlp.gate", 0),
    "mlp.down_proj": ("mlp.proj", 1),
}
"""Hugging Face linear -> where TensorRT-LLM keeps it, and the axis that its ranks share; q, k and v are apart."""
ENGINE_SUFFIXES = {
    "weight": "weight",
    "weight_scale": "weights_scaling_factor",
    "weight_scale_2": "weights_scaling_factor_2",
    "input_scale": "activation_scaling_factor",
}


def check(source: Checkpoint, container: Container, folder: Path) -> int:
    """Compare a conversion with its source.

    Args:
        source: The checkpoint that was converted.
        container: The conversion's layout.
        folder: The conversion.

    Returns:
        How many of the source's tensors (for weights: linears and the like) were compared.

    Raises:
        UserError: the first difference, or damaged files.
    """
    if container is Container.compressed_tensors:
        return _check_compressed(source, open_checkpoint(folder))
    if container is Container.trtllm:
        return _check_engine(source, folder)
    return _check_dequantized(source, open_checkpoint(folder))


def _check_compressed(source: Checkpoint, result: Checkpoint) -> int:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
    from compressed_tensors.utils.match import match_name

    config = QuantizationConfig.model_validate(result.config["quantization_config"])
    (scheme,) = config.config_groups.values()
    assert isinstance(scheme, QuantizationScheme)  # a list of names is the other form, which config.json has not
    compressor: Any = BaseCompressor.get_value_from_registry(config.format)
    quantized = source.quantized_modules()
    for module in quantized:
        if any(match_name(module, pattern) for pattern in config.ignore or []):
            raise UserError(f"{result.folder}: {module} is quantized, but its config ignores it")
        names = compressor.compression_param_names(scheme)
        state = {name: _tensor(result, f"{module}.{name}") for name in names}
        decompressed = compressor.decompress(state, scheme)["weight"].float().numpy()
        _near(f"{result.folder}: {module}", decompressed, source.decode(module), exact=_pow2(source, module))
    # what the package decodes in BF16 is compared in its bits as well: codes and block scales are copies
    copies = {f"{module}.weight": f"{module}.weight_packed" for module in quantized}
    owned = {name for name in source.names() if name.rpartition(".")[0] in quantized}
    copies |= {name: name for name in source.names() if name not in owned or name.endswith(".weight_scale")}
    inverses = {"weight_scale_2": "weight_global_scale", "input_scale": "input_global_scale"}
    for name in owned:
        module, _, suffix = name.rpartition(".")
        if suffix in inverses:
            target = f"{module}.{inverses[suffix]}"
            _same(f"{result.folder}: {target}", result.raw(target), np.float32(1) / source.raw(name))
    for ours, theirs in copies.items():
        _same(f"{result.folder}: {theirs}", result.raw(theirs), source.raw(ours))
    for name in (name for name in source.names() if name.endswith((".k_scale", ".v_scale"))):
        attention, _, suffix = name.rpartition(".")
        _same(f"{result.folder}: {name}", result.raw(f"{attention.rpartition('.')[0]}.{suffix}"), source.raw(name))
    return len(copies)


def _tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    if name not in checkpoint.entries:
        raise UserError(f"{checkpoint.folder}: no tensor {name}, which its config promises")
    with safe_open(checkpoint.entries[name].file, "pt") as file:
        return file.get_tensor(name)


def _pow2(source: Checkpoint, module: str) -> bool:
    return bool(np.frexp(source.raw(f"{module}.weight_scale_2"))[0] == 0.5)


def _check_engine(source: Checkpoint, folder: Path) -> int:
    files = sorted(folder.glob("rank*.safetensors"), key=lambda file: int(file.stem.removeprefix("rank")))
    ranks = [read_header(file) for file in files]
    left = set(ranks[0])
    for name in source.names():
        target, axis, member = _engine_place(name)
        if target is None:
            continue
        _same(f"{folder}: {target}", _joined(ranks, target, axis, member, source), source.raw(name))
        left.discard(target)
    left.discard("lm_head.weight")  # of a tied model: its embedding a second time
    head = "lm_head.weight" if "lm_head.weight" in source.entries else "model.embed_tokens.weight"
    _same(f"{folder}: lm_head", _joined(ranks, "lm_head.weight", 0, None, source), source.raw(head))
    left = {name for name in left if not name.endswith(".kv_cache_scaling_factor")}
    if left:
        raise UserError(f"{folder}: {min(left)} stands for no tensor of {source.folder}")
    return len(source.names())


def _engine_place(name: str) -> tuple[str | None, int | None, int | None]:
    """Where a Hugging Face tensor is: TensorRT-LLM's name, the axis that ranks share, which of q, k, v."""
    whole = {
        "model.embed_tokens.weight": ("transformer.vocab_embedding.weight", 0, None),
        "lm_head.weight": ("lm_head.weight", 0, None),
        "model.norm.weight": ("transformer.ln_f.weight", None, None),
    }
    if name in whole:
        return whole[name]
    _, _, layer, rest = name.split(".", 3)
    module, _, suffix = rest.rpartition(".")
    prefix = f"transformer.layers.{layer}."
    if suffix in ("k_scale", "v_scale"):
        return f"{prefix}attention.{suffix[0]}_cache_scaling_factor", None, None
    if "norm" in module:
        return f"{prefix}{rest}", None, None
    scalar = suffix in ("weight_scale_2", "input_scale")
    if module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        member = None if scalar else "qkv".index(module.removeprefix("self_attn.")[0])
        return f"{prefix}attention.qkv.{ENGINE_SUFFIXES[suffix]}", None if scalar else 0, member
    target, axis = ENGINE_NAMES[module]
    return f"{prefix}{target}.{ENGINE_SUFFIXES[suffix]}", None if scalar else axis, None


def _joined(
    ranks: list[dict[str, Entry]], target: str, axis: int | None, member: int | None, source: Checkpoint
) -> np.ndarray:
    """A tensor of the whole model from the parts that the ranks hold."""
    missing = next((rank for rank, entries in enumerate(ranks) if target not in entries), None)
    if missing is not None:
        raise UserError(f"rank{missing}.safetensors: no tensor {target}")
    parts = [stored(entries[target]) for entries in ranks]
    if axis is None:
        if any(part.tobytes() != parts[0].tobytes() for part in parts):
            raise UserError(f"{target}: the ranks disagree")
        return parts[0]
    if member is not None:
        heads, groups = source.config["num_attention_heads"], source.config.get("num_key_value_heads")
        groups = groups or heads
        head = len(parts[0]) // (heads + 2 * groups) * len(ranks)  # rows of one head
        of_rank = [size * head // len(ranks) for size in (heads, groups, groups)]
        start = sum(of_rank[:member])
        parts = [part[start : start + of_rank[member]] for part in parts]
    return np.concatenate(parts, axis)


def _check_dequantized(source: Checkpoint, result: Checkpoint) -> int:
    names = [name for name in source.names() if name.endswith((".weight", ".weight_packed", ".bias"))]
    for name in names:
        module, _, suffix = name.rpartition(".")
        target = name if suffix == "bias" else f"{module}.weight"
        expected = source.decode_dense(name) if suffix == "bias" else source.decode(module)
        _same(f"{result.folder}: {target}", result.decode_dense(target), expected)
    if len(result.names()) != len(names):
        raise UserError(f"{result.folder}: {len(result.names())} tensors, {len(names)} in {source.folder}")
    return len(names)


def _same(what: str, found: np.ndarray, expected: np.ndarray) -> None:
    if found.size != expected.size or found.tobytes() != expected.tobytes():
        raise UserError(f"{what} differs from the source")


def _near(what: str, found: np.ndarray, expected: np.ndarray, *, exact: bool) -> None:
    """Equal, or within BF16's rounding of scale and product where the second-level scale is no power of two."""
    error: Any = np.abs(found - expected)
    if (error > (0 if exact else 2.0**-7) * np.abs(expected)).any():
        raise UserError(f"{what} decompresses to other values than the source's")
