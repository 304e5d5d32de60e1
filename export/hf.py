"""The checkpoint for serving: a Hugging Face directory that TensorRT-LLM, vLLM and SGLang load as it is.

    model*.safetensors          packed linears (export/pack.py), everything else in BF16
    config.json                 the source model's, with quantization_config in the flat shape (vLLM, SGLang)
    hf_quant_config.json        the same in ModelOpt's nested shape (TensorRT-LLM, where it wins); not for MXFP4
    tokenizer, chat template    copied
    halfbyte.json               gate verdict, checkpoint, recipe hash, versions, SHA-256 of every other file

The directory appears whole or not at all: it is written beside its destination, flushed to disk and renamed.
"""

import shutil
from collections.abc import Iterable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfbyte.export import folder
from halfbyte.export.container import file_names, write_index
from halfbyte.export.filling import Filling
from halfbyte.export.folder import disk_errors, write_plain_json
from halfbyte.export.layout import Layout, plan_layout
from halfbyte.export.pack import cache_scale, module_name, pack
from halfbyte.export.quantization_config import quantization_configs
from halfbyte.export.record import write_record
from halfbyte.export.team import ALONE, Team
from halfbyte.training.config import Recipe
from halfbyte.training.errors import UserError
from halfbyte.training.hf_map import HFWeight, expected_shapes
from halfbyte.training.kv_format import KVCache
from halfbyte.training.model_config import in_both_spellings, read_config
from halfbyte.training.shape import read_shape

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
    team: Team = ALONE,
) -> dict[str, Any]:
    """Write the checkpoint; every process of the team its own files. Memory holds two tensors.

    Args:
        weights: Complete tensors in Hugging Face naming, of this process's files (own_weights); consumed once.
        recipe: The resolved recipe; method bf16 writes a dense checkpoint without a quantization config.
        model_dir: The source model: config.json, generation_config.json, tokenizer files.
        out: Destination; an existing one is replaced once the new one is complete.
        checkpoint: Name of the training checkpoint that `weights` come from, for halfbyte.json.
        versions: Package -> version, for halfbyte.json.
        team: The processes that write together, on one file system.

    Returns:
        bytes_before (all tensors in BF16) and bytes_after (tensor data on disk), bytes; files (safetensors files),
        tensors (in the files), quantized (linears).

    Raises:
        UserError: A weight is missing, there twice or not as planned, or cannot be packed; a source file is missing or
            damaged; the disk is full. Nothing new stands at `out` then, and what stood there still does.
    """
    layout = plan_layout(read_shape(model_dir / "config.json"), recipe)
    names = file_names(len(layout.files))

    def files() -> dict[str, dict[str, Any]]:
        with disk_errors(out):
            return _write_files(weights, recipe, layout, {i: partial / names[i] for i in _own(layout, team)})

    def complete() -> None:
        with disk_errors(out):
            _write_rest(partial, model_dir, recipe, layout)
            entries = {name: entry for part in written for name, entry in part.items()}
            write_record(partial, recipe, layout.formats, checkpoint, versions, entries)
            folder.finish(out)

    partial = team.on_first(lambda: folder.begin(out))
    try:
        written = team.on_every(files)
        team.on_first(complete)
    except BaseException:  # Ctrl-C included
        if team.rank == 0:
            folder.abandon(out)
        raise
    return {
        "bytes_before": layout.bytes_before,
        "bytes_after": layout.bytes_after,
        "files": len(names),
        "tensors": sum(map(len, layout.tensors.values())),
        "quantized": len(layout.formats),
    }


def own_weights(recipe: Recipe, model_dir: Path, team: Team) -> dict[str, int]:
    """The weights that are in this process's files: name -> its bytes in BF16."""
    shape = read_shape(model_dir / "config.json")
    layout, sizes = plan_layout(shape, recipe), expected_shapes(shape)
    return {name: 2 * prod(sizes[name]) for number in _own(layout, team) for name in layout.files[number]}


def _own(layout: Layout, team: Team) -> range:
    return range(team.rank, len(layout.files), team.size)


