"""The checkpoint for serving: a Hugging Face directory that TensorRT-LLM, vLLM and SGLang load as it is.

    model*.safetensors          packed linears (export/pack.py), everything else in BF16
    config.json                 the source model's, with quantization_config in the flat shape (vLLM, SGLang)
    hf_quant_config.json        the same in ModelOpt's nested shape (TensorRT-LLM, where it wins); not for MXFP4
    tokenizer, chat template    copied
    halfbyte.json               gate verdict, checkpoint, recipe hash, versions, SHA-256 of every other file

The directory appears whole or not at all: it is written beside its destination, flushed to disk and renamed.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from halfbyte.export.folder import disk_errors, replacing
from halfbyte.export.pack import cache_scale, format_of, module_name, pack
from halfbyte.export.quantization_config import quantization_configs
from halfbyte.export.record import write_record
from halfbyte.training.config import Format, Method, Recipe
from halfbyte.training.errors import UserError
from halfbyte.training.hf_map import HFWeight
from halfbyte.training.kv_format import KVCache

GENERATION = "generation_config.json"

SIDE_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
)
"""What serving needs (or the licence demands) besides weights and configs: fnmatch patterns in the model directory."""


def write(
    weights: Iterable[HFWeight],
    recipe: Recipe,
    *,
    model_dir: Path,
    out: Path,
    checkpoint: str,
    versions: dict[str, str],
) -> dict[str, Any]:
    """Write the checkpoint. Holds at most one shard (export.shard_gb) in memory.

    Args:
        weights: Complete tensors in Hugging Face naming; consumed once, in order.
        recipe: The resolved recipe; method bf16 writes a dense checkpoint without a quantization config.
        model_dir: The source model: config.json, generation_config.json, tokenizer files.
        out: Destination; an existing one is replaced once the new one is complete.
        checkpoint: Name of the training checkpoint that `weights` come from, for halfbyte.json.
        versions: Package -> version, for halfbyte.json.

    Returns:
        bytes_before (all tensors in BF16) and bytes_after (tensor data on disk), bytes; files (safetensors files),
        tensors (in the files), quantized (linears).

    Raises:
        UserError: No weights, nothing quantized, a tensor twice, a weight that cannot be packed, a source file missing
            or damaged, disk full. Nothing new stands at `out` then, and what stood there still does.
    """
    source = _read_config(model_dir / "config.json")
    with disk_errors(out), replacing(out) as folder:
        shards = Shards(folder, limit=int(recipe.export.shard_gb * 1e9))
        tied = bool(source.get("tie_word_embeddings"))
        bytes_before, formats, dense_modules = _write_tensors(weights, recipe, shards, tied=tied)
        shards.finish()
        _write_configs(folder, source, formats, dense_modules, recipe.quantize.kv_cache)
        _copy_side_files(model_dir, folder, source)
        write_record(folder, recipe, formats, checkpoint, versions)
    sizes = {"bytes_before": bytes_before, "quantized": len(formats)}
    return sizes | {"bytes_after": shards.total_bytes, "files": shards.count, "tensors": len(shards.file_of)}


def _write_tensors(
    weights: Iterable[HFWeight], recipe: Recipe, shards: "Shards", *, tied: bool
) -> tuple[int, dict[str, Format], list[str]]:
    """Pack or round every tensor into the shards.

    Returns:
        Bytes of all tensors in BF16; quantized module -> format; the modules left in BF16.
    """
    bytes_before = 0
    formats: dict[str, Format] = {}
    dense_modules = {"lm_head"}  # listed even if tied: readers build the module and look it up
    for weight in weights:
        module = module_name(weight.name)
        if tied and module == "lm_head":
            if weight.quantized:
                raise UserError("lm_head is the embedding of this model and cannot be FP4; add it to quantize.exclude")
            continue
        bytes_before += 2 * weight.tensor.numel()
        shards.add({f"{module}.{suffix}": scale for suffix, scale in cache_scale(weight).items()})
        if weight.quantized:
            shards.add({f"{module}.{suffix}": part for suffix, part in pack(weight, recipe.quantize).items()})
            dense_modules.discard(module)
            formats[module] = format_of(weight, recipe.quantize)
        else:
            # copy: a safetensors file refuses tensors that share memory, as the parts of a fused weight do
            dense = weight.tensor.detach().to("cpu", torch.bfloat16, copy=True)
            shards.add({weight.name: dense.contiguous()})
            if weight.tensor.dim() == 2:
                dense_modules.add(module)
    if not bytes_before:
        raise UserError("export got no weights; train first (halfbyte train RUN_DIR)")
    if bool(formats) is (recipe.method is Method.bf16):
        raise UserError(f"export got {len(formats)} quantized linears for method = {recipe.method.value}; run again")
    return bytes_before, formats, sorted(dense_modules)


class Shards:
    """Safetensors files of at most `limit` bytes of tensor data (a layer that is larger gets its own)."""

    def __init__(self, folder: Path, *, limit: int):
        self.folder, self.limit = folder, limit
        self.count = self.total_bytes = 0
        self.file_of: dict[str, int] = {}  # tensor name -> shard number
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Append tensors that belong into one file."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._pending and self._pending_bytes + size > self.limit:
            self._save()
        for name, tensor in tensors.items():
            if name in self.file_of:
                raise UserError(f"{name}: exported twice; the checkpoint's tensors do not fit this model")
            self._pending[name] = tensor
            self.file_of[name] = self.count
        self._pending_bytes += size
        self.total_bytes += size

    def finish(self) -> None:
        """Write what is left, then name the files, now that their number is known."""
        self._save()
        names = [f"model-{i + 1:05d}-of-{self.count:05d}.safetensors" for i in range(self.count)]
        if self.count == 1:
            names = ["model.safetensors"]
        for i, name in enumerate(names):
            path = self._unnamed(i).rename(self.folder / name)
            path.chmod(0o644)  # safetensors makes its files private; a server often runs as somebody else
        if self.count > 1:
            weight_map = {name: names[i] for name, i in sorted(self.file_of.items())}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            _write_json(self.folder / "model.safetensors.index.json", index)

    def _save(self) -> None:
        save_file(self._pending, self._unnamed(self.count), metadata={"format": "pt"})
        self.count += 1
        self._pending, self._pending_bytes = {}, 0

    def _unnamed(self, number: int) -> Path:
        return self.folder / f"shard-{number}.partial"


def _write_configs(
    folder: Path, source: dict[str, Any], formats: dict[str, Format], dense_modules: list[str], cache: KVCache
) -> None:
    """config.json and, for the formats of ModelOpt's layout, hf_quant_config.json."""
    # both spellings: transformers 5 reads `dtype`, the serving runtimes still look for `torch_dtype`
    config = source | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    config.pop("quantization_config", None)  # of a source that was quantized itself
    if formats:
        flat, nested = quantization_configs(formats, dense_modules, cache)
        config["quantization_config"] = flat
        if nested is not None:
            _write_json(folder / "hf_quant_config.json", nested)
    _write_json(folder / "config.json", config)


def _copy_side_files(model_dir: Path, folder: Path, source: dict[str, Any]) -> None:
    """Tokenizer, chat template, licence and generation config."""
    for path in side_files(model_dir):
        shutil.copyfile(path, folder / path.name)
    generation = folder / GENERATION
    if not generation.exists():
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
        _write_json(generation, {name: source[name] for name in tokens if source.get(name) is not None})


def side_files(model_dir: Path) -> list[Path]:
    """The files of a model directory that are copied as they are, sorted.

    Raises:
        UserError: no tokenizer is among them.
    """
    found = {path for pattern in (*SIDE_FILES, GENERATION) for path in model_dir.glob(pattern) if path.is_file()}
    if not any(path.name.startswith(("tokenizer", "vocab")) for path in found):
        raise UserError(f"{model_dir}: no tokenizer files there; a server needs them: copy them into the directory")
    return sorted(found)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give model.path a Hugging Face directory"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy the model's config.json again") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a JSON object; copy the model's config.json again")
    return config


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
