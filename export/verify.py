"""Verify: are the exported bytes the model that was trained?

Three independent questions about the files at `out`: are they the files that were written (SHA-256), do they obey the
runtimes' rules (export/rules.py), and does every tensor decode, with the second reader (export/reader.py), to the
value that the training-time model computes with, bit for bit?
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfbyte.export.pack import cache_scale, fake, format_of, module_name, pack
from halfbyte.export.reader import Checkpoint, open_checkpoint
from halfbyte.export.record import broken_hashes
from halfbyte.export.rules import DTYPES, broken_rules
from halfbyte.export.team import ALONE, Team
from halfbyte.training import codec, numerics
from halfbyte.training.config import BlockScale, Format, Method, Quantize, Recipe
from halfbyte.training.errors import UserError
from halfbyte.training.formats import SPECS
from halfbyte.training.hf_map import HFWeight

MAX_PROBLEMS = 50
"""Lines kept in the report; a wrong scale rule breaks every layer in the same way."""


@dataclass
class _Findings:
    """What one process of those that verify finds.

    Attributes:
        counts: See verify.
        differences: Lines about tensors that are not as trained.
        rules: Lines about the rules of the format; of rank 0.
        hashes: Lines about altered files.
        expected: Names of the tensors that the weights of this process stand for.
        stored: Names of the tensors in the files; None where they cannot be read.
    """

    counts: dict[str, int]
    differences: list[str] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    expected: set[str] = field(default_factory=set)
    stored: set[str] | None = None


def verify(out: Path, weights: Iterable[HFWeight], recipe: Recipe, team: Team = ALONE) -> dict[str, Any]:
    """Compare an exported checkpoint with the trained weights and with the rules of its format.

    Args:
        out: The exported directory.
        weights: The training-time tensors, of each process of the team its share; consumed once, one in memory at a
            time.
        recipe: The recipe of the run.
        team: The processes that verify together; all get the same report.

    Returns:
        The content of verify.json: ok; tensors (training-time tensors compared), mismatches (of them, those that
        differ in value or bytes), quantized (linears among them), elements (values compared); problems, a line each
        (the first 50) and their number.

    Raises:
        UserError: There are no files or no weights: nothing was verified. A calibrated amax is missing.
    """
    if not any(out.glob("*.safetensors")):
        raise UserError(f"{out}: no *.safetensors to verify; export first (halfbyte export RUN_DIR)")
    return _report(out, recipe, team.on_every(lambda: _findings(out, weights, recipe, team)))


def _findings(out: Path, weights: Iterable[HFWeight], recipe: Recipe, team: Team) -> _Findings:
    found = _Findings({"tensors": 0, "mismatches": 0, "quantized": 0, "elements": 0})
    try:
        checkpoint = open_checkpoint(out)
    except UserError as error:  # the files are there but cannot be read: a finding, not a crash
        found.rules = [str(error)] if team.rank == 0 else []
    else:
        found.stored = set(checkpoint.entries)
        _compare(checkpoint, weights, recipe, found)
        found.rules = broken_rules(checkpoint, recipe) if team.rank == 0 else []
    found.hashes = broken_hashes(out, rank=team.rank, size=team.size)
    return found


def _report(out: Path, recipe: Recipe, parts: list[_Findings]) -> dict[str, Any]:
    """The findings of all processes as one: no tensor missing, none extra, all equal."""
    counts = {name: sum(part.counts[name] for part in parts) for name in parts[0].counts}
    problems = [line for part in parts for line in part.differences]
    stored = parts[0].stored
    if stored is not None:
        if not counts["tensors"]:
            raise UserError(f"{out}: there are no trained weights to compare with; train first")
        if recipe.method is not Method.bf16 and not counts["quantized"]:
            problems.append(f"no linear is quantized, but method = {recipe.method.value}")
        extra = sorted(stored.difference(*(part.expected for part in parts)))
        problems += [f"{name} is in the files but not in the trained model" for name in extra]
    problems += [line for part in parts for line in part.rules]
    problems += [line for part in parts for line in part.hashes]  # last: a tensor's name says more than its file's
    return {
        "ok": not problems and counts["mismatches"] == 0,
        **counts,
        "problems": problems[:MAX_PROBLEMS],
        "problem_count": len(problems),
    }


def broken_directory(out: Path, recipe: Recipe) -> list[str]:
    """What would keep a server from loading a directory right, without the trained weights; one line each.

    Args:
        out: The exported directory.
        recipe: The recipe of the run.
    """
    try:
        return [*broken_rules(open_checkpoint(out), recipe), *broken_hashes(out)]
    except UserError as error:
        return [str(error)]


def _compare(checkpoint: Checkpoint, weights: Iterable[HFWeight], recipe: Recipe, found: _Findings) -> None:
    """Compare every weight with the tensors that stand for it; adds to `found`."""
    tied = bool(checkpoint.config.get("tie_word_embeddings"))
    for weight in weights:
        module = module_name(weight.name)
        if tied and module == "lm_head":
            continue
        if weight.quantized:
            differences = _compare_linear(checkpoint, weight, recipe.quantize)
            found.expected |= {f"{module}.{suffix}" for suffix in DTYPES[format_of(weight, recipe.quantize)]}
        else:
            differences = _compare_dense(checkpoint, weight)
            found.expected.add(weight.name)
        of_cache, names = _compare_cache(checkpoint, weight)
        differences += of_cache
        found.expected |= names
        found.counts["tensors"] += 1
        found.counts["mismatches"] += bool(differences)
        found.counts["quantized"] += weight.quantized
        found.counts["elements"] += weight.tensor.numel()
        found.differences += differences


def _compare_linear(checkpoint: Checkpoint, weight: HFWeight, quantize: Quantize) -> list[str]:
    """The decoded values equal the fake-quantized weight, and the bytes equal a fresh packing of it."""
    module = module_name(weight.name)
    try:
        decoded = checkpoint.decode(module)
        problems = _difference(weight.name, decoded, fake(weight, quantize).cpu().numpy())
        for suffix, tensor in pack(weight, quantize).items():
            name = f"{module}.{suffix}"
            problems += _difference(f"{name} (stored)", checkpoint.raw(name), _bits(tensor))
        if weight.log2_scale is not None:
            return problems + _repack_learned(checkpoint, module, decoded)
        if weight.packed is not None:  # another packer may have chosen another code for the same value, such as -0
            return problems
        return problems + _repack(checkpoint, module, decoded, quantize, format_of(weight, quantize))
    except UserError as error:
        return [str(error)]


def _repack(
    checkpoint: Checkpoint, module: str, decoded: np.ndarray, quantize: Quantize, number_format: Format
) -> list[str]:
    """Packing the decoded values loses nothing, so a converter may decode and pack again."""
    values = torch.from_numpy(decoded)
    grid = SPECS[number_format].grid
    if not grid.per_tensor:
        # Values, not bytes: a block whose maximum was rounded down to 3 * 2^k can be written with the exponent below.
        wrong = int((numerics.mxfp4_fake(values, quantize.block_scale) != values).sum())
        return [f"{module}: {wrong} values change when packed again"] if wrong else []
    if grid.block_scale is None:
        scale = torch.from_numpy(np.array(checkpoint.raw(f"{module}.weight_scale")))
        wrong = int((_bits(codec.fp8_encode(values, scale)) != checkpoint.raw(f"{module}.weight")).sum())
        return [f"{module}: {wrong} codes change when decoded and packed again"] if wrong else []
    scale_2 = torch.from_numpy(np.array(checkpoint.raw(f"{module}.weight_scale_2")))
    stored_scale = checkpoint.raw(f"{module}.weight_scale")
    wrong = changed_blocks(values, stored_scale, scale_2, quantize.block_scale)
    return [f"{module}: {wrong} of {stored_scale.size} blocks change when decoded and packed again"] if wrong else []


def changed_blocks(values: torch.Tensor, scale: np.ndarray, scale_2: torch.Tensor, rule: BlockScale) -> int:
    """How many blocks of decoded NVFP4 values are not what rounding them again gives.

    Values, not bytes: 4 s may be written as 6 (2 s / 3), and Four-Over-Six, with no error to choose by, does so.

    Args:
        values: Float32 [N, K].
        scale: Stored E4M3 codes of the block scales, uint8 [N, K / block].
        scale_2: FP32 [] scale per tensor.
        rule: How block scales are chosen.

    Returns:
        Their number, without the one kind of block that the format itself cannot reproduce (see nvfp4_fake): scale
        2 * 2^-9, E4M3 code 2.
    """
    again = numerics.nvfp4_fake(values, scale_2, rule, values.shape[1] // scale.shape[1])
    changed = (again != values).reshape(*scale.shape, -1).any(-1).numpy()
    return int((changed & (scale != 2)).sum())


def _repack_learned(checkpoint: Checkpoint, module: str, decoded: np.ndarray) -> list[str]:
    """Learned scales follow from no block's values: packed with the scales in the files, the codes are the same."""
    values = torch.from_numpy(decoded)
    stored = torch.from_numpy(np.array(checkpoint.raw(f"{module}.weight_scale")))
    if f"{module}.weight_packed" in checkpoint.entries:
        scales, _ = numerics.mxfp4_scales(stored.int())
        name, (codes, _) = "weight_packed", codec.mxfp4_encode(values, scales=scales)
    else:
        scales = stored.view(torch.float8_e4m3fn).float()
        scale_2 = torch.from_numpy(np.array(checkpoint.raw(f"{module}.weight_scale_2")))
        block = values.shape[1] // scales.shape[1]
        name, (codes, _) = "weight", codec.nvfp4_encode(values, scale_2, block=block, scales=scales)
    wrong = int((_bits(codes) != checkpoint.raw(f"{module}.{name}")).sum())
    return [f"{module}: {wrong} codes change when packed again with their scales"] if wrong else []


