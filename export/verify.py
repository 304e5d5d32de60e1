"""Verify: are the exported bytes the model that was trained?

Three independent questions about the files at `out`: are they the files that were written (SHA-256), do they obey the
runtimes' rules (export/rules.py), and does every tensor decode, with the second reader (export/reader.py), to the
value that the training-time model computes with, bit for bit?
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfbyte.export.hf import RECORD, file_hash
from halfbyte.export.pack import fake, format_of, module_name, pack
from halfbyte.export.reader import Checkpoint, open_checkpoint
from halfbyte.export.rules import DTYPES, broken_rules
from halfbyte.training import codec, numerics
from halfbyte.training.config import Format, Method, Quantize, Recipe
from halfbyte.training.errors import UserError
from halfbyte.training.hf_map import HFWeight

MAX_PROBLEMS = 50
"""Lines kept in the report; a wrong scale rule breaks every layer in the same way."""


def verify(out: Path, weights: Iterable[HFWeight], recipe: Recipe) -> dict[str, Any]:
    """Compare an exported checkpoint with the trained weights and with the rules of its format.

    Args:
        out: The exported directory.
        weights: The training-time tensors; consumed once, one in memory at a time.
        recipe: The recipe of the run.

    Returns:
        The content of verify.json: ok; tensors (training-time tensors compared), mismatches (of them, those that
        differ in value or bytes), quantized (linears among them), elements (values compared); problems, a line each
        (the first 50) and their number.

    Raises:
        UserError: There are no files or no weights: nothing was verified. A calibrated amax is missing.
    """
    if not any(out.glob("*.safetensors")):
        raise UserError(f"{out}: no *.safetensors to verify; export first (halfbyte export RUN_DIR)")
    problems: list[str] = []
    counts = {"tensors": 0, "mismatches": 0, "quantized": 0, "elements": 0}
    try:
        checkpoint = open_checkpoint(out)
    except UserError as error:  # the files are there but cannot be read: a finding, not a crash
        problems.append(str(error))
    else:
        problems += broken_rules(checkpoint, recipe)
        problems = _compare(checkpoint, weights, recipe, counts) + problems
    problems += _broken_hashes(out)  # last: a tensor's name says more than its file's
    return {
        "ok": not problems and counts["mismatches"] == 0,
        **counts,
        "problems": problems[:MAX_PROBLEMS],
        "problem_count": len(problems),
    }


def _broken_hashes(out: Path) -> list[str]:
    """Files that are not as they were written, by the list in halfbyte.json."""
    try:
        listed = json.loads((out / RECORD).read_bytes())["files"]
        hashes = {name: entry["sha256"] for name, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{out / RECORD} is missing or damaged ({error!r}): the files cannot be told from altered ones"]
    present = {path.name for path in out.iterdir()} - {RECORD}
    problems = [f"{out / name} is listed in {RECORD} but missing" for name in sorted(hashes.keys() - present)]
    problems += [f"{out / name} is not listed in {RECORD}" for name in sorted(present - hashes.keys())]
    changed = [name for name in sorted(present & hashes.keys()) if file_hash(out / name) != hashes[name]]
    return problems + [f"{out / name} changed after the export (SHA-256 differs)" for name in changed]


def _compare(checkpoint: Checkpoint, weights: Iterable[HFWeight], recipe: Recipe, counts: dict[str, int]) -> list[str]:
    """Compare every tensor both ways: none missing, none extra, all equal. Adds to `counts`."""
    problems: list[str] = []
    tied = bool(checkpoint.config.get("tie_word_embeddings"))
    expected: set[str] = set()
    for weight in weights:
        module = module_name(weight.name)
        if tied and module == "lm_head":
            continue
        if weight.quantized:
            found = _compare_linear(checkpoint, weight, recipe.quantize)
            expected |= {f"{module}.{suffix}" for suffix in DTYPES[format_of(weight, recipe.quantize)]}
        else:
            found = _compare_dense(checkpoint, weight)
            expected.add(weight.name)
        counts["tensors"] += 1
        counts["mismatches"] += bool(found)
        counts["quantized"] += weight.quantized
        counts["elements"] += weight.tensor.numel()
        problems += found
    if not counts["tensors"]:
        raise UserError(f"{checkpoint.folder}: there are no trained weights to compare with; train first")
    if recipe.method is not Method.bf16 and not counts["quantized"]:
        problems.append(f"no linear is quantized, but method = {recipe.method.value}")
    extra = sorted(checkpoint.entries.keys() - expected)
    return problems + [f"{name} is in the files but not in the trained model" for name in extra]


def _compare_linear(checkpoint: Checkpoint, weight: HFWeight, quantize: Quantize) -> list[str]:
    """The decoded values equal the fake-quantized weight, and the bytes equal a fresh packing of it."""
    module = module_name(weight.name)
    try:
        decoded = checkpoint.decode(module)
        problems = _difference(weight.name, decoded, fake(weight, quantize).cpu().numpy())
        for suffix, tensor in pack(weight, quantize).items():
            name = f"{module}.{suffix}"
            problems += _difference(f"{name} (stored)", checkpoint.raw(name), _bits(tensor))
        return problems + _repack(checkpoint, module, decoded, quantize, format_of(weight, quantize))
    except UserError as error:
        return [str(error)]


def _repack(
    checkpoint: Checkpoint, module: str, decoded: np.ndarray, quantize: Quantize, number_format: Format
) -> list[str]:
    """Packing the decoded values loses nothing, so a converter may decode and pack again."""
    values = torch.from_numpy(decoded)
    if number_format is Format.mxfp4:
        # Values, not bytes: a block whose maximum was rounded down to 3 * 2^k can be written with the exponent below.
        wrong = int((numerics.mxfp4_fake(values, quantize.block_scale) != values).sum())
        return [f"{module}: {wrong} values change when packed again"] if wrong else []
    if number_format is Format.fp8:
        scale = torch.from_numpy(np.array(checkpoint.raw(f"{module}.weight_scale")))
        wrong = int((_bits(codec.fp8_encode(values, scale)) != checkpoint.raw(f"{module}.weight")).sum())
        return [f"{module}: {wrong} codes change when decoded and packed again"] if wrong else []
    scale_2 = torch.from_numpy(np.array(checkpoint.raw(f"{module}.weight_scale_2")))
    codes, scale = (_bits(tensor) for tensor in codec.nvfp4_encode(values, scale_2, quantize.block_scale))
    stored_codes, stored_scale = checkpoint.raw(f"{module}.weight"), checkpoint.raw(f"{module}.weight_scale")
    blocks = (*stored_scale.shape, numerics.NVFP4_BLOCK // 2)
    same = (scale == stored_scale) & (codes == stored_codes).reshape(blocks).all(-1)
    # The one kind of block that the format itself cannot reproduce (see nvfp4_fake): scale 2 * 2^-9, E4M3 code 2.
    wrong = int((~same & (stored_scale != 2)).sum())
    return [f"{module}: {wrong} of {same.size} blocks change when decoded and packed again"] if wrong else []


def _compare_dense(checkpoint: Checkpoint, weight: HFWeight) -> list[str]:
    """An unquantized tensor is the training-time value rounded to BF16."""
    expected = weight.tensor.detach().to("cpu", torch.bfloat16)
    try:
        found = _difference(weight.name, checkpoint.decode_dense(weight.name), expected.float().numpy())
        bits = expected.view(torch.uint16).numpy()  # tells -0 from +0
        return found or _difference(f"{weight.name} (stored)", checkpoint.raw(weight.name), bits)
    except UserError as error:
        return [str(error)]


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


def decoded_model(out: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The exported checkpoint as a transformers model that computes what a server computes, without Megatron.

    Weights are decoded by export/reader.py. Where activations are quantized too, each quantized linear rounds its input
    with the scale in the file; products are computed in `dtype`.

    Args:
        out: The exported directory.
        dtype: Of parameters and activations. The decoded weights are exact in float32, and in bfloat16 if their
            second-level scale is a power of two.

    Returns:
        transformers LlamaForCausalLM on the CPU, in eval mode, without gradients.

    Raises:
        UserError: Damaged files, or tensors that do not fit config.json.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    checkpoint = open_checkpoint(out)
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    with no_init_weights():
        model = LlamaForCausalLM(LlamaConfig(**config)).to(dtype)
    model.tie_weights()
    packed = set(checkpoint.quantized_modules())
    unread = {name.rsplit(".", 1)[0] for name in checkpoint.names()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module = module_name(name)
            values = torch.from_numpy(checkpoint.decode(module))
            if values.shape != parameter.shape:
                raise UserError(
                    f"{out}: {name} is {list(values.shape)}, but config.json asks for {list(parameter.shape)}"
                )
            parameter.copy_(values)
            unread.discard(module)
    if unread:
        raise UserError(f"{out}: {min(unread)} has no place in the model of config.json; export again")
    for module in packed:
        _quantize_input(checkpoint, module, model.get_submodule(module))
    return model.eval().requires_grad_(False)


def _quantize_input(checkpoint: Checkpoint, module: str, linear: torch.nn.Module) -> None:
    """Round the input of a linear as the files say; weight-only formats have no input_scale."""
    if f"{module}.weight_packed" in checkpoint.entries:
        number_format, scale = Format.mxfp4, None
    elif f"{module}.input_scale" in checkpoint.entries:
        is_fp8 = checkpoint.entries[f"{module}.weight"].dtype == "F8_E4M3"
        number_format = Format.fp8 if is_fp8 else Format.nvfp4
        scale = torch.from_numpy(np.array(checkpoint.raw(f"{module}.input_scale")))
    else:
        return
    linear.register_forward_pre_hook(lambda _, args: (numerics.fake_quantize(args[0], number_format, scale),))