def _write_files(
    weights: Iterable[HFWeight], recipe: Recipe, layout: Layout, paths: dict[int, Path]
) -> dict[str, dict[str, Any]]:
    """Fill these files with the weights, each packed or rounded when its turn comes: their entries in halfbyte.json."""
    missing = {name: number for number in paths for name in layout.files[number]}
    with Filling({path: layout.file(number) for number, path in paths.items()}) as files:
        for weight in weights:
            if weight.name not in layout.tensors and module_name(weight.name) == "lm_head":
                continue  # tied: the embedding stands for it
            if weight.name not in missing:
                raise UserError(f"{weight.name}: exported twice, or no weight of this model; train it again")
            number = missing.pop(weight.name)
            _check_plan(weight, layout)
            parts = {name: bits(tensor) for name, tensor in _tensors(weight, recipe).items()}
            try:
                files.put(paths[number], parts)
            except ValueError as error:
                raise UserError(f"{error}: not as planned; the checkpoint fits another recipe") from error
        if missing:
            remedy = "train first (halfbyte train RUN_DIR)"
            raise UserError(f"export lacks {len(missing)} weights, {next(iter(missing))} for one; {remedy}")
        return files.entries()


def _check_plan(weight: HFWeight, layout: Layout) -> None:
    if weight.quantized is not (module_name(weight.name) in layout.formats):
        found = "quantized in the model, not" if weight.quantized else "not quantized in the model, but"
        raise UserError(f"{weight.name}: {found} in the recipe; export with the recipe of the run")


def _tensors(weight: HFWeight, recipe: Recipe) -> dict[str, torch.Tensor]:
    """What stands for a weight in the files, by name, on the CPU."""
    module = module_name(weight.name)
    scales = {f"{module}.{suffix}": scale for suffix, scale in cache_scale(weight).items()}
    if weight.quantized:
        return scales | {f"{module}.{suffix}": part for suffix, part in _packed(weight, recipe).items()}
    return scales | {weight.name: weight.tensor.detach().to("cpu", torch.bfloat16)}


def bits(tensor: torch.Tensor) -> np.ndarray:
    """A CPU tensor as numpy writes it: E4M3 as bytes, BF16 as 16-bit words."""
    views = {torch.float8_e4m3fn: torch.uint8, torch.bfloat16: torch.uint16}
    return tensor.contiguous().view(views.get(tensor.dtype, tensor.dtype)).numpy()


def _packed(weight: HFWeight, recipe: Recipe) -> dict[str, torch.Tensor]:
    """The weight's packed tensors, made on the GPU where there is one with room: only they come back from it."""
    if torch.cuda.is_available() and weight.packed is None:
        try:
            return pack(_on_gpu(weight), recipe.quantize)
        except torch.OutOfMemoryError:  # beside a model in training
            torch.cuda.empty_cache()
    return pack(weight, recipe.quantize)


def _on_gpu(weight: HFWeight) -> HFWeight:
    log2 = weight.log2_scale
    return replace(weight, tensor=weight.tensor.cuda(), log2_scale=None if log2 is None else log2.cuda())


def _write_rest(partial: Path, model_dir: Path, recipe: Recipe, layout: Layout) -> None:
    """Everything beside the weights: index, configs, tokenizer, licence."""
    names = file_names(len(layout.files))
    if len(names) > 1:
        places = {name: names[i] for i in range(len(names)) for name in layout.file(i)}
        write_index(partial, places, layout.bytes_after)
    source = read_config(model_dir / "config.json")
    _write_configs(partial, source, layout, recipe.quantize.kv_cache)
    _copy_side_files(model_dir, partial, source)


def _write_configs(folder: Path, source: dict[str, Any], layout: Layout, cache: KVCache) -> None:
    """config.json and, for the formats of ModelOpt's layout, hf_quant_config.json."""
    config = in_both_spellings(source, "bfloat16")
    config.pop("quantization_config", None)  # of a source that was quantized itself
    if layout.formats:
        flat, nested = quantization_configs(layout.formats, layout.dense, cache)
        config["quantization_config"] = flat
        if nested is not None:
            write_plain_json(folder / "hf_quant_config.json", nested)
    write_plain_json(folder / "config.json", config)


def _copy_side_files(model_dir: Path, folder: Path, source: dict[str, Any]) -> None:
    """Tokenizer, chat template, licence and generation config."""
    for path in side_files(model_dir):
        shutil.copyfile(path, folder / path.name)
    generation = folder / GENERATION
    if not generation.exists():
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
        write_plain_json(generation, {name: source[name] for name in tokens if source.get(name) is not None})


def side_files(model_dir: Path) -> list[Path]:
    """The files of a model directory that are copied as they are, sorted.

    Raises:
        UserError: no tokenizer is among them.
    """
    found = {path for pattern in (*SIDE_FILES, GENERATION) for path in model_dir.glob(pattern) if path.is_file()}
    if not any(path.name.startswith(("tokenizer", "vocab")) for path in found):
        raise UserError(f"{model_dir}: no tokenizer files there; a server needs them: copy them into the directory")
    return sorted(found)
