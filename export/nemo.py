"""A .nemo archive of a run: the weights as they were trained, and the state of their quantizers, to go on from.

The layout is that of NeMo's save/restore connector, an uncompressed tar with `model_config.yaml`; its weights are a
pickle, and these are safetensors:

    model_config.yaml           target, versions, the model's sizes, the whole recipe
    halfbyte.json               gate verdict, checkpoint, recipe, SHA-256 of every other file
    config.json, tokenizer      for training to start from it like from any Hugging Face directory
    model*.safetensors, index   in the training type, Hugging Face names
    quantizers.*                export/quantizer_state.py

The bytes depend on the checkpoint alone: no times, no owners, files in a fixed order.
"""

import shutil
import tarfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from halfbyte.export import quantizer_state
from halfbyte.export.container import STORAGE, Planned, TensorFile, file_names, share_out, write_file, write_index
from halfbyte.export.convert import record_of
from halfbyte.export.folder import disk_errors, flush, write_plain_json
from halfbyte.export.hf import bits, side_files
from halfbyte.export.layout import in_order
from halfbyte.export.pack import module_name
from halfbyte.export.record import CARD, RECORD
from halfbyte.export.verify import verify
from halfbyte.training import nemo_archive
from halfbyte.training.choices import Container
from halfbyte.training.config import Recipe
from halfbyte.training.errors import UserError
from halfbyte.training.files import read_json
from halfbyte.training.hf_map import HFWeight, expected_shapes
from halfbyte.training.model_config import read_config
from halfbyte.training.model_source import QUANTIZERS
from halfbyte.training.shape import ModelShape, planned_linears, read_shape

TARGET = "megatron.core.models.gpt.gpt_model.GPTModel"
"""The model's class, under the key by which NeMo finds one."""
DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
"""Training type -> safetensors dtype."""

Weights = Callable[[Collection[str] | None], Iterator[HFWeight]]
"""Gives the trained tensors of these names; None: all. Called several times."""


def write(
    release: Path,
    recipe: Recipe,
    weights: Weights,
    errors: Mapping[str, float],
    out: Path,
) -> dict[str, Any]:
    """Write the archive of the checkpoint that `release` was made from, check it, and put it at `out`.

    Before it takes its place, its files are read back, quantized, and compared with every tensor of the release, and
    the tar's content with the files' SHA-256.

    Args:
        release: The exported directory: config, tokenizer, card and record come from it.
        recipe: The recipe of the run.
        weights: The trained tensors.
        errors: Hugging Face module name -> relative RMS error of its weight, for every quantized linear.
        out: The archive; what stands there is replaced.

    Returns:
        bytes (of the archive), files (of weights), tensors (compared with the release).

    Raises:
        UserError: the weights are not those of the release, or the disk is full; what stood at `out` still does.
    """
    partial_folder, archive = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.tmp")
    try:
        with disk_errors(out):
            shutil.rmtree(partial_folder, ignore_errors=True)
            partial_folder.mkdir(parents=True)
            files = _write_files(partial_folder, release, recipe, weights, errors)
            tensors = _check(partial_folder, release, recipe)
            _pack(partial_folder, archive)
            size = archive.stat().st_size
            archive.replace(out)
            flush(out.parent)
    finally:  # Ctrl-C included
        shutil.rmtree(partial_folder, ignore_errors=True)
        archive.unlink(missing_ok=True)
    return {"bytes": size, "files": files, "tensors": tensors}


def _write_files(folder: Path, release: Path, recipe: Recipe, weights: Weights, errors: Mapping[str, float]) -> int:
    shape = read_shape(release / "config.json")
    (first,) = weights({"model.norm.weight"})
    dtype = DTYPES[first.tensor.dtype]
    files, scalars, learned = _write_weights(folder, shape, recipe, weights, dtype)
    planned = {name: Planned("F32", (), partial(bits, value)) for name, value in scalars.items()}
    planned |= {
        f"{module}.{quantizer_state.LOG2}": Planned(kind, size, partial(_log2, weights, module))
        for module, (kind, size) in learned.items()
    }
    write_file(folder / quantizer_state.NUMBERS, planned)
    formats = planned_linears(shape, recipe)
    state = quantizer_state.describe(recipe.quantize, formats, errors, learned=bool(learned))
    write_plain_json(folder / QUANTIZERS, state)
    named = {"BF16": "bfloat16", "F32": "float32", "F64": "float64"}[dtype]
    config = {key: value for key, value in read_config(release / "config.json").items() if key != "quantization_config"}
    write_plain_json(folder / "config.json", config | {"dtype": named, "torch_dtype": named})
    for path in [*side_files(release), *release.glob(CARD)]:
        shutil.copyfile(path, folder / path.name)
    (folder / nemo_archive.CONFIG).write_text(_model_config(release, recipe, shape))
    write_plain_json(folder / RECORD, record_of(release, Container.nemo, folder, ranks=1))
    return files


