"""An exported checkpoint as a transformers model that computes what a server computes, without Megatron."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfbyte.export.pack import module_name
from halfbyte.export.reader import Checkpoint, open_checkpoint
from halfbyte.training import numerics
from halfbyte.training.errors import UserError
from halfbyte.training.formats import Rounding


def decoded_model(out: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Decode a checkpoint into its model class.

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
