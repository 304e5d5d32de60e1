"""The rotary settings of a config.json: where they stand, and which of them training/model.py can compute. Torch-free.

transformers 5 keeps them in `rope_parameters`; older files have `rope_theta` and `rope_scaling`.
"""

import math
from collections.abc import Iterator
from typing import Any

# Megatron-Core's Llama-3 RoPE takes only the factor; these three are constants in it.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """The settings under the names of transformers 5: rope_type, and rope_theta where the file has one."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))  # `type` is the spelling before transformers 4.43
    for key in ("rope_theta", "partial_rotary_factor"):  # where files before transformers 5 have them
        if key not in rope and config.get(key) is not None:
            rope[key] = config[key]
    return rope


def rope_problems(config: dict[str, Any]) -> Iterator[str]:
    """What of the settings has no counterpart in the model, or could be read in two ways; a line per reason."""
    rope = rope_of(config)
    parts = [key for key, value in rope.items() if isinstance(value, dict)]
    if parts:  # transformers 5 writes them so for models whose kinds of layers rotate differently
        yield f"rope_parameters.{parts[0]}: a rotation of its own for a kind of layers; only one for all is supported"
        return
    differing = _contradiction(config)
    if differing is not None:
        yield f"rope_parameters and rope_scaling differ in {differing}: readers take one or the other; keep one"
    base = float(rope.get("rope_theta", 10000.0))
    if not (math.isfinite(base) and base > 0):
        yield f"rope_theta = {base:g}: not a positive number; take the model's own file"
    if rope["rope_type"] == "llama3":
        yield from (
            f"rope {key} = {rope.get(key)}: Megatron-Core computes Llama-3 scaling with {key} = {value:g} only"
            for key, value in LLAMA3_ROPE.items()
            if rope.get(key) != value
        )
        if not isinstance(rope.get("factor"), int | float):
            yield f"rope factor = {rope.get('factor')}: Llama-3 scaling needs a number"
    elif rope["rope_type"] != "default":
        yield f"rope_type = {rope['rope_type']}: only default and llama3 are supported"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"partial_rotary_factor = {rope['partial_rotary_factor']}: only full rotary (1.0) is supported"


def _contradiction(config: dict[str, Any]) -> str | None:
    """The first setting in which the newer and the older spelling contradict each other, if both are there."""
    if not config.get("rope_parameters") or not config.get("rope_scaling"):
        return None
    newer = rope_of({"rope_parameters": config["rope_parameters"]})
    older = rope_of({"rope_scaling": config["rope_scaling"]})
    return next((key for key in sorted(newer.keys() & older.keys()) if newer[key] != older[key]), None)