def _write_weights(
    folder: Path, shape: ModelShape, recipe: Recipe, weights: Weights, dtype: str
) -> tuple[int, dict[str, torch.Tensor], dict[str, tuple[str, tuple[int, ...]]]]:
    """Write the weights in shards, one tensor in memory.

    Returns:
        Number of files; the quantizers' scalars by name; module -> dtype and shape of its learned block scales.
    """
    sizes = in_order(expected_shapes(shape))
    scalars: dict[str, torch.Tensor] = {}
    learned: dict[str, tuple[str, tuple[int, ...]]] = {}
    width = np.dtype(STORAGE[dtype]).itemsize
    nbytes = {name: prod(size) * width for name, size in sizes.items()}
    groups = share_out(nbytes, count=recipe.export.files, limit=int(recipe.export.shard_gb * 1e9))
    names = file_names(len(groups))
    for file, group in zip(names, groups, strict=True):
        try:
            with TensorFile(folder / file, {name: (dtype, sizes[name]) for name in group}) as out:
                for weight in weights(set(group)):
                    out.write(weight.name, bits(weight.tensor.detach().cpu()))
                    scalars |= quantizer_state.numbers(weight, recipe.quantize)
                    if weight.log2_scale is not None:
                        kind = DTYPES[weight.log2_scale.dtype]
                        learned[module_name(weight.name)] = kind, tuple(weight.log2_scale.shape)
        except (KeyError, ValueError) as error:
            raise UserError(
                f"the checkpoint is not of this model: {error}; export with the recipe of the run"
            ) from error
    if len(names) > 1:
        places = {name: file for file, group in zip(names, groups, strict=True) for name in group}
        write_index(folder, places, sum(nbytes.values()))
    return len(names), scalars, learned


def _log2(weights: Weights, module: str) -> np.ndarray:
    (weight,) = weights({f"{module}.weight"})
    assert weight.log2_scale is not None
    return bits(weight.log2_scale.detach().cpu())


def _model_config(release: Path, recipe: Recipe, shape: ModelShape) -> str:
    """model_config.yaml. No key is called `model`: NeMo's connector would read that alone."""
    made = read_json(release / RECORD)
    versions = made["versions"]
    content = {
        "target": TARGET,
        "nemo_version": versions["nemo-toolkit"],
        "halfbyte_version": versions["halfbyte"],
        "checkpoint": made["checkpoint"],
        "sizes": asdict(shape),
        "recipe": OmegaConf.structured(recipe),
    }
    return OmegaConf.to_yaml(OmegaConf.create(content))


def _check(folder: Path, release: Path, recipe: Recipe) -> int:
    """Compare what the files quantize to with every tensor of the release; returns how many."""
    state, shape = quantizer_state.read_state(folder), read_shape(folder / "config.json")
    quantizer_state.calibration(folder, state, shape)
    report = verify(release, quantizer_state.read_weights(folder, state, shape), recipe)
    if not report["ok"]:
        raise UserError(f"{release}: is not what the checkpoint quantizes to: {report['problems'][0]}; export it again")
    return report["tensors"]


def _pack(folder: Path, archive: Path) -> None:
    """Put the files into a tar, each removed from the folder once it is in, and compare the tar with their hashes."""
    listed = {name: entry["sha256"] for name, entry in read_json(folder / RECORD)["files"].items()}
    first = [
        folder / name for name in (nemo_archive.CONFIG, RECORD, "config.json", QUANTIZERS)
    ]  # read without the rest
    rest = sorted(path for path in folder.iterdir() if path not in first)
    with archive.open("wb") as file, tarfile.open(fileobj=file, mode="w:", format=tarfile.GNU_FORMAT) as tar:
        for path in [*first, *rest]:
            member = tarfile.TarInfo(path.name)
            member.size, member.mode = path.stat().st_size, 0o644
            with path.open("rb") as content:
                tar.addfile(member, content)
            path.unlink()
    flush(archive)
    found = nemo_archive.digests(archive)
    wrong = [name for name, sha256 in listed.items() if found.get(name) != sha256]
    if wrong:
        raise OSError(f"{wrong[0]} in the archive is not what was written")
