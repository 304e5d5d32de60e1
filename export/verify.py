"""Verify: are the exported bytes the model that was trained?

Three independent questions about the files at `out`: are they the files that were written (SHA-256), do they obey the
runtimes' rules (export/rules.py), and does every tensor decode, with the second reader (export/reader.py), to the
value that the training-time model computes with, bit for bit?
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfbyte.export.pack import cache_scale, fake, format_of, module_name, pack
from halfbyte.export.reader import Checkpoint, open_checkpoint
from halfbyte.export.record import broken_hashes
from halfbyte.export.rules import DTYPES, broken_rules
from halfbyte.training import codec, numerics
from halfbyte.training.config import BlockScale, Format, Method, Quantize, Recipe
from halfbyte.training.errors import UserError
from halfbyte.training.formats import SPECS, Rounding
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
    problems += broken_hashes(out)  # last: a tensor's name says more than its file's
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
        scale_problems, names = _compare_cache(checkpoint, weight)
        found, expected = found + scale_problems, expected | names
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


def decoded_model(out: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The exported checkpoint as a transformers model that computes what a server computes, without Megatron.

    Weights are decoded by export/reader.py. Where activations are quantized too, each quantized linear rounds its input
    with the scale in the file, and so does attention with keys and values where the cache is quantized; products are
    computed in `dtype`.

    Args:
        out: The exported directory.
        dtype: Of parameters and activations. The decoded weights are exact in float32, and in bfloat16 if their
            second-level scale is a power of two.

    Returns:
        The model class of config.json (LlamaForCausalLM, ...) on the CPU, in eval mode, without gradients.

    Raises:
        UserError: Damaged files, or tensors that do not fit config.json.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    checkpoint = open_checkpoint(out)
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype)
    model.tie_weights()
    packed = set(checkpoint.quantized_modules())
    biases = {name for name in checkpoint.names() if name.endswith(".bias")}
    unread = biases | {name.rsplit(".", 1)[0] for name in checkpoint.names()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module = module_name(name)  # of a bias: its own name
            found = checkpoint.decode_dense(name) if name in biases else checkpoint.decode(module)
            values = torch.from_numpy(found)
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
    _quantize_cache(checkpoint, model)
    return model.eval().requires_grad_(False)


def _quantize_input(checkpoint: Checkpoint, module: str, linear: torch.nn.Module) -> None:
    """Round the input of a linear as the files say: by the config group that aims at it, with its input_scale."""
    section = checkpoint.config.get("quantization_config") or {}
    groups = [
        group for group in (section.get("config_groups") or {}).values() if isinstance(group.get("targets"), list)
    ]
    group = next((group for group in groups if group["targets"] == ["Linear"] or module in group["targets"]), None)
    if group is None:
        raise UserError(f"{checkpoint.folder}/config.json: no config group aims at {module}; export again")
    elements = group.get("input_activations")
    if elements is None:
        return
    block, scale = elements.get("group_size"), None
    rounding = {None: Rounding.fp8, 16: Rounding.nvfp4, 32: Rounding.mxfp4}[block]
    if rounding is not Rounding.mxfp4:
        scale = torch.from_numpy(np.array(checkpoint.raw(f"{module}.input_scale")))
    linear.register_forward_pre_hook(lambda _, args: (numerics.fake_quantize(args[0], rounding, scale),))


def _quantize_cache(checkpoint: Checkpoint, model: Any) -> None:
    """Round the keys and values of every layer as the files say, if they hold scales for them.

    transformers rotates keys, hands them with the values to the cache's update, and attends to what that returns.
    """
    scheme = checkpoint.config.get("quantization_config", {}).get("kv_cache_scheme")
    if scheme is None:
        return
    from transformers import DynamicCache

    rounds_as = Rounding.nvfp4 if scheme == "NVFP4" else Rounding.fp8
    names = ("k_proj.k_scale", "v_proj.v_scale")
    scales = [
        [torch.from_numpy(np.array(checkpoint.raw(f"model.layers.{layer}.self_attn.{name}"))) for name in names]
        for layer in range(checkpoint.config["num_hidden_layers"])
    ]

    def rounding(update: Callable) -> Callable:
        def rounded(keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            pair = zip((keys, values), scales[layer_idx], strict=True)
            keys, values = (numerics.fake_quantize(x, rounds_as, scale.to(x.device)) for x, scale in pair)
            return update(keys, values, layer_idx, *args, **kwargs)

        return rounded

    def give_cache(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        cache = kwargs.get("past_key_values")
        cache = DynamicCache(config=model.config) if cache is None else cache
        if "update" not in vars(cache):  # generate() hands the same cache in at every step
            cache.update = rounding(cache.update)
        return args, kwargs | {"past_key_values": cache, "use_cache": True}

    model.register_forward_pre_hook(give_cache, with_kwargs=True)