def _compare_dense(checkpoint: Checkpoint, weight: HFWeight) -> list[str]:
    """An unquantized tensor is the training-time value rounded to BF16."""
    expected = weight.tensor.detach().to("cpu", torch.bfloat16)
    try:
        found = _difference(weight.name, checkpoint.decode_dense(weight.name), expected.float().numpy())
        bits = expected.view(torch.uint16).numpy()  # tells -0 from +0
        return found or _difference(f"{weight.name} (stored)", checkpoint.raw(weight.name), bits)
    except UserError as error:
        return [str(error)]


def _compare_cache(checkpoint: Checkpoint, weight: HFWeight) -> tuple[list[str], set[str]]:
    """The scale of the key/value cache beside k_proj or v_proj, if there should be one: problems, and its name."""
    problems: list[str] = []
    names: set[str] = set()
    for suffix, scale in cache_scale(weight).items():
        name = f"{module_name(weight.name)}.{suffix}"
        names.add(name)
        try:
            problems += _difference(name, checkpoint.raw(name), scale.numpy())
        except UserError as error:
            problems.append(str(error))
    return problems, names


def _difference(name: str, found: np.ndarray, expected: np.ndarray) -> list[str]:
    """One line if two arrays are not equal value by value (a NaN equals nothing)."""
    if found.shape != expected.shape:
        return [f"{name}: shape {list(found.shape)} in the files, {list(expected.shape)} in the trained model"]
    wrong = np.asarray(found != expected)
    count = int(np.count_nonzero(wrong))
    if not count:
        return []
    where = tuple(int(i) for i in np.unravel_index(int(wrong.argmax()), wrong.shape))
    return [
        f"{name}: {count} of {wrong.size} values differ from the trained model, first at {list(where)}: "
        f"{found[where].item()!r} in the files, {expected[where].item()!r} trained"
    ]


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """A packed tensor as numpy sees it in the file: E4M3 as bytes."""
    return (tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor).numpy()
